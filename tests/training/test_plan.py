"""Which worker holds which rows, what the kernels can't do, and what the tables take."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sellarec.config import Sparse, Tables
from sellarec.errors import UserError
from sellarec.training.plan import (
    Placement,
    balanced,
    check_fits,
    check_kernels,
    describe,
    place,
    row_bytes,
    row_memory,
    whole,
    worker_bytes,
)
from sellarec.training.table import MAX_COLUMNS, Table

FLOAT32 = Tables()


def table(name: str, rows: int, dim: int = 8) -> Table:
    return Table(name, rows, dim, (name,))


def optimizer(name: str, **changes) -> Sparse:
    return Sparse(table_optimizer=name, **changes)


ROWS = st.lists(st.integers(1, 50), min_size=1, max_size=6)


@given(ROWS, st.integers(1, 5), st.sampled_from(["row-wise", "table-wise"]))
def test_each_row_lies_on_one_worker(rows, workers, sharding):
    """Whole."""
    tables = [table(f"t{number}", count) for number, count in enumerate(rows)]
    placements = place(tables, Tables(sharding=sharding), optimizer("sgd"), workers, "cpu")
    assert [placement.table for placement in placements] == tables
    for placement in placements:
        held = [placement.rows(worker, workers) for worker in range(workers)]
        assert sum(held) == placement.table.rows
        columns = [placement.columns(worker, workers) for worker in range(workers) if held[worker]]
        assert all(found == [range(8)] for found in columns)
        if sharding == "row-wise" and placement.worker is None:
            assert max(held) == -(-placement.table.rows // workers) and held == sorted(held, reverse=True)
            assert min(held) > 0
        else:
            assert sorted(held)[:-1] == [0] * (workers - 1)


@given(
    st.integers(1, 9),
    st.one_of(st.integers(1, 40), st.integers(1, 3 * MAX_COLUMNS // 4)),
    st.sampled_from([0, 1, 2, 3]),
)
def test_each_column_lies_on_one_worker(workers, fours, more):
    """Of each piece a range, multiples of 4 (but for the last of a width that is none), as even as they can be."""
    wide = table("wide", 7, 4 * fours - more)
    (placement,) = place([wide], Tables(sharding="column-wise"), optimizer("sgd"), workers, "cpu")
    held = [placement.columns(worker, workers) for worker in range(workers)]
    assert [placement.rows(worker, workers) for worker in range(workers)] == [7 * bool(found) for found in held]
    for piece in whole(wide):
        shares = [next((part for part in found if part[0] in piece), range(0)) for found in held]
        assert [column for share in shares for column in share] == list(piece)
        assert all(share[0] % 4 == 0 for share in shares if share)
        counts = [-(-len(share) // 4) for share in shares]
        assert counts == sorted(counts, reverse=True) and max(counts) - min(counts) <= 1


@given(ROWS, st.integers(1, 5), st.sampled_from(["sgd", "rowwise-adagrad", "adagrad", "adam"]))
def test_whole_tables_are_spread_by_their_bytes(rows, workers, name):
    """As by hand: the largest first, each on the worker that holds least; so none holds more than a table above another."""
    tables = [table(f"t{number}", count, 4 * (number + 1)) for number, count in enumerate(rows)]
    settings = optimizer(name)
    placements = place(tables, Tables(sharding="table-wise"), settings, workers, "cpu")
    state = {"sgd": 0, "rowwise-adagrad": 1, "adagrad": None, "adam": None}[name]
    size = {
        t.name: 4 * t.rows * (t.dim + (state if state is not None else t.dim * {"adagrad": 1, "adam": 3}[name]))
        for t in tables
    }
    held = worker_bytes(placements, FLOAT32, settings, workers)
    assert sum(held) == sum(size.values())
    for worker, others in itertools.permutations(range(workers), 2):
        own = [size[p.table.name] for p in placements if p.worker == worker]
        assert not own or held[worker] - min(own) <= held[others]


def test_a_table_too_small_for_all_workers_is_not_cut():
    """The kernels fail on a worker that holds no row at all. 4 rows of 3 workers would be 2, 2 and 0."""
    found = place([table("a", 4), table("b", 5), table("c", 2)], FLOAT32, None, 3, "cpu")
    assert [p.worker for p in found] == [0, None, 0]
    assert [p.sharding for p in found] == ["table-wise", "row-wise", "table-wise"]


def test_the_same_placement_is_found_whatever_the_order_of_tables():
    tables = [table(name, rows) for name, rows in (("user", 30), ("item", 30), ("history", 10))]
    found = [
        {p.table.name: p.worker for p in place(order, Tables(sharding="table-wise"), None, 2, "cpu")}
        for order in itertools.permutations(tables)
    ]
    assert all(one == found[0] for one in found) and len(set(found[0].values())) == 2


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("name", ["rowwise-adagrad", "adam"])
def test_torchrecs_planner_places_every_table(workers, name):
    """Of several widths, one wider than the kernels take, one with fewer rows than workers."""
    tables = [table("user", 1000, 32), table("item", 5000, 32), table("tiny", 2, 4), table("wide", 50, 2 * MAX_COLUMNS)]
    found = place(tables, Tables(sharding="auto"), optimizer(name), workers, "cpu")
    assert [placement.table for placement in found] == tables
    assert all(p.worker is None or 0 <= p.worker < workers for p in found)
    assert found == place(tables, Tables(sharding="auto"), optimizer(name), workers, "cpu")


@pytest.mark.parametrize(
    ("users", "items", "placed"),
    [
        (100_000_000, 1000, [None, 1]),  # one table is nearly all there is
        (54_500_000, 48_200_000, [0, 1]),  # even already
    ],
)
def test_a_whole_table_is_cut_where_its_worker_would_hold_far_more_than_others(users, items, placed):
    """As TorchRec's planner looks at time alone, it puts both whole on a worker each."""
    settings = optimizer("rowwise-adagrad")
    found = place([table("user", users, 64), table("item", items, 64)], Tables(sharding="auto"), settings, 2, "cpu")
    assert [p.worker for p in found] == placed
    held = worker_bytes(found, FLOAT32, settings, 2)
    assert max(held) <= 1.25 * sum(held) / 2


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=6), st.integers(1, 5), st.data())
def test_what_is_balanced_leaves_no_worker_with_too_much(rows, workers, data):
    """More than 1.25 equal shares only of rows that can't be cut; and none is moved elsewhere."""
    settings = optimizer("rowwise-adagrad")
    tables = [table(f"t{number}", count, 4 * (number + 1)) for number, count in enumerate(rows)]
    first = [Placement(t, "table-wise", data.draw(st.integers(0, workers - 1))) for t in tables]
    found = balanced(first, FLOAT32, settings, workers)
    held = worker_bytes(found, FLOAT32, settings, workers)
    fullest = held.index(max(held))
    can_be_cut = [-(-t.rows // workers) * (workers - 1) < t.rows for t in tables]
    left = [p for p, can in zip(found, can_be_cut, strict=True) if p.worker == fullest and can]
    assert held[fullest] <= 1.25 * sum(held) / workers or not left
    for before, after, can in zip(first, found, can_be_cut, strict=True):
        assert after == before or (can and after == Placement(before.table, "row-wise"))
    assert max(worker_bytes(first, FLOAT32, settings, workers)) > 1.25 * sum(held) / workers or found == first


@pytest.mark.parametrize(
    ("storage", "settings", "device", "message"),
    [
        ({"dtype": "bfloat16"}, optimizer("sgd"), "cpu", "tables.dtype is bfloat16"),
        ({"dtype": "bfloat16"}, None, "cpu", "tables.dtype is bfloat16"),
        ({"placement": "uvm"}, optimizer("sgd"), "cpu", "tables.placement is uvm, but there is no GPU"),
        ({"placement": "uvm-caching"}, optimizer("sgd"), "cpu", "but there is no GPU"),
        ({"dtype": "float16"}, optimizer("adam"), "cpu", "table_optimizer is adam, tables.dtype float16"),
        ({"dtype": "float16"}, optimizer("adamw"), "cpu", "table_optimizer is adamw, tables.dtype float16"),
        ({"dtype": "bfloat16"}, optimizer("adam"), "cuda", "table_optimizer is adam, tables.dtype bfloat16"),
        ({"placement": "uvm"}, optimizer("adam"), "cuda", "table_optimizer is adam, .* tables.placement uvm"),
        ({"sharding": "grid"}, optimizer("sgd"), "cpu", "sharding is grid .* TorchRec refuses on CPUs.* take row-wise"),
        ({"sharding": "grid"}, None, "cuda", "sharding is grid .* nothing here has run on GPUs"),
        ({"sharding": "data-parallel"}, optimizer("adam"), "cpu", "sharding is data-parallel.* take row-wise"),
        (
            {"sharding": "column-wise"},
            optimizer("rowwise-adagrad"),
            "cuda",
            "tables.sharding is column-wise and table_optimizer rowwise-adagrad.* take adagrad, sgd, adam or adamw",
        ),
        ({}, optimizer("sgd", table_weight_decay=0.1), "cpu", "table_weight_decay is 0.1 and table_optimizer sgd"),
        ({}, optimizer("adagrad", table_weight_decay=0.1), "cuda", "table_weight_decay is 0.1 .* adagrad"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(storage, settings, device, message):
    for check in (check_kernels, lambda *arguments: place([table("user", 3)], *arguments[:2], 1, arguments[2])):
        with pytest.raises(UserError, match=message):
            check(Tables(**storage), settings, device)


@pytest.mark.parametrize(
    ("storage", "settings", "device"),
    [
        ({}, None, "cpu"),
        ({"dtype": "float16"}, None, "cpu"),
        ({"dtype": "float16"}, optimizer("adagrad"), "cpu"),
        ({"dtype": "bfloat16"}, optimizer("sgd"), "cuda"),
        ({"placement": "uvm-caching"}, optimizer("rowwise-adagrad"), "cuda"),
        ({}, optimizer("adam", table_weight_decay=0.1), "cpu"),
        ({}, optimizer("rowwise-adagrad", table_weight_decay=0.1), "cpu"),
        ({"sharding": "column-wise"}, None, "cpu"),
        ({"sharding": "column-wise", "dtype": "float16"}, optimizer("adagrad"), "cpu"),
        ({"sharding": "column-wise"}, optimizer("adam", table_weight_decay=0.1), "cuda"),
    ],
)
def test_what_the_kernels_can_do_is_not(storage, settings, device):
    check_kernels(Tables(**storage), settings, device)


def test_bytes_of_a_row():
    """Optimizer states are float32, whatever the rows are; adam has two moments and a gradient."""
    wide = table("wide", 1, 2 * MAX_COLUMNS + 4)
    columns = [range(8, 40)]
    assert row_bytes(columns, Tables(dtype="float16"), optimizer("adagrad")) == (64, 128)
    assert row_bytes(columns, Tables(dtype="bfloat16"), optimizer("rowwise-adagrad")) == (64, 4)
    assert row_bytes(whole(wide), FLOAT32, optimizer("rowwise-adagrad")) == (4 * wide.dim, 12)
    assert row_bytes(columns, FLOAT32, optimizer("adam")) == (128, 3 * 128)
    assert row_bytes(columns, FLOAT32, optimizer("adamw")) == (128, 3 * 128)
    assert row_bytes(columns, FLOAT32, optimizer("sgd")) == (128, 0)
    assert row_bytes(columns, FLOAT32, None) == (128, 0)


def test_bytes_of_a_row_in_the_hosts_memory():
    """States of a float a row stay on the GPU, as fbgemm's `construct_split_state` has them, others lie with the rows. Its cache
    has a fifth of the rows and 16 bytes for each, and 4 bytes for each row of the table."""
    columns, half = [range(8, 40)], {"dtype": "float16"}
    for name, uvm, caching in (("rowwise-adagrad", (4, 64), 24), ("adagrad", (0, 64 + 128), 20), ("sgd", (0, 64), 20)):
        settings = optimizer(name)
        found = row_memory(columns, Tables(placement="uvm", **half), settings)
        assert (found["device"], found["host"]) == uvm
        found = row_memory(columns, Tables(placement="uvm-caching", **half), settings)
        assert (found["device"], found["host"]) == (caching, uvm[1])
        assert row_memory(columns, Tables(**half), settings) == {"device": sum(uvm), "host": 0}
    # of two pieces, each a table to the kernels
    both = row_memory([range(4), range(4, 8)], Tables(placement="uvm-caching"), None)
    assert (both["device"], both["host"]) == (2 * 4 + 13, 32)


def test_both_memories_have_to_hold_their_part():
    storage, settings = Tables(placement="uvm-caching"), optimizer("rowwise-adagrad")
    placements = place([table("user", 10, 32)], storage, settings, 2, "cuda")
    assert worker_bytes(placements, storage, settings, 2) == [5 * 132] * 2
    arguments = (placements, storage, settings, 2)
    for where, of_row, told in (("device", 4 + 4 + 29, "of tables"), ("host", 128, "of tables in its host's memory")):
        assert worker_bytes(*arguments, where) == [5 * of_row] * 2
        check_fits(*arguments, 5 * of_row, "each", where)
        with pytest.raises(UserError, match=rf"{told} \(user 5 rows x {of_row} bytes\)"):
            check_fits(*arguments, 5 * of_row - 1, "each", where)


def test_a_frozen_table_has_no_state_of_an_optimizer():
    user, item = table("user", 10, 32), replace(table("item", 10, 32), frozen=True)
    placements = place([user, item], FLOAT32, optimizer("adam"), 2, "cpu")
    assert worker_bytes(placements, FLOAT32, optimizer("adam"), 2) == [5 * (4 * 128 + 128)] * 2
    assert [line["optimizer bytes"] for line in describe(placements, FLOAT32, optimizer("adam"), 2)] == [5 * 3 * 128, 0]
    with pytest.raises(UserError, match=r"item 5 rows x 128 bytes"):
        check_fits(placements, FLOAT32, optimizer("adam"), 2, 1, "each")
    other = table("other", 10, 16)  # with state it would take more than the frozen one
    placed = place([user, item, other], Tables(sharding="table-wise"), optimizer("adam"), 2, "cpu")
    assert {p.table.name: p.worker for p in placed} == {"user": 0, "other": 1, "item": 1}


def test_a_plan_tells_what_the_fullest_worker_holds():
    user, item = table("user", 10, 32), table("item", 7, 16)
    storage, settings = Tables(dtype="float16"), optimizer("rowwise-adagrad")
    placements = [Placement(user, "row-wise"), Placement(item, "table-wise", 2)]
    first, second = describe(placements, storage, settings, 3)
    assert first == {
        "table": "user", "rows": 10, "columns": 32, "dtype": "float16", "sharding": "row-wise", "worker": None,
        "placement": "device", "rows per worker": 4, "columns per worker": 32, "weight bytes": 4 * 64,
        "optimizer bytes": 4 * 4,
    }  # fmt: skip
    assert (second["sharding"], second["worker"], second["rows per worker"]) == ("table-wise", 2, 7)
    assert (second["weight bytes"], second["optimizer bytes"]) == (7 * 32, 7 * 4)
    assert worker_bytes(placements, storage, settings, 3) == [4 * 68, 4 * 68, 2 * 68 + 7 * 36]


def test_a_plan_by_columns():
    """36 columns of 4 workers are 12, 8, 8 and 8; 8 are 4, 4 and none."""
    placements = place([table("user", 10, 36), table("item", 7, 8)], Tables(sharding="column-wise"), None, 4, "cpu")
    settings = optimizer("adagrad")
    first, second = describe(placements, FLOAT32, settings, 4)
    assert (first["sharding"], first["worker"]) == ("column-wise", None)
    assert (first["rows per worker"], first["columns per worker"], second["columns per worker"]) == (10, 12, 4)
    assert (first["weight bytes"], first["optimizer bytes"]) == (10 * 48, 10 * 48)
    held = [10 * 96 + 7 * 32, 10 * 64 + 7 * 32, 10 * 64, 10 * 64]
    assert worker_bytes(placements, FLOAT32, settings, 4) == held
    check_fits(placements, FLOAT32, settings, 4, held[0], "each")
    with pytest.raises(UserError, match=r"worker 0 of 4 .* \(user 10 rows x 96 bytes \+ item 7 rows x 32 bytes\)"):
        check_fits(placements, FLOAT32, settings, 4, held[0] - 1, "each")


def test_tables_that_do_not_fit_are_refused_with_the_arithmetic():
    """48.2 M users and 54.5 M items as Amazon-2023 has them, 128 wide."""
    tables = [table("user", 48_200_000, 128), table("item", 54_500_000, 128)]
    placements = [Placement(t, "row-wise") for t in tables]
    held = (48_200_000 + 54_500_000) // 8 * (512 + 4)  # both are multiples of 8
    arguments = (placements, FLOAT32, optimizer("rowwise-adagrad"), 8)
    check_fits(*arguments, held, "each")
    message = (
        r"worker 0 of 8 would hold 6\.17 GiB of tables \(user 6,025,000 rows x 516 bytes \+ item 6,812,500 rows x 516 bytes\), "
        r"but each has room for 4\.00 GiB"
    )
    with pytest.raises(UserError, match=message):
        check_fits(*arguments, 4 << 30, "each")
    with pytest.raises(UserError):
        check_fits(*arguments, held - 1, "each")


def test_row_wise_is_advised_where_it_fits():
    user, item = table("user", 1 << 20, 256), table("item", 1 << 10, 256)
    placements = [Placement(user, "table-wise", 0), Placement(item, "table-wise", 1)]
    arguments = (placements, FLOAT32, optimizer("sgd"), 2)
    by_rows = (user.rows + item.rows) // 2 * 1024
    with pytest.raises(UserError, match=r"take --tables.sharding row-wise \(0.50 GiB\), a smaller width"):
        check_fits(*arguments, by_rows, "each")
    with pytest.raises(UserError, match=r"take a smaller width"):
        check_fits(*arguments, by_rows - 1, "each")


def test_the_fullest_worker_decides():
    placements = [Placement(table("user", 10, 8), "table-wise", 1), Placement(table("item", 4, 8), "row-wise")]
    arguments = (placements, FLOAT32, optimizer("sgd"), 2)
    check_fits(*arguments, 12 * 32, "each")
    with pytest.raises(UserError, match=r"worker 1 of 2 .* \(user 10 rows x 32 bytes \+ item 2 rows x 32 bytes\)"):
        check_fits(*arguments, 12 * 32 - 1, "each")
