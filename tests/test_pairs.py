"""Sums over all pairs, against the matrix of all pairs."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sellarec.pairs import left, log_sum_exp

LOWEST = torch.finfo(torch.float64).min


@st.composite
def cases(draw):
    rows, others, kinds = draw(st.integers(0, 5)), draw(st.integers(0, 12)), draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    vectors = [torch.randn(n, 3, generator=generator, dtype=torch.float64).requires_grad_() for n in (rows, others)]
    alike = [tuple(torch.randint(3, (n,), generator=generator) for n in (rows, others)) for _ in range(kinds)]
    return *vectors, alike


def all_pairs(rows, others, alike):
    """Their products, and which count."""
    counts = torch.ones(len(rows), len(others), dtype=torch.bool)
    for own, theirs in alike:
        counts &= own[:, None] != theirs
    return rows @ others.T, counts


@given(cases(), st.sampled_from([1, 2, 5, 64]), st.booleans())
def test_it_is_the_sum_over_all_pairs_that_are_not_left_out(case, block, bounded):
    rows, others, alike = case
    products, counts = all_pairs(*case)
    expected = products.masked_fill(~counts, -torch.inf).exp().sum(1).log()
    bound = float(products.detach().max()) if bounded and products.numel() else None
    found = log_sum_exp(rows, others, alike, block, bound)
    torch.testing.assert_close(found, expected.clamp(min=LOWEST))
    there = counts.any(1)
    if there.any():
        ours, theirs = (
            torch.autograd.grad(of[there].sum(), (rows, others), retain_graph=True) for of in (found, expected)
        )
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)


@given(cases(), st.sampled_from([1, 2, 5, 64]))
def test_what_is_left_is_counted(case, block):
    rows, others, alike = case
    assert left(rows, others, alike, block).tolist() == all_pairs(*case)[1].sum(1).tolist()


def test_a_row_whose_others_are_all_left_out_has_no_gradient():
    rows, others = torch.ones(2, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
    found = log_sum_exp(rows, others, [(torch.tensor([1, 2]), torch.ones(4, dtype=torch.int64))])
    assert found[0] == torch.finfo(torch.float32).min
    torch.testing.assert_close(found[1], torch.tensor(3 + 4.0).sub(4 - torch.tensor(4.0).log()))
    found.sum().backward()
    assert rows.grad.tolist() == [[0] * 3, [1] * 3]


def test_products_far_apart_neither_overflow_nor_vanish():
    rows, others = torch.tensor([[300.0], [-300.0]]), torch.tensor([[1.0], [-1.0], [0.5]])
    for block in (1, 2, 3):
        torch.testing.assert_close(log_sum_exp(rows, others, block=block), torch.logsumexp(rows @ others.T, 1))
