"""Laws of the prepared log: dense ids, splits in time, histories without the future; and what is refused."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import files_of, in_parts, no_ray, prepare_into, rules, source_of

from sellarec.config import Data
from sellarec.data import phases
from sellarec.data.log import Log
from sellarec.data.prepare import rules_of
from sellarec.data.raw import ATTRIBUTES, SPLITS, Source
from sellarec.errors import UserError

# Few users, items and times, so that repeats and ties are common. (user, item, label, time); no row repeats another.
RATINGS = st.lists(
    st.tuples(st.integers(1, 4), st.integers(10, 16), st.integers(0, 1), st.integers(0, 12)),
    min_size=12,
    max_size=60,
    unique=True,
)

FEW = settings(max_examples=20)  # each writes a log; the referee's test looks at many more


def table_of(ratings: list[tuple], **columns) -> pa.Table:
    user, item, label, time = zip(*ratings, strict=True)
    rows: dict[str, Any] = {
        "user": [f"u{value}" for value in user],
        "item": [f"i{value}" for value in item],
        "label": pa.array(label, pa.int8()),
        "timestamp": pa.array(time, pa.int64()),
    }
    return pa.table({name: column for name, column in (rows | columns).items() if column is not None})


def book_source(ratings: list[tuple], **columns) -> Source:
    items = pa.table({"item": pa.array(["i99", "i10"]), "title": ["Unseen", "Ten"], "text": ["", "Ten. Drama"]})
    return source_of(table_of(ratings, **columns), items)


def prepared(source: Source, **changes) -> dict[str, Any]:
    """The tables as lists of rows, the splits' rows together with theirs; and the facts."""
    with tempfile.TemporaryDirectory() as folder:
        return tables_of(prepare_into(Path(folder), source, rules(**changes)))


def tables_of(log: Log) -> dict[str, Any]:
    rows = [row | {"split": split} for split in SPLITS for row in log.split(split).to_pylist()]
    return {"rows": rows, "items": log.items().to_pylist(), "users": log.users().to_pylist(), "facts": log.facts}


def some_ratings(count: int = 20) -> list[tuple]:
    return [(index % 3, index % 5, index % 2, 1_000 + index) for index in range(count)]


# ---- laws ----


@FEW
@given(RATINGS, st.integers(1, 5))
def test_splits_are_disjoint_complete_and_ordered_in_time(ratings, cap):
    rows = prepared(book_source(ratings), history_cap=cap)["rows"]
    assert [row["row"] for row in rows] == list(range(len(ratings)))
    times = [row["timestamp"] for row in rows]
    assert times == sorted(rating[3] for rating in ratings)
    assert [row["split"] for row in rows] == sorted((row["split"] for row in rows), key=SPLITS.index)


@FEW
@given(RATINGS)
def test_ids_are_dense_and_lead_back_to_the_source(ratings):
    tables = prepared(book_source(ratings))
    rows = tables["rows"]
    users, items = ([row["external_id"] for row in tables[name]] for name in ("users", "items"))
    assert [row["user"] for row in tables["users"]] == list(range(len({rating[0] for rating in ratings})))
    assert [row["item"] for row in tables["items"]] == list(range(len({rating[1] for rating in ratings} | {99, 10})))
    in_time = sorted(ratings, key=lambda rating: rating[3])
    assert [(users[row["user"]], items[row["item"]], row["label"]) for row in rows] == [
        (f"u{user}", f"i{item}", label) for user, item, label, _ in in_time
    ]
    # Numbered by first appearance.
    assert list(dict.fromkeys(row["user"] for row in rows)) == list(range(len(users)))
    seen = list(dict.fromkeys(row["item"] for row in rows))
    assert seen == list(range(len(seen)))
    titles = {row["external_id"]: (row["title"], row["text"]) for row in tables["items"]}
    assert titles["i99"] == ("Unseen", "Unseen")
    assert titles["i10"] == ("Ten", "Ten. Drama")
    assert all(titles[item] == ("", "") for item in items if item not in ("i99", "i10"))
    assert tables["facts"]["items_without_title"] == len(items) - 2


