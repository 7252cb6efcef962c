"""Negatives: functions of (seed, epoch, row), drawn as they should be, and none that the user is known to like."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sellarec.collab.negatives import Negatives, _is_liked

COUNTS = np.array([[10, 0, 5, 40, 1, 20, 3, 7], [8, 0, 0, 30, 1, 10, 3, 0]])
"""Items 1 (never in train), 2 and 7 (never liked) are drawn by no popularity."""

ROW_NUMBERS = np.arange(1000, 1020)


def lists(of: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([item for found in of for item in found], np.int64), np.array(
        [len(found) for found in of], np.int64
    )


def drawn(
    negatives: Negatives,
    liked: list[list[int]],
    row: np.ndarray = ROW_NUMBERS,
    targets: list[int] | None = None,
    epoch: int = 0,
) -> np.ndarray:
    """The negatives, [n, N]; -1 stands for one that doesn't count."""
    row = row[: len(liked)]
    each = np.array(targets or [1] * len(liked))
    found = negatives.draw(row, each, lists(liked), epoch)
    assert found is not None
    items, log_q = found
    assert items.dtype == np.int64 and log_q.dtype == np.float32
    return np.where(np.isfinite(log_q), items, -1).reshape(each.sum(), negatives.number)


ITEM = st.integers(0, 7)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.lists(ITEM, min_size=1, max_size=4)), min_size=1, max_size=20),
    st.sampled_from(["uniform", "popularity"]),
    st.integers(1, 5),
    st.integers(0, 3),
    st.data(),
)
def test_draws_are_a_function_of_the_row_and_avoid_what_it_likes(case, kind, number, epoch, data):
    targets, liked = (list(part) for part in zip(*case, strict=True))
    negatives = pickle.loads(pickle.dumps(Negatives(kind, COUNTS, number, 5)))
    found = drawn(negatives, liked, targets=targets, epoch=epoch)
    possible = set(np.flatnonzero(COUNTS[0 if kind == "uniform" else 1]).tolist())
    for chosen, likes in zip(np.split(found, np.cumsum(targets)[:-1]), liked, strict=True):
        assert set(chosen[chosen >= 0].tolist()) <= possible - set(likes)
        if len(possible - set(likes)) > len(possible) / 2 and kind == "uniform":
            assert (chosen >= 0).all(), "at most a half is liked: one in 65,000 fails 16 times"
    start = data.draw(st.integers(0, len(case) - 1))
    part = drawn(negatives, liked[start:], ROW_NUMBERS[start:], targets[start:], epoch)
    assert (part == found[sum(targets[:start]) :]).all()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.lists(ITEM, max_size=9), st.lists(ITEM, min_size=1, max_size=4)), min_size=1, max_size=9))
def test_what_is_liked_is_found(case):
    """By few questions of a row, each compared with all, and by many, looked up."""
    asked, liked = (list(part) for part in zip(*case, strict=True))
    row = np.repeat(np.arange(len(case)), [len(of_row) for of_row in asked])
    items = lists(asked)[0]
    if len(items):
        found = _is_liked(row, items, *lists(liked), len(COUNTS[0]))
        assert found.tolist() == [item in likes for of_row, likes in zip(asked, liked, strict=True) for item in of_row]


def test_seeds_epochs_places_and_targets_are_drawn_apart():
    liked = [[3]] * 20
    draws = [
        drawn(Negatives("uniform", np.ones((2, 1000), int), 2, seed), liked, targets=[3] * 20, epoch=epoch)
        for seed in (1, 2)
        for epoch in (0, 1)
    ]
    columns = {tuple(column) for found in draws for column in found.reshape(20, 6).T}
    assert len(columns) == 24
    again = drawn(Negatives("uniform", np.ones((2, 1000), int), 2, 1), liked, targets=[3] * 20, epoch=1)
    assert (again == draws[1]).all()


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_items_are_drawn_as_often_as_they_are_said_to_be(kind):
    n = 20_000
    negatives = Negatives(kind, COUNTS, 2, 9)
    # likes an item that nobody draws, so that no draw is rejected
    found = negatives.draw(np.arange(n), np.ones(n, np.int64), (np.ones(n, np.int64), np.ones(n, np.int64)), 0)
    assert found is not None
    items, said = found[0], np.exp(found[1])
    weights = (COUNTS[0] > 0) if kind == "uniform" else COUNTS[1]
    expected = weights / weights.sum()
    np.testing.assert_allclose(said, expected[items], rtol=1e-5)
    np.testing.assert_allclose(np.exp(negatives.log_q), expected, rtol=1e-6)
    observed = np.bincount(items, minlength=8)
    possible = expected > 0
    assert (observed[~possible] == 0).all()
    chi_squared = ((observed - 2 * n * expected)[possible] ** 2 / (2 * n * expected[possible])).sum()
    assert chi_squared < 30, "6 degrees of freedom or fewer; 30 is passed once in 25,000"


def test_a_batch_that_serves_itself_draws_nothing_but_knows_likelihoods():
    negatives = Negatives("in-batch", COUNTS, 4, 0)
    assert negatives.draw(ROW_NUMBERS[:2], np.ones(2, np.int64), lists([[1], [2]]), 0) is None
    np.testing.assert_allclose(np.exp(negatives.log_q), COUNTS[1] / COUNTS[1].sum(), rtol=1e-6)


def test_a_user_who_likes_everything_has_no_negatives():
    assert drawn(Negatives("uniform", COUNTS, 3, 1), [list(range(8))] * 2).tolist() == [[-1] * 3] * 2


def test_rows_of_the_largest_logs_are_drawn_apart():
    """Row ids in the hundreds of millions don't run into each other's targets."""
    negatives = Negatives("uniform", np.ones((2, 10**6), int), 100, 1)
    row = np.arange(500_000_000, 500_000_010)
    found = drawn(negatives, [[3]] * 10, row, targets=[50] * 10)
    assert len(np.unique(found)) > 0.95 * found.size
