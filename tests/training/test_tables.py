"""Sharded embedding tables on one to three workers, against whole tables of plain torch; checkpoints between any of them.

One process with a gloo group of one serves what needs no others.
"""

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import table_cases
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from table_cases import Plain, Setup, Step

from sellarec.config import Sparse, Tables
from sellarec.training.plan import place
from sellarec.training.table import MAX_COLUMNS, Jagged, SavedTable, Table, index, initial_rows
from sellarec.training.tables import ShardedTables

WIDE = 2 * MAX_COLUMNS + 8
FLOAT = {"rtol": 1e-5, "atol": 2e-6}
"""float32 sums in other orders, over a few steps."""
HALF = {"rtol": 2e-3, "atol": 2e-3}
"""Rows that are rounded to float16 once or twice a step."""


@pytest.fixture(scope="module")
def group():
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def numbered(rows: int, columns: int):
    whole = np.random.default_rng(rows * columns).standard_normal((rows, columns)).astype(np.float32)
    return whole, lambda start, stop: whole[start:stop]


def sharded(group, *tables: Table, **optimizer: Any) -> ShardedTables:
    settings = Sparse(**{"table_learning_rate": 0.1, **optimizer})
    placements = place(tables, Tables(), settings, 1, "cpu")
    return ShardedTables(placements, Tables(), settings, group, torch.device("cpu"), seed=7)


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
    for optimizer in ("rowwise-adagrad", "adam"):
        found = sharded(group, *tables, table_optimizer=optimizer).look_up(ids)
        assert set(found) == set(ids)
        for feature, asked in ids.items():
            name = "item" if feature == "candidate" else feature
            np.testing.assert_array_equal(found[feature].detach().numpy(), rows[name][asked.numpy()])


JAGGED = st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=6)


@settings(max_examples=10)
@given(JAGGED, st.sampled_from(["sgd", "adam"]), st.data())
def test_lists_of_ids_are_looked_up_as_lists_of_rows(group, lists, optimizer, data):
    """Beside a feature of plain ids in the same table; a slice is that of the rows; updates reach each id."""
    table = Table("item", 6, WIDE, ("item", "history"), init_std=0.1)
    tables = sharded(group, table, table_optimizer=optimizer)
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
    tables.step()
    after = tables.look_up(
        {"item": torch.arange(6), "history": Jagged(ids.values[:0], torch.zeros(6, dtype=torch.int64))}
    )
    moved = (after["item"] != rows).any(1)
    assert set(torch.flatten(moved.nonzero()).tolist()) == {i for ids in lists for i in ids}
    assert after["history"].sum().abs().sum() == 0


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
    tables.step()


def current(tables: ShardedTables, rows: int) -> np.ndarray:
    return tables.look_up({"user": torch.arange(rows)})["user"].detach().numpy()


def test_steps_are_those_of_row_wise_adagrad_at_the_rate_set_last(group):
    """Repeated ids count once with their summed gradient; rows that aren't looked up stay."""
    whole, read = numbered(6, 8)
    tables, plain = sharded(group, Table("user", 6, 8, ("user",), read=read)), PlainAdagrad(whole)
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


@pytest.mark.parametrize("optimizer", ["rowwise-adagrad", "adam"])
@pytest.mark.parametrize("columns", [8, WIDE])
def test_saved_rows_are_read_back_and_a_state_that_is_loaded_steps_on_alike(group, tmp_path, columns, optimizer):
    table = Table("user", 5, columns, ("user",), init_std=1.0)
    tables = sharded(group, table, table_optimizer=optimizer)
    gradients = np.random.default_rng(2).standard_normal((3, columns)).astype(np.float32)
    ids = np.array([1, 4, 1])
    step(tables, ids, gradients)
    facts = index(table, tables.save(tmp_path))
    (tmp_path / "user.json").write_text(json.dumps(facts))
    saved = SavedTable(tmp_path, "user")
    np.testing.assert_array_equal(saved.read(0, 5), current(tables, 5))
    torch.distributed.checkpoint.save(tables.state(), checkpoint_id=tmp_path / "state")
    step(tables, ids, gradients)
    resumed = sharded(group, table, table_optimizer=optimizer)
    state = resumed.state()
    torch.distributed.checkpoint.load(state, checkpoint_id=tmp_path / "state")
    resumed.load_state(state)
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
    assert [line["weight bytes"] + line["optimizer bytes"] for line in lines] == [
        1000 * (4 * 32 + 4),
        100 * (4 * WIDE + 3 * 4),
    ]


