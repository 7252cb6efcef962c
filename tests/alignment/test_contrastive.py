"""The contrastive losses: their formulas row by row, no false negatives, in blocks as at once, the same however rows lie on
workers."""

import itertools
from math import exp, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest import Largest
from small import together
from torch.nn import functional as F

from sellarec.alignment.contrastive import Views, contrastive_loss
from sellarec.config import Align
from sellarec.training.task import Alone

torch.set_num_threads(1)

KINDS = [
    *itertools.product(("info-nce", "rince"), ("both", "semantic-to-collab"), (True, False)),
    *itertools.product(("rlmrec-con", "rlmrec-gen"), ("both",), (True, False)),
]


def draw(seed: int, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))


def loss(left, right, ids, weight, temperature=0.3, peers=None, **options):
    peers = peers or Alone()
    own = (peers.own(rows) for rows in (left, right, ids))
    views = Views(*own, left, right, ids, weight)
    return contrastive_loss(views, Align(temperature=temperature, **options), peers)


def plain(left, right, temperature):
    logits = F.normalize(left, dim=1) @ F.normalize(right, dim=1).T / temperature
    target = torch.arange(len(left))
    one, other = (F.cross_entropy(x, target, reduction="none") for x in (logits, logits.T))
    return (one + other) / 2


def by_hand(left, right, ids, weight, row, kind, direction, mask_equal, q=0.01, scale=0.1, temperature=0.3):
    """The published formulas, of one row."""
    cosines = F.normalize(right, dim=1) @ F.normalize(left, dim=1).T / temperature
    sides = (cosines, cosines.T)[: 2 if direction == "both" else 1]
    if kind.startswith("rlmrec"):  # a row finds its semantic vector, whatever the direction of others
        sides = (cosines.T,)
    values = []
    for scores in sides:
        others = [j for j in range(len(ids)) if weight[j] and not (mask_equal and ids[j] == ids[row])]
        positive = exp(scores[row, row])
        negative = sum(exp(scores[row, j]) for j in others)
        if kind == "rince":
            values.append(-(positive**q) / q + (scale * (positive + negative)) ** q / q)
        else:
            values.append(-log(positive / (positive + negative if mask_equal else negative)))
    return sum(values) / len(values)


SEED, ROWS, TEMPERATURE = st.integers(0, 2**31), st.integers(1, 12), st.floats(0.05, 5)


@given(SEED, ROWS, TEMPERATURE)
def test_it_is_cross_entropy_over_the_batch_when_all_items_differ(seed, rows, temperature):
    left, right = draw(seed, rows, 6)
    ours = loss(left, right, torch.arange(rows), torch.ones(rows), temperature)
    torch.testing.assert_close(ours, plain(left, right, temperature))


@pytest.mark.parametrize(("kind", "direction", "mask_equal"), KINDS)
@settings(max_examples=15)
@given(SEED, st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=9), st.integers(1, 10))
def test_each_row_has_the_loss_that_is_published(kind, direction, mask_equal, seed, drawn, block):
    """In blocks of any size."""
    items, weight = torch.tensor([item for item, _ in drawn]), torch.tensor([float(kept) for _, kept in drawn])
    left, right = draw(seed, len(drawn), 5)
    options = {"contrastive": kind, "direction": direction, "mask_equal": mask_equal}
    ours = loss(left, right, items, weight, block=block, **options)
    for row in weight.nonzero()[:, 0].tolist():
        expected = by_hand(left, right, items, weight, row, kind, direction, mask_equal)
        assert ours[row].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    if kind == "rince":
        ours = loss(left, right, items, weight, block=block, rince_q=0.4, rince_lambda=0.7, **options)
        for row in weight.nonzero()[:, 0].tolist():
            expected = by_hand(left, right, items, weight, row, kind, direction, mask_equal, 0.4, 0.7)
            assert ours[row].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_rince_keeps_its_digits_at_a_small_power():
    """Written down as published, each power is 100 and more, and of seven digits five are left."""
    left, right = (x.float() for x in draw(0, 50, 16))
    ids, weight = torch.arange(50), torch.ones(50)
    options = {"contrastive": "rince", "rince_q": 0.001}
    exact = loss(left.double(), right.double(), ids, weight.double(), 0.2, **options)
    torch.testing.assert_close(loss(left, right, ids, weight, 0.2, **options).double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("kind", "direction", "mask_equal"), KINDS)
