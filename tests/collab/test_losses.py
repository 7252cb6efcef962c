"""Ranking losses against their definitions, row by row in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sellarec.collab.losses import bpr, sampled_softmax

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
    positive, negative, counts, log_q, negative_log_q = case
    found = sampled_softmax(*(torch.from_numpy(x) for x in case))
    for row, loss in enumerate(found.tolist()):
        true = positive[row] - log_q[row]
        others = (negative[row] - negative_log_q[row])[counts[row]]
        assert loss == pytest.approx(math.log(math.exp(true) + np.exp(others).sum()) - true, rel=1e-5, abs=1e-6)


def test_the_correction_makes_drawn_negatives_stand_for_the_whole_catalog():
    """With items drawn by popularity, the expected gradient is that of the softmax over all items."""
    generator = torch.Generator().manual_seed(0)
    scores, q = (
        torch.randn(6, generator=generator, dtype=torch.float64),
        torch.tensor([0.4, 0.25, 0.2, 0.1, 0.04, 0.01]),
    )
    scores.requires_grad_()
    drawn = torch.multinomial(q, 200_000, replacement=True, generator=generator)[None]
    others = drawn != 0
    log_q = (q.double() * drawn.numel()).log()  # how often each is expected among the drawn
    loss = sampled_softmax(scores[:1], scores[drawn], others, torch.zeros(1), log_q[drawn])
    (sampled,) = torch.autograd.grad(loss.sum(), scores)
    (whole,) = torch.autograd.grad(-torch.log_softmax(scores, 0)[0], scores)
    torch.testing.assert_close(sampled, whole, rtol=0.05, atol=0.005)
