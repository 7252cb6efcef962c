"""Losses that rank an item above others.

Shapes: n targets of a worker, N negatives of a target, M negatives that all share, m rows of the catalog that a worker holds, H
columns of vectors whose products are scores.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sellarec.pairs import Alike, left, log_sum_exp
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
    positive: Tensor, negative: Tensor, counts: Tensor, log_rest: Tensor, negative_log_q: Tensor
) -> Tensor:
    """Cross-entropy of the target among all items but others that are left out, for which drawn negatives stand (Bengio &
    Senécal, 2008).

    Left out are the target and whatever else is none of its negatives, as what its user is known to like. Of N negatives that
    count, drawn among the rest, one of probability q is expected N q / (1 - Q) times, where Q is how likely a draw is one that is
    left out. The logarithm of that is taken off its score, so that frequent items aren't pushed down for being frequent (logQ
    correction; Yi et al., 2019, for negatives of the batch).

    Args:
        positive, log_rest: float [n], scores of the targets, and log(1 - Q).
        negative, negative_log_q: float [n, N], scores of negatives, and the logarithm of how likely each is drawn.
        counts: bool [n, N], which negatives count.

    Returns:
        float [n].
    """
    corrected = (negative - negative_log_q).masked_fill(~counts, -torch.inf)
    others = corrected.logsumexp(1) + log_rest - counts.sum(1).clamp(min=1).log()
    return torch.logaddexp(positive, others) - positive


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


def shared_softmax(
    positive: Tensor, users: Tensor, negatives: Tensor, alike: Alike, log_q: tuple[Tensor, Tensor] | None
) -> Tensor:
    """`sampled_softmax`, or without `log_q` `softmax_among`, of targets that share their negatives: without the scores of all in
    memory.

    Args:
        positive: float [n], scores of the targets.
        users, negatives: float [n, H] and [M, H], whose products are the scores of negatives.
        alike: which negatives are none of a target's.
        log_q: float [n] and [M], the logarithm of how likely each target, and each negative, is drawn.

    Returns:
        float [n].
    """
    if log_q is None:
        others = log_sum_exp(users, negatives, alike)
    else:
        of_targets, of_negatives = log_q
        corrected = torch.cat([negatives, -of_negatives[:, None]], dim=1)
        others = log_sum_exp(torch.cat([users, torch.ones_like(users[:, :1])], dim=1), corrected, alike)
        log_rest = torch.log1p(
            -of_targets.exp().clamp(max=1 - 1e-6)
        )  # negatives are drawn for all: a target leaves out itself
        others = others + log_rest - left(users, negatives, alike).clamp(min=1).log()
    return torch.logaddexp(positive, others) - positive


def full_softmax(users: Tensor, positive: Tensor, catalog: Tensor, peers: Peers) -> Tensor:
    """Cross-entropy of the target in the whole catalog, whose rows lie on all workers.

    Each worker scores all workers' users against the rows that it holds, a block at a time; what is summed over workers is one
    number a user.

    Args:
        users: float [n, H]; n may differ between workers.
        positive: float [n], scores of the targets.
        catalog: float [m, H], the worker's rows that belong to the sum: their products with users are scores.

    Returns:
        float [n].
    """
    room = int(peers.largest(torch.tensor(float(len(users)), device=users.device)))
    found = log_sum_exp(peers.gather(F.pad(users, (0, 0, 0, room - len(users)))), catalog)
    bound = peers.largest(found.detach())  # it has no part in the gradient
    total = peers.add((found - bound).exp())
    return peers.own(total.log() + bound)[: len(users)] - positive
