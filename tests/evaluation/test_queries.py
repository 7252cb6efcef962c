"""Whom is ranked for, and what: against plain referees, on a small prepared log."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import prepare_into, rules, source_of

from sellarec.data.log import Log, read_log
from sellarec.errors import UserError
from sellarec.evaluation import queries as module
from sellarec.evaluation.queries import QUERY_COLUMNS, queries, write_candidates, write_queries

USERS, ITEMS = 25, 40
SPLITS = ["valid", "test"]


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Log:
    """Repeated pairs, users without a positive, and users and items that only later splits have."""
    folder = tmp_path_factory.mktemp("log")
    generator = np.random.default_rng(8)
    count = 400
    user, item = generator.integers(0, USERS, count), generator.integers(0, ITEMS, count)
    user[-9:-6], user[210:212], item[-30:-20] = USERS, USERS + 1, ITEMS
    label = generator.random(count) < 0.6
    label[-9], label[210] = True, True
    rows = {"user": user, "item": item, "label": pa.array(label, pa.int8()), "timestamp": np.arange(count)}
    return prepare_into(folder, source_of(pa.table(rows)), rules(history_cap=4, shares=(0.5, 0.25, 0.25)))


def wanted(log: Log, split: str) -> dict[int, dict]:
    """By user: the first row in the split, the relevant items and the excluded ones."""
    before = {"valid": ["train"], "test": ["train", "valid"]}[split]
    earlier = [row for name in before for row in log.split(name).to_pylist()]
    found: dict[int, dict] = {}
    rows = log.split(split, list(QUERY_COLUMNS)).to_pylist()
    for user in sorted({row["user"] for row in rows if row["label"] == 1}):
        relevant = {row["item"] for row in rows if row["user"] == user and row["label"] == 1}
        had = {row["item"] for row in earlier if row["user"] == user}
        first = next(row for row in rows if row["user"] == user)
        found[user] = first | {"relevant": sorted(relevant), "excluded": sorted(had - relevant)}
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_each_user_with_a_positive_is_ranked_for_once(log, split, tmp_path):
    expected = wanted(log, split)
    assert 10 < len(expected) < len(set(log.split(split)["user"].to_pylist())), "some have no positive"
    assert any(row["label"] == 0 for row in expected.values()), "a first row may be no positive"
    assert any(not row["excluded"] for row in expected.values()), "a user may be new"
    found = queries(log, split)
    assert found.to_pylist() == list(expected.values())
    two = write_queries(log, split, tmp_path / "queries.parquet")
    assert pq.read_table(tmp_path / "queries.parquet").to_pylist() == list(expected.values())
    assert two.to_pylist() == [{"user": u, "relevant": row["relevant"]} for u, row in expected.items()]


@pytest.mark.parametrize("most", [1, 2, 5, 7, 12, 1000])
def test_of_more_users_every_so_manyth_is_taken(log, most):
    everyone = queries(log, "test").to_pylist()
    found = queries(log, "test", most).to_pylist()
    assert len(found) <= most and (2 * len(found) >= most or len(found) == len(everyone))
    step = -(-len(everyone) // most)
    assert found == everyone[::step]


def test_a_split_without_a_positive_is_refused(tmp_path):
    rows = {"user": np.arange(20) % 4, "item": np.arange(20) % 5, "timestamp": np.arange(20)}
    label = pa.array([1] * 16 + [0] * 4, pa.int8())
    log = prepare_into(tmp_path, source_of(pa.table(rows | {"label": label})), rules(shares=(0.6, 0.2, 0.2)))
    assert len(queries(log, "valid"))
    with pytest.raises(UserError, match="the test split has no positives"):
        queries(log, "test")


def candidates(log: Log, split: str, number: int, seed: int, folder: Path) -> pa.Table:
    write_candidates(log, split, number, seed, folder / "candidates.parquet")
    return pq.read_table(folder / "candidates.parquet")


def negatives(rows: pa.Table) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for row in rows.to_pylist():
        if row["label"] == 0:
            found.setdefault(row["user"], []).append(row["item"])
    return found


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("number", [1, 12])
def test_candidates_are_the_relevant_items_and_distinct_others(log, split, number, tmp_path):
    expected, found = wanted(log, split), candidates(log, split, number, 3, tmp_path)
    seen = log.items(["seen"])["seen"].to_pylist()
    assert found["row"].to_pylist() == list(range(len(found)))
    assert found["user"].to_pylist() == sorted(found["user"].to_pylist())
    rows = found.to_pylist()
    for user, query in expected.items():
        own = [row for row in rows if row["user"] == user]
        assert [row["item"] for row in own if row["label"] == 1] == query["relevant"]
        drawn = [row["item"] for row in own if row["label"] == 0]
        assert len(drawn) == len(set(drawn)) == number
        assert not set(drawn) & {*query["relevant"], *query["excluded"]}
        assert all(0 <= item < log.facts["items"] for item in drawn)
        for row in own:
            assert (row["history"], row["user_seen"]) == (query["history"], query["user_seen"])
            assert row["item_seen"] == seen[row["item"]]
    assert set(found["user"].to_pylist()) == set(expected)


def test_candidates_are_a_function_of_seed_and_user(log, tmp_path, monkeypatch):
    """Not of the users beside them, nor of how many are drawn for at once."""
    found = candidates(log, "test", 12, 3, tmp_path)
    assert candidates(log, "test", 12, 3, tmp_path).equals(found)
    assert negatives(candidates(log, "test", 12, 4, tmp_path)) != negatives(found)
    with monkeypatch.context() as patch:
        patch.setattr(module, "CHUNK_USERS", 3)
        assert candidates(log, "test", 12, 3, tmp_path).equals(found)
    everyone = queries(log, "test")
    some_queries = everyone.take(np.arange(0, len(everyone), 3))
    with monkeypatch.context() as patch:
        patch.setattr(module, "queries", lambda *_: some_queries)
        some = negatives(candidates(log, "test", 12, 3, tmp_path))
    assert some == {query["user"]: negatives(found)[query["user"]] for query in some_queries.to_pylist()}


def test_candidates_are_drawn_uniformly(log, tmp_path):
    """Over many seeds, of the items that are left to a user each is drawn as often as any other."""
    query = max(wanted(log, "test").values(), key=lambda query: len(query["excluded"]))
    left = log.facts["items"] - len(query["relevant"]) - len(query["excluded"])
    counts: Counter = Counter()
    for seed in range(150):
        counts.update(negatives(candidates(log, "test", 8, seed, tmp_path))[query["user"]])
    assert len(counts) == left
    mean = 150 * 8 / left
    assert sum((count - mean) ** 2 / mean for count in counts.values()) < 2 * left  # chi-square, of some `left`


def test_more_candidates_than_half_the_catalog_are_refused(log, tmp_path):
    with pytest.raises(UserError, match=rf"candidates are 21 of {log.facts['items']} items"):
        candidates(log, "test", 21, 0, tmp_path)


def test_a_user_who_had_nearly_all_items_ends_in_a_refusal_or_in_what_is_left(tmp_path):
    """Never in a search without end: 20 items, of which the user has had 12."""
    item = np.array([*range(12), *range(20), 3])
    user = np.array([0] * 12 + [*range(1, 21)] + [0])
    rows = {"user": user, "item": item, "timestamp": np.arange(len(item)), "split": ["train"] * 31 + ["valid", "test"]}
    label = pa.array([1] * len(item), pa.int8())
    log = prepare_into(tmp_path / "log", source_of(pa.table(rows | {"label": label})))
    with pytest.raises(UserError, match="candidates are 9, but user 0 has had 12 of the 20 items, so only 8 are left"):
        candidates(log, "test", 9, 0, tmp_path)
    assert sorted(negatives(candidates(log, "test", 8, 0, tmp_path))[0]) == list(range(12, 20))
    assert read_log(tmp_path / "log").facts["items"] == 20