# One to three workers

TABLES = (
    Table("user", 13, 8, ("user",), init_std=0.5),
    Table("item", 10, 8, ("item", "history", "candidate"), init_std=0.5),
    Table("tiny", 2, 4, ("tiny",), init_std=0.5),  # fewer rows than workers
    Table("wide", 5, 20, ("wide",), init_std=0.5),  # three pieces
)
PIECE = 8
OPTIMIZERS = {
    "sgd": Sparse(table_optimizer="sgd"),
    "adagrad": Sparse(table_optimizer="adagrad"),
    "rowwise": Sparse(table_optimizer="rowwise-adagrad"),
    "rowwise decay": Sparse(table_optimizer="rowwise-adagrad", table_weight_decay=0.1),
    "adam": Sparse(table_optimizer="adam"),
    "adam decay": Sparse(table_optimizer="adam", table_weight_decay=0.1),
    "adamw decay": Sparse(table_optimizer="adamw", table_weight_decay=0.1),
}
RATES = (0.1, 0.02, 0.3, 0.3, 0.05)
WORKERS = (1, 2, 3)
SHARDINGS = ("row-wise", "table-wise", "column-wise")


def setup_of(optimizer: str, sharding: str = "row-wise", dtype: str = "float32") -> Setup:
    return Setup(TABLES, OPTIMIZERS[optimizer], Tables(sharding=sharding, dtype=dtype), PIECE)


def steps_of(workers: int) -> tuple[Step, ...]:
    """Slices of different sizes; in the second and third step features that nobody asks for, in the third a worker without
    ids, in the fourth none with any."""
    generator = np.random.default_rng(11)
    steps = []
    for number, rate in enumerate(RATES):
        ids = []
        for worker in range(3):
            rows = 3 + worker
            lengths = generator.integers(0, 4, rows) * (number != 3 and not (number == 2 and worker == 0))
            found = {
                "user": generator.integers(0, 13, rows).tolist(),
                "item": generator.integers(0, 9, rows).tolist(),
                "history": tuple(generator.integers(0, 9, n).tolist() for n in lengths),
                "candidate": generator.integers(0, 10, (rows, 2)).tolist(),
                "tiny": generator.integers(0, 2, rows).tolist(),
                "wide": generator.integers(0, 4, rows).tolist(),
            }
            asked = {1: ("user", "wide"), 2: ("history",), 3: ("history",)}.get(number, tuple(found))
            ids.append({name: found[name] for name in asked})
        steps.append(Step(rate, tuple(ids[:workers])))
    return tuple(steps)


def close_to_plain(setup: Setup, steps: tuple[Step, ...], found: list[dict]) -> None:
    half = setup.storage.dtype == "float16"
    tolerance = HALF if half else FLOAT
    plain = Plain(setup)
    for number, expected in enumerate(plain.take(steps, len(found))):
        for worker, vectors in enumerate(expected):
            assert set(vectors) == set(found[worker]["looked up"][number])
            for name, value in vectors.items():
                np.testing.assert_allclose(
                    found[worker]["looked up"][number][name], value, err_msg=f"{name}, step {number}", **tolerance
                )
    after = table_cases.whole([worker["after"] for worker in found])
    for name, value in plain.state().items():
        assert after[name].dtype == (np.float16 if half else np.float32)
        np.testing.assert_allclose(after[name], value, err_msg=name, **tolerance)


def is_offered(optimizer: str, sharding: str) -> bool:
    return not (optimizer.startswith("rowwise") and sharding == "column-wise")


GRID = [
    (optimizer, sharding, dtype, workers)
    for optimizer, sharding, dtype, workers in product(OPTIMIZERS, SHARDINGS, ("float32", "float16"), WORKERS)
    if is_offered(optimizer, sharding) and not (optimizer.startswith("adam") and dtype == "float16")
]


