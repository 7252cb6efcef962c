"""Losses that rank an item above others.

Shapes: n targets of a worker, N candidates of a target, D columns, W workers, m rows of the catalog that a worker holds.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sellarec.training.task import Peers


def bpr(positive: Tensor, negative: Tensor, counts: Tensor) -> Tensor:
    """Bayesian personalised ranking (Rendle et al., 2009): the mean of -log sigmoid(positive - negative).

    Args:
        positive: float [n], scores of the targets.
        negative: float [n, N], scores of negatives.
        counts: bool [n, N], which of them count.

    Returns:
        float [n]; 0 for a target without negatives.
    """
    losses = F.softplus(negative - positive[:, None]) * counts
    return losses.sum(1) / counts.sum(1).clamp(min=1)


def sampled_softmax(
    positive: Tensor, negative: Tensor, counts: Tensor, positive_log_q: Tensor, negative_log_q: Tensor
) -> Tensor:
    """Cross-entropy of the target in the whole catalog, for which drawn negatives stand (Bengio & Senécal, 2008).

    Of N negatives that count, drawn among the items other than the target, one of probability q is expected
    N q / (1 - q_target) times. The logarithm of that is taken off its score, so that frequent items aren't pushed down for
    being frequent (logQ correction; Yi et al., 2019, for negatives of the batch).

    Args:
        positive, positive_log_q: float [n], scores of the targets, and the logarithm of how likely each is drawn.
        negative, negative_log_q: float [n, N], the same of negatives.
        counts: bool [n, N], which negatives count.

    Returns:
        float [n].
    """
    others = torch.log1p(-positive_log_q.exp().clamp(max=1 - 1e-6)) - counts.sum(1).clamp(min=1).log()
    # in place, as in-batch negatives of a large batch are the largest tensor by far
    corrected = (negative - negative_log_q).add_(others[:, None]).masked_fill_(~counts, -torch.inf)
    return torch.logaddexp(positive, torch.logsumexp(corrected, dim=1)) - positive


def softmax_among(positive: Tensor, negative: Tensor, counts: Tensor) -> Tensor:
    """Cross-entropy of the target among itself and its negatives, however likely each was drawn.

    Args:
        positive: float [n], scores of the targets.
        negative: float [n, N], scores of negatives.
        counts: bool [n, N], which negatives count.

    Returns:
        float [n].
    """
    return torch.logaddexp(positive, negative.masked_fill(~counts, -torch.inf).logsumexp(1)) - positive


def full_softmax(
    users: Tensor, positive: Tensor, scores: Callable[[Tensor], Tensor], allowed: Tensor, peers: Peers
) -> Tensor:
    """Cross-entropy of the target in the whole catalog, whose rows lie on all workers.

    Each worker scores all workers' users against the rows that it holds; what is summed over workers is one number a user.
    Takes memory for [W n, m] scores, where n is the largest of any worker.

    Args:
        users: float [n, D].
        positive: float [n], scores of the targets.
        scores: float [W n, D] -> [W n, m], the scores of the worker's rows, in a tensor that may be changed.
        allowed: bool [m], which of the rows belong to the sum.

    Returns:
        float [n].
    """
    room = int(peers.largest(torch.tensor(float(len(users)), device=users.device)))
    found = scores(peers.gather(F.pad(users, (0, 0, 0, room - len(users))))).masked_fill_(~allowed, -torch.inf)
    lowest = torch.finfo(
        found.dtype
    ).min  # a finite bound, where no row is allowed; the bound has no part in the gradient
    bound = found.detach().amax(1) if found.shape[1] else found.new_full((len(found),), lowest)
    bound = peers.largest(bound.clamp(min=lowest))
    total = peers.add(found.sub_(bound[:, None]).exp_().sum(1))  # in place: the scores are the largest tensor by far
    return peers.own(total.log() + bound)[: len(users)] - positive
