"""DaRec's loss: its terms restated with matrices of all pairs, gradients, and the same however rows lie on workers."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest import Largest
from small import together
from torch.nn import functional as F

from sellarec.alignment.disentangled import ROUNDS, Disentangling, Parts, cluster, disentangled_loss, match
from sellarec.config import Align
from sellarec.training.task import Alone

torch.set_num_threads(1)

SEED = st.integers(0, 2**31)
ROWS = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=10)


def draw(seed: int, rows: int, width: int = 4) -> Parts:
    generator = torch.Generator().manual_seed(seed)
    return Parts(*(torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(4)))


def drawn_of(ids: torch.Tensor, seed: int) -> torch.Tensor:
    """A number for each id."""
    return torch.from_numpy(np.random.default_rng(seed).random(100))[ids]


def loss(parts: Parts, ids: torch.Tensor, weight: torch.Tensor, seed: int = 0, peers: Any = None, **options: Any):
    whole = Align(contrastive="darec", **options)
    return disentangled_loss(parts, ids, weight, drawn_of(ids, seed), peers or Alone(), whole)


def by_hand(parts: Parts, ids: list[int], weight: list[float], seed: int, centers: int) -> list[float]:
    """The four terms, by numpy with all pairs."""
    place: dict[int, int] = {}
    for row, (i, kept) in enumerate(zip(ids, weight, strict=True)):
        if kept:
            place.setdefault(i, row)
    rows = sorted(place.values())
    shared, semantic, own, its_own = (
        part.detach().numpy()[rows] / np.linalg.norm(part.detach().numpy()[rows], axis=1, keepdims=True)
        for part in parts
    )
    n = len(rows)
    if n == 0:
        return [0.0] * 4
    orthogonality = float(np.mean((shared * own).sum(1) ** 2) + np.mean((semantic * its_own).sum(1) ** 2))
    uniformity = 0.0
    if n > 1:
        for x in (own, its_own):
            distances = ((x[:, None] - x[None]) ** 2).sum(2)
            uniformity += float(np.log(np.exp(-2 * distances)[~np.eye(n, dtype=bool)].mean()))
    structure = float(np.mean((shared @ shared.T - semantic @ semantic.T) ** 2))
    start = np.argsort(drawn_of(torch.tensor(ids)[rows], seed).numpy())[:centers]
    found = []
    for x in (shared, semantic):
        center = x[start]
        for _ in range(ROUNDS):
            nearest = (x @ center.T).argmax(1)
            for k in range(len(center)):
                if (nearest == k).any():
                    center[k] = x[nearest == k].sum(0) / np.linalg.norm(x[nearest == k].sum(0))
        found.append(center)
    cosines = found[0] @ found[1].T
    pairs: dict[int, int] = {}
    for flat in np.argsort(-cosines, axis=None):
        k, h = divmod(int(flat), len(start))
        if k not in pairs and h not in pairs.values():
            pairs[k] = h
    rest = [cosines[k, h] ** 2 for k in pairs for h in pairs if pairs[k] != h]
    local = float(np.mean([(cosines[k, h] - 1) ** 2 for k, h in pairs.items()]))
    return [orthogonality, uniformity, structure, local + (float(np.mean(rest)) if rest else 0.0)]


@settings(max_examples=60)
@given(SEED, ROWS, st.integers(1, 4), st.integers(1, 10))
def test_it_is_the_sum_of_its_terms_over_all_pairs_of_ids(seed, rows, centers, block):
    """Rows of one id count once, padding doesn't; in blocks of any size."""
    ids, weight = [i for i, _ in rows], [float(kept) for _, kept in rows]
    parts = draw(seed, len(rows))
    found = loss(parts, torch.tensor(ids), torch.tensor(weight).double(), seed, centers=centers, block=block)
    assert found.item() == pytest.approx(sum(by_hand(parts, ids, weight, seed, centers)), rel=1e-8, abs=1e-9)


def test_gradients_are_those_of_finite_differences():
    parts = [part.requires_grad_() for part in draw(5, 6, 3)]
    ids, weight = torch.tensor([0, 1, 1, 2, 3, 4]), torch.tensor([1.0, 1, 1, 1, 1, 0], dtype=torch.float64)

    def of(*parts):
        return loss(Parts(*parts), ids, weight, centers=3, block=2)

    assert torch.autograd.gradcheck(of, tuple(parts))
    for part, gradient in zip(parts, torch.autograd.grad(of(*parts), parts), strict=True):
        assert part.shape == gradient.shape
        counts = [True, True, False, True, True, False]
        assert (gradient.abs().sum(1) > 0).tolist() == counts, "of rows that count alone"