@pytest.mark.distributed
@pytest.mark.parametrize(("optimizer", "sharding", "dtype", "workers"), sorted(GRID, key=lambda case: case[3]))
def test_any_sharding_takes_the_steps_of_whole_tables(gloo, optimizer, sharding, dtype, workers):
    """Vectors of each step and rows after them; the learning rate changes with each step."""
    setup, steps = setup_of(optimizer, sharding, dtype), steps_of(workers)
    close_to_plain(setup, steps, gloo.call(workers, table_cases.run, setup, steps))


@pytest.mark.distributed
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_so_do_workers_that_hold_different_numbers_of_columns(gloo, optimizer, workers):
    """Of 20 columns 12 and 8, or 8, 8 and 4; of 8 columns the third of three workers holds none."""
    setup, steps = replace(setup_of(optimizer, "column-wise"), max_columns=1024), steps_of(workers)
    found = gloo.call(workers, table_cases.run, setup, steps)
    close_to_plain(setup, steps, found)
    held = [
        {n: shards[0][2].shape[1] for n, shards in worker["after"].items() if "optimizer" not in n} for worker in found
    ]
    assert [worker.get("wide_0", 0) for worker in held] == {2: [12, 8], 3: [8, 8, 4]}[workers]
    assert [worker.get("user_0", 0) for worker in held] == {2: [4, 4], 3: [4, 4, 0]}[workers]


@pytest.mark.distributed
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("optimizer", ["rowwise", "adam"])
def test_so_does_what_torchrecs_planner_finds(gloo, optimizer, workers):
    setup, steps = setup_of(optimizer, "auto"), steps_of(workers)
    close_to_plain(setup, steps, gloo.call(workers, table_cases.run, setup, steps))


@pytest.mark.distributed
@pytest.mark.parametrize(("sharding", "then"), [("row-wise", "column-wise"), ("column-wise", "row-wise")])
def test_rows_that_are_read_start_all_workers_and_pieces(gloo, tmp_path, sharding, then):
    """A table that was saved by two workers, then read by three."""
    setup, steps = setup_of("sgd", sharding), steps_of(2)
    found = gloo.call(2, table_cases.run, setup, steps, tmp_path)
    written = [part for worker in found for part in worker["written"]]
    after = table_cases.whole([worker["after"] for worker in found])
    again = []
    for table in TABLES:
        (tmp_path / "rows" / f"{table.name}.json").write_text(json.dumps(index(table, written)))
        saved = SavedTable(tmp_path / "rows", table.name)
        pieces = [after[name] for name, _, _ in table_cases.cut(table, PIECE)]
        np.testing.assert_array_equal(saved.read(0, table.rows), np.concatenate(pieces, axis=1))
        again.append(replace(table, read=saved.read))
    found = gloo.call(3, table_cases.run, replace(setup_of("sgd", then), tables=tuple(again)), ())
    for name, value in table_cases.whole([worker["before"] for worker in found]).items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)


# Checkpoints

KINDS = [(workers, sharding) for workers in WORKERS for sharding in SHARDINGS]
QUICK = {(1, "row-wise"), (2, "row-wise"), (2, "table-wise"), (3, "table-wise")}
QUICK_BY_COLUMNS = {
    ((2, "column-wise"), (3, "column-wise")),
    ((3, "column-wise"), (1, "row-wise")),
    ((3, "row-wise"), (2, "column-wise")),
    ((2, "column-wise"), (2, "column-wise")),
}


@pytest.fixture(scope="module")
def saved(gloo, tmp_path_factory):
    """Checkpoints after three steps by optimizer, workers and sharding, each made once."""
    made: dict[tuple, tuple[Path, dict]] = {}

    def make(optimizer: str, workers: int, sharding: str) -> tuple[Path, dict]:
        key = (optimizer, workers, sharding)
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            setup, steps = setup_of(optimizer, sharding), steps_of(workers)
            found = gloo.call(workers, table_cases.run, setup, steps[:3], folder)
            made[key] = folder, table_cases.whole([worker["after"] for worker in found])
        return made[key]

    return make


