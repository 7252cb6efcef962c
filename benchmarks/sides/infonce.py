"""The symmetric contrastive loss of a global batch, and its gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sides.language import peak_flops
from torch import Tensor
from torch.nn import functional as F

from sellarec.alignment.contrastive import Views, contrastive_loss
from sellarec.config import Align
from sellarec.training.task import Alone

Loss = Callable[[Tensor, Tensor], Tensor]


def repetition(work: dict[str, Any], loss_of: Loss) -> Callable[[], tuple[int, dict]]:
    generator = torch.Generator().manual_seed(0)
    shape = number, columns = work["batch"], work["width"]
    # the product of all pairs, which both directions share, and two for its gradients
    asked = {"model FLOPs": 6 * number**2 * columns, "peak FLOPs/s": peak_flops(work["device"], torch.float32)}
    collab, semantic = (
        torch.randn(shape, generator=generator).to(work["device"]).requires_grad_() for _ in range(2)
    )  # fmt: skip

    def repeat() -> tuple[int, dict]:
        collab.grad = semantic.grad = None
        loss = loss_of(collab, semantic)
        loss.backward()
        norms = [rows.grad.norm().item() for rows in (collab, semantic)]  # waits for a GPU
        return len(collab), {"loss": loss.item(), "gradient norms": norms, **asked}

    return repeat


def ours(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    settings = Align(temperature=work["temperature"], block=work["block"])
    ids, weight = (make(work["batch"], device=work["device"]) for make in (torch.arange, torch.ones))

    def loss(collab: Tensor, semantic: Tensor) -> Tensor:
        return contrastive_loss(Views(collab, semantic, ids, collab, semantic, ids, weight), settings, Alone()).mean()

    return repetition(work, loss)


def naive(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    """As it is written everywhere: the matrix of all cosines, and the cross-entropy of its rows and its columns."""

    def loss(collab: Tensor, semantic: Tensor) -> Tensor:
        logits = F.normalize(collab, dim=1) @ F.normalize(semantic, dim=1).T / work["temperature"]
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    return repetition(work, loss)
