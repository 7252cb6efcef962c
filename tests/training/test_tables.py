"""Embedding tables: initial rows that don't depend on sharding, updates as a plain optimizer's, rows saved and read back.

One process with a gloo group of one: the tables' own code on the real engine. Several workers:
tests/end_to_end/test_worker_counts.py.
"""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sellarec.training.tables import (
    INIT_BLOCK,
    MAX_COLUMNS,
    Jagged,
    SavedTable,
    ShardedTables,
    Table,
    index,
    initial_rows,
)

WIDE = 2 * MAX_COLUMNS + 8


@pytest.fixture(scope="module")
def group():
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


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


def written(*parts: tuple[str, int, int]) -> list[dict]:
    return [{"table": t, "file": f"{t}-{start}", "start": start, "rows": rows} for t, start, rows in parts]


def test_an_index_lists_the_files_of_one_table_in_order():
    facts = index(Table("user", 10, 4, ("user",)), written(("user", 6, 4), ("item", 0, 3), ("user", 0, 6)))
    assert (facts["rows"], facts["columns"]) == (10, 4)
    assert [part["start"] for part in facts["shards"]] == [0, 6]


@pytest.mark.parametrize(
    "parts", [[(0, 4), (5, 5)], [(0, 6), (5, 5)], [(0, 9)], [(0, 11)], [(1, 9)], [], [(0, 5), (0, 5), (5, 5)]]
)
def test_an_index_refuses_gaps_overlaps_and_missing_rows(parts):
    with pytest.raises(RuntimeError, match="table user"):
        index(Table("user", 10, 4, ("user",)), written(*(("user", *part) for part in parts)))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_saved_table_reads_across_its_files(tmp_path_factory, sizes, data):
    folder = tmp_path_factory.mktemp("tables")
    whole, _ = numbered(sum(sizes), 3)
    parts, start = [], 0
    for rows in sizes:
        save_file({"rows": whole[start : start + rows]}, folder / f"user-{start}")
        parts.append(("user", start, rows))
        start += rows
    facts = index(Table("user", start, 3, ("user",)), written(*parts))
    (folder / "user.json").write_text(json.dumps(facts))
    low, high = sorted((data.draw(st.integers(0, start)), data.draw(st.integers(0, start))))
    np.testing.assert_array_equal(SavedTable(folder, "user").read(low, high), whole[low:high])


def sharded(group, *tables: Table, rate: float = 0.1) -> ShardedTables:
    return ShardedTables(tables, rate, group, torch.device("cpu"), seed=7)


def test_a_lookup_gives_the_rows_in_whatever_shape_the_ids_have(group):
    """Tables of several widths, one with two features, one wider than the kernels take."""
    tables = [
        Table("user", 9, 4, ("user",), init_std=0.1),
        Table("item", 6, 8, ("item", "candidate"), init_std=0.1),
        Table("semantic", 6, WIDE, ("semantic",), read=numbered(6, WIDE)[1]),
    ]
    rows = {table.name: initial_rows(table, 7, 0, table.rows) for table in tables}
    ids = {
        "user": torch.tensor([8, 0, 8]),
        "item": torch.tensor([5, 2, 5]),
        "candidate": torch.tensor([[0, 1, 5], [5, 5, 2], [3, 4, 0]]),
        "semantic": torch.tensor([1, 5, 1]),
    }
    found = sharded(group, *tables).look_up(ids)
    for feature, asked in ids.items():
        name = "item" if feature == "candidate" else feature
        np.testing.assert_array_equal(found[feature].detach().numpy(), rows[name][asked.numpy()])


