"""The order of training rows: each row once an epoch, whatever the workers, the row groups and the windows."""

import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sellarec.errors import UserError
from sellarec.training import stream
from sellarec.training.stream import (
    LEFT_OUT,
    Order,
    RowGroup,
    counts_in_words,
    named_counts,
    prepared,
    row_groups,
    shortened,
    slice_rows,
    slices,
    take,
)

COLUMNS = ("row", "twice")


def test_a_users_mistake_is_found_in_whatever_wraps_it() -> None:
    class OfRay(UserError):
        """As Ray makes one: an instance of what it was, with the traceback in its words."""

        cause = UserError("item is 9 in row 3")

    wrapped = RuntimeError("a task failed")
    wrapped.__cause__ = OfRay("Traceback (most recent call last): ...")
    assert stream._mistake(wrapped) == "item is 9 in row 3"
    assert stream._mistake(RuntimeError("another")) is None


@pytest.fixture(scope="module")
def make_order():
    """Writes files of so many rows each and gives an order over them; the files are kept for further examples."""
    with tempfile.TemporaryDirectory() as folder:
        written: dict[tuple, list[str]] = {}

        def make(files: tuple[int, ...], group: int, batch: int, seed: int | None, every: int = 1) -> Order:
            if (files, group) not in written:
                paths, start = [], 0
                for rows in files:
                    row = np.arange(start, start + rows)
                    paths.append(str(Path(folder) / f"{len(written)}-{len(paths)}.parquet"))
                    pq.write_table(pa.table({"row": row, "twice": row * 2}), paths[-1], row_group_size=group)
                    start += rows
                written[files, group] = paths
            return Order(tuple(row_groups(written[files, group])), batch, seed, every)

        yield make


def rows_of(order: Order, first: int, last: int, columns=COLUMNS, prepare=None) -> Iterator[pa.Table]:
    """What the reading tasks deliver for steps [first, last)."""
    for piece in order.pieces(first, last):
        yield from prepared(order, piece, columns, prepare)


def own(order: Order, rank: int, workers: int, first: int, last: int) -> list[pa.Table]:
    return list(slices(rows_of(order, first, last), order, rank, workers, first, last))


def batches(order: Order, epoch: int, workers: int) -> list[list[int]]:
    """The rows of each global batch of an epoch, worker after worker, without padding."""
    steps, share = order.steps_per_epoch, slice_rows(order.batch, workers)
    found: list[list[int]] = [[] for _ in range(steps)]
    for rank in range(workers):
        tables = own(order, rank, workers, epoch * steps, (epoch + 1) * steps)
        assert len(tables) == steps
        for step, table in enumerate(tables):
            assert len(table) == share
            assert set(table["weight"].to_pylist()) <= {0.0, 1.0}
            assert table["twice"].to_pylist() == [2 * row for row in table["row"].to_pylist()]
            found[step] += table.filter(pc.equal(table["weight"], 1))["row"].to_pylist()
    return found


FILES = st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple)
GROUP, BATCH, WINDOW = st.sampled_from([1, 3, 7, 100]), st.integers(1, 30), st.sampled_from([1, 5, 20, 1 << 20])


