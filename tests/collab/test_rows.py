"""What models get of rows: a law of histories, targets and negatives, the same however rows are cut into batches."""

import itertools
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sellarec.collab.negatives import Negatives
from sellarec.collab.rows import Rows
from sellarec.errors import UserError

COUNTS = np.array([[10, 0, 5, 40, 1, 20, 3, 7], [8, 0, 1, 30, 1, 10, 3, 2]])
SEEN = COUNTS[0] > 0
"""Item 1 isn't in train."""

LIKED = st.integers(0, 7)
TARGETS = st.sampled_from(np.flatnonzero(SEEN).tolist())
CASES = st.lists(st.tuples(TARGETS, st.lists(LIKED, max_size=7)), min_size=1, max_size=12)


def table(case: list[tuple[int, list[int]]], first: int = 100) -> pa.Table:
    items, histories = zip(*case, strict=True) if case else ((), ())
    return pa.table(
        {
            "row": np.arange(first, first + len(case)),
            "item": pa.array(items, pa.int64()),
            "history": pa.array(histories, pa.list_(pa.int64())),
        }
    )


def prepare(rows: Rows, found: pa.Table, epoch: int = 0) -> pa.Table:
    return rows.prepare(found, epoch, np.zeros(len(found), np.int64))


@settings(max_examples=150)
@given(
    CASES, st.booleans(), st.integers(1, 5), st.sampled_from(["uniform", "popularity", "in-batch", None]),
    st.integers(1, 3), st.integers(0, 2), st.data(),
)  # fmt: skip
def test_what_rows_become(case, sequences, most, kind, number, epoch, data):
    negatives = None if kind is None else Negatives(kind, COUNTS, number, 5)
    made_by = pickle.loads(pickle.dumps(Rows(most, SEEN, sequences, negatives)))
    found = prepare(made_by, table(case), epoch)
    assert found["row"].to_pylist() == list(range(100, 100 + len(case)))
    assert found["item"].to_pylist() == [item for item, _ in case]
    drawn = kind in ("uniform", "popularity")
    columns = {"row", "item", "history", *["targets"] * sequences, *["log_q"] * (kind is not None)}
    assert set(found.column_names) == columns | ({"negative", "negative_log_q"} if drawn else set())
    for (item, history), row in zip(case, found.to_pylist(), strict=True):
        read = [other for other in history if sequences or SEEN[other]]
        if sequences:
            whole = [*read, item][-(most + 1) :]
            assert row["history"] == whole[:-1] and row["targets"] == whole[1:]
            targets = whole[1:]
        else:
            assert row["history"] == read[-most:]
            targets = [item]
        if kind is not None:
            said = row["log_q"] if sequences else [row["log_q"]]
            weights = SEEN if kind == "uniform" else COUNTS[1]
            np.testing.assert_allclose(np.exp(said), (weights / weights.sum())[targets], rtol=1e-5)
        if drawn:
            assert len(row["negative"]) == len(row["negative_log_q"]) == number * len(targets)
            counted = {n for n, q in zip(row["negative"], row["negative_log_q"], strict=True) if np.isfinite(q)}
            assert not counted & {item, *history}, "none that the user likes, read or not"
            assert all(weights[n] for n in counted)
    # the same for any batching
    cut = sorted(data.draw(st.lists(st.integers(0, len(case)), max_size=3)))
    edges = [0, *cut, len(case)]
    parts = [prepare(made_by, table(case).slice(a, b - a), epoch) for a, b in itertools.pairwise(edges) if b > a]
    assert pa.concat_tables(parts).to_pylist() == found.to_pylist()


@pytest.mark.parametrize(
    "made_by", [Rows(2, SEEN), Rows(0, SEEN, negatives=Negatives("popularity", COUNTS, 2, 0)), Rows(3, SEEN, True)]
)
@pytest.mark.parametrize("bad", [-1, len(SEEN), 1 << 40])
def test_an_id_that_the_catalog_does_not_have_is_refused(made_by, bad):
    """Negative ones too, which would count from the end; with the column and the row."""
    last = len(SEEN) - 1
    for rows, words in (
        ([(0, [1]), (bad, [1])], f"item is {bad} in row 101 of the log, but table item has the ids 0 to {last}"),
        ([(0, []), (1, [2, 3]), (1, [0, bad])], f"history is {bad} in row 102 of the log"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(made_by, table(rows))


@pytest.mark.parametrize("sequences", [False, True])
def test_no_rows_become_no_rows(sequences):
    found = prepare(Rows(3, SEEN, sequences, Negatives("uniform", COUNTS, 2, 0)), table([]))
    assert len(found) == 0 and {"history", "log_q", "negative"} <= set(found.column_names)


def test_a_model_that_reads_no_history_gets_none_but_is_drawn_none_of_it():
    rows = table([(0, [2, 3, 5, 6])] * 50)
    found = prepare(Rows(0, SEEN, negatives=Negatives("uniform", COUNTS, 4, 1)), rows)
    assert "history" not in found.column_names
    negative, log_q = (np.concatenate(found[name].to_numpy()) for name in ("negative", "negative_log_q"))
    assert set(negative[np.isfinite(log_q)]) == {4, 7}


def test_rows_that_are_only_scored_keep_their_columns():
    rows = table([(0, [1, 2])]).append_column("user", pa.array([3]))
    assert prepare(Rows(2, SEEN), rows).to_pylist() == [{"row": 100, "item": 0, "user": 3, "history": [2]}]
    assert prepare(Rows(0, SEEN), rows.drop_columns(["history"])).column_names == ["row", "item", "user"]


def test_columns_may_be_parts_of_larger_ones():
    """As the stream cuts them."""
    case = [(item, [2, 3, item][: item % 4]) for item in (0, 2, 3, 4, 5, 6, 7, 0, 2)]
    whole = pa.concat_tables([table(case[:4]), table(case[4:], 104)])
    made_by = Rows(2, SEEN, True, Negatives("popularity", COUNTS, 2, 0))
    expected = prepare(made_by, table(case)).to_pylist()
    assert prepare(made_by, whole).to_pylist() == expected
    assert prepare(made_by, whole.slice(3, 4)).to_pylist() == expected[3:7]


def test_tasks_that_read_rows_dont_load_torch():
    rows = Rows(2, SEEN, True, Negatives("popularity", COUNTS, 2, 0))
    code = "import pickle, sys; pickle.loads(sys.stdin.buffer.read()); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(rows.prepare), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
