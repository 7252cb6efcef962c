"""The contrastive loss: a plain InfoNCE where items differ, no false negatives, the same however rows lie on workers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sellarec.alignment.contrastive import symmetric_info_nce

torch.set_num_threads(1)


def draw(seed: int, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))


def loss(left, right, ids, weight, temperature, rows=slice(None)):
    return symmetric_info_nce(left[rows], right[rows], ids[rows], left, right, ids, weight, temperature)


def plain(left, right, temperature):
    logits = F.normalize(left, dim=1) @ F.normalize(right, dim=1).T / temperature
    target = torch.arange(len(left))
    one, other = (F.cross_entropy(x, target, reduction="none") for x in (logits, logits.T))
    return (one + other) / 2


SEED, ROWS, TEMPERATURE = st.integers(0, 2**31), st.integers(1, 12), st.floats(0.05, 5)


@given(SEED, ROWS, TEMPERATURE)
def test_it_is_cross_entropy_over_the_batch_when_all_items_differ(seed, rows, temperature):
    left, right = draw(seed, rows, 6)
    ours = loss(left, right, torch.arange(rows), torch.ones(rows), temperature)
    torch.testing.assert_close(ours, plain(left, right, temperature))


@given(SEED, st.lists(st.integers(0, 3), min_size=1, max_size=10))
def test_rows_of_the_same_item_are_no_negatives_of_each_other(seed, items):
    left, right = draw(seed, len(items), 5)
    ours = loss(left, right, torch.tensor(items), torch.ones(len(items)), 0.3)
    for row, item in enumerate(items):
        others = [other for other, its in enumerate(items) if its != item]
        alone = [row, *others]
        left_row = F.normalize(left, dim=1)[row] @ F.normalize(right, dim=1)[alone].T / 0.3
        right_row = F.normalize(right, dim=1)[row] @ F.normalize(left, dim=1)[alone].T / 0.3
        expected = -(left_row.log_softmax(0)[0] + right_row.log_softmax(0)[0]) / 2
        torch.testing.assert_close(ours[row], expected)


@given(SEED, st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=10))
def test_padding_is_nobodys_negative(seed, drawn):
    items, valid = torch.tensor([item for item, _ in drawn]), torch.tensor([kept for _, kept in drawn])
    left, right = draw(seed, len(drawn), 4)
    ours = loss(left, right, items, valid.double(), 0.2)
    assert torch.isfinite(ours).all()
    without = loss(left[valid], right[valid], items[valid], torch.ones(int(valid.sum())), 0.2)
    torch.testing.assert_close(ours[valid], without)


@settings(max_examples=40)
@given(SEED, st.lists(st.integers(0, 4), min_size=4, max_size=12), st.integers(1, 4))
def test_it_does_not_depend_on_how_rows_lie_on_workers(seed, items, workers):
    """Losses, and the gradient of their sum, of workers that each see their rows and gather all the others'."""
    ids, weight = torch.tensor(items), torch.ones(len(items))
    weight[-1] = 0
    left, right = (x.requires_grad_() for x in draw(seed, len(items), 4))
    whole = loss(left, right, ids, weight, 0.5) * weight
    expected = torch.autograd.grad(whole.sum(), (left, right))
    pieces = [torch.from_numpy(x) for x in np.array_split(np.arange(len(items)), workers)]
    parts = torch.cat([loss(left, right, ids, weight, 0.5, rows) for rows in pieces]) * weight
    torch.testing.assert_close(parts, whole)
    found = torch.autograd.grad(parts.sum(), (left, right))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@given(SEED)
def test_gradients_reach_both_sides_of_every_row(seed):
    left, right = (x.requires_grad_() for x in draw(seed, 6, 4))
    total = loss(left, right, torch.tensor([0, 1, 2, 2, 3, 4]), torch.ones(6), 0.5).sum()
    for gradient in torch.autograd.grad(total, (left, right)):
        assert (gradient.abs().sum(1) > 0).all()


@given(SEED)
def test_it_is_symmetric_and_blind_to_lengths(seed):
    left, right = draw(seed, 6, 4)
    ids, weight = torch.arange(6), torch.ones(6)
    ours = loss(left, right, ids, weight, 0.2)
    torch.testing.assert_close(ours, loss(right, left, ids, weight, 0.2))
    torch.testing.assert_close(ours, loss(left * 3, right * 0.5, ids, weight, 0.2))


def test_descending_it_brings_the_views_together():
    left, right = (x.requires_grad_() for x in draw(0, 8, 8))
    ids, weight = torch.arange(8), torch.ones(8)
    before = F.cosine_similarity(left, right).mean()
    for _ in range(100):
        gradients = torch.autograd.grad(loss(left, right, ids, weight, 0.2).mean(), (left, right))
        with torch.no_grad():
            for side, gradient in zip((left, right), gradients, strict=True):
                side -= 5 * gradient
    assert F.cosine_similarity(left, right).mean() > before + 0.5


@pytest.mark.parametrize("rows", [1, 3])
def test_without_negatives_there_is_no_loss(rows):
    left, right = draw(1, rows, 4)
    assert loss(left, right, torch.zeros(rows, dtype=torch.long), torch.ones(rows), 0.1).abs().max() < 1e-12