@FEW
@given(RATINGS, st.integers(1, 5))
def test_a_history_is_the_positives_before_and_never_the_future(ratings, cap):
    rows = prepared(book_source(ratings), history_cap=cap)["rows"]
    for position, row in enumerate(rows):
        before = [r["item"] for r in rows[:position] if r["user"] == row["user"] and r["label"] == 1]
        assert row["history"] == before[-cap:]
        assert row["history_length"] == len(before)


@FEW
@given(RATINGS)
def test_seen_and_warm_are_about_the_train_split(ratings):
    tables = prepared(book_source(ratings))
    rows = tables["rows"]
    users = {row["user"] for row in rows if row["split"] == "train"}
    items = {row["item"] for row in rows if row["split"] == "train"}
    for row in rows:
        assert row["user_seen"] == (row["user"] in users)
        assert row["item_seen"] == (row["item"] in items)
        assert row["warm"] == (row["user_seen"] and row["item_seen"])
    assert [row["seen"] for row in tables["users"]] == [row["user"] in users for row in tables["users"]]
    assert [row["seen"] for row in tables["items"]] == [row["item"] in items for row in tables["items"]]


@FEW
@given(RATINGS, st.data(), st.integers(1, 3), st.sampled_from([4, 1000]))
def test_a_given_split_history_and_warmth_are_kept(ratings, data, parts, piece_rows):
    size = len(ratings)
    split = [*SPLITS, *data.draw(st.lists(st.sampled_from(SPLITS), min_size=size - 3, max_size=size - 3))]
    history = data.draw(st.lists(st.none() | st.lists(st.integers(10, 20), max_size=4), min_size=size, max_size=size))
    warm = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    expected = pa.array([index / size for index in range(size)], pa.float32())
    given_history = pa.array([h and [f"i{item}" for item in h] for h in history], pa.list_(pa.string()))
    source = book_source(ratings, split=split, history=given_history, warm=warm, expected=expected)
    source = Source(
        **vars(source)
        | {
            "interactions": in_parts(
                table_of(ratings, split=split, history=given_history, warm=warm, expected=expected), parts
            ),
            "rows_about": 3 * piece_rows,
        }
    )
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr("sellarec.data.prepare.PIECE_ROWS", piece_rows)
        tables = tables_of(prepare_into(Path(folder), source, rules(split="given", history_cap=2), start_ray=None))
    rows, items = tables["rows"], [row["external_id"] for row in tables["items"]]
    # expected is different in every row, so it says which row of the source each one was.
    origin = [round(row["expected"] * size) for row in rows]
    assert sorted(origin) == list(range(size))
    for row, index in zip(rows, origin, strict=True):
        assert row["split"] == split[index]
        assert row["warm"] == warm[index]
        assert [items[item] for item in row["history"]] == [f"i{item}" for item in (history[index] or [])[-2:]]
        assert row["history_length"] == len(history[index] or [])
    # Items that occur in histories alone come last, by first appearance there.
    appeared = [items[row["item"]] for row in rows]
    known = set(appeared) | {"i99", "i10"}
    listed = [items[item] for row in rows for item in row["history"]]
    assert items[len(known) :] == [item for item in dict.fromkeys(listed) if item not in known]
    assert tables["facts"]["split_rule"] == "as drawn"
    assert tables["facts"]["warm_rule"] == tables["facts"]["history_rule"] == "as the source publishes it"


