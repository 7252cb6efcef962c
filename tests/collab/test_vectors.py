"""Tables that start from vectors of a file, found by the source's ids."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small import make

from sellarec.collab.vectors import write_table
from sellarec.data.log import Log
from sellarec.errors import UserError
from sellarec.training.table import SavedTable, Table, initial_rows

IDS = ["b", "a", "7", "08", "x"]
TABLE = Table("item", len(IDS), 4, ("item",), init_std=0.1)
SEED = 3


@pytest.fixture
def log(tmp_path: Path) -> Log:
    """Items in two parts."""
    (tmp_path / "items").mkdir()
    for part, (start, stop) in enumerate(((0, 3), (3, 5))):
        rows = pa.table({"item": np.arange(start, stop), "external_id": IDS[start:stop]})
        pq.write_table(rows, tmp_path / "items" / f"part-{part}.parquet")
    return Log(tmp_path, {"items": len(IDS)})


def write(log: Log, ids: Any, vectors: Any, has_biases: bool = False, **columns: str) -> int:
    """Write a file of vectors, and the table that starts from it."""
    path = log.directory / "vectors.parquet"
    pq.write_table(pa.table({columns.get("id", "id"): ids, columns.get("vector", "vector"): vectors}), path)
    return write_table(log, TABLE, str(path), has_biases, SEED, log.directory / "tables")


@pytest.mark.parametrize("has_biases", [False, True])
def test_rows_of_the_file_lie_where_their_ids_are_and_the_others_are_fresh(log: Log, has_biases: bool) -> None:
    width = TABLE.dim - has_biases
    vectors = np.arange(3 * width, dtype=np.float64).reshape(3, width)
    assert write(log, ["x", "unknown", "b"], list(vectors), has_biases) == 2
    rows = SavedTable(log.directory / "tables", "item").read(0, len(IDS))
    expected = initial_rows(TABLE, SEED, 0, len(IDS))
    expected[[4, 0], :width] = vectors[[0, 2]]
    expected[[4, 0], width:] = 0
    np.testing.assert_array_equal(rows, expected)


def test_a_whole_row_may_have_its_bias(log: Log) -> None:
    assert write(log, ["a"], [[1.0, 2.0, 3.0, 4.0]], has_biases=True) == 1
    np.testing.assert_array_equal(SavedTable(log.directory / "tables", "item").read(1, 2), [[1, 2, 3, 4]])


def test_ids_that_are_numbers_are_compared_as_text(log: Log) -> None:
    assert write(log, [7, 8], [[1.0] * 4, [2.0] * 4]) == 1
    np.testing.assert_array_equal(SavedTable(log.directory / "tables", "item").read(2, 3), [[1] * 4])


def test_vectors_may_be_lists_of_a_fixed_size(log: Log) -> None:
    """As Arrow writes an array of two dimensions."""
    assert write(log, ["a"], pa.FixedSizeListArray.from_arrays(pa.array(range(4), pa.int32()), 4)) == 1
    np.testing.assert_array_equal(SavedTable(log.directory / "tables", "item").read(1, 2), [[0, 1, 2, 3]])


def test_a_model_starts_from_them(tmp_path: Path, log: Log) -> None:
    write(log, ["a"], [[1.0] * 4])
    tables = {table.name: table for table in make(tmp_path / "model", given={"item": tmp_path / "tables"}).tables}
    assert tables["user"].read is None
    np.testing.assert_array_equal(initial_rows(tables["item"], 0, 1, 2), [[1] * 4])


REFUSED = [
    (["a", "b"], [[1.0] * 4, [1.0] * 3], "vectors are 3 to 4 wide, but rows of table item are 4 wide: 4 is needed"),
    (["a", "b"], [[1.0] * 3] * 2, "vectors are 3 to 3 wide"),
    (["a", "a"], [[1.0] * 4] * 2, "has 2 rows, but only 1 ids"),
    (["a", None], [[1.0] * 4] * 2, "1 ids or vectors are null"),
    (["a", "b"], [[1.0] * 4, [np.nan] * 4], "the vector of item 'b' is not finite"),
    (["p", "q"], [[1.0] * 4] * 2, "no vector of any item of the log: its ids are such as 'p', the log's such as '08'"),
    (["a", "b"], [[1.0] * 4, [1e300] * 4], "the vector of item 'b' is not finite"),
    (["a", "b"], [[1.0] * 4, [1.0, None, 1.0, 1.0]], "the vector of item 'b' is not finite"),
    (["a", "b"], [1.0, 2.0], "vector is of type double, but a list of numbers is needed"),
    (["a", "b"], [["x"] * 4] * 2, "vector is of type list<element: string>, but a list of numbers"),
    ([1.0, 2.0], [[1.0] * 4] * 2, "id is of type double, but text or whole numbers are needed"),
    (pa.array([], pa.string()), pa.array([], pa.list_(pa.float32())), "has no rows"),
]


@pytest.mark.parametrize(("ids", "vectors", "message"), REFUSED)
def test_files_that_are_refused(log: Log, ids: Any, vectors: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        write(log, ids, vectors)


def test_files_without_the_columns_or_of_another_format_are_refused(log: Log) -> None:
    with pytest.raises(UserError, match="has the columns name, vector, but id and vector are needed"):
        write(log, ["a"], [[1.0] * 4], id="name")
    (log.directory / "text").write_text("no Parquet")
    for path in (log.directory / "text", log.directory / "absent"):
        with pytest.raises(UserError, match=f"{path} can't be read as Parquet"):
            write_table(log, TABLE, str(path), False, SEED, log.directory / "tables")
