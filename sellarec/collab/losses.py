"""Losses that rank an item above negatives.

Shapes: b rows, N negatives of a row.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def bpr(positive: Tensor, negative: Tensor, counts: Tensor) -> Tensor:
    """Bayesian personalised ranking (Rendle et al., 2009): the mean of -log sigmoid(positive - negative).

    Args:
        positive: float [b], scores of the rows' items.
        negative: float [b, N], scores of negatives.
        counts: bool [b, N], which of them count.

    Returns:
        float [b]; 0 for a row without negatives.
    """
    losses = F.softplus(negative - positive[:, None]) * counts
    return losses.sum(1) / counts.sum(1).clamp(min=1)


def sampled_softmax(
    positive: Tensor, negative: Tensor, counts: Tensor, positive_log_q: Tensor, negative_log_q: Tensor
) -> Tensor:
    """Cross-entropy of the item among its negatives, their scores corrected for how likely they were drawn (logQ).

    score - log q, of the item as of its negatives (Bengio & Senécal, 2008; in batches Yi et al., 2019), so that frequent
    negatives aren't pushed down for being frequent.

    Args:
        positive, positive_log_q: float [b].
        negative, negative_log_q: float [b, N].
        counts: bool [b, N], which negatives count.

    Returns:
        float [b].
    """
    true = positive - positive_log_q
    others = (negative - negative_log_q).masked_fill(~counts, -torch.inf)
    return torch.logsumexp(torch.cat([true[:, None], others], dim=1), dim=1) - true
