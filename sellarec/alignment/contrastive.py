"""Contrastive alignment of two views of the items, or users, in a batch.

Shapes: b rows of one worker, B rows of all workers, m of them that are gone through at once, H columns of either view.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sellarec.config import Align
from sellarec.training.task import Peers


@dataclass(frozen=True)
class Views:
    """Two views of each row: a collaborative vector and a semantic one, of which one is projected to the width of the other.

    Attributes:
        collab, semantic: float [b, H], of this worker's rows.
        ids: int64 [b], the items, or users, that they are of.
        all_collab, all_semantic, all_ids: [B, H], [B, H], [B]: the same of all workers.
        all_weight: float [B], 0 for rows without a loss (padding), which are nobody's negatives.
    """

    collab: Tensor
    semantic: Tensor
    ids: Tensor
    all_collab: Tensor
    all_semantic: Tensor
    all_ids: Tensor
    all_weight: Tensor

    @classmethod
    def gather(cls, collab: Tensor, semantic: Tensor, ids: Tensor, weight: Tensor, peers: Peers) -> "Views":
        """Of this worker's rows. All workers call it."""
        return cls(collab, semantic, ids, *(peers.gather(rows) for rows in (collab, semantic, ids, weight)))


def contrastive_loss(views: Views, settings: Align, peers: Peers) -> Tensor:
    """What draws a row's two views together, and apart from the other rows', float [b]: a loss per row. All workers call it.

    Of this worker's rows against all workers', so it doesn't depend on how rows lie on workers. With temperature t,

        s_ij = cos(semantic_i, collab_j) / t,  pos_i = exp(s_ii),  neg_i = sum_j exp(s_ij),

    where j runs over the rows of the global batch with another id than row i. Rows of the same id are no negatives of each
    other; with `mask_equal` false they are, and j runs over all rows, row i itself too. Padding counts nowhere.

    info-nce (Oord et al., 2018): -log(pos_i / (pos_i + neg_i)); with `mask_equal` false -log(pos_i / neg_i), as pos_i is in
    neg_i: the cross-entropy over the batch, as in CLIP.

    rince (Chuang et al., 2022): -pos_i^q / q + (lambda (pos_i + neg_i))^q / q, which becomes info-nce plus log lambda as q goes
    to 0. With `mask_equal` false it is the loss of SeLLa-Rec's published code, in which pos_i counts twice in the second term:
    by itself and in neg_i.

    With `direction` both, it is the mean of that and of the same with collab_i and semantic_j.

    rlmrec-con, rlmrec-gen (the contrastive and the generative alignment of RLMRec, Ren et al., 2024, arXiv 2310.15950): info-nce
    with collab_i and semantic_j alone, as its code has them; the paper's f(s_j, e_i) = exp(cos(sigma_down(s_j), e_i)), and
    exp(cos(s_j, sigma_up(e_i))). With `mask_equal` false, rows of one item in a batch count as there. Other than there,

    - sigma is Linear - GELU - Linear of a width that is set, where the code has LeakyReLU and the mean of both widths;
    - s of an item is its distilled vector and s of a user the mean of those of its history, not embeddings of written profiles;
    - negatives are the rows of the global batch, of users as of items, where the code takes all users, and has a second term, of
      drawn negative items; and users are no negatives of items, where its generative loss goes through both at once.
    """
    collab, semantic, all_collab, all_semantic = (
        F.normalize(rows, dim=1) for rows in (views.collab, views.semantic, views.all_collab, views.all_semantic)
    )
    positive = (collab * semantic).sum(1) / settings.temperature
    backwards = settings.contrastive.startswith("rlmrec")
    if settings.direction == "both" and not backwards and _has_room(collab.dtype, settings):
        negatives = log_sums_exp(semantic, all_collab, views, settings, peers)
    else:
        sides = [] if backwards else [(semantic, all_collab)]
        if backwards or settings.direction == "both":
            sides.append((collab, all_semantic))
        negatives = tuple(log_sum_exp(rows, others, views, settings) for rows, others in sides)
    losses = []
    for negative in negatives:
        if settings.contrastive == "rince":
            losses.append(_rince(positive, torch.logaddexp(positive, negative), settings))
        else:
            total = torch.logaddexp(positive, negative) if settings.mask_equal else negative
            losses.append(total - positive)
    return torch.stack(losses).mean(0)


