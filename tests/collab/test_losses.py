"""Ranking losses against their definitions, row by row in float64."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sellarec.collab.losses import bpr, sampled_softmax
from sellarec.collab.negatives import Negatives

NUMBERS = st.floats(-5, 5, width=32)


@st.composite
def cases(draw) -> tuple[np.ndarray, ...]:
    rows, number = draw(st.integers(1, 4)), draw(st.integers(0, 5))

    def numbers(*shape: int) -> np.ndarray:
        size = math.prod(shape)
        return np.array(draw(st.lists(NUMBERS, min_size=size, max_size=size))).reshape(shape)

    counts = draw(st.lists(st.booleans(), min_size=rows * number, max_size=rows * number))
    return (
        numbers(rows), numbers(rows, number), np.array(counts, bool).reshape(rows, number),
        -np.abs(numbers(rows)), -np.abs(numbers(rows, number)),
    )  # fmt: skip


@given(cases())
def test_bpr_is_the_mean_over_the_negatives_that_count(case):
    positive, negative, counts, _, _ = case
    found = bpr(*(torch.from_numpy(x) for x in (positive, negative, counts)))
    for row, loss in enumerate(found.tolist()):
        each = [math.log1p(math.exp(n - positive[row])) for n in negative[row][counts[row]]]
        assert loss == pytest.approx(np.mean(each) if each else 0, rel=1e-5, abs=1e-9)


@given(cases())
def test_softmax_is_the_cross_entropy_of_corrected_scores(case):
    positive, negative, counts, own, log_q = case
    found = sampled_softmax(*(torch.from_numpy(x) for x in case))
    for row, loss in enumerate(found.tolist()):
        others = np.exp(negative[row] - log_q[row])[counts[row]] / max(1, counts[row].sum())
        others = others * (1 - min(math.exp(own[row]), 1 - 1e-6))
        assert loss == pytest.approx(
            math.log(math.exp(positive[row]) + others.sum()) - positive[row], rel=1e-5, abs=1e-6
        )


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
@pytest.mark.parametrize("item", [0, 2, 5])
def test_drawn_negatives_stand_for_the_whole_catalog(kind, item):
    """With many of them, the gradient is that of the softmax over all items, be the row's item popular or rare."""
    counts = np.array([[40, 25, 20, 10, 4, 1]] * 2)
    n, each = 300, 500
    drawn = Negatives(kind, counts, each, seed=3).prepare(
        pa.table({"row": np.arange(n), "item": np.full(n, item), "history": pa.array([[]] * n, pa.list_(pa.int64()))}),
        0, np.zeros(n, np.int64), keep_history=False,
    )  # fmt: skip
    negative, log_q = (
        torch.from_numpy(drawn[name].combine_chunks().flatten().to_numpy().reshape(n, each).copy())
        for name in ("negative", "negative_log_q")
    )
    own = torch.from_numpy(drawn["log_q"].to_numpy().copy())
    scores = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    loss = sampled_softmax(scores[item].expand(n), scores[negative], log_q.isfinite(), own, log_q)
    (sampled,) = torch.autograd.grad(loss.mean(), scores)
    (whole,) = torch.autograd.grad(-torch.log_softmax(scores, 0)[item], scores)
    torch.testing.assert_close(sampled, whole, rtol=0.03, atol=0.003)
