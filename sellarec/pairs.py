"""Sums over all pairs of two sets of vectors, a block of pairs at a time: the matrix of all pairs is never in memory.

Shapes: n rows, m others, H columns of both; k of the others are gone through at once.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Alike = Sequence[tuple[Tensor, Tensor]]
"""Numbers of the rows, int64 [n], and of the others, int64 [m]: pairs that have the same, in any of them, are left out.
They are looked up, not compared one by one, which is quick where they are few (16 bytes each)."""

BLOCK = 512
"""Others that are gone through at once: enough for a product to be fast, and few enough to stay in a cache."""


def log_sum_exp(
    rows: Tensor, others: Tensor, alike: Alike = (), block: int = BLOCK, bound: float | None = None
) -> Tensor:
    """log sum_j exp(<rows_i, others_j>) over the others that aren't left out, float [n]; of [n, H] and [m, H].

    Each block is computed again in the backward pass, so that of all pairs never more than [n, block] are in memory. Without
    others it is the dtype's lowest number: finite, so that gradients are.

    Args:
        bound: no product is above it, and exponentials of products less it are above 0; None where none is known, which
            takes a look for the largest one of each block.
    """
    return _LogSumExp.apply(rows, others, alike, block, bound)


def left(rows: Tensor, others: Tensor, alike: Alike, block: int = BLOCK) -> Tensor:
    """How many others of each row aren't left out, int64 [n]; of [n, H] and [m, H]."""
    found = torch.full((len(rows),), len(others), device=rows.device)
    for start in range(0, len(others), block):
        places, _ = _left_out(alike, slice(start, start + block), rows.device)
        found -= torch.bincount(places, minlength=len(rows))
    return found


class _LogSumExp(torch.autograd.Function):
    """What it costs beside matrix products are passes over all pairs: with a bound, which comes out of the product, each pair has
    two, an exponential and in the forward pass a sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, others: Tensor, alike: Alike, block: int, bound: float | None) -> Tensor:
        lowest = torch.finfo(rows.dtype).min
        shift, sums = rows.new_full((len(rows),), lowest if bound is None else bound), rows.new_zeros(len(rows))
        for _, scores, left_out in blocks(rows, others, None if bound is None else shift, alike, block):
            if bound is None:
                scores[left_out] = lowest
                before, shift = shift, torch.maximum(shift, scores.amax(1))
                scores.sub_(shift[:, None])
                sums *= (before - shift).exp_()
            scores.exp_()
            scores[left_out] = 0
            sums += scores.sum(1)
        total = (shift + sums.log()).clamp(min=lowest)
        ctx.alike, ctx.block = alike, block
        ctx.save_for_backward(rows, others, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        rows, others, total = ctx.saved_tensors
        of_rows, of_others = torch.zeros_like(rows), torch.empty_like(others)
        weighted = rows * gradient[:, None]
        # of a row without others nothing depends on the total: its shares are 0
        shift = torch.where(total > torch.finfo(total.dtype).min, total, torch.finfo(total.dtype).max)
        for part, shares, left_out in blocks(rows, others, shift, ctx.alike, ctx.block):
            shares.exp_()
            shares[left_out] = 0
            of_rows.addmm_(shares, others[part])
            torch.mm(shares.T, weighted, out=of_others[part])
        return of_rows.mul_(gradient[:, None]), of_others, None, None, None


Block = tuple[slice, Tensor, tuple[Tensor, Tensor]]
"""Which others; their products with each row, float [n, k]; the places in it, int64 [p] twice, of pairs that are left out."""


def blocks(rows: Tensor, others: Tensor, shift: Tensor | None, alike: Alike, block: int) -> Iterator[Block]:
    """<rows_i, others_j> - shift_i, a block of others after the other; all are written into the same memory."""
    if shift is not None:  # within the product, where it costs next to nothing
        rows = torch.cat([rows, -shift[:, None]], dim=1)
        others = torch.cat([others, torch.ones_like(others[:, :1])], dim=1)
    buffer = rows.new_empty(len(rows) * min(block, len(others)))
    for start in range(0, len(others), block):
        part = slice(start, min(start + block, len(others)))
        products = buffer[: len(rows) * (part.stop - start)].view(len(rows), part.stop - start)
        torch.mm(rows, others[part].T, out=products)
        yield part, products, _left_out(alike, part, rows.device)


def _left_out(alike: Alike, part: slice, device: torch.device) -> tuple[Tensor, Tensor]:
    """The places (i, j) of pairs with equal numbers, each once."""
    if not alike:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return none, none
    found = [_equal(ids, others[part]) for ids, others in alike]
    if len(found) == 1:
        return found[0]
    columns = part.stop - part.start
    places = torch.cat([row * columns + column for row, column in found]).unique()
    return places // columns, places % columns


def _equal(ids: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    ordered, order = others.sort()
    first = torch.searchsorted(ordered, ids)
    number = torch.searchsorted(ordered, ids, right=True) - first
    row = torch.repeat_interleave(number)
    of_row = torch.arange(len(row), device=row.device) - (number.cumsum(0) - number)[row]
    return row, order[first[row] + of_row]
