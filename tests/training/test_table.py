"""Declared tables: initial rows that don't depend on sharding, pieces, files and their index."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sellarec.errors import UserError
from sellarec.training.table import INIT_BLOCK, MAX_COLUMNS, SavedTable, Table, index, initial_rows, saved_rows

WIDE = 2 * MAX_COLUMNS + 8


def numbered(rows: int, columns: int):
    whole = np.random.default_rng(rows * columns).standard_normal((rows, columns)).astype(np.float32)
    return whole, lambda start, stop: whole[start:stop]


@given(st.integers(0, 2 * INIT_BLOCK + 9), st.integers(0, 2 * INIT_BLOCK + 9), st.integers(0, 3))
def test_initial_rows_do_not_depend_on_the_range_that_is_asked_for(a, b, seed):
    table = Table("user", 2 * INIT_BLOCK + 9, 2, ("user",), init_std=0.1)
    start, stop = sorted((a, b))
    np.testing.assert_array_equal(
        initial_rows(table, seed, 0, table.rows)[start:stop], initial_rows(table, seed, start, stop)
    )


def test_initial_rows_are_normal_and_differ_by_seed_and_table():
    user, item = (Table(name, 5000, 8, (name,), init_std=0.05) for name in ("user", "item"))
    rows = initial_rows(user, 1, 0, 5000)
    assert rows.dtype == np.float32 and rows.shape == (5000, 8)
    assert rows.std() == pytest.approx(0.05, rel=0.02) and abs(rows.mean()) < 1e-3
    assert not np.allclose(rows, initial_rows(item, 1, 0, 5000))
    assert not np.allclose(rows, initial_rows(user, 2, 0, 5000))
    assert len(np.unique(rows[:, 0])) > 4990, "no block repeats another"


def test_rows_that_are_read_are_taken_as_they_are():
    whole, read = numbered(10, 3)
    np.testing.assert_array_equal(initial_rows(Table("x", 10, 3, ("x",), read=read), 5, 2, 7), whole[2:7])


def test_wide_tables_are_cut_into_pieces_that_cover_them():
    pieces = Table("wide", 4, WIDE, ("wide",)).pieces
    assert [(start, stop) for _, start, stop in pieces] == [(0, 1024), (1024, 2048), (2048, WIDE)]
    assert len({name for name, _, _ in pieces}) == 3


def part(table: str, start: int, rows: int, column: int = 0, columns: int = 4) -> dict:
    file = f"{table}-{start}-{column}"
    return {"table": table, "file": file, "start": start, "rows": rows, "column": column, "columns": columns}


def test_an_index_lists_the_files_of_one_table_in_order():
    parts = [part("user", 6, 4, 2, 2), part("user", 6, 4, 0, 2), part("item", 0, 3), part("user", 0, 6)]
    facts = index(Table("user", 10, 4, ("user",)), parts)
    assert (facts["rows"], facts["columns"]) == (10, 4)
    assert facts["shards"] == [parts[3], parts[1], parts[0]]


@pytest.mark.parametrize(
    "parts",
    [
        [(0, 4), (5, 5)],
        [(0, 6), (5, 5)],
        [(0, 9)],
        [(0, 11)],
        [(1, 9)],
        [],
        [(0, 5), (0, 5), (5, 5)],
        [(0, 10, 0, 3)],
        [(0, 10, 1, 3)],
        [(0, 10, 0, 5)],
        [(0, 10, 0, 2), (0, 10, 3, 1)],
        [(0, 10, 0, 3), (0, 10, 2, 2)],
        [(0, 10, 0, 2), (0, 9, 2, 2)],
        [(0, 10, 0, 2), (1, 9, 2, 2)],
        [(0, 5), (5, 5, 0, 2)],
    ],
)
def test_an_index_refuses_gaps_overlaps_and_what_is_missing(parts):
    with pytest.raises(RuntimeError, match="table user"):
        index(Table("user", 10, 4, ("user",)), [part("user", *found) for found in parts])


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(SIZES, SIZES, st.data())
def test_a_saved_table_reads_across_its_files(tmp_path_factory, sizes, widths, data):
    folder = tmp_path_factory.mktemp("tables")
    whole, _ = numbered(sum(sizes), sum(widths))
    parts, start = [], 0
    for rows in sizes:
        column = 0
        for columns in widths:
            parts.append(part("user", start, rows, column, columns))
            block = whole[start : start + rows, column : column + columns]
            save_file({"rows": np.ascontiguousarray(block)}, folder / parts[-1]["file"])
            column += columns
        start += rows
    facts = index(Table("user", start, sum(widths), ("user",)), data.draw(st.permutations(parts)))
    (folder / "user.json").write_text(json.dumps(facts))
    low, high = sorted((data.draw(st.integers(0, start)), data.draw(st.integers(0, start))))
    np.testing.assert_array_equal(SavedTable(folder, "user").read(low, high), whole[low:high])


def test_rows_beyond_those_that_are_read_are_fresh_ones():
    whole, read = numbered(10, 3)
    table = Table("x", 14, 3, ("x",), init_std=1.0, read=read, read_rows=10)
    fresh = initial_rows(Table("x", 14, 3, ("x",), init_std=1.0), 5, 0, 14)
    for start, stop in ((0, 14), (3, 10), (8, 12), (10, 14), (12, 13), (4, 4)):
        expected = np.concatenate([whole, fresh[10:]])[start:stop]
        np.testing.assert_array_equal(initial_rows(table, 5, start, stop), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_refused_by_whoever_reads_them(value):
    whole, read = numbered(10, 3)
    whole[6, 1] = whole[8, 0] = value
    table = Table("x", 10, 3, ("x",), read=read)
    with pytest.raises(UserError, match=r"table x: row 6 .* not finite .* as do 1 of the 5 rows"):
        initial_rows(table, 0, 4, 9)
    np.testing.assert_array_equal(initial_rows(table, 0, 0, 6), whole[:6])


def save_table(folder, name: str, whole: np.ndarray) -> None:
    rows, columns = whole.shape
    written = part(name, 0, rows, 0, columns)
    save_file({"rows": whole}, folder / written["file"])
    facts = index(Table(name, rows, columns, (name,)), [written])
    (folder / f"{name}.json").write_text(json.dumps(facts))


def test_a_table_starts_from_saved_rows_and_goes_on_fresh(tmp_path):
    whole, _ = numbered(6, 4)
    save_table(tmp_path, "user", whole)
    table = saved_rows(Table("user", 8, 4, ("user",), init_std=1.0), tmp_path)
    found = initial_rows(table, 3, 0, 8)
    np.testing.assert_array_equal(found[:6], whole)
    np.testing.assert_array_equal(found[6:], initial_rows(Table("user", 8, 4, ("user",), init_std=1.0), 3, 6, 8))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (Table("item", 6, 4, ()), r"holds no table item \(tables: user\)"),
        (Table("user", 6, 8, ()), "is 4 wide, but 8 is asked for"),
        (Table("user", 5, 4, ()), "has 6 rows, but the log has only 5"),
    ],
)
def test_saved_tables_that_do_not_fit_are_refused(tmp_path, table, message):
    save_table(tmp_path, "user", numbered(6, 4)[0])
    with pytest.raises(UserError, match=message):
        saved_rows(table, tmp_path)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), "file not fully covered"),
        (lambda path: os.truncate(path, 0), "header too small"),
        (Path.unlink, "No such file"),
        (lambda path: save_file({"rows": np.zeros((5, 4), np.float32)}, path), "index 5 out of bounds"),
        (lambda path: save_file({"weight": np.zeros((6, 4), np.float32)}, path), "does not contain tensor rows"),
    ],
)
def test_a_file_of_saved_rows_that_is_damaged_is_named(tmp_path, damage, told):
    save_table(tmp_path, "user", numbered(6, 4)[0])
    path = tmp_path / part("user", 0, 6, 0, 4)["file"]
    damage(path)
    for read in (lambda saved: saved.read(2, 6), lambda saved: saved.rows(np.array([5]))):
        with pytest.raises(UserError, match=f"table user: its rows . to 5 can't be read from {path} .*{told}"):
            read(SavedTable(tmp_path, "user"))


def test_an_index_that_was_cut_off_is_named(tmp_path):
    save_table(tmp_path, "user", numbered(6, 4)[0])
    path = tmp_path / "user.json"
    os.truncate(path, path.stat().st_size // 2)
    saved, table = SavedTable(tmp_path, "user"), Table("user", 6, 4, ("user",))
    for read in (lambda: saved.read(2, 6), lambda: saved.rows(np.array([5])), lambda: saved_rows(table, tmp_path)):
        with pytest.raises(UserError, match=f"{path} can't be read .*copy the artifact again"):
            read()


@given(st.lists(st.integers(0, 8), max_size=12))
def test_saved_rows_are_found_in_any_order(tmp_path_factory, ids):
    folder = tmp_path_factory.mktemp("tables")
    whole, _ = numbered(9, 2)
    save_table(folder, "user", whole)
    np.testing.assert_array_equal(SavedTable(folder, "user").rows(np.array(ids, np.int64)), whole[ids])


@pytest.mark.parametrize("bad", [-1, 9])
def test_saved_rows_that_are_not_there_are_refused(tmp_path, bad):
    save_table(tmp_path, "user", numbered(9, 2)[0])
    with pytest.raises(UserError, match=rf"id {bad} \(number 1\) is none of table user, which has the ids 0 to 8"):
        SavedTable(tmp_path, "user").rows(np.array([3, bad, 11]))