@settings(max_examples=60, deadline=None)
@given(FILES, GROUP, BATCH, WINDOW, st.integers(1, 5), st.none() | st.integers(0, 9), st.integers(0, 3))
def test_each_row_is_seen_once_an_epoch_in_the_same_batches_by_any_number_of_workers(
    make_order, files, group, batch, window, workers, seed, epoch
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "WINDOW_ROWS", window)
        order = make_order(files, group, batch, seed)
        assert order.rows == sum(files) and order.steps_per_epoch == -(-sum(files) // batch)
        together = batches(order, epoch, workers)
        alone = batches(order, epoch, 1)
    assert sorted(row for rows in together for row in rows) == list(range(sum(files)))
    assert together == alone
    assert [len(rows) for rows in alone[:-1]] == [batch] * (len(alone) - 1)
    if seed is None:
        assert [row for rows in alone for row in rows] == list(range(sum(files)))


@settings(max_examples=30, deadline=None)
@given(FILES, GROUP, BATCH, WINDOW, st.integers(1, 4), st.data())
def test_a_resumed_run_sees_the_tail_of_what_an_undisturbed_one_sees(
    make_order, files, group, batch, window, workers, data
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "WINDOW_ROWS", window)
        order = make_order(files, group, batch, 4)
        last = 3 * order.steps_per_epoch - data.draw(st.integers(0, order.steps_per_epoch - 1))
        first = data.draw(st.integers(0, last - 1))
        for rank in range(workers):
            whole = own(order, rank, workers, 0, last)
            assert len(whole) == last
            for part, expected in zip(own(order, rank, workers, first, last), whole[first:], strict=True):
                # what stands in padding has no meaning
                assert part["weight"].equals(expected["weight"])
                valid = pc.equal(part["weight"], 1)
                assert part.filter(valid).equals(expected.filter(valid))


@settings(max_examples=30, deadline=None)
@given(FILES, GROUP, BATCH, WINDOW, st.sampled_from([1, 3, 1000]), st.data())
def test_rows_are_prepared_with_the_step_that_they_are_read_in(make_order, files, group, batch, window, at_once, data):
    def note(rows: pa.Table, epoch: int, step: np.ndarray) -> pa.Table:
        assert 0 < len(rows) <= at_once
        return rows.drop_columns(["twice"]).append_column("seen", pa.array([[epoch, int(at)] for at in step]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "WINDOW_ROWS", window)
        patch.setattr(stream, "PREPARED_ROWS", at_once)
        order = make_order(files, group, batch, 4, data.draw(st.integers(1, 3)))
        per_epoch = order.steps_per_epoch
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, 3 * per_epoch)] * 2)))
        found = [pair for table in rows_of(order, first, last, prepare=note) for pair in table["seen"].to_pylist()]
    expected = [[step // per_epoch, step] for step in range(first, last) for _ in range(order.batch_rows(step))]
    assert found == expected


def test_epochs_and_seeds_are_shuffled_differently_and_repeatably(make_order):
    def flat(seed: int, epoch: int) -> list[int]:
        return list(chain(*batches(make_order((200,), 16, 32, seed), epoch, 2)))

    orders = [flat(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6
    assert flat(1, 2) == orders[-1]
    assert all(order != sorted(order) for order in orders)


def test_rows_are_mixed_across_row_groups_within_a_window(make_order):
    first = batches(make_order((400,), 20, 40, 0), 0, 1)[0]
    assert len({row // 20 for row in first}) > 10


def test_each_window_is_shuffled_in_its_own_way(make_order, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW_ROWS", 100)
    order = make_order((400,), 20, 400, 0)
    seen = batches(order, 0, 1)[0]
    shuffles = set()
    for number, window in enumerate(order.windows(0)):
        lying = [row for group in window for row in range(group.index * 20, group.index * 20 + group.rows)]
        shuffles.add(tuple(lying.index(row) for row in seen[number * 100 : number * 100 + 100]))
    assert len(shuffles) == 4


def test_a_window_holds_no_more_row_groups_than_it_needs(make_order, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW_ROWS", 50)
    order = make_order((400,), 20, 40, 0)
    windows = order.windows(0)
    assert [sum(group.rows for group in window) for window in windows[:-1]] == [60] * (len(windows) - 1)
    assert sorted(group.index for window in windows for group in window) == list(range(20))


def test_padding_has_weight_zero_and_fills_equal_slices(make_order):
    order = make_order((10,), 4, 7, None)
    found = [own(order, rank, 3, 0, 2) for rank in range(3)]
    assert [[table["weight"].to_pylist() for table in tables] for tables in found] == [
        [[1, 1, 1], [1, 1, 1]],
        [[1, 1, 1], [0, 0, 0]],
        [[1, 0, 0], [0, 0, 0]],
    ]
    assert found[1][0]["row"].to_pylist() == [3, 4, 5]


@settings(max_examples=30, deadline=None)
@given(FILES, GROUP, BATCH, WINDOW, st.integers(1, 7), st.integers(1, 3))
def test_every_nth_row_of_the_files_order(make_order, files, group, batch, window, every, workers):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "WINDOW_ROWS", window)
        order = make_order(files, group, batch, None, every)
        assert list(chain(*batches(order, 0, workers))) == list(range(0, sum(files), every))
        assert order.rows == len(range(0, sum(files), every))


def test_only_the_named_columns_are_read(make_order):
    order = make_order((10,), 4, 5, 0)
    assert [table.column_names for table in rows_of(order, 0, 2, ("twice",))] == [["twice"]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), BATCH)
def test_prompts_whose_history_was_cut_are_counted_once_whatever_the_workers(left_out, batch):
    """Padding, which is a row of the batch again, counts for nothing."""
    rows = pa.table({LEFT_OUT: left_out})
    expected = (len(left_out), sum(count > 0 for count in left_out), sum(left_out))
    order = Order((RowGroup("", 0, len(rows)),), batch, None)
    for workers in (1, 2, 3):
        parts = [
            part
            for rank in range(workers)
            for part in slices(iter([rows]), order, rank, workers, 0, order.steps_per_epoch)
        ]
        counts = np.sum([shortened(part) for part in parts], axis=0)
        assert tuple(counts) == expected
    found = {"train": named_counts(counts)}
    assert found["train"] == dict(zip(("prompts", "shortened", "titles left out"), expected, strict=True))
    words = f"train: {expected[1]} of {expected[0]} prompts, {expected[2]} titles left out"
    assert counts_in_words(found | {"valid": found["train"]}) == f"{words}; {words.replace('train', 'valid')}"


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.none() | st.lists(st.none() | st.integers(0, 99), max_size=4), min_size=1, max_size=12),
    st.sampled_from([pa.list_(pa.int64()), pa.large_list(pa.float32()), pa.list_(pa.string())]),
    st.booleans(),
    st.integers(0, 3),
    st.data(),
)
def test_rows_are_taken_as_arrow_takes_them(lists, kind, fills, cut, data):
    """Whatever they hold: lists of numbers, with nulls or without, of text, cut out of longer ones, in several chunks."""
    if fills:
        lists = [[value or 0 for value in found or []] for found in lists]
    if pa.types.is_string(kind.value_type):
        lists = [found and [None if value is None else str(value) for value in found] for found in lists]
    column = pa.chunked_array([pa.array([*lists[:cut], *lists], kind).slice(min(cut, len(lists)))])
    table = pa.table({"row": np.arange(len(lists)), "list": column, "name": [str(n) for n in range(len(lists))]})
    rows = np.array(data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=20)), np.int64)
    for whole in (table, pa.concat_tables([table.slice(0, 1), table.slice(1)])):
        found = take(whole, rows)
        found.validate(full=True)
        assert found.schema == table.schema and found.to_pylist() == table.take(rows).to_pylist()


def test_rows_that_are_no_prompts_count_for_nothing():
    assert shortened(pa.table({"row": [1, 2], "weight": pa.array([1.0, 0.0], pa.float32())})) == (0, 0, 0)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), BATCH, st.integers(1, 4), st.integers(1, 9))
