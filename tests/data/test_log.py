"""The prepared log on disk."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sellarec.data.log import INTERACTIONS, ITEMS, USERS, read_log, write_log
from sellarec.data.prepare import Prepared, prepare
from sellarec.data.raw import SPLITS, Raw
from sellarec.errors import UserError


def raw_log(count: int) -> Raw:
    index = np.arange(count)
    rows = {"user": index % 7, "item": index % 11, "label": index % 2, "timestamp": index, "rating": index % 5 + 0.5}
    items = pa.table(
        {"external_id": np.arange(12), "title": [f"Title {item}" for item in range(12)], "text": [""] * 12}
    )
    return Raw(pa.table(rows), items, noun="book", label_rule="every other row")


@pytest.fixture
def prepared() -> Prepared:
    return prepare(raw_log(40), history_cap=3)


def test_what_is_written_is_read(prepared, tmp_path):
    write_log(prepared, tmp_path / "log")
    log = pickle.loads(pickle.dumps(read_log(tmp_path / "log")))
    assert log.facts == prepared.facts
    for split in SPLITS:
        table = log.split(split)
        assert table.schema.equals(INTERACTIONS)
        assert table.to_pylist() == prepared.interactions[split].to_pylist()
        assert log.split(split, ["user", "label"]).column_names == ["user", "label"]
        assert pq.read_schema(log.split_path(split)).equals(INTERACTIONS)
    assert log.items().schema.equals(ITEMS)
    assert log.items().equals(prepared.items)
    assert log.users().schema.equals(USERS)
    assert log.users().equals(prepared.users)


def test_the_same_log_is_written_byte_for_byte(prepared, tmp_path):
    write_log(prepared, tmp_path / "a")
    write_log(prepare(raw_log(40), history_cap=3), tmp_path / "b")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_row_groups_are_bounded(tmp_path):
    log = write_log(prepare(raw_log(100_000), history_cap=3), tmp_path)
    metadata = pq.ParquetFile(log.split_path("train")).metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [65_536, 14_464]


def test_no_log(tmp_path):
    with pytest.raises(UserError, match=r"holds no prepared log: cannot read log\.json"):
        read_log(tmp_path)


def test_damaged_log(prepared, tmp_path):
    log = write_log(prepared, tmp_path)
    log.split_path("test").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"Cannot read .*test\.parquet of the prepared log"):
        log.split("test")
    (tmp_path / "log.json").write_text("{")
    with pytest.raises(UserError, match=r"log\.json is damaged"):
        read_log(tmp_path)


def test_an_unknown_split_is_a_programming_error(prepared, tmp_path):
    with pytest.raises(ValueError, match="no split 'dev'"):
        write_log(prepared, tmp_path).split("dev")