def test_facts():
    facts = prepared(book_source(some_ratings()), shares=(0.5, 0.25, 0.25))["facts"]
    assert facts["rows"] == {"train": 10, "valid": 5, "test": 5}
    assert facts["positives"] == {"train": 5, "valid": 2, "test": 3}
    assert facts["cold"] == {"valid": 0, "test": 0}
    assert facts["dates"]["test"] == ["1970-01-01T00:16:55+00:00", "1970-01-01T00:16:59+00:00"]
    assert facts["noun"] == "book" and facts["id_types"] == {"user": "string", "item": "string"}
    assert facts["dropped"] == {} and facts["extends"] is None and facts["k_core_rule"] is None
    assert facts["label_rule"] == "as drawn"
    assert (
        facts["split_rule"] == "by time: the first 0.5 of the rows are train, the next 0.25 valid, the last 0.25 test"
    )


@pytest.mark.parametrize(
    ("columns", "stated", "labels"),
    [
        ({}, "as drawn", [0, 1] * 3),
        ({"label": None}, "1 where the rating is at least 4, else 0", [0, 1, 1, 0, 0, 1]),
        ({"label": None, "rating": None}, "1 for every row (implicit feedback)", [1] * 6),
    ],
)
def test_labels_are_the_sources_or_made_of_ratings_or_all_positive(columns, stated, labels):
    rating = pa.array([3.9, 4.0, 5.0, 3.0, 1.0, 4.1], pa.float32())
    tables = prepared(book_source(some_ratings(6), **{"rating": rating} | columns), shares=(0.5, 0.25, 0.25))
    assert [row["label"] for row in tables["rows"]] == labels
    assert tables["facts"]["label_rule"] == stated


def test_leave_one_out_keeps_back_the_last_two_rows_of_users_with_three():
    users = "aaaabbbccd"
    table = pa.table({"user": list(users), "item": list("0123456789"), "timestamp": [9, 8, 7, 6, 1, 2, 3, 1, 2, 5]})
    tables = prepared(source_of(table), split="leave-one-out")
    found = {(row["user"], row["timestamp"]): row["split"] for row in tables["rows"]}
    names = [row["external_id"] for row in tables["users"]]
    found = {(names[user], time): split for (user, time), split in found.items()}
    assert {key for key, split in found.items() if split == "test"} == {("a", 9), ("b", 3)}
    assert {key for key, split in found.items() if split == "valid"} == {("a", 8), ("b", 2)}
    # users with one or two rows are in train alone
    assert {key for key in found if key[0] in "cd"} <= {key for key, split in found.items() if split == "train"}


def test_a_date_belongs_to_the_split_that_begins_on_it():
    tables = prepared(book_source(some_ratings(6)), split="dates", dates=(1_002, 1_004))
    assert [row["split"] for row in tables["rows"]] == ["train", "train", "valid", "valid", "test", "test"]
    assert tables["facts"]["split_rule"] == (
        "by time: train before 1970-01-01T00:16:42+00:00, valid before 1970-01-01T00:16:44+00:00, test from then on"
    )


def test_random_shares_are_the_seeds_and_no_ones_elses():
    ratings = [(index % 20, index, 1, index) for index in range(2_000)]

    def splits(seed: int, parts: int = 1) -> dict[int, str]:
        source = source_of(table_of(ratings), parts=parts)
        return {row["timestamp"]: row["split"] for row in prepared(source, split="random", seed=seed)["rows"]}

    one = splits(0)
    assert one == splits(0, parts=3) and one != splits(1)
    # a user's rows stay where they are when those of others are left out
    few = prepared(source_of(table_of(ratings[::2])), split="random", seed=0)["rows"]
    assert {row["timestamp"]: row["split"] for row in few} == {time: one[time] for time in range(0, 2_000, 2)}
    # and neither users nor times are favoured
    test = np.array([time for time, split in one.items() if split == "test"])
    assert np.bincount(test % 20).tolist() == [10] * 20
    assert abs(test.mean() - 999.5) < 4 * 577 / np.sqrt(200)