def _rince(positive: Tensor, total: Tensor, settings: Align) -> Tensor:
    """From log pos_i and log(pos_i + neg_i). The ones of both powers cancel: at a small q they are nearly all of them."""
    q = settings.rince_q
    scaled = total + torch.log(torch.tensor(settings.rince_lambda, dtype=total.dtype, device=total.device))
    return (torch.expm1(q * scaled) - torch.expm1(q * positive)) / q


def log_sum_exp(rows: Tensor, others: Tensor, views: Views, settings: Align) -> Tensor:
    """log sum_j exp(<rows_i, others_j> / t) over the negatives, float [b]; of unit vectors [b, H] and [B, H].

    Goes through `block` others at a time, and through each again in the backward pass, so that of all pairs never more than
    [b, block] are in memory. Without a negative it is the dtype's lowest number: finite, so that gradients are.
    """
    return _LogSumExp.apply(rows, *_counted(others, views, settings), settings)


def log_sums_exp(rows: Tensor, others: Tensor, views: Views, settings: Align, peers: Peers) -> tuple[Tensor, Tensor]:
    """`log_sum_exp` of this worker's rows and all others, and of this worker's others and all rows: float [b] each.

    Both come from the same products: what each worker sums over its own rows is added up. All workers call it, and `_has_room`
    must hold.
    """
    counts, all_ids = views.all_weight > 0, views.all_ids if settings.mask_equal else None
    of_rows, of_others = _Sums.apply(rows, others, peers.own(counts), counts, views.ids, all_ids, settings)
    return tuple(_log(sums) + 1 / settings.temperature for sums in (of_rows, peers.own(peers.add(of_others))))


def _log(sums: Tensor) -> Tensor:
    """The logarithm; of 0 half of the dtype's lowest number, without a gradient."""
    return torch.where(sums > 0, sums, 1).log().where(sums > 0, torch.finfo(sums.dtype).min / 2)


def _has_room(dtype: torch.dtype, settings: Align) -> bool:
    """Whether exp(s - 1 / t) is above 0 for all scores s of unit vectors, which lie between -1 / t and 1 / t."""
    return 2 / settings.temperature < -math.log(torch.finfo(dtype).tiny)


def _counted(others: Tensor, views: Views, settings: Align) -> tuple[Tensor, Tensor, Tensor | None]:
    counts = views.all_weight.nonzero()[:, 0]
    return others.index_select(0, counts), views.ids, views.all_ids[counts] if settings.mask_equal else None