def test_gradients_are_those_of_finite_differences(kind, direction, mask_equal):
    left, right = (x.requires_grad_() for x in draw(3, 6, 4))
    ids, weight = torch.tensor([0, 1, 1, 2, 3, 4]), torch.tensor([1.0, 1, 1, 1, 1, 0])
    options = {"contrastive": kind, "direction": direction, "mask_equal": mask_equal, "rince_q": 0.3}
    if kind != "rince":
        del options["rince_q"]

    def of(left, right):
        return (loss(left, right, ids, weight, block=2, **options) * weight).sum()

    assert torch.autograd.gradcheck(of, (left, right))


@pytest.mark.parametrize("kind", ["info-nce", "rince"])
def test_all_pairs_are_never_in_memory_at_once(kind):
    """Neither forward nor backward; the same losses and gradients as at once."""
    rows, width = 512, 4
    left, right = (x.requires_grad_() for x in draw(0, rows, width))
    ids, weight = torch.arange(rows) % 400, torch.ones(rows)
    found = []
    for block in (rows, 32):
        with Largest() as largest:
            losses = loss(left, right, ids, weight, block=block, contrastive=kind)
            gradients = torch.autograd.grad(losses.sum(), (left, right))
        found.append((largest.elements, losses, *gradients))
    (at_once, *expected), (in_blocks, *ours) = found
    assert at_once == rows * rows and in_blocks == rows * 32
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.001, 0.01, 0.02, 0.03, 0.1])
def test_low_temperatures_lose_nothing(temperature, dtype):
    """Where exp(-2 / t) is no number of the dtype any more, and opposite vectors are all a row has."""
    left, right = (x.to(dtype).requires_grad_() for x in draw(4, 12, 6))
    with torch.no_grad():
        right[0] = -left[0]
        left[1:] = left[0]
    ids, weight = torch.arange(12), torch.ones(12, dtype=dtype)
    ours, theirs = loss(left, right, ids, weight, temperature, block=5), plain(left, right, temperature)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    found, expected = (torch.autograd.grad(x.mean(), (left, right)) for x in (ours, theirs))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


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


@settings(max_examples=40, deadline=None)
@given(SEED, st.lists(st.integers(0, 4), min_size=2, max_size=5), st.integers(1, 4), st.sampled_from(KINDS))
def test_it_does_not_depend_on_how_rows_lie_on_workers(seed, items, workers, kind):
    """Losses, and the gradient of their sum, of workers that each see their rows and gather all the others'."""
    items = items * workers
    ids, weight = torch.tensor(items), torch.ones(len(items))
    weight[-1] = 0
    options = dict(zip(("contrastive", "direction", "mask_equal"), kind, strict=True), block=5)
    left, right = (x.requires_grad_() for x in draw(seed, len(items), 4))
    whole = loss(left, right, ids, weight, 0.5, **options) * weight
    expected = torch.autograd.grad(whole.sum(), (left, right))
    parts = torch.cat(together(workers, lambda peer: loss(left, right, ids, weight, 0.5, peer, **options))) * weight
    torch.testing.assert_close(parts, whole)
    found = torch.autograd.grad(parts.sum(), (left, right))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("temperature", [0.3, 0.01])
@pytest.mark.parametrize(("kind", "direction", "mask_equal"), KINDS)
def test_of_all_workers_no_more_is_gathered_than_is_compared(kind, direction, mask_equal, temperature):
    """One view; both in both directions at a temperature too low for float32 to add up exponentials."""
    gathered: list[torch.Tensor] = []

    class Noting(Alone):
        def gather(self, rows: torch.Tensor) -> torch.Tensor:
            gathered.append(rows)
            return rows

    left, right = (x.float() for x in draw(2, 9, 5))
    ids, weight = torch.arange(9) % 7, torch.ones(9)
    options = Align(temperature=temperature, contrastive=kind, direction=direction, mask_equal=mask_equal)
    views = Views.gather(left, right, ids, weight, options, Noting())
    ours = contrastive_loss(views, options, Noting())
    assert torch.equal(
        ours, loss(left, right, ids, weight, temperature, contrastive=kind, direction=direction, mask_equal=mask_equal)
    )
    of_views = [rows for rows in gathered if rows.dim() == 2]
    in_both = direction == "both" and not kind.startswith("rlmrec")
    assert len(of_views) == (2 if in_both and temperature == 0.01 else 1) and len(gathered) == len(of_views) + 2
    if len(of_views) == 1:
        assert of_views[0] is (right if kind.startswith("rlmrec") else left)


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