def test_valid_rows_are_drawn_of_each_users_train_rows_where_none_are_given():
    ratings = [(index % 4, index, 1, 0) for index in range(80)]
    split = ["test" if index >= 40 else "train" for index in range(80)]
    tables = prepared(book_source(ratings, split=split, timestamp=None), split="given", shares=(0.7, 0.2, 0.1))
    rows = tables["rows"]
    assert [sum(row["split"] == name for row in rows) for name in SPLITS] == [32, 8, 40]
    assert {sum(row["user"] == user for row in rows if row["split"] == "valid") for user in range(4)} == {2}
    assert tables["facts"]["split_rule"] == (
        "as drawn; of each user's train rows 0.222 are valid, rounded down, drawn at random"
    )


def test_a_log_without_times_needs_a_split_that_asks_for_none():
    timeless = {"timestamp": pa.nulls(6, pa.int64())}
    for split in ({"split": "shares"}, {"split": "dates", "dates": (1, 2)}):
        with pytest.raises(UserError, match="6 of 6 rows have no timestamp"):
            prepared(book_source(some_ratings(6), **timeless), **split)
    split = ["train", "train", "train", "train", "valid", "test"]
    for columns in (timeless, {"timestamp": None}):
        tables = prepared(book_source(some_ratings(6), **columns, split=split), split="given")
        assert tables["facts"]["dates"]["train"] == [None, None]
        # Without times, the source's order says what came before.
        assert [row["history"] for row in tables["rows"]] == [[], [], [], [], [1], []]


def test_one_row_without_time_is_enough_to_refuse_a_split_by_time():
    time = pa.array([*range(19), None], pa.int64())
    with pytest.raises(UserError, match="1 of 20 rows have no timestamp, so the log cannot be split by time"):
        prepared(book_source(some_ratings(), timestamp=time))
    rows = prepared(book_source(some_ratings(), timestamp=time), split="random", shares=(0.6, 0.2, 0.2))["rows"]
    last = [row for row in rows if row["timestamp"] is None]
    # the row comes last: all positives of its user that lie in train are in its history
    own = [row for row in rows if (row["user"], row["label"], row["split"]) == (last[0]["user"], 1, "train")]
    assert [row["history_length"] for row in last] == [sum(row is not last[0] for row in own)]


# ---- the catalog ----


def test_titles_are_cleaned_and_counted():
    items = pa.table(
        {
            "item": ["i0", "i1", "i2", "i3", "i4", "i0", "i7"],
            "title": ["Zero\nsum", None, " ", "Same", "Same", "Zero again", "Un\x85seen\x00\x1b"],
            "text": [None, "Of one\nbook", "", None, " \t", "text", None],
        }
    )
    tables = prepared(source_of(table_of(some_ratings()), items))
    found = {row["external_id"]: (row["title"], row["text"]) for row in tables["items"]}
    assert found == {
        "i0": ("Zero sum", "Zero sum"),
        "i1": ("", "Of one\nbook"),
        "i2": (" ", " "),
        "i3": ("Same", "Same"),
        "i4": ("Same", "Same"),
        "i7": ("Un seen ", "Un seen "),
    }
    assert tables["facts"]["items_without_title"] == 2 and tables["facts"]["titles_cleaned"] == 2
    assert [row["external_id"] for row in tables["items"]] == ["i0", "i1", "i2", "i3", "i4", "i7"]


def test_what_is_told_of_users_and_items_is_kept():
    genres = [{"name": "genre", "value": "Drama"}, {"name": "genre", "value": "War"}]
    links = [{"name": "imdb", "value": "tt1"}]
    items = pa.table(
        {
            "item": ["i1"],
            "title": ["One"],
            "attributes": pa.array([genres], ATTRIBUTES),
            "links": pa.array([links], ATTRIBUTES),
        }
    )
    users = pa.table({"user": ["u2", "u9"], "attributes": pa.array([[{"name": "age", "value": "25"}], []], ATTRIBUTES)})
    source = source_of(table_of(some_ratings()), items, users=in_parts(users, 1, "users"))
    tables = prepared(source)
    (one,) = (row for row in tables["items"] if row["external_id"] == "i1")
    assert (one["attributes"], one["links"]) == (genres, links)
    told = {row["external_id"]: row["attributes"] for row in tables["users"]}
    # users who did nothing are no users of the log
    assert told == {"u0": None, "u1": None, "u2": [{"name": "age", "value": "25"}]}


