"""Graphs, and what one worker computes on them for test_graph.py."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from sellarec.training.graph import ShardedGraph

WORKERS = 3
"""At most."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A graph and what is computed on it.

    Attributes:
        rows: (user, item, label) in the log's order.
        asked: by kind, the ids that each of WORKERS workers fetches; of fewer workers the last takes what is left over.
    """

    users: int
    items: int
    rows: list[tuple[int, int, int]]
    columns: int = 4
    asked: dict[str, list[list[int]]] = field(
        default_factory=lambda: {kind: [[] for _ in range(WORKERS)] for kind in ("user", "item")}
    )

    @property
    def size(self) -> int:
        return self.users + self.items

    def numbers(self, seed: int, rows: int | None = None) -> Tensor:
        shape = (self.size if rows is None else rows, self.columns)
        return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()

    def part(self, kind: str, rank: int, workers: int) -> tuple[list[int], Tensor]:
        """What a worker fetches, and the gradient of it."""
        lists = self.asked[kind]
        before = sum(map(len, lists[:rank]))
        ids = lists[rank] if rank < workers - 1 else [i for ids in lists[rank:] for i in ids]
        return ids, self.numbers(5, sum(map(len, lists)))[before : before + len(ids)]

    def edges(self) -> set[tuple[int, int]]:
        return {(user, item) for user, item, label in self.rows if label == 1}

    def adjacency(self) -> Tensor:
        matrix = torch.zeros(self.size, self.size, dtype=torch.float64)
        for user, item in self.edges():
            matrix[user, self.users + item] = matrix[self.users + item, user] = 1
        return matrix

    def normalized(self) -> Tensor:
        matrix = self.adjacency()
        scale = matrix.sum(1).clamp(min=1) ** -0.5
        return scale[:, None] * matrix * scale

    def write(self, folder: Path) -> list[Path]:
        """The log in three files of small row groups, some of them empty."""
        columns = np.array(self.rows, np.int64).reshape(-1, 3)
        columns = np.column_stack([columns, np.arange(len(columns))])
        paths = []
        for number, part in enumerate(np.array_split(columns, 3)):
            types = {"user": np.int64, "item": np.int64, "label": np.int8, "row": np.int64}
            table = {name: part[:, k].astype(of) for k, (name, of) in enumerate(types.items())}
            table["rating"] = pa.nulls(len(part), pa.float32())
            paths.append(folder / f"part-{number}.parquet")
            pq.write_table(pa.table(table), paths[-1], row_group_size=2)
        return paths


def own_rows(graph: ShardedGraph, case: Case, whole: Tensor) -> Tensor:
    (first, stop), (first_item, stop_item) = graph.own["user"], graph.own["item"]
    return torch.cat([whole[first:stop], whole[case.users + first_item : case.users + stop_item]])


def loss_of(layers: list[Tensor], users: Tensor, items: Tensor, gradient: Tensor) -> Tensor:
    """Not linear, so that gradients depend on all that was fetched."""
    return sum((layer**2).sum() for layer in layers) + torch.tanh(users).sum() + (torch.sin(items) * gradient).sum()


def convolve(multiply, rows: Tensor) -> list[Tensor]:
    layers = [rows]
    for _ in range(3):
        layers.append(multiply(layers[-1]))
    return layers


def compute_as_worker(case: Case, paths: list[Path]) -> dict[str, Any]:
    """What a worker of the default group computes, its tensors as arrays."""
    found = compute(case, paths, dist.group.WORLD)
    return {name: x.numpy() if isinstance(x, Tensor) else x for name, x in found.items()}


def compute(case: Case, paths: list[Path], group: dist.ProcessGroup | None) -> dict[str, Any]:
    """All that the tests compare, of one worker."""
    rank, workers = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    graph = ShardedGraph.read(paths, case.users, case.items, group, CPU)
    found = {"own": graph.own, "received": graph.received, "sent": graph.sent, "entries": graph.entries}

    def leaf() -> Tensor:
        return own_rows(graph, case, case.numbers(1)).requires_grad_()

    rows = leaf()
    product = graph.multiply(rows)
    (product * own_rows(graph, case, case.numbers(2))).sum().backward()
    found["product"], found["product gradient"] = product.detach(), rows.grad
    found["product of gradient"] = graph.multiply(own_rows(graph, case, case.numbers(2)))
    for kind in ("user", "item"):
        rows = leaf()
        ids, gradient = case.part(kind, rank, workers)
        (vectors,) = graph.fetch(rows, [(kind, torch.tensor(ids, dtype=torch.int64))])
        (vectors * gradient).sum().backward()
        found[kind], found[f"{kind} gradient"] = vectors.detach(), rows.grad
    for number in range(2):
        rows = leaf()
        layers = convolve(graph.multiply, rows)
        mean = torch.stack(layers).mean(0)
        parts = {kind: case.part(kind, rank, workers)[0] for kind in ("user", "item")}
        users, items = graph.fetch(mean, [(kind, torch.tensor(ids, dtype=torch.int64)) for kind, ids in parts.items()])
        loss = loss_of(layers, users, items, case.part("item", rank, workers)[1])
        loss.backward()
        found[f"loss {number}"], found[f"loss gradient {number}"] = loss.detach(), rows.grad
    return found
