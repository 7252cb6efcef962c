"""Laws of the prepared log: dense ids, splits in time, histories without the future."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sellarec.data.prepare import Prepared, prepare
from sellarec.data.raw import SPLITS, Raw
from sellarec.errors import UserError

# Few users, items and times, so that repeats and ties are common. (user, item, label, time)
RATINGS = st.lists(
    st.tuples(st.integers(1, 4), st.integers(10, 16), st.integers(0, 1), st.integers(0, 12)), min_size=12, max_size=60
)


def raw_log(ratings: list[tuple], **columns) -> Raw:
    user, item, label, time = zip(*ratings, strict=True)
    items = pa.table({"external_id": pa.array(["i99", "i10"]), "title": ["Unseen", "Ten"], "text": ["", "Ten. Drama"]})
    rows = {
        "user": [f"u{value}" for value in user],
        "item": [f"i{value}" for value in item],
        "label": label,
        "timestamp": pa.array(time, pa.int64()),
    }
    return Raw(pa.table(rows | columns), items, noun="book", label_rule="as drawn", split_rule="as drawn")


def all_rows(prepared: Prepared) -> list[dict]:
    return [row | {"split": split} for split in SPLITS for row in prepared.interactions[split].to_pylist()]


@given(RATINGS, st.integers(1, 5))
def test_splits_are_disjoint_complete_and_ordered_in_time(ratings, cap):
    rows = all_rows(prepare(raw_log(ratings), history_cap=cap))
    assert [row["row"] for row in rows] == list(range(len(ratings)))
    times = [row["timestamp"] for row in rows]
    assert times == sorted(rating[3] for rating in ratings)
    assert [row["split"] for row in rows] == sorted((row["split"] for row in rows), key=SPLITS.index)


@given(RATINGS)
def test_ids_are_dense_and_lead_back_to_the_source(ratings):
    prepared = prepare(raw_log(ratings), history_cap=5)
    rows = all_rows(prepared)
    users, items = prepared.users["external_id"].to_pylist(), prepared.items["external_id"].to_pylist()
    assert prepared.users["user"].to_pylist() == list(range(len({rating[0] for rating in ratings})))
    assert prepared.items["item"].to_pylist() == list(range(len({rating[1] for rating in ratings} | {99, 10})))
    in_time = sorted(ratings, key=lambda rating: rating[3])
    assert [(users[row["user"]], items[row["item"]], row["label"]) for row in rows] == [
        (f"u{user}", f"i{item}", label) for user, item, label, _ in in_time
    ]
    # Numbered by first appearance.
    assert list(dict.fromkeys(row["user"] for row in rows)) == list(range(len(users)))
    seen = list(dict.fromkeys(row["item"] for row in rows))
    assert seen == list(range(len(seen)))
    titles = dict(zip(items, prepared.items.select(["title", "text"]).to_pylist(), strict=True))
    assert titles["i99"] == {"title": "Unseen", "text": "Unseen"}
    assert titles["i10"] == {"title": "Ten", "text": "Ten. Drama"}
    assert all(titles[item] == {"title": "", "text": ""} for item in items if item not in ("i99", "i10"))
    assert prepared.facts["items_without_title"] == len(items) - 2


@given(RATINGS, st.integers(1, 5))
def test_a_history_is_the_positives_before_and_never_the_future(ratings, cap):
    rows = all_rows(prepare(raw_log(ratings), history_cap=cap))
    for position, row in enumerate(rows):
        before = [r["item"] for r in rows[:position] if r["user"] == row["user"] and r["label"] == 1]
        assert row["history"] == before[-cap:]
        assert row["history_length"] == len(before)


@given(RATINGS)
def test_seen_and_warm_are_about_the_train_split(ratings):
    rows = all_rows(prepare(raw_log(ratings), history_cap=5))
    users = {row["user"] for row in rows if row["split"] == "train"}
    items = {row["item"] for row in rows if row["split"] == "train"}
    for row in rows:
        assert row["user_seen"] == (row["user"] in users)
        assert row["item_seen"] == (row["item"] in items)
        assert row["warm"] == (row["user_seen"] and row["item_seen"])


@given(RATINGS, st.data())
def test_a_given_split_history_and_warmth_are_kept(ratings, data):
    size = len(ratings)
    split = [*SPLITS, *data.draw(st.lists(st.sampled_from(SPLITS), min_size=size - 3, max_size=size - 3))]
    history = data.draw(st.lists(st.none() | st.lists(st.integers(10, 20), max_size=4), min_size=size, max_size=size))
    warm = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    expected = [index / size for index in range(size)]
    given_history = pa.array([h and [f"i{item}" for item in h] for h in history], pa.list_(pa.string()))
    raw = raw_log(ratings, split=split, history=given_history, warm=warm, expected=expected)
    prepared = prepare(raw, history_cap=2)
    rows, items = all_rows(prepared), prepared.items["external_id"].to_pylist()
    # expected is different in every row, so it says which row of the source each one was.
    source = [round(row["expected"] * size) for row in rows]
    assert sorted(source) == list(range(size))
    for row, index in zip(rows, source, strict=True):
        assert row["split"] == split[index]
        assert row["warm"] == warm[index]
        assert [items[item] for item in row["history"]] == [f"i{item}" for item in (history[index] or [])[-2:]]
        assert row["history_length"] == len(history[index] or [])
    assert prepared.facts["split_rule"] == "as drawn"
    assert prepared.facts["warm_rule"] == "as the source publishes it"


def some_ratings(count: int = 20) -> list[tuple]:
    return [(index % 3, index % 5, index % 2, 1_000 + index) for index in range(count)]


def test_facts():
    facts = prepare(raw_log(some_ratings()), history_cap=5, split=(0.5, 0.25, 0.25)).facts
    assert facts["rows"] == {"train": 10, "valid": 5, "test": 5}
    assert facts["positives"] == {"train": 5, "valid": 2, "test": 3}
    assert facts["cold"] == {"valid": 0, "test": 0}
    assert facts["dates"]["test"] == ["1970-01-01T00:16:55+00:00", "1970-01-01T00:16:59+00:00"]
    assert facts["noun"] == "book"
    assert (
        facts["split_rule"] == "by time: the first 0.5 of the rows are train, the next 0.25 valid, the last 0.25 test"
    )


def test_a_log_without_times_needs_a_given_split():
    timeless = {"timestamp": pa.nulls(6, pa.int64())}
    with pytest.raises(UserError, match="6 of 6 rows have no timestamp"):
        prepare(raw_log(some_ratings(6), **timeless), history_cap=5)
    split = ["train", "train", "train", "train", "valid", "test"]
    prepared = prepare(raw_log(some_ratings(6), **timeless, split=split), history_cap=5)
    assert prepared.facts["dates"]["train"] == [None, None]
    # Without times, the source's order says what came before.
    assert prepared.interactions["train"]["history"].to_pylist() == [[], [], [], []]
    assert prepared.interactions["valid"]["history"].to_pylist() == [[1]]


@pytest.mark.parametrize("empty", SPLITS)
def test_an_empty_split_is_named_with_its_rule(empty):
    others = [split for split in SPLITS if split != empty]
    split = [others[index % 2] for index in range(6)]
    with pytest.raises(UserError, match=rf"^The {empty} split is empty: of 6 rows, .*Split rule: as drawn\."):
        prepare(raw_log(some_ratings(6), split=split), history_cap=5)


def test_refuses_what_cannot_be_meant():
    with pytest.raises(UserError, match="history_cap is 0"):
        prepare(raw_log(some_ratings()), history_cap=0)
    with pytest.raises(UserError, match=r"their sum 1"):
        prepare(raw_log(some_ratings()), history_cap=5, split=(0.8, 0.1, 0.2))
    milliseconds = pa.array(np.arange(20) + 1_600_000_000_000_000)
    with pytest.raises(UserError, match="The timestamp 1600000000000000 is no time in seconds"):
        prepare(raw_log(some_ratings(), timestamp=milliseconds), history_cap=5)