def test_items_without_interactions_are_left_out_under_a_k_core():
    tables = prepared(book_source(some_ratings()), k_core=2)
    assert "i99" not in [row["external_id"] for row in tables["items"]]
    assert tables["facts"]["k_core_rule"] == (
        "users and items with fewer than 2 rows are left out, again until none is left out"
    )
    once = prepared(book_source(some_ratings()), k_core=2, k_core_once=True)["facts"]["k_core_rule"]
    assert once == "users and items with fewer than 2 rows are left out, counted once"


def test_a_chain_of_cuts_is_followed_to_its_end_or_once():
    # user n has items n and n+1: item 0 has one row, without it user 0 has one, and so on to the last but the core
    chain = [(n, item, 1, 10 * n + item) for n in range(12) for item in (n, n + 1)]
    core = [(100 + n, 100 + item, 1, 1_000 + 10 * n + item) for n in range(3) for item in range(3)]
    source = book_source(chain + core)
    shares = {"shares": (0.4, 0.3, 0.3), "k_core": 2}
    facts = prepared(source, **shares)["facts"]
    assert sum(facts["rows"].values()) == 9 and facts["dropped"] == {"below the k-core": 24}
    facts = prepared(source, **shares, k_core_once=True)["facts"]
    assert sum(facts["rows"].values()) == 31 and facts["dropped"] == {"below the k-core": 2}


# ---- data that extend a log ----


def test_new_data_extend_the_ids_of_an_earlier_log(tmp_path):
    genre = pa.array([[{"name": "genre", "value": "Drama"}], None], ATTRIBUTES)
    earlier = Source(
        **vars(book_source(some_ratings()))
        | {
            "items": in_parts(pa.table({"item": ["i99", "i1"], "title": ["Unseen", "One"], "attributes": genre}), 1),
        }
    )
    first = prepare_into(tmp_path / "first", earlier, rules())
    more = [(user, item, 1, 2_000 + 10 * user + item) for user in (2, 7, 8) for item in (0, 4, 30, 31)]
    items = pa.table({"item": ["i31", "i1", "i32"], "title": ["New", "One, renamed", "Not seen yet"]})
    second = prepare_into(tmp_path / "second", source_of(table_of(more), items), previous=first.directory)
    for name in ("users", "items"):
        old, new = getattr(first, name)().to_pylist(), getattr(second, name)().to_pylist()
        described = [column for column in old[0] if column != "seen"]
        # the same ids for the same, described as they were
        assert [{c: row[c] for c in described} for row in new[: len(old)]] == [
            {c: row[c] for c in described} for row in old
        ]
        assert [row[name[:-1]] for row in new] == list(range(len(new)))
        assert all(row["seen"] for row, before in zip(new, old, strict=False) if before["seen"])
    assert [row["external_id"] for row in second.users().to_pylist()[3:]] == ["u7", "u8"]
    new_items = second.items().to_pylist()[len(first.items()) :]
    assert [(row["external_id"], row["title"]) for row in new_items] == [
        ("i30", ""), ("i31", "New"), ("i32", "Not seen yet"),
    ]  # fmt: skip
    there_alone = {"users seen there alone": 2, "items seen there alone": 3}
    assert second.facts["extends"] == {"log": str(first.directory), "users": 3, "items": 6, **there_alone}
    # i3 occurs in the earlier train split alone; u8 and what comes after train in the new one is new
    seen = {row["external_id"]: row["seen"] for row in [*second.users().to_pylist(), *second.items().to_pylist()]}
    assert seen["i3"] and seen["u0"] and seen["u7"] and not seen["i32"] and not seen["i99"]
    # what was learned from the earlier log is warm here
    rows = tables_of(second)["rows"]
    assert all(row["user_seen"] == seen[f"u{(2, 7, 8)[number // 4]}"] for number, row in enumerate(rows))


