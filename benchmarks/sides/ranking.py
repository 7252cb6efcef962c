"""Each user's best items of a whole catalog, but for those that the user had before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sellarec.evaluation.ranking import top_k

SHOWN = 20
"""Users whose lists are compared."""

Rank = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def repetition(work: dict[str, Any], rank: Rank) -> Callable[[], tuple[int, dict]]:
    generator, device = torch.Generator().manual_seed(0), work["device"]
    users, items = (torch.randn(work[kind], work["dim"], generator=generator).to(device) for kind in ("users", "items"))
    excluded = torch.randint(0, work["items"], (work["users"], work["excluded"]), generator=generator).to(device)

    def repeat() -> tuple[int, dict]:
        best = [
            rank(some, items, ids, torch.full((len(some),), work["excluded"], device=device))
            for some, ids in zip(users.split(work["at_once"]), excluded.split(work["at_once"]), strict=True)
        ]
        found = torch.cat(best).cpu()  # waits for a GPU
        return len(users), {"items": found[:SHOWN].tolist(), "sum of all": int(found.sum())}

    return repeat


def ours(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    def rank(users: Tensor, items: Tensor, excluded: Tensor, lengths: Tensor) -> Tensor:
        return top_k(users, items, 0, work["k"], (excluded.flatten(), lengths)).items

    return repetition(work, rank)


def plain(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    def rank(users: Tensor, items: Tensor, excluded: Tensor, lengths: Tensor) -> Tensor:
        scores = users @ items.T
        scores.scatter_(1, excluded, -torch.inf)
        return scores.topk(work["k"]).indices

    return repetition(work, rank)
