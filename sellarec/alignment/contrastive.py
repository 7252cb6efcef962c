"""Contrastive alignment of two views of the items in a batch.

Shapes: b rows of one worker, B rows of all workers, H columns.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def symmetric_info_nce(
    left: Tensor,
    right: Tensor,
    ids: Tensor,
    all_left: Tensor,
    all_right: Tensor,
    all_ids: Tensor,
    all_weight: Tensor,
    temperature: float,
) -> Tensor:
    """Symmetric InfoNCE (Oord et al., 2018; both directions as in CLIP) of this worker's rows against all workers'.

    With s_ij = cos(left_i, right_j) / temperature, a row's loss is the mean over both directions of

        -s_ii + log sum_j exp(s_ij),

    j running over row i itself and every row of the global batch with another item: equal items are no negatives of
    each other. It doesn't depend on how rows lie on workers.

    Args:
        left, right: float [b, H], the two views of this worker's rows.
        ids: int64 [b], their items.
        all_left, all_right, all_ids: [B, H], [B, H], [B]: the same of all workers.
        all_weight: float [B], 0 for padding, which is nobody's negative.

    Returns:
        float [b], a loss per row.
    """
    left, right, all_left, all_right = (F.normalize(x, dim=1) for x in (left, right, all_left, all_right))
    positive = (left * right).sum(1) / temperature
    excluded = (ids[:, None] == all_ids) | (all_weight == 0)
    losses = []
    for rows, others in ((left, all_right), (right, all_left)):
        negatives = (rows @ others.T / temperature).masked_fill(excluded, -torch.inf)
        losses.append(torch.logsumexp(torch.cat([positive[:, None], negatives], dim=1), dim=1) - positive)
    return (losses[0] + losses[1]) / 2