def test_what_an_earlier_log_knew_by_name_alone_is_seen_once_train_has_it(tmp_path):
    first = prepare_into(tmp_path / "first", book_source(some_ratings()))
    # i3 is in the earlier train split and only in the new test split, i99 in the new train split alone
    more = [(0, item, 1, 2_000 + number) for number, item in enumerate([99, 1, 0, 2, 4, 5, 6, 7, 8, 3])]
    second = prepare_into(tmp_path / "second", source_of(table_of(more)), previous=first.directory)
    seen = [{row["external_id"]: row["seen"] for row in log.items().to_pylist()} for log in (first, second)]
    assert [known["i99"] for known in seen] == [False, True] and [known["i3"] for known in seen] == [True, True]
    assert not seen[1]["i8"]
    assert [row["item_seen"] for row in tables_of(second)["rows"]] == [True] * 8 + [False, True]


def test_an_extended_log_is_extended_again(tmp_path):
    folder, previous = tmp_path / "0", None
    ids: list[str] = []
    for step in range(3):
        folder = tmp_path / str(step)
        ratings = [
            (user + step, item + step, 1, 100 * step + 10 * user + item) for user in range(3) for item in range(4)
        ]
        log = prepare_into(folder, source_of(table_of(ratings)), rules(k_core=2), previous=previous)
        found = log.items(["external_id"])["external_id"].to_pylist()
        assert found[: len(ids)] == ids and len(set(found)) == len(found) == 4 + step
        ids, previous = found, folder


def test_codes_of_categorical_values_never_change(tmp_path):
    def log(folder: str, cities: list[str], **settings) -> Log:
        rows = table_of(some_ratings()).append_column("city", pa.array(cities * 10))
        return prepare_into(tmp_path / folder, source_of(rows, features=("city",)), **settings)

    first = log("first", ["Oslo", "Rome"])
    second = log("second", ["Turku", "Rome"], previous=first.directory)
    assert first.facts["features"]["city"] == ["Oslo", "Rome"]
    assert second.facts["features"]["city"] == ["Oslo", "Rome", "Turku"]
    codes = {code for split in SPLITS for code in second.split(split)["city"].to_pylist()}
    assert codes == {1, 2}


def test_ids_of_another_type_extend_nothing(tmp_path):
    first = prepare_into(tmp_path / "first", book_source(some_ratings()))
    numbers = pa.table({"user": [1, 2, 3] * 5, "item": range(15), "timestamp": range(15)})
    with pytest.raises(UserError, match=r"user ids of .*first are string, those of the new data int64"):
        prepare_into(tmp_path / "second", source_of(numbers), previous=first.directory)
    with pytest.raises(UserError, match="holds no prepared log"):
        prepare_into(tmp_path / "second", source_of(numbers), previous=tmp_path / "nowhere")


# ---- what is refused ----


@pytest.mark.parametrize("empty", SPLITS)
def test_an_empty_split_is_named_with_its_rule(empty):
    others = [split for split in SPLITS if split != empty]
    split = [others[index % 2] for index in range(6)]
    source = book_source(some_ratings(6), split=split)
    if empty == "valid":  # is drawn where it isn't given, but one row a user is too few for it
        with pytest.raises(UserError, match=r"^The valid split is empty: of 6 rows, 3, 0, 3 are .*rule: as drawn; of"):
            prepared(source, split="given")
        return
    with pytest.raises(UserError, match=rf"^The {empty} split is empty: of 6 rows, .*Split rule: as drawn\."):
        prepared(source, split="given")


