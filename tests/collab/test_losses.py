"""Ranking losses against their definitions, row by row in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import together
from torch.nn import functional as F

from sellarec.collab.losses import bpr, full_softmax, sampled_softmax, shared_softmax, softmax_among
from sellarec.collab.negatives import Negatives
from sellarec.training.task import Alone

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
        others = others * math.exp(own[row])
        assert loss == pytest.approx(
            math.log(math.exp(positive[row]) + others.sum()) - positive[row], rel=1e-5, abs=1e-6
        )


@given(cases())
def test_softmax_among_is_the_cross_entropy_of_the_target_and_the_negatives_that_count(case):
    positive, negative, counts, _, _ = case
    found = softmax_among(*(torch.from_numpy(x) for x in (positive, negative, counts)))
    for row, loss in enumerate(found.tolist()):
        logits = torch.tensor([positive[row], *negative[row][counts[row]]])
        assert loss == pytest.approx(F.cross_entropy(logits, torch.tensor(0)).item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
@pytest.mark.parametrize(("item", "liked"), [(0, ()), (2, ()), (5, ()), (1, (0,)), (5, (1, 3, 1))])
def test_drawn_negatives_stand_for_the_whole_catalog(kind, item, liked):
    """With many of them, the gradient is that of the softmax over all items but what else is liked, be the row's item popular or
    rare."""
    counts = np.array([[40, 25, 20, 10, 4, 1]] * 2)
    n, each = 300, 500
    negatives = Negatives(kind, counts, each, seed=3)
    ones = np.ones(n, np.int64)
    lists = np.tile([*liked, item], n), ones * (len(liked) + 1)
    found = negatives.draw(np.arange(n), ones, lists, 0)
    assert found is not None
    negative, log_q = (torch.from_numpy(part.reshape(n, each)) for part in found)
    rest = torch.from_numpy(negatives.log_rest(lists))
    scores = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    loss = sampled_softmax(scores[item].expand(n), scores[negative], log_q.isfinite(), rest, log_q)
    (sampled,) = torch.autograd.grad(loss.mean(), scores)
    left_out = torch.tensor([other in liked for other in range(6)])
    expected = -torch.log_softmax(scores.masked_fill(left_out, -torch.inf), 0)[item]
    (whole,) = torch.autograd.grad(expected, scores)
    assert loss.mean().item() == pytest.approx(expected.item(), rel=0.02)
    torch.testing.assert_close(sampled, whole, rtol=0.03, atol=0.003)


def catalog(seed: int, users: int, items: int, width: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (users, items)]
    return drawn[0].requires_grad_(), drawn[1].requires_grad_(), torch.randint(items, (users,), generator=generator)


SEEDS = st.integers(0, 2**31)


def gradients(losses: torch.Tensor, *of: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(losses.sum(), of, retain_graph=True)


@given(SEEDS, st.integers(1, 6), st.integers(1, 8))
def test_with_all_other_items_as_negatives_the_sampled_softmax_is_the_full_one(seed, n, items):
    """Each is drawn once, as N = I - 1 uniform draws of the others are expected to."""
    users, rows, target = catalog(seed, n, items)
    scores = users @ rows.T
    others = torch.tensor([[i for i in range(items) if i != t] for t in target]).view(n, items - 1)
    log_q = torch.full((n, items - 1), -math.log(items), dtype=torch.float64)
    positive = scores.gather(1, target[:, None])[:, 0]
    found = sampled_softmax(
        positive, scores.gather(1, others), torch.ones_like(others, dtype=torch.bool),
        torch.full((n,), math.log(max(items - 1, 1e-9) / items), dtype=torch.float64), log_q,
    )  # fmt: skip
    expected = F.cross_entropy(scores, target, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(full_softmax(users, positive, rows, Alone()), expected)


@given(SEEDS, st.integers(1, 6), st.integers(2, 8), st.data())
def test_items_that_arent_allowed_have_no_part_in_the_full_softmax(seed, n, items, data):
    users, rows, _ = catalog(seed, n, items)
    allowed = torch.tensor(data.draw(st.lists(st.booleans(), min_size=items, max_size=items)))
    allowed[seed % items] = True
    target = allowed.nonzero()[:, 0][torch.arange(n) % int(allowed.sum())]
    scores = users @ rows.T
    found = full_softmax(users, scores.gather(1, target[:, None])[:, 0], rows[allowed], Alone())
    whole = F.cross_entropy(scores.masked_fill(~allowed, -torch.inf), target, reduction="none")
    torch.testing.assert_close(found, whole)
    for ours, theirs in zip(*(gradients(loss, users, rows) for loss in (found, whole)), strict=True):
        torch.testing.assert_close(ours, theirs)


@settings(max_examples=40)
@given(SEEDS, st.lists(st.integers(0, 4), min_size=2, max_size=4), st.integers(1, 9), st.data())
def test_the_full_softmax_doesnt_depend_on_who_holds_what(seed, counts, items, data):
    """Workers with another number of users each, or none, and blocks of the catalog that may be empty or not allowed."""
    n, workers = sum(counts), len(counts)
    users, rows, target = catalog(seed, max(1, n), items)
    allowed = torch.tensor(data.draw(st.lists(st.booleans(), min_size=items, max_size=items)))
    allowed[target] = True
    scores = users @ rows.T
    positive = scores.gather(1, target[:, None])[:, 0]
    whole = F.cross_entropy(scores.masked_fill(~allowed, -torch.inf), target, reduction="none")[:n]
    block = -(-items // workers)
    starts = np.cumsum([0, *counts])

    def work(peers) -> torch.Tensor:
        mine = slice(starts[peers.rank], starts[peers.rank + 1])
        part = slice(peers.rank * block, (peers.rank + 1) * block)
        return full_softmax(users[mine], positive[mine], rows[part][allowed[part]], peers)

    found = torch.cat(together(workers, work))
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(gradients(found, users, rows), gradients(whole, users, rows))


def test_large_scores_dont_overflow_the_full_softmax():
    users, rows = torch.tensor([[200.0], [-300.0]]), torch.tensor([[1.0], [-1.0], [0.5]])
    target = torch.tensor([1, 2])
    found = full_softmax(users, (users @ rows.T).gather(1, target[:, None])[:, 0], rows, Alone())
    torch.testing.assert_close(found, F.cross_entropy(users @ rows.T, target, reduction="none"))


def test_a_target_without_negatives_has_a_loss_of_zero():
    positive, none, counts = torch.tensor([2.0]), torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2, dtype=torch.bool)
    log_q = torch.full((1, 2), torch.inf)
    sampled = sampled_softmax(positive, none, counts, torch.tensor([-1.0]), log_q)
    for found in (bpr(positive, none, counts), softmax_among(positive, none, counts), sampled):
        assert found.tolist() == [0]
    # a negative that doesn't count has an infinite log_q, and still no part in the gradient
    score = torch.tensor([[1.0, 3.0]], requires_grad=True)
    one = torch.tensor([[True, False]])
    loss = sampled_softmax(positive, score, one, torch.tensor([-1.0]), torch.tensor([[-2.0, torch.inf]]))
    loss.sum().backward()
    assert score.grad is not None and score.grad[0, 1] == 0 and score.grad[0, 0] > 0


@given(SEEDS, st.integers(1, 6), st.integers(0, 9), st.booleans(), st.booleans())
def test_shared_negatives_are_those_of_each_target(seed, n, number, corrected, of_users):
    """The same losses and gradients as from the matrix of all scores; also where all negatives are alike to the target."""
    users, rows, items = catalog(seed, n, max(1, number))
    rows = rows[:number]
    generator = torch.Generator().manual_seed(seed)
    alike = [(items % 3, torch.randint(3, (number,), generator=generator))]
    if of_users:
        alike.append((torch.arange(n) % 2, torch.randint(3, (number,), generator=generator)))
    counts = ~torch.stack([own[:, None] == theirs for own, theirs in alike]).any(0)
    positive = torch.randn(n, generator=generator, dtype=torch.float64, requires_grad=True)
    log_q = [-torch.rand(size, generator=generator, dtype=torch.float64) - 0.1 for size in (n, number)]
    scores = users @ rows.T
    if corrected:
        log_rest = torch.log1p(-log_q[0].exp())
        expected = sampled_softmax(positive, scores, counts, log_rest, log_q[1].expand_as(scores))
    else:
        expected = softmax_among(positive, scores, counts)
    found = shared_softmax(positive, users, rows, alike, tuple(log_q) if corrected else None)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(*(gradients(loss, users, rows, positive) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs.nan_to_num(0))  # nan where there is no negative at all