def resharding() -> list:
    cases = []
    for optimizer, before, after in product(("sgd", "adagrad", "rowwise decay", "adam decay"), KINDS, KINDS):
        if not (is_offered(optimizer, before[1]) and is_offered(optimizer, after[1])):
            continue
        is_quick = optimizer == "rowwise decay"  # all of 1, 2 and 3 workers, row-wise and table-wise, by all of them
        is_quick = is_quick or (optimizer == "adam decay" and before in QUICK and after in QUICK)
        is_quick = is_quick or (optimizer == "adagrad" and (before, after) == ((2, "row-wise"), (3, "table-wise")))
        is_quick = is_quick or (optimizer in ("adagrad", "adam decay") and (before, after) in QUICK_BY_COLUMNS)
        marks = () if is_quick else pytest.mark.slow
        cases.append(pytest.param(optimizer, *before, *after, marks=marks))
    return sorted(cases, key=lambda case: case.values[3])


@pytest.mark.distributed
@pytest.mark.parametrize(("optimizer", "workers", "sharding", "then_workers", "then_sharding"), resharding())
def test_any_number_of_workers_loads_what_any_other_has_saved(
    gloo, saved, optimizer, workers, sharding, then_workers, then_sharding
):
    """Rows and the optimizer's state to the bit; the steps after it as whole tables take them, and with as many workers
    exactly as those that went on (Adam's kernel rounds by where in a shard a value lies, so with the same sharding)."""
    folder, state = saved(optimizer, workers, sharding)
    fresh = replace(setup_of(optimizer, then_sharding), seed=99)
    further = steps_of(then_workers)[3:]
    found = gloo.call(then_workers, table_cases.resume, fresh, folder, further, 3)
    loaded = table_cases.whole([worker["loaded"] for worker in found])
    assert set(loaded) == set(state) and (optimizer == "sgd") == (len(state) == 6)
    for name, value in state.items():
        np.testing.assert_array_equal(loaded[name], value, err_msg=name)
    after = table_cases.whole([worker["after"] for worker in found])
    plain = Plain(setup_of(optimizer))
    for _ in plain.take(steps_of(workers)[:3], workers):
        pass
    for _ in plain.take(further, then_workers, 3):
        pass
    for name, value in plain.state().items():
        np.testing.assert_allclose(after[name], value, err_msg=name, **FLOAT)
    if workers == then_workers and (sharding == then_sharding or optimizer != "adam decay"):
        straight = gloo.call(workers, table_cases.run, setup_of(optimizer, sharding), steps_of(workers))
        for name, value in table_cases.whole([worker["after"] for worker in straight]).items():
            np.testing.assert_array_equal(after[name], value, err_msg=name)


@pytest.mark.distributed
@pytest.mark.parametrize("optimizer", ["adagrad", "rowwise decay"])
@pytest.mark.parametrize(
    ("workers", "sharding", "then_workers", "then_sharding"),
    [(2, "row-wise", 3, "table-wise"), (3, "table-wise", 1, "row-wise"), (1, "row-wise", 2, "row-wise")],
)
def test_rows_of_float16_are_loaded_by_any_number_of_workers_too(
    gloo, tmp_path, optimizer, workers, sharding, then_workers, then_sharding
):
    """To the bit, with the optimizer's state, which is float32."""
    steps = steps_of(workers)[:3]
    found = gloo.call(workers, table_cases.run, setup_of(optimizer, sharding, "float16"), steps, tmp_path)
    state = table_cases.whole([worker["after"] for worker in found])
    fresh = replace(setup_of(optimizer, then_sharding, "float16"), seed=99)
    found = gloo.call(then_workers, table_cases.resume, fresh, tmp_path, (), 3)
    loaded = table_cases.whole([worker["loaded"] for worker in found])
    assert set(loaded) == set(state) and {value.dtype for value in state.values()} == {np.dtype("f2"), np.dtype("f4")}
    for name, value in state.items():
        assert loaded[name].dtype == value.dtype
        np.testing.assert_array_equal(loaded[name], value, err_msg=name)