def test_a_split_that_is_not_given_cannot_be_taken():
    with pytest.raises(UserError, match=r"the source gives no split: choose data\.split_by"):
        prepared(book_source(some_ratings()), split="given")


def test_a_k_core_that_leaves_nothing():
    with pytest.raises(UserError, match=r"the k-core leaves no rows: lower data\.k_core"):
        prepared(book_source(some_ratings()), k_core=21)


def test_a_source_without_rows():
    source = book_source(some_ratings())
    empty = source_of(table_of(some_ratings()).slice(0, 0), parts=2)
    with pytest.raises(UserError, match="there are no rows in the source"):
        prepared(empty)
    with pytest.raises(UserError, match=r"there are no rows in a\.csv, b\.csv"):
        prepared(Source(**vars(empty) | {"files": ("a.csv", "b.csv"), "rows_about": 5}))
    assert prepared(source)["facts"]["users"] == 3


@pytest.mark.parametrize("time", [1_600_000_000_000, 1_600_000_000_000_000, -(2**40)])
def test_times_that_no_date_can_name(time):
    with pytest.raises(UserError, match=rf"rows 0: the timestamp {time} is no time in seconds .*milliseconds"):
        prepared(book_source(some_ratings(), timestamp=pa.array([*range(19), time])))


def test_ids_of_two_types():
    texts = table_of(some_ratings())
    numbers = texts.set_column(0, "user", pa.array(range(20), pa.int64()))
    mixed = in_parts(texts, 1) + in_parts(numbers, 1)
    with pytest.raises(UserError, match="user ids are numbers in some parts of the source and text in others"):
        prepared(Source(**vars(source_of(texts)) | {"interactions": mixed}))
    # a part without rows has no say
    assert prepared(Source(**vars(source_of(texts)) | {"interactions": (mixed[0], *in_parts(numbers[:0], 1))}))
    catalog = in_parts(pa.table({"item": [0, 1, 2], "title": ["a", "b", "c"]}), 1)
    with pytest.raises(
        UserError, match="item ids are string in the interactions and int64 in the descriptions of items"
    ):
        prepared(Source(**vars(source_of(texts)) | {"items": catalog}))


def test_a_feature_with_too_many_values_is_an_id(monkeypatch):
    monkeypatch.setattr(phases, "MAX_VALUES", 7)
    for parts, count in ((1, 20), (4, 12)):
        city = [f"city {index % count}" for index in range(20)]
        source = source_of(table_of(some_ratings(), city=city), parts=parts, features=("city",))
        with pytest.raises(UserError, match=r"the feature city has \d+ values or more, above 7: leave it out"):
            prepared(source)
    ok = source_of(table_of(some_ratings(), city=[str(n % 7) for n in range(20)]), features=("city",))
    assert len(prepared(ok)["facts"]["features"]["city"]) == 7


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": pa.array([None, *"abc"])}, "rows 0 gives rows without user"),
        ({"item": pa.array(["a", None, "b", "c"])}, "rows 0 gives rows without item"),
        ({"rating": pa.array([1.0, float("nan"), None, 2.0], pa.float32())}, "rows 0 gives ratings that are NaN"),
    ],
)
def test_a_source_that_breaks_its_promise_is_a_programming_error(columns, message):
    with pytest.raises(ValueError, match=message):
        prepared(source_of(table_of(some_ratings(4), **columns)))


def test_two_ids_with_one_key_are_refused(monkeypatch):
    monkeypatch.setattr(phases, "keys_of", lambda ids: np.array([ord(id.as_py()[-1]) for id in ids], np.uint64))
    for parts in (1, 5):
        items = [f"{'ab'[index % 10 == 9]}{index % 5}" for index in range(20)]
        table = pa.table({"user": list("0123" * 5), "item": items, "timestamp": range(20)})
        with pytest.raises(RuntimeError, match=r"the items '[ab]4' and '[ab]4' have the same 64-bit key"):
            prepared(source_of(table, parts=parts))