class PlainAdagrad:
    """Row-wise Adagrad as published with DLRM: one accumulator a row, of the mean square of its gradient."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.state = rows.astype(np.float64), np.zeros(len(rows))

    def step(self, ids: np.ndarray, gradients: np.ndarray, rate: float) -> None:
        summed = np.zeros_like(self.rows)
        np.add.at(summed, ids, gradients)
        touched = np.unique(ids)
        self.state[touched] += (summed[touched] ** 2).mean(1)
        self.rows[touched] -= rate * summed[touched] / (np.sqrt(self.state[touched]) + 1e-8)[:, None]


def step(tables: ShardedTables, ids: np.ndarray, gradients: np.ndarray) -> None:
    found = tables.look_up({"user": torch.from_numpy(ids)})["user"]
    (found * torch.from_numpy(gradients)).sum().backward()


def current(tables: ShardedTables, rows: int) -> np.ndarray:
    return tables.look_up({"user": torch.arange(rows)})["user"].detach().numpy()


def test_steps_are_those_of_row_wise_adagrad_at_the_rate_set_last(group):
    """Repeated ids count once with their summed gradient; rows that aren't looked up stay."""
    whole, read = numbered(6, 8)
    tables, plain = sharded(group, Table("user", 6, 8, ("user",), read=read), rate=0.1), PlainAdagrad(whole)
    generator = np.random.default_rng(0)
    for rate in (0.1, 0.1, 0.5, 0.0, 0.02):
        ids = generator.integers(0, 5, 7)
        gradients = generator.standard_normal((7, 8)).astype(np.float32)
        tables.set_learning_rate(rate)
        step(tables, ids, gradients)
        plain.step(ids, gradients, rate)
        np.testing.assert_allclose(current(tables, 6), plain.rows, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(current(tables, 6)[5], whole[5])


def test_each_piece_of_a_wide_table_is_stepped_as_a_table_of_its_own(group):
    whole, read = numbered(3, WIDE)
    table = Table("user", 3, WIDE, ("user",), read=read)
    tables = sharded(group, table)
    gradients = np.random.default_rng(1).standard_normal((2, WIDE)).astype(np.float32)
    step(tables, np.array([2, 0]), gradients)
    for _, first, last in table.pieces:
        plain = PlainAdagrad(whole[:, first:last])
        plain.step(np.array([2, 0]), gradients[:, first:last], 0.1)
        np.testing.assert_allclose(current(tables, 3)[:, first:last], plain.rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("columns", [8, WIDE])
def test_saved_rows_are_read_back_and_a_state_that_is_loaded_steps_on_alike(group, tmp_path, columns):
    table = Table("user", 5, columns, ("user",), init_std=1.0)
    tables = sharded(group, table)
    gradients = np.random.default_rng(2).standard_normal((3, columns)).astype(np.float32)
    ids = np.array([1, 4, 1])
    step(tables, ids, gradients)
    facts = index(table, tables.save(tmp_path))
    (tmp_path / "user.json").write_text(json.dumps(facts))
    saved = SavedTable(tmp_path, "user")
    np.testing.assert_array_equal(saved.read(0, 5), current(tables, 5))
    torch.save(tables.state(), tmp_path / "state.pt")
    step(tables, ids, gradients)
    resumed = sharded(group, table)
    # written above by this test: sharded tensors are no plain weights
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=False))
    np.testing.assert_array_equal(current(resumed, 5), saved.read(0, 5))
    step(resumed, ids, gradients)
    np.testing.assert_array_equal(current(resumed, 5), current(tables, 5))


def test_the_plan_tells_what_a_worker_holds(group):
    user, wide = Table("user", 1000, 32, ("user",)), Table("semantic", 100, WIDE, ("semantic",))
    lines = sharded(group, user, wide).plan()
    assert [(line["table"], line["rows"], line["columns"], line["rows per worker"]) for line in lines] == [
        ("user", 1000, 32, 1000),
        ("semantic", 100, WIDE, 100),
    ]
    assert lines[0]["MiB per worker"] == round(1000 * 4 * 33 / 2**20, 3)


JAGGED = st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=6)


@settings(max_examples=20, deadline=None)
@given(JAGGED, st.data())
def test_lists_of_ids_are_looked_up_as_lists_of_rows(group, lists, data):
    """Beside a feature of plain ids in the same table; a slice is that of the rows; updates reach each id."""
    table = Table("item", 6, WIDE, ("item", "history"), init_std=0.1)
    tables = sharded(group, table)
    rows = torch.from_numpy(initial_rows(table, 7, 0, 6))
    ids = Jagged.of(pa.chunked_array([pa.array(lists, pa.list_(pa.int64()))]))
    found = tables.look_up({"item": torch.arange(len(lists)) % 6, "history": ids})
    history = found["history"]
    assert torch.equal(found["item"], rows[torch.arange(len(lists)) % 6])
    assert torch.equal(history.values, rows[[i for ids in lists for i in ids]].reshape(-1, WIDE))
    assert history.lengths.tolist() == [len(ids) for ids in lists]
    sums = torch.stack([rows[ids].sum(0) if ids else torch.zeros(WIDE) for ids in lists])
    torch.testing.assert_close(history.sum(), sums)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(lists))] * 2)))
    torch.testing.assert_close(history[start:stop].sum(), sums[start:stop])
    assert len(history[start:stop]) == stop - start
    (history.sum().sum() + 0 * found["item"].sum()).backward()
    after = tables.look_up(
        {"item": torch.arange(6), "history": Jagged(ids.values[:0], torch.zeros(6, dtype=torch.int64))}
    )
    moved = (after["item"] != rows).any(1)
    assert set(torch.flatten(moved.nonzero()).tolist()) == {i for ids in lists for i in ids}
    assert after["history"].sum().abs().sum() == 0
