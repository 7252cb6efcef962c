"""DaRec: of two views of the items, or users, in a batch, the structure of what they share is aligned.

To draw two views together whole also draws what only one of them can know. DaRec (Yang et al., ICDE 2025, arXiv 2408.08231)
projects a shared and a specific part out of either, keeps the two apart, and aligns how the shared parts of the rows lie to each
other, not row with row.

Shapes: b rows of one worker, B rows of all workers, D columns of a collaborative row and of each part, H columns of a distilled
vector, K centres.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sellarec.alignment.contrastive import Views, log_sum_of_negatives
from sellarec.config import Align
from sellarec.fusion.projection import Projection
from sellarec.training.task import Peers

UNIFORMITY = 2.0
"""What multiplies squared distances in the uniformity of specific parts (Wang & Isola, 2020, take 2 too)."""

ROUNDS = 10
"""Rounds of k-means."""


class Parts(NamedTuple):
    """What is projected out of a collaborative and a semantic vector of each row, float [b, D] each."""

    collab_shared: Tensor
    semantic_shared: Tensor
    collab_specific: Tensor
    semantic_specific: Tensor


class Disentangling(nn.Module):
    """Four projections to the width of collaborative rows: D -> hidden -> D of these, H -> hidden -> D of semantic vectors."""

    def __init__(self, dim: int, hidden: int, width: int, layers: int = 1) -> None:
        super().__init__()
        self.collab_shared, self.collab_specific = (Projection(dim, hidden, dim, layers) for _ in range(2))
        self.semantic_shared, self.semantic_specific = (Projection(width, hidden, dim, layers) for _ in range(2))

    def forward(self, rows: Tensor, semantic: Tensor) -> Parts:
        """Collaborative vectors [b, D] and semantic ones [b, H] -> their parts."""
        return Parts(
            self.collab_shared(rows),
            self.semantic_shared(semantic),
            self.collab_specific(rows),
            self.semantic_specific(semantic),
        )


def disentangled_loss(
    parts: Parts, ids: Tensor, weight: Tensor, drawn: Tensor, peers: Peers, settings: Align
) -> Tensor:
    """DaRec's four terms of the global batch, added: a scalar, the same on all workers, which all call it.

    Of rows of one id in the global batch the first alone counts, so that a pair of rows is a pair of ids; padding never does.
    With the rows that count, and the shared parts c_i, l_i and the specific ones c'_i, l'_i at length 1,

        orthogonality     mean_i <c'_i, c_i>^2 + mean_i <l'_i, l_i>^2
        uniformity        log mean_{i /= j} exp(-2 |c'_i - c'_j|^2), and the same of l': specific parts are no constant
        global structure  mean_{i, j} (<c_i, c_j> - <l_i, l_j>)^2
        local structure   mean_k (<m_k, n_k> - 1)^2 + mean_{k /= h} <m_k, n_h>^2

    with m_k and n_k, at length 1, the centres of the c_i and of the l_i by k-means, matched as pairs: the two most alike first,
    then of those left. `centers` of them, or as many as rows count; either k-means starts from the same rows, those with the
    lowest `drawn`. Which row belongs to which centre has no gradient; centres have that of their rows. A mean of no pair is 0.

    What was at hand of the paper tells the terms and what they are for. Lengths of 1, the 2 of the uniformity, equal weights of
    the terms, and how many centres there are, how they start and how they are matched, are set here.

    Args:
        ids: int64 [b], the items, or users, of the rows.
        weight: float [b], 0 for rows without a loss.
        drawn: float [b], the same for rows of one id.
    """
    all_ids = peers.gather(ids)
    counts = _first_of_each(all_ids, peers.gather(weight))
    own, number = peers.own(counts), counts.sum()
    unit = Parts(*(F.normalize(part, dim=1) for part in parts))
    return (
        _orthogonality(unit, own, number, peers)
        + _uniformity(unit, ids, all_ids, own, counts, peers, settings)
        + _global_structure(unit, own, number, peers)
        + _local_structure(unit, own, counts, peers.gather(drawn), peers, settings.centers)
    )


def _first_of_each(ids: Tensor, weight: Tensor) -> Tensor:
    """Of ids int64 [B] those that count, as the type of `weight` [B]: 1 for the first with a weight of each id, else 0."""
    kept = weight.nonzero()[:, 0]
    distinct, which = ids[kept].unique(return_inverse=True)
    first = kept.new_full((len(distinct),), len(ids)).scatter_reduce(0, which, kept, "amin")
    return torch.zeros_like(weight).index_fill(0, first, 1.0)


def _orthogonality(unit: Parts, own: Tensor, number: Tensor, peers: Peers) -> Tensor:
    collab = (unit.collab_specific * unit.collab_shared).sum(1)
    semantic = (unit.semantic_specific * unit.semantic_shared).sum(1)
    return peers.add(((collab.square() + semantic.square()) * own).sum()) / number.clamp(min=1)


def _uniformity(
    unit: Parts, ids: Tensor, all_ids: Tensor, own: Tensor, counts: Tensor, peers: Peers, settings: Align
) -> Tensor:
    """Of either view. At length 1, exp(-t |x - y|^2) is exp(2 t <x, y> - 2 t), so the sums are those of a contrast, in blocks."""
    collab, semantic = unit.collab_specific, unit.semantic_specific
    views = Views(collab, semantic, ids, None, None, all_ids, counts)
    scaled = replace(settings, temperature=1 / (2 * UNIFORMITY))
    sums = torch.stack(
        [
            ((log_sum_of_negatives(rows, others, views, scaled) - 2 * UNIFORMITY).exp() * own).sum()
            for rows, others in ((collab, peers.gather(collab)), (semantic, peers.gather(semantic)))
        ]
    )
    pairs = counts.sum() * (counts.sum() - 1)
    return (peers.add(sums) / pairs.clamp(min=1) + (pairs == 0)).log().sum()


def _global_structure(unit: Parts, own: Tensor, number: Tensor, peers: Peers) -> Tensor:
    """The squared difference of the two matrices of all rows' products, without either: with C and L [B, D] it is
    |C^T C|^2 - 2 |C^T L|^2 + |L^T L|^2, of matrices that workers add up."""
    both = torch.cat([unit.collab_shared, unit.semantic_shared], dim=1) * own[:, None]
    squares = (peers.add(both.T @ both) / number.clamp(min=1)).square()  # [2 D, 2 D]
    width = unit.collab_shared.shape[1]
    collab, semantic = squares[:width, :width].sum(), squares[width:, width:].sum()
    return collab - 2 * squares[:width, width:].sum() + semantic


def _local_structure(unit: Parts, own: Tensor, counts: Tensor, drawn: Tensor, peers: Peers, centers: int) -> Tensor:
    start = torch.where(counts > 0, drawn, torch.inf).argsort(stable=True)[:centers]
    start = start[counts[start] > 0]
    if len(start) == 0:
        return unit.collab_shared.sum() * 0
    collab, semantic = (
        _centers(rows, own, counts, start, peers) for rows in (unit.collab_shared, unit.semantic_shared)
    )
    cosines = collab @ semantic.T  # [K, K]
    matched = match(cosines.detach())
    own_pairs = cosines.gather(1, matched[:, None])
    others = cosines.square().sum() - own_pairs.square().sum()
    return (own_pairs - 1).square().mean() + others / max(len(start) * (len(start) - 1), 1)


def _centers(rows: Tensor, own: Tensor, counts: Tensor, start: Tensor, peers: Peers) -> Tensor:
    """float [K, D] of length 1, with the gradient of this worker's rows [b, D]; one that has lost its rows has none.

    Args:
        start: int64 [K], which of all rows the centres start as.
    """
    nearest, found = cluster(peers.gather(rows.detach()), counts, start)
    members = F.one_hot(nearest, len(start)) * counts[:, None]  # [B, K]
    sums = peers.add((F.one_hot(peers.own(nearest), len(start)) * own[:, None]).T @ rows)
    return torch.where(members.any(0)[:, None], F.normalize(sums, dim=1), found)


@torch.no_grad()
def cluster(rows: Tensor, counts: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """k-means of unit vectors by their cosines.

    Args:
        rows: float [B, D].
        counts: float [B], 1 for rows that count, else 0.
        start: int64 [K], the rows that the centres start as.

    Returns:
        int64 [B], the centre of each row in the last round, and float [K, D], what that round made of the centres: the means of
        their rows, at length 1; one that has lost its rows is as before.
    """
    centers = rows[start]
    for _ in range(ROUNDS):
        nearest = (rows @ centers.T).argmax(1)
        members = F.one_hot(nearest, len(start)) * counts[:, None]
        centers = torch.where(members.any(0)[:, None], F.normalize(members.T @ rows, dim=1), centers)
    return nearest, centers


def match(cosines: Tensor) -> Tensor:
    """int64 [K]: to each row of [K, K] a column of its own, the highest entry first, then the highest of those left."""
    left, matched = cosines.cpu().clone(), torch.empty(len(cosines), dtype=torch.int64)
    for _ in range(len(left)):
        row, column = divmod(int(left.argmax()), len(left))
        matched[row] = column
        left[row], left[:, column] = -torch.inf, -torch.inf
    return matched.to(cosines.device)