@settings(max_examples=25, deadline=None)
@given(SEED, st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=4), st.integers(2, 3))
def test_it_does_not_depend_on_how_rows_lie_on_workers(seed, rows, workers):
    """Every worker finds the whole batch's loss, and the gradient of shares of it that make one is that of the loss."""
    rows = rows * workers
    ids, weight = (torch.tensor(x) for x in zip(*rows, strict=True))
    weight = weight.double()
    parts = [part.requires_grad_() for part in draw(seed, len(rows))]
    whole = loss(Parts(*parts), ids, weight, seed, centers=2, block=3)
    expected = torch.autograd.grad(whole, parts)
    share = len(rows) // workers

    def work(peers):
        own = slice(peers.rank * share, (peers.rank + 1) * share)
        return loss(Parts(*(p[own] for p in parts)), ids[own], weight[own], seed, peers, centers=2, block=3)

    each = torch.stack(together(workers, work))
    torch.testing.assert_close(each, whole.expand(workers))
    shares = torch.arange(1, workers + 1, dtype=torch.float64)
    found = torch.autograd.grad((each * shares / shares.sum()).sum(), parts)
    torch.testing.assert_close(found, expected)


def test_all_pairs_are_never_in_memory_at_once():
    rows, width = 512, 4
    parts = [part.requires_grad_() for part in draw(0, rows, width)]
    ids, weight = torch.arange(rows) % 100, torch.ones(rows, dtype=torch.float64)
    found = []
    for block in (rows, 32):
        with Largest() as largest:
            value = disentangled_loss(
                Parts(*parts), ids, weight, drawn_of(ids, 1), Alone(), Align(contrastive="darec", block=block)
            )
            gradients = torch.autograd.grad(value, parts)
        found.append((largest.elements, value, *gradients))
    (at_once, *expected), (in_blocks, *ours) = found
    assert at_once == rows * 100 and in_blocks == rows * 32  # of equal items one counts
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("weight", [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
def test_few_rows_have_a_finite_loss_and_gradient(weight):
    """None; one; and two of one item, of which one counts."""
    parts = [part.float().requires_grad_() for part in draw(2, 2)]
    value = loss(Parts(*parts), torch.tensor([3, 3]), torch.tensor(weight))
    gradients = torch.autograd.grad(value, parts)
    assert value.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    if not any(weight):
        assert value == 0 and not any(gradient.any() for gradient in gradients)
    else:
        assert value.item() == pytest.approx(sum(by_hand(Parts(*parts), [3, 3], weight, 0, 4)), rel=1e-5)


def test_k_means_finds_the_groups_that_are_there():
    """Rows that don't count move no centre."""
    generator = torch.Generator().manual_seed(1)
    middle = torch.eye(3)[[0, 0, 0, 1, 1, 1, 2, 2, 2]]
    rows = F.normalize(middle + 0.1 * torch.randn(9, 3, generator=generator), dim=1)
    nearest, centers = cluster(rows, torch.ones(9), torch.tensor([0, 3, 6]))
    assert nearest.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    torch.testing.assert_close(centers[1], F.normalize(rows[3:6].mean(0), dim=0))
    counts = torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 0, 0])
    nearest, centers = cluster(rows, counts, torch.tensor([0, 3]))
    torch.testing.assert_close(centers[0], F.normalize(rows[:3].mean(0), dim=0))


def test_a_centre_that_has_lost_its_rows_stays():
    rows = torch.tensor([[1.0, 0], [1, 0], [0.6, 0.8]])
    nearest, centers = cluster(rows, torch.tensor([1.0, 1, 0]), torch.tensor([0, 1]))
    assert nearest.tolist() == [0, 0, 0] and centers.tolist() == [[1, 0], [1, 0]]


@given(SEED, st.integers(1, 6))
def test_centres_are_matched_one_to_one_best_first(seed, number):
    cosines = torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (number, number)))
    matched = match(cosines)
    assert sorted(matched.tolist()) == list(range(number))
    row, column = divmod(int(cosines.argmax()), number)
    assert matched[row] == column
    order = torch.from_numpy(np.random.default_rng(seed).permutation(number))
    assert torch.equal(match(torch.eye(number)[order] + 0.1 * cosines), order)


def test_descending_it_brings_the_structures_together_and_keeps_the_parts_apart():
    torch.manual_seed(0)
    rows, semantic = torch.randn(40, 4), torch.randn(40, 8)
    ids, weight, module = torch.arange(40), torch.ones(40), Disentangling(4, 16, 8)
    rows.requires_grad_()
    optimizer = torch.optim.Adam([rows, *module.parameters()], lr=0.02)

    def terms() -> list[float]:
        return by_hand(module(rows, semantic), ids.tolist(), weight.tolist(), 0, 4)

    before = terms()
    for _ in range(80):
        optimizer.zero_grad()
        loss(module(rows, semantic), ids, weight).backward()
        optimizer.step()
    after = terms()
    assert after[0] < 0.2 * before[0] and after[1] < before[1] and after[2] < 0.3 * before[2] and after[3] < before[3]
