"""Negatives: functions of (seed, epoch, row), drawn as they should be, and none that the user is known to like."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sellarec.collab.negatives import Negatives

COUNTS = np.array([[10, 0, 5, 40, 1, 20, 3, 7], [8, 0, 0, 30, 1, 10, 3, 0]])
"""Items 1 (never in train), 2 and 7 (never liked) are drawn by no popularity."""

IDS = np.zeros(0, np.int64)


def rows(number: int, items=3, histories=None, first: int = 0) -> pa.Table:
    return pa.table(
        {
            "row": np.arange(first, first + number),
            "item": np.full(number, items) if np.isscalar(items) else items,
            "history": pa.array(histories or [[]] * number, pa.list_(pa.int64())),
        }
    )


def drawn(negatives: Negatives, rows: pa.Table, epoch: int = 0) -> np.ndarray:
    """The negatives; -1 stands for one that doesn't count."""
    found = negatives.prepare(rows, epoch, np.zeros(len(rows), np.int64), keep_history=False)
    assert found.column_names == ["row", "item", "log_q", "negative", "negative_log_q"]
    items, log_q = (np.array(found[name].to_pylist()).reshape(len(rows), -1) for name in ("negative", "negative_log_q"))
    return np.where(np.isfinite(log_q), items, -1)


ITEM = st.integers(0, 7)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(ITEM, st.lists(ITEM, max_size=3)), min_size=1, max_size=20),
    st.sampled_from(["uniform", "popularity"]),
    st.integers(1, 5),
    st.integers(0, 3),
    st.data(),
)
def test_draws_are_a_function_of_the_row_and_avoid_what_it_likes(case, kind, number, epoch, data):
    items, histories = zip(*case, strict=True)
    table = rows(len(case), np.array(items), list(histories), first=1000)
    negatives = pickle.loads(pickle.dumps(Negatives(kind, COUNTS, number, 5)))
    found = drawn(negatives, table, epoch)
    possible = set(np.flatnonzero(COUNTS[0 if kind == "uniform" else 1]).tolist())
    for chosen, item, history in zip(found, items, histories, strict=True):
        assert len(chosen) == number and set(chosen[chosen >= 0].tolist()) <= possible - {item, *history}
        if len(possible - {item, *history}) > len(possible) / 2 and kind == "uniform":
            assert (chosen >= 0).all(), "at most a third is liked: one in 40 million fails 16 times"
    start = data.draw(st.integers(0, len(case) - 1))
    assert (drawn(negatives, table.slice(start), epoch) == found[start:]).all()


def test_seeds_epochs_and_places_are_drawn_apart():
    draws = [
        drawn(Negatives("uniform", np.ones((2, 1000), int), 2, seed), rows(50), epoch)
        for seed in (1, 2)
        for epoch in (0, 1)
    ]
    columns = {tuple(column) for found in draws for column in found.T}
    assert len(columns) == 8
    assert (drawn(Negatives("uniform", np.ones((2, 1000), int), 2, 1), rows(50), 1) == draws[1]).all()


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_items_are_drawn_as_often_as_they_are_said_to_be(kind):
    n = 20_000
    negatives = Negatives(kind, COUNTS, 2, 9)
    table = rows(n, items=1)  # an item that nobody draws, so that no draw is rejected
    found = negatives.prepare(table, 0, np.zeros(n, np.int64), keep_history=True)
    assert "history" in found.column_names
    items = found["negative"].combine_chunks().flatten().to_numpy()
    said = np.exp(found["negative_log_q"].combine_chunks().flatten().to_numpy())
    weights = (COUNTS[0] > 0) if kind == "uniform" else COUNTS[1]
    expected = weights / weights.sum()
    np.testing.assert_allclose(said, expected[items], rtol=1e-5)
    observed = np.bincount(items, minlength=8)
    possible = expected > 0
    assert (observed[~possible] == 0).all()
    chi_squared = ((observed - 2 * n * expected)[possible] ** 2 / (2 * n * expected[possible])).sum()
    assert chi_squared < 30, "6 degrees of freedom or fewer; 30 is passed once in 25,000"


def test_a_batch_that_serves_itself_only_tells_likelihoods():
    found = Negatives("in-batch", COUNTS, 4, 0).prepare(rows(3, np.array([0, 3, 5])), 0, IDS, keep_history=False)
    np.testing.assert_allclose(np.exp(found["log_q"].to_numpy()), COUNTS[1][[0, 3, 5]] / COUNTS[1].sum(), rtol=1e-6)
    assert found.column_names == ["row", "item", "history", "log_q"]


def test_a_user_who_likes_everything_has_no_negatives():
    found = drawn(Negatives("uniform", COUNTS, 3, 1), rows(2, histories=[list(range(8))] * 2))
    assert found.tolist() == [[-1] * 3] * 2