# ---- repeats, seams, settings ----


def test_only_exact_repeats_are_left_out():
    ratings = [(1, 1, 1, 5), (1, 1, 1, 5), (1, 1, 0, 5), (1, 1, 1, 6), (1, 2, 1, 5), (2, 1, 1, 5), (1, 1, 1, 5)]
    tables = prepared(source_of(table_of(ratings), parts=3), shares=(0.4, 0.3, 0.3))
    assert tables["facts"]["dropped"] == {"exact repeat of an earlier row": 2}
    assert len(tables["rows"]) == 5
    # without times, who did the same twice is there once
    tables = prepared(source_of(table_of(ratings, timestamp=None), parts=3), split="random", shares=(0.4, 0.3, 0.3))
    assert len(tables["rows"]) == 4


def test_rows_that_a_source_leaves_out_are_counted():
    from sellarec.data.raw import part_of_table

    table = table_of(some_ratings())
    left_out = (part_of_table("a", table, {"repeated": 3}), part_of_table("b", table[:0], {"repeated": 1, "empty": 2}))
    facts = prepared(Source(**vars(source_of(table)) | {"interactions": left_out}))["facts"]
    assert facts["dropped"] == {"repeated": 4, "empty": 2}


def test_a_row_without_a_rating_has_no_label_to_be_made():
    ratings = pa.table({"user": [1, 1, 2, 2], "item": [1, 2, 1, 2], "rating": [5.0, None, 1.0, None]})
    with pytest.raises(UserError, match="rows 0, row 2: there is no rating, of which labels are made"):
        prepared(source_of(ratings, label_rule=None))


def test_rays_processes_are_asked_for_where_pieces_are_several(tmp_path, monkeypatch):
    class AskedFor(Exception):
        pass

    def start_ray() -> None:
        raise AskedFor

    source = source_of(table_of(some_ratings()), parts=3, rows_about=30)
    assert prepare_into(tmp_path / "small", source, start_ray=no_ray).facts["users"] == 3
    monkeypatch.setattr("sellarec.data.prepare.PIECE_ROWS", 10)
    with pytest.raises(AskedFor):
        prepare_into(tmp_path / "large", source, start_ray=start_ray)


def test_pieces_change_the_files_and_not_the_rows(tmp_path, monkeypatch):
    ratings = [(index % 13, index % 17, index % 2, index // 3) for index in range(300)]
    whole = prepare_into(tmp_path / "whole", source_of(table_of(ratings)))
    monkeypatch.setattr("sellarec.data.prepare.PIECE_ROWS", 20)
    monkeypatch.setattr(phases, "RANGE_ROWS", 5)
    monkeypatch.setattr(phases, "FLUSH_ROWS", 1)
    source = source_of(table_of(ratings), parts=4, rows_about=100)
    cut = prepare_into(tmp_path / "cut", source, start_ray=None)
    assert tables_of(whole) == tables_of(cut)
    assert len(files_of(whole.directory)) == 8 and len(files_of(cut.directory)) > 25
    sequences = pa.concat_tables([pq.ParquetFile(path).read() for path in cut.paths("sequences")])
    assert sequences.sort_by("user").equals(pq.ParquetFile(whole.paths("sequences")[0]).read())


def test_rules_come_from_the_settings():
    plain, given_split = book_source(some_ratings()), book_source(some_ratings(), split=["train"] * 20)
    assert rules_of(Data(), plain).split == "shares" and rules_of(Data(), given_split).split == "given"
    assert rules_of(Data(split_by="random", k_core=5, split_seed=3), given_split) == rules(
        split="random", k_core=5, seed=3, history_cap=50
    )
    dated = rules_of(Data(split_by="dates", split_dates=("1970-01-02", "1970-01-03T00:00:01+00:00")), plain)
    assert dated.dates == (86_400, 172_801)
