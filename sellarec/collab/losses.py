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
    """Cross-entropy of the item in the whole catalog, for which drawn negatives stand (Bengio & Senécal, 2008).

    Of n negatives that count, drawn among the items other than the row's own, one of probability q is expected
    n q / (1 - q_own) times. The logarithm of that is taken off its score, so that frequent items aren't pushed down for
    being frequent (logQ correction; Yi et al., 2019, for negatives of the batch).

    Args:
        positive, positive_log_q: float [b], scores of the rows' items, and the logarithm of how likely each is drawn.
        negative, negative_log_q: float [b, N], the same of negatives.
        counts: bool [b, N], which negatives count.

    Returns:
        float [b].
    """
    others = torch.log1p(-positive_log_q.exp().clamp(max=1 - 1e-6))[:, None]
    expected = negative_log_q - others + counts.sum(1, keepdim=True).clamp(min=1).log()
    corrected = (negative - expected).masked_fill(~counts, -torch.inf)
    return torch.logsumexp(torch.cat([positive[:, None], corrected], dim=1), dim=1) - positive