def test_prompts_are_dealt_out_by_length_each_once(lengths, batch, workers, size):
    """Of each global batch; micro-batches of all workers that go through the model at a time are neighbours in length, so no more
    is padded than in slices of rows as they come, sorted by length."""
    rows = pa.table({"row": np.arange(len(lengths)), "tokens": [[0] * length for length in lengths]})
    order = Order((RowGroup("", 0, len(rows)),), batch, None)
    steps = order.steps_per_epoch
    own, cut = (
        [list(slices(iter([rows]), order, rank, workers, 0, steps, *how)) for rank in range(workers)]
        for how in ((size,), ())
    )
    for step in range(steps):
        expected = list(range(step * batch, min((step + 1) * batch, len(lengths))))
        real = [part[step].filter(pc.equal(part[step]["weight"], 1)) for part in own]
        assert sorted(row for part in real for row in part["row"].to_pylist()) == expected
        read = {}
        for name, parts in (("dealt", own), ("cut", cut)):
            found = [np.sort(pc.list_value_length(part[step]["tokens"]).to_numpy()) for part in parts]
            assert {len(part) for part in found} == {slice_rows(batch, workers)}
            turns = [[part[at : at + size] for part in found] for at in range(0, len(found[0]), size)]
            read[name] = sum(len(part) * part.max() for turn in turns for part in turn)
        ends = [length for turn in _turns(own, step, size) for part in turn for length in (part.min(), part.max())]
        assert ends == sorted(ends)
        if len(expected) == workers * slice_rows(batch, workers):  # else rows of padding are other ones
            assert read["dealt"] <= read["cut"]


def _turns(parts: list[list[pa.Table]], step: int, size: int) -> list[list[np.ndarray]]:
    """Lengths of the micro-batches of a step, in their order: by turn and worker."""
    found = [pc.list_value_length(part[step]["tokens"]).to_numpy() for part in parts]
    return [[part[at : at + size] for part in found] for at in range(0, len(found[0]), size)]
