"""The softmax over negatives that a batch shares, and its gradients."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sellarec.collab.losses import shared_softmax


def repetition(work: dict[str, Any], loss_of: Callable[..., Tensor]) -> Callable[[], tuple[int, dict]]:
    generator, device = torch.Generator().manual_seed(0), work["device"]
    sizes = work["batch"], work["batch"], work["negatives"]
    users, targets, negatives = (
        torch.randn(size, work["width"], generator=generator).div(3).to(device).requires_grad_() for size in sizes
    )
    items = [torch.randint(work["items"], (size,), generator=generator).to(device) for size in sizes[1:]]

    def repeat() -> tuple[int, dict]:
        for rows in (users, targets, negatives):
            rows.grad = None
        loss = loss_of((users * targets).sum(1), users, negatives, *items).mean()
        loss.backward()
        norms = [rows.grad.norm().item() for rows in (users, targets, negatives)]  # waits for a GPU
        return len(users), {"loss": loss.item(), "gradient norms": norms}

    return repeat


def ours(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    log_q = [
        torch.full((work[name],), -math.log(work["items"]), device=work["device"]) for name in ("batch", "negatives")
    ]

    def loss(positive: Tensor, users: Tensor, negatives: Tensor, items: Tensor, others: Tensor) -> Tensor:
        return shared_softmax(positive, users, negatives, [(items, others)], (log_q[0], log_q[1]))

    return repetition(work, loss)


def plain(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    """The scores of all negatives less the logarithm of how often each is expected, and the cross-entropy of the target first."""

    def loss(positive: Tensor, users: Tensor, negatives: Tensor, items: Tensor, others: Tensor) -> Tensor:
        same = items[:, None] == others
        expected = (~same).sum(1, keepdim=True) / (work["items"] - 1)  # of uniform draws among the other items
        scores = (users @ negatives.T - expected.log()).masked_fill(same, -torch.inf)
        logits = torch.cat([positive[:, None], scores], dim=1)
        return F.cross_entropy(logits, torch.zeros_like(items), reduction="none")

    return repetition(work, loss)