@pytest.mark.distributed
@pytest.mark.parametrize("optimizer", ["adagrad", "adam decay"])
def test_so_is_what_workers_saved_that_held_different_numbers_of_columns(gloo, tmp_path, optimizer):
    """Of 20 columns 8, 8 and 4; then 12 and 8, or all of a part of the rows."""
    setup, steps = replace(setup_of(optimizer, "column-wise"), max_columns=1024), steps_of(3)
    found = gloo.call(3, table_cases.run, setup, steps[:3], tmp_path)
    state = table_cases.whole([worker["after"] for worker in found])
    for workers, sharding in ((2, "column-wise"), (2, "row-wise"), (1, "column-wise")):
        fresh = replace(setup, storage=Tables(sharding=sharding), seed=99)
        found = gloo.call(workers, table_cases.resume, fresh, tmp_path, (), 3)
        loaded = table_cases.whole([worker["loaded"] for worker in found])
        assert set(loaded) == set(state)
        for name, value in state.items():
            np.testing.assert_array_equal(loaded[name], value, err_msg=name)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("sharding", "optimizer"),
    [case for case in product(SHARDINGS, ("sgd", "adagrad", "rowwise", "adam")) if is_offered(case[1], case[0])],
)
def test_workers_that_hold_no_rows_take_part(gloo, tmp_path, optimizer, sharding):
    """All that there is, is a table of two rows; it is saved by three workers, and loaded by three and by one."""
    setup = replace(setup_of(optimizer, sharding), tables=(TABLES[2],))
    steps = tuple(
        Step(rate, tuple({"tiny": found} for found in ids))
        for rate, ids in zip(RATES, [([0, 1], [1, 1], [0]), ([1], [1], [1]), ([0], [1], [0])], strict=False)
    )
    found = gloo.call(3, table_cases.run, setup, steps[:2], tmp_path)
    close_to_plain(setup, steps[:2], found)
    held = [sum(len(values) for _, _, values in worker["after"].get("tiny_0", ())) for worker in found]
    assert held == [2, 0, 0]
    state = table_cases.whole([worker["after"] for worker in found])
    fresh = replace(setup, seed=99)
    ids = tuple({"tiny": [i for worker in step.ids for i in worker["tiny"]]} for step in steps)
    for workers in (3, 1):
        further = steps[2] if workers == 3 else replace(steps[2], ids=(ids[2],))
        loaded = gloo.call(workers, table_cases.resume, fresh, tmp_path, (further,), 2)
        for name, value in table_cases.whole([worker["loaded"] for worker in loaded]).items():
            np.testing.assert_array_equal(value, state[name], err_msg=name)
        if workers == 3:
            straight = gloo.call(3, table_cases.run, setup, steps)
            after = [table_cases.whole([worker["after"] for worker in run]) for run in (loaded, straight)]
            for name in state:
                np.testing.assert_array_equal(after[0][name], after[1][name], err_msg=name)


# What is refused


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("feature", "ids", "message"),
    [
        ("user", [3, 13, 0], "user is 13 in row 70 .worker 1., but table user has the ids 0 to 12"),
        ("user", [3, 1, -1], "user is -1 in row 8 "),
        ("candidate", [[0, 9], [1, 1], [10, 2]], "candidate is 10 in row 8 .* table item has the ids 0 to 9"),
        ("history", ([], [1], [2, 99]), "history is 99 in row 8 "),
        ("wide", [5, 0, 0], "wide is 5 in row 41 "),
    ],
)
def test_an_id_that_a_table_does_not_have_is_found_by_whoever_has_it(gloo, feature, ids, message):
    """And named by its row's id in the log, of rows that lie in any order."""
    good, bad = ({"user": [1, 2, 3], "history": ([], [1], []), feature: found} for found in ([0, 1, 1], ids))
    first, second = gloo.call(2, table_cases.out_of_range, setup_of("sgd"), (good, bad), np.array([41, 70, 8]))
    assert first is None
    assert second is not None and re.search(message, second)


@pytest.mark.distributed
def test_of_rows_without_ids_in_the_log_the_place_is_named(gloo):
    found = gloo.call(2, table_cases.out_of_range, setup_of("sgd"), ({"user": [1]}, {"user": [1, 13]}), None)
    assert found[0] is None and found[1].startswith("user is 13 in place 1 of its slice (worker 1), but")