class _LogSumExp(torch.autograd.Function):
    """`log_sum_exp`, where all others count but those with the row's own id. What it costs beside matrix products are passes over
    all pairs, so each block has two: an exponential, and in the forward pass a sum. A row's shift comes out of the product."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, others: Tensor, ids: Tensor, all_ids: Tensor | None, settings: Align) -> Tensor:
        lowest = torch.finfo(rows.dtype).min
        shift = _shift(rows, others, ids, all_ids, settings)
        total = torch.zeros_like(shift)
        for _, scores, equal in _blocks(rows, others, shift, ids, all_ids, settings):
            scores.exp_()
            scores[equal] = 0
            total += scores.sum(1)
        total = (shift + total.log()).clamp(min=lowest)
        ctx.ids, ctx.all_ids, ctx.settings = ids, all_ids, settings
        ctx.save_for_backward(rows, others, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        rows, others, total = ctx.saved_tensors
        of_rows, of_others = torch.zeros_like(rows), torch.empty_like(others)
        scale = gradient[:, None] / ctx.settings.temperature
        weighted = rows * scale
        # of a row without negatives nothing depends on the total: its shares are 0
        shift = torch.where(total > torch.finfo(total.dtype).min, total, torch.finfo(total.dtype).max)
        for part, shares, equal in _blocks(rows, others, shift, ctx.ids, ctx.all_ids, ctx.settings):
            shares.exp_()
            shares[equal] = 0
            of_rows.addmm_(shares, others[part])
            torch.mm(shares.T, weighted, out=of_others[part])
        return of_rows.mul_(scale), of_others, None, None, None


class _Sums(torch.autograd.Function):
    """exp(<rows_i, others_j> / t - 1 / t), summed over the others, [b], and over this worker's rows, [B], that count."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, others: Tensor, own: Tensor, counts: Tensor, ids: Tensor, all_ids: Tensor | None,
        settings: Align,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        own, counts = own.to(rows.dtype), counts.to(rows.dtype)
        of_rows, of_others = torch.zeros_like(own), torch.empty_like(counts)
        shift = torch.full_like(own, 1 / settings.temperature)
        for part, scores, equal in _blocks(rows, others, shift, ids, all_ids, settings):
            scores.exp_()
            scores[equal] = 0
            of_rows.addmv_(scores, counts[part])
            torch.mv(scores.T, own, out=of_others[part])
        ctx.ids, ctx.all_ids, ctx.settings = ids, all_ids, settings
        ctx.save_for_backward(rows, others, own, counts, shift)
        return of_rows, of_others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_row_sums: Tensor, of_other_sums: Tensor) -> tuple[Tensor | None, ...]:
        rows, others, own, counts, shift = ctx.saved_tensors
        of_rows, of_others = torch.zeros_like(rows), torch.empty_like(others)
        # of a pair's exponential: of_row_sums_i counts_j + own_i of_other_sums_j
        left, right = torch.stack([of_row_sums, own], dim=1), torch.stack([counts, of_other_sums])
        buffer = rows.new_empty(len(rows) * min(ctx.settings.block, len(others)))
        for part, scores, equal in _blocks(rows, others, shift, ctx.ids, ctx.all_ids, ctx.settings):
            scores.exp_()
            scores[equal] = 0
            gradient = torch.mm(left, right[:, part], out=buffer[: scores.numel()].view_as(scores)).mul_(scores)
            of_rows.addmm_(gradient, others[part])
            torch.mm(gradient.T, rows, out=of_others[part])
        scale = 1 / ctx.settings.temperature
        return of_rows.mul_(scale), of_others.mul_(scale), None, None, None, None, None


def _shift(rows: Tensor, others: Tensor, ids: Tensor, all_ids: Tensor | None, settings: Align) -> Tensor:
    """What is taken off a row's scores before their exponentials, float [b]: 1 / t, the highest that can be, or where that could
    leave exponentials of 0, the highest that there is."""
    if _has_room(rows.dtype, settings):
        return rows.new_full((len(rows),), 1 / settings.temperature)
    highest = rows.new_full((len(rows),), torch.finfo(rows.dtype).min)
    for _, scores, equal in _blocks(rows, others, torch.zeros_like(highest), ids, all_ids, settings):
        scores[equal] = torch.finfo(rows.dtype).min
        highest = torch.maximum(highest, scores.amax(1))
    return highest


Block = tuple[slice, Tensor, tuple[Tensor, Tensor]]
"""Which others; their scores with each row, float [b, m]; the places in it, int64 [p] twice, of others with the row's own id."""


def _blocks(
    rows: Tensor, others: Tensor, shift: Tensor, ids: Tensor, all_ids: Tensor | None, settings: Align
) -> Iterator[Block]:
    """<rows_i, others_j> / t - shift_i, a block of others after the other; all are written into the same memory."""
    shifted = torch.cat([rows / settings.temperature, -shift[:, None]], dim=1)
    ones = torch.cat([others, torch.ones_like(others[:, :1])], dim=1)
    buffer = rows.new_empty(len(rows) * min(settings.block, len(others)))
    for start in range(0, len(others), settings.block):
        part = slice(start, min(start + settings.block, len(others)))
        scores = buffer[: len(rows) * (part.stop - start)].view(len(rows), -1)
        torch.mm(shifted, ones[part].T, out=scores)
        yield part, scores, _equal(ids, ids[:0] if all_ids is None else all_ids[part])


def _equal(ids: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The places (i, j) of equal ids of [b] and [m]. There are few, so they are looked up and not compared one by one."""
    ordered, order = others.sort()
    first = torch.searchsorted(ordered, ids)
    number = torch.searchsorted(ordered, ids, right=True) - first
    row = torch.repeat_interleave(number)
    of_row = torch.arange(len(row), device=row.device) - (number.cumsum(0) - number)[row]
    return row, order[first[row] + of_row]
