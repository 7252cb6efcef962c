"""Contrastive alignment of two views of the items, or users, in a batch.

Shapes: b rows of one worker, B rows of all workers, m of them that are gone through at once, H columns of either view.
"""

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


def contrastive_loss(views: Views, settings: Align) -> Tensor:
    """What draws a row's two views together, and apart from the other rows', float [b]: a loss per row.

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
    sides = []
    if not settings.contrastive.startswith("rlmrec"):
        sides.append((semantic, all_collab))
    if settings.contrastive.startswith("rlmrec") or settings.direction == "both":
        sides.append((collab, all_semantic))
    losses = []
    for rows, others in sides:
        negative = log_sum_exp(rows, others, views, settings)
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
    return _LogSumExp.apply(rows, others, views, settings)


class _LogSumExp(torch.autograd.Function):
    """`log_sum_exp`. One buffer serves all blocks: many large tensors that come and go leave gaps in the memory of CPUs."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, others: Tensor, views: Views, settings: Align) -> Tensor:
        total = rows.new_full((len(rows),), torch.finfo(rows.dtype).min)
        for scores, _ in _blocks(rows, others, views, settings):
            highest = scores.amax(1)
            total = torch.logaddexp(total, highest + scores.sub_(highest[:, None]).exp_().sum(1).log())
        ctx.views, ctx.settings = views, settings  # of the views ids and weights are read, which have no gradient
        ctx.save_for_backward(rows, others, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, others, total = ctx.saved_tensors
        of_rows, of_others = torch.zeros_like(rows), torch.empty_like(others)
        for scores, part in _blocks(rows, others, ctx.views, ctx.settings):
            # of a row without negatives nothing depends on the total, so its gradient is 0
            shares = scores.sub_(total[:, None]).exp_().mul_(gradient[:, None] / ctx.settings.temperature)
            of_rows.addmm_(shares, others[part])
            torch.mm(shares.T, rows, out=of_others[part])
        return of_rows, of_others, None, None


def _blocks(rows: Tensor, others: Tensor, views: Views, settings: Align) -> Iterator[tuple[Tensor, slice]]:
    """<rows_i, others_j> / t for some others, [b, m], with the lowest number where j is no negative of i; and which others.
    All are written into the same memory."""
    buffer = rows.new_empty(len(rows) * min(settings.block, len(others)))
    for start in range(0, len(others), settings.block):
        part = slice(start, min(start + settings.block, len(others)))
        scores = buffer[: len(rows) * (part.stop - start)].view(len(rows), -1)
        torch.mm(rows, others[part].T, out=scores)
        excluded = views.all_weight[part] == 0
        if settings.mask_equal:
            excluded = excluded | (views.ids[:, None] == views.all_ids[part])
        yield scores.div_(settings.temperature).masked_fill_(excluded, torch.finfo(scores.dtype).min), part
