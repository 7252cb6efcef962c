"""Contrastive alignment of two views of the items, or users, in a batch.

Shapes: b rows of one worker, B rows of all workers, H columns of either view.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sellarec.config import Align
from sellarec.pairs import Alike, blocks, log_sum_exp
from sellarec.training.task import Peers


@dataclass(frozen=True)
class Views:
    """Two views of each row: a collaborative vector and a semantic one, of which one is projected to the width of the other.

    Attributes:
        collab, semantic: float [b, H], of this worker's rows.
        ids: int64 [b], the items, or users, that they are of.
        all_collab, all_semantic, all_ids: [B, H], [B, H], [B]: the same of all workers. Where own rows aren't compared with
            all of a view (`compares_with_all`), which is most of what is gathered, it may be None.
        all_weight: float [B], 0 for rows without a loss (padding), which are nobody's negatives.
    """

    collab: Tensor
    semantic: Tensor
    ids: Tensor
    all_collab: Tensor | None
    all_semantic: Tensor | None
    all_ids: Tensor
    all_weight: Tensor

    @classmethod
    def gather(
        cls, collab: Tensor, semantic: Tensor, ids: Tensor, weight: Tensor, settings: Align, peers: Peers
    ) -> "Views":
        """Of this worker's rows, with what `contrastive_loss` needs of all workers'. All workers call it."""
        with_collab, with_semantic = compares_with_all(settings, collab.dtype)
        return cls(
            *(collab, semantic, ids),
            all_collab=peers.gather(collab) if with_collab else None,
            all_semantic=peers.gather(semantic) if with_semantic else None,
            all_ids=peers.gather(ids),
            all_weight=peers.gather(weight),
        )


def compares_with_all(settings: Align, dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether own rows are compared with all workers' collaborative vectors, and with all workers' semantic ones. In both
    directions one of the two will do, as what workers sum over their own rows is added up, unless a temperature is so low that
    sums of exponentials aren't safe."""
    if settings.contrastive.startswith("rlmrec"):
        return False, True
    return True, settings.direction == "both" and not _has_room(dtype, settings)


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
    - s of an item is its distilled vector, and s of a user the mean of those of its history, or the distilled vector of a list of
      liked titles, not an embedding of a profile that a language model has written;
    - negatives are the rows of the global batch, of users as of items, where the code takes all users, and has a second term, of
      drawn negative items; and users are no negatives of items, where its generative loss goes through both at once.
    """
    collab, semantic = F.normalize(views.collab, dim=1), F.normalize(views.semantic, dim=1)
    positive = (collab * semantic).sum(1) / settings.temperature
    needed = zip(
        compares_with_all(settings, collab.dtype),
        ((semantic, views.all_collab), (collab, views.all_semantic)),
        strict=True,
    )
    sides = [(rows, F.normalize(others, dim=1)) for is_needed, (rows, others) in needed if is_needed]
    backwards = settings.contrastive.startswith("rlmrec")
    if settings.direction == "both" and not backwards and len(sides) == 1:
        negatives = _both_ways(*sides[0], views, settings, peers)
    else:
        negatives = tuple(log_sum_of_negatives(rows, others, views, settings) for rows, others in sides)
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


def log_sum_of_negatives(rows: Tensor, others: Tensor, views: Views, settings: Align) -> Tensor:
    """log sum_j exp(<rows_i, others_j> / t) over the negatives, float [b]; of unit vectors [b, H] and [B, H].

    Without a negative it is the dtype's lowest number: finite, so that gradients are.
    """
    counts = views.all_weight.nonzero()[:, 0]
    alike = ((views.ids, views.all_ids[counts]),) if settings.mask_equal else ()
    bound = 1 / settings.temperature if _has_room(rows.dtype, settings) else None
    return log_sum_exp(rows / settings.temperature, others.index_select(0, counts), alike, settings.block, bound)


def _both_ways(rows: Tensor, others: Tensor, views: Views, settings: Align, peers: Peers) -> tuple[Tensor, Tensor]:
    """`log_sum_of_negatives` of this worker's rows and all others, and of this worker's others and all rows: float [b] each.

    Both come from the same products: what each worker sums over its own rows is added up. All workers call it, and `_has_room`
    must hold.
    """
    counts, bound = views.all_weight > 0, 1 / settings.temperature
    alike = ((views.ids, views.all_ids),) if settings.mask_equal else ()
    found = _Sums.apply(rows / settings.temperature, others, peers.own(counts), counts, alike, settings.block, bound)
    of_rows, of_others = found[0], peers.own(peers.add(found[1]))
    return _log(of_rows) + bound, _log(of_others) + bound


def _log(sums: Tensor) -> Tensor:
    """The logarithm; of 0 half of the dtype's lowest number, without a gradient."""
    return torch.where(sums > 0, sums, 1).log().where(sums > 0, torch.finfo(sums.dtype).min / 2)


def _has_room(dtype: torch.dtype, settings: Align) -> bool:
    """Whether exp(s - 1 / t) is above 0 for all scores s of unit vectors, which lie between -1 / t and 1 / t."""
    return 2 / settings.temperature < -math.log(torch.finfo(dtype).tiny)


class _Sums(torch.autograd.Function):
    """exp(<rows_i, others_j> - bound), summed over the others, [b], and over this worker's rows, [B], that count."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, others: Tensor, own: Tensor, counts: Tensor, alike: Alike, block: int, bound: float
    ) -> tuple[Tensor, Tensor]:
        own, counts = own.to(rows.dtype), counts.to(rows.dtype)
        of_rows, of_others = torch.zeros_like(own), torch.empty_like(counts)
        shift = torch.full_like(own, bound)
        for part, scores, left_out in blocks(rows, others, shift, alike, block):
            scores.exp_()
            scores[left_out] = 0
            of_rows.addmv_(scores, counts[part])
            torch.mv(scores.T, own, out=of_others[part])
        ctx.alike, ctx.block = alike, block
        ctx.save_for_backward(rows, others, own, counts, shift)
        return of_rows, of_others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_row_sums: Tensor, of_other_sums: Tensor) -> tuple[Tensor | None, ...]:
        rows, others, own, counts, shift = ctx.saved_tensors
        of_rows, of_others = torch.zeros_like(rows), torch.empty_like(others)
        # of a pair's exponential: of_row_sums_i counts_j + own_i of_other_sums_j
        of_pairs = torch.stack([of_row_sums, own], dim=1), torch.stack([counts, of_other_sums])
        buffer = rows.new_empty(len(rows) * min(ctx.block, len(others)))
        for part, scores, left_out in blocks(rows, others, shift, ctx.alike, ctx.block):
            scores.exp_()
            scores[left_out] = 0
            gradient = torch.mm(of_pairs[0], of_pairs[1][:, part], out=buffer[: scores.numel()].view_as(scores))
            gradient.mul_(scores)
            of_rows.addmm_(gradient, others[part])
            torch.mm(gradient.T, rows, out=of_others[part])
        return of_rows, of_others, None, None, None, None, None
