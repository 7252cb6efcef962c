"""Steps of LightGCN with BPR, triples in memory: the training loop's engine, and the algorithm of the published PyTorch code."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sides import bpr
from sides.engine import engine_of
from sides.held_out import INTERACTIONS
from torch import Tensor, nn
from torch.nn import functional as F

from sellarec.collab.model import Sizes
from sellarec.collab.models.lightgcn import Model
from sellarec.collab.negatives import Negatives
from sellarec.collab.rows import lists
from sellarec.collab.task import CollabTask
from sellarec.config import Collab
from sellarec.training.table import Table, initial_rows
from sellarec.training.task import Graph

INIT, RATE, L2 = 0.1, 1e-3, 1e-4
"""As published."""

TRAIN, TRIPLES = "train.parquet", "triples.npz"


def inputs(work: dict[str, Any], folder: Path) -> None:
    """Distinct pairs of long-tailed degrees as a train split, and the triples of all steps: pairs drawn uniformly, each with an
    item of the split that its user doesn't have."""
    bpr.inputs(work, folder)
    given, generator = np.load(folder / INTERACTIONS), np.random.default_rng(1)
    user, item = given["user"], given["item"]
    pq.write_table(pa.table({"user": user, "item": item, "label": np.ones(len(user), np.int8)}), folder / TRAIN)
    taken = np.zeros((work["users"], work["items"]), bool)
    taken[user, item] = True
    drawn = generator.integers(0, len(user), work["batch"] * work["steps"])
    items = np.unique(item)
    negative = generator.choice(items, len(drawn))
    while (known := taken[user[drawn], negative]).any():
        negative[known] = generator.choice(items, known.sum())
    np.savez(folder / TRIPLES, user=user[drawn], item=item[drawn], negative=negative)


def repetition(work: dict[str, Any], step: Callable[[int], float]) -> Callable[[], tuple[int, dict]]:
    """Steps over the same batches each time; `step` takes a batch's number and gives its loss."""

    def repeat() -> tuple[int, dict]:
        losses = [step(number) for number in range(work["steps"])]
        return work["batch"] * work["steps"], {"first loss": losses[0], "losses": losses}

    return repeat


def ours(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    settings = Collab(
        dim=work["dim"], layers=work["layers"], loss="bpr", negatives_per_row=1, biases=False, global_mean=False,
        init_std=INIT, l2=L2, batch=work["batch"], table_optimizer="adam", table_learning_rate=RATE,
    )  # fmt: skip
    users, items, triples = work["users"], work["items"], np.load(folder / TRIPLES)
    counts = np.tile(np.bincount(pq.read_table(folder / TRAIN)["item"].to_numpy(), minlength=items), (2, 1))
    negatives = Negatives("uniform", counts, 1, 0)
    graph = Graph((str(folder / TRAIN),), users, items)
    model = Model(Sizes(users, items, 1.0), settings)
    engine = engine_of(CollabTask(model, settings, counts[0] > 0, negatives, graph), settings)
    one, known = np.ones(len(triples["user"]), np.int64), np.ones(len(triples["user"]), bool)
    rows = pa.table(
        {
            "user": triples["user"], "item": triples["item"], "label": one.astype(np.int8), "user_seen": known,
            "item_seen": known, "weight": one.astype(np.float32), "log_q": negatives.log_q[triples["item"]],
            "negative": lists(triples["negative"], one),
            "negative_log_q": lists(negatives.log_q[triples["negative"]], one),
        }
    )  # fmt: skip
    batches, taken = [rows.slice(step * work["batch"], work["batch"]) for step in range(work["steps"])], 0

    def step(number: int) -> float:
        nonlocal taken
        taken += 1
        return engine.step(batches[number], taken - 1, 1.0)

    return repetition(work, step)


class Plain(nn.Module):
    """Two embeddings, whose rows are smoothed over the graph; `multiply` is the product with its matrix. Starts from the rows
    that ours start from."""

    def __init__(self, work: dict[str, Any], multiply: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.multiply, self.layers = multiply, work["layers"]
        for name in ("user", "item"):
            size = work[f"{name}s"]
            rows = initial_rows(Table(name, size, work["dim"], (name,), init_std=INIT), 0, 0, size)
            self.add_module(name, nn.Embedding(size, work["dim"], _weight=torch.from_numpy(rows)))

    def smoothed(self) -> tuple[Tensor, Tensor]:
        """Rows of all users and of all items."""
        layers = [torch.cat([self.user.weight, self.item.weight])]
        for _ in range(self.layers):
            layers.append(self.multiply(layers[-1]))
        users, items = torch.stack(layers, dim=1).mean(1).split([len(self.user.weight), len(self.item.weight)])
        return users, items

    def forward(self, user: Tensor, item: Tensor, negative: Tensor) -> Tensor:
        """int64 [b] each -> the mean loss."""
        users, items = self.smoothed()
        score, other = ((users[user] * items[ids]).sum(1) for ids in (item, negative))
        rows = (self.user(user), self.item(item), self.item(negative))
        norm = 0.5 * sum(found.square().sum() for found in rows) / len(user)
        return F.softplus(other - score).mean() + L2 * norm


def adjacency(work: dict[str, Any], folder: Path) -> Tensor:
    """D^-1/2 A D^-1/2 over users, then items: sparse COO, coalesced."""
    table, size = pq.read_table(folder / TRAIN), work["users"] + work["items"]
    user, item = (torch.from_numpy(table[name].to_numpy().copy()) for name in ("user", "item"))
    item = item + work["users"]
    places = torch.stack([torch.cat([user, item]), torch.cat([item, user])])
    scale = torch.bincount(places[0], minlength=size).float().rsqrt()
    values = scale[places[0]] * scale[places[1]]
    return torch.sparse_coo_tensor(places, values, (size, size), check_invariants=False).coalesce()


def plain(work: dict[str, Any], folder: Path, multiply: Callable[[Tensor], Tensor]) -> Callable[[], tuple[int, dict]]:
    model = Plain(work, multiply)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    triples = np.load(folder / TRIPLES)
    columns = [torch.from_numpy(triples[name]).split(work["batch"]) for name in ("user", "item", "negative")]

    def step(number: int) -> float:
        loss = model(*(column[number] for column in columns))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return repetition(work, step)


def published(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    return plain(work, folder, partial(torch.sparse.mm, adjacency(work, folder)))


class Symmetric(torch.autograd.Function):
    """The product with a symmetric matrix, which is its own backward pass: torch's would transpose the matrix at each step."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor) -> Tensor:
        ctx.matrix = matrix
        return matrix @ rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.matrix @ gradient, None


def compressed(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    """What a careful user would write: the matrix in compressed rows, for which torch has the quicker product."""
    matrix = adjacency(work, folder).to_sparse_csr()
    return plain(work, folder, lambda rows: Symmetric.apply(rows, matrix))
