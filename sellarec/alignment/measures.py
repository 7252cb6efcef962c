"""How well two views of the same items, or users, lie over each other: alignment, uniformity, retrieval.

Shapes: n items, m of them that are gone through at once, H columns.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from sellarec.training.stream import Order

MOST_ITEMS = MOST_USERS = 10_000
"""Items, and users, that are measured at most: all pairs of them are compared."""

BLOCK = 1024
"""Items that are compared with all others at once."""

PLACES = (1, 10)
"""Of how many nearest vectors an item's own has to be one."""


def draw_items(seen: np.ndarray, seed: int) -> np.ndarray:
    """int64 [n], sorted: the items that the train split has (bool [items]), or MOST_ITEMS of them, drawn."""
    items = np.flatnonzero(seen)
    return np.sort(np.random.default_rng(seed).choice(items, min(len(items), MOST_ITEMS), replace=False))


def draw_rows_of_users(order: Order, columns: Sequence[str], has_vector: Callable[[pa.Table], np.ndarray]) -> pa.Table:
    """One row each of MOST_USERS users, or of all: the first in the order's first epoch that is theirs.

    Args:
        columns: `user` and others, which the rows are to have.
        has_vector: bool [b], of which rows the user has a semantic vector; others are left out.
    """
    found, known = [order.read(next(order.pieces(0, 1)), columns).slice(0, 0)], np.zeros(0, np.int64)
    for piece in order.pieces(0, order.steps_per_epoch):
        rows = order.read(piece, columns)
        rows = rows.take(np.flatnonzero(has_vector(rows)))
        users, first = np.unique(rows["user"].to_numpy(), return_index=True)
        new = np.sort(first[~np.isin(users, known)])[: MOST_USERS - len(known)]
        found.append(rows.take(new))
        known = np.concatenate([known, found[-1]["user"].to_numpy()])
        if len(known) == MOST_USERS:
            break
    return pa.concat_tables(found)


def compare_views(collab: Tensor, semantic: Tensor) -> dict[str, float | None]:
    """Measures of two views of n items, or users, float [n, H] each, whose lengths don't count.

    alignment: mean squared distance of an item's two unit vectors; uniformity_*: log mean exp(-2 d^2) over all pairs of
    different items of one view, with their distance d (both Wang & Isola, 2020), None for a single item; VIEW_to_VIEW@k: share of
    items whose vector in the other view is among the k that are nearest to theirs, where another one as near comes first.
    """
    collab, semantic = F.normalize(collab, dim=1), F.normalize(semantic, dim=1)
    found: dict[str, float | None] = {
        "alignment": (collab - semantic).square().sum(1).double().mean().item(),
        "uniformity_collab": uniformity(collab),
        "uniformity_semantic": uniformity(semantic),
    }
    for name, queries, others in (
        ("collab_to_semantic", collab, semantic),
        ("semantic_to_collab", semantic, collab),
    ):
        ranks = torch.cat([_ranks(scores, own) for scores, own in _scores(queries, others)])
        found |= {f"{name}@{k}": (ranks < k).double().mean().item() for k in PLACES}
    return found


def uniformity(vectors: Tensor) -> float | None:
    """log mean exp(-2 d^2) over all pairs of different unit vectors [n, H]; None where there is no pair."""
    if len(vectors) < 2:
        return None
    total = sum(
        (4 * (scores.scatter(1, own[:, None], -torch.inf) - 1)).exp().double().sum().item()
        for scores, own in _scores(vectors, vectors)
    )
    return math.log(total / (len(vectors) * (len(vectors) - 1)))


def _scores(queries: Tensor, others: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Products [m, n] of some queries with all others, and the place of each query's own one: int64 [m]."""
    for start in range(0, len(queries), BLOCK):
        block = queries[start : start + BLOCK]
        yield block @ others.T, torch.arange(start, start + len(block), device=block.device)


def _ranks(scores: Tensor, own: Tensor) -> Tensor:
    """int64 [m]: how many others are as near as one's own, or nearer."""
    return (scores >= scores.gather(1, own[:, None])).sum(1) - 1


def summary(found: Mapping[str, Any]) -> str:
    """One line of what alignment.json holds."""
    before, after = found["before"], found["after"]
    parts = _changes(before, after, f"{found['items']:,} items")
    if "users" in found:
        parts += _changes(before["users"], after["users"], f"{found['users']:,} users")
    return "; ".join([*parts, *(_price(metric, found["valid"]) for metric in found["valid"]["align"])])


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], of: str) -> list[str]:
    def change(name: str, form: str) -> str:
        return " to ".join("-" if at[name] is None else format(at[name], form) for at in (before, after))

    return [
        f"alignment {change('alignment', '.3f')}",
        f"uniformity of rows {change('uniformity_collab', '.2f')}, of vectors {change('uniformity_semantic', '.2f')}",
        f"of {of} find their vector first {change('collab_to_semantic@1', '.1%')}, "
        f"their row {change('semantic_to_collab@1', '.1%')}",
    ]


def _price(metric: str, valid: Mapping[str, Any]) -> str:
    values = {name: metrics[metric] for name, metrics in valid.items() if metrics is not None}
    shown = {name: "-" if value is None else f"{value:.4f}" for name, value in values.items()}
    beside = f" (collab {shown['collab']})" if "collab" in shown else ""
    return f"valid {metric.upper()} {shown['align']}{beside}"


def kept_metrics(facts: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics on the valid split of the state that a training kept, from the facts that it left."""
    evaluations: Sequence[Any] = facts["evaluations"]
    (metrics,) = (metrics for step, metrics in evaluations if step == facts["kept_step"])
    return metrics
