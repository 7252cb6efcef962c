"""Preparation of data that others published, against what they published."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from prepared import in_parts, prepare_into, rules

from sellarec.data.log import Log
from sellarec.data.raw import SPLITS, Source
from sellarec.data.sources.collm import open_collm
from sellarec.data.sources.movielens import open_movielens
from sellarec.errors import UserError

LONGEST_HISTORY = 445


@pytest.fixture(scope="module")
def published(sellarec_data, tmp_path_factory) -> Log:
    """CoLLM's MovieLens-1M with its own labels, histories and warm flags."""
    source = open_collm(str(sellarec_data / "collm-ml1m" / "ml-1m.zip"))
    chosen = rules(split="given", history_cap=LONGEST_HISTORY)
    return prepare_into(tmp_path_factory.mktemp("published"), source, chosen)


@pytest.fixture(scope="module")
def dated_rows(sellarec_data) -> pa.Table:
    table = pq.read_table(sellarec_data / "collm-ml1m" / "collm_ml1m_interactions.parquet")
    assert table["row"].to_pylist() == list(range(51_623))
    return table


def dated_source(rows: pa.Table, *names: str) -> Source:
    """The dated rows as a source that gives users, items, times, splits and `names`, and nothing else."""
    rating = pc.if_else(pc.greater(rows["rating"], 0), rows["rating"], None)  # of 10 rows it is unknown
    given = {
        "user": rows["uid"].cast(pa.int64()),
        "item": rows["iid"].cast(pa.int64()),
        "timestamp": rows["timestamp"],
        "split": rows["split"],
        "expected": rows["row"].cast(pa.float32()),  # says in the log which row each one was
        "rating": rating.cast(pa.float32()),
        "label": rows["label"],
    }
    table = pa.table({name: given[name] for name in ("user", "item", "timestamp", "split", "expected", *names)})
    return Source(in_parts(table, 4), (), (), "movie", split_rule="as published")


def under_source_ids(log: Log) -> dict[str, list[dict]]:
    """Rows of each split, with the source's ids, and ordered so that logs can be laid side by side."""
    users = np.array(log.users()["external_id"].to_pylist()).astype(int)
    items = np.array(log.items()["external_id"].to_pylist()).astype(int)
    found = {}
    for split in SPLITS:
        rows = log.split(split).to_pylist()
        for row in rows:
            row |= {"user": users[row["user"]], "item": items[row["item"]]}
            row["history"] = items[row["history"]].tolist()
        found[split] = sorted(rows, key=lambda row: (row["user"], row["item"]))
    return found


def test_collm_movielens_keeps_the_published_counts(published):
    assert published.facts["rows"] == {"train": 33_891, "valid": 10_401, "test": 7_331}
    assert published.facts["cold"] == {"valid": 3_792, "test": 3_178}
    assert published.facts["dropped"] == {}
    # published as 839 and 3,256, the padding id 0 counted in
    assert (published.facts["users"], published.facts["items"]) == (838, 3_255)
    assert published.facts["items_without_title"] == 0
    test = published.split("test", ["history_length"])["history_length"].to_numpy()
    assert (test > 0).sum() == 7_269
    rates = {split: published.facts["positives"][split] / published.facts["rows"][split] for split in SPLITS}
    assert rates == pytest.approx({"train": 0.53675, "valid": 0.52831, "test": 0.54536}, abs=1e-5)


def test_collm_histories_and_warm_flags_are_reproduced_exactly_from_the_dated_rows(published, dated_rows, tmp_path):
    """All 51,623 rows. About half share their time with another of the user: the published order is the rows' own."""
    chosen = rules(split="given", history_cap=LONGEST_HISTORY)
    made = prepare_into(tmp_path, dated_source(dated_rows, "label"), chosen)
    assert made.facts["warm_rule"] != published.facts["warm_rule"]
    assert made.facts["history_rule"] != published.facts["history_rule"]
    assert made.facts["cold"] == published.facts["cold"] and made.facts["positives"] == published.facts["positives"]
    ours, theirs = under_source_ids(made), under_source_ids(published)
    compared = ("user", "item", "label", "timestamp", "history", "history_length", "warm", "user_seen", "item_seen")
    for split in SPLITS:
        assert len(ours[split]) == len(theirs[split]) == published.facts["rows"][split]
        for one, other in zip(ours[split], theirs[split], strict=True):
            assert {name: one[name] for name in compared} == {name: other[name] for name in compared}
    longest = max(row["history_length"] for rows in ours.values() for row in rows)
    assert longest == LONGEST_HISTORY


def test_collm_labels_are_reproduced_exactly_from_the_ratings_that_are_known(published, dated_rows, tmp_path):
    """Of 10 rows, each the only one of its user, no rating is known: they are bad rows."""
    chosen = rules(split="given", history_cap=LONGEST_HISTORY)
    source = dated_source(dated_rows, "rating")
    with pytest.raises(UserError, match="there is no rating, of which labels are made"):
        prepare_into(tmp_path / "refused", source, chosen)
    made = prepare_into(tmp_path / "made", source, chosen, bad_rows="drop")
    assert made.facts["label_rule"] == "1 where the rating is at least 4, else 0"
    assert made.facts["dropped"] == {"there is no rating, of which labels are made": 10}
    ours, theirs = under_source_ids(made), under_source_ids(published)
    assert sum(map(len, ours.values())) == 51_613
    for split in SPLITS:
        of_pair = {(row["user"], row["item"]): row for row in theirs[split]}
        for row in ours[split]:
            other = of_pair[row["user"], row["item"]]
            assert all(row[name] == other[name] for name in ("label", "timestamp", "history"))


@pytest.mark.ray
@pytest.mark.slow
def test_rays_processes_prepare_the_same_log(sellarec_data, tmp_path, monkeypatch):
    import ray

    source = open_movielens(str(sellarec_data / "ml-latest-small"), "ml-latest-small")
    chosen = rules(k_core=5)
    alone = prepare_into(tmp_path / "alone", source, chosen)
    monkeypatch.setattr("sellarec.data.prepare.PIECE_ROWS", 40_000)
    started = []

    def start_ray() -> None:
        started.append(ray.init(num_cpus=2, include_dashboard=False))

    try:
        together = prepare_into(tmp_path / "together", source, chosen, start_ray=start_ray)
    finally:
        ray.shutdown()
    assert len(started) == 1 and len(together.paths("sequences")) > 1
    for split in SPLITS:
        assert together.split(split).equals(alone.split(split)), split
    assert together.items().equals(alone.items()) and together.users().equals(alone.users())
    sequences = pa.concat_tables([pq.ParquetFile(path).read() for path in together.paths("sequences")])
    assert sequences.sort_by("user").equals(pq.ParquetFile(alone.paths("sequences")[0]).read())
    assert together.facts == alone.facts
