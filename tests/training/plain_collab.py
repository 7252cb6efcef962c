"""The collaborative models and their losses once more, in float64 on one process, a target at a time: what the loop is held to.

Nothing here is taken from `sellarec.collab`. Rows come from the prepared log by their ids; drawn negatives are given.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sellarec.config import Collab

EPSILON = 1e-8

VANISHING = 1e-12
"""A gradient below it is nothing but the rounding of float64."""

KINK = 1e-7
"""A unit so near to 0 may lie on either side of it in float32."""


@dataclass(frozen=True)
class Target:
    """An item that is scored for a user."""

    user: int
    item: int
    label: int
    history: tuple[int, ...]
    is_user_seen: bool = True
    is_item_seen: bool = True
    negatives: tuple[int, ...] = ()
    log_q: tuple[float, ...] = ()
    """Of the negatives; inf for one that doesn't count."""
    liked: tuple[int, ...] = ()
    """What was left out when they were drawn."""


@dataclass(frozen=True)
class World:
    """What is known of the log.

    Attributes:
        edges: distinct (user, item) of train positives.
        seen: bool [items].
        q: float64 [items], how likely an item is drawn.
        train_rows: float64 [items], how many of them an item has.
    """

    users: int
    items: int
    positive_rate: float
    edges: tuple[tuple[int, int], ...]
    seen: np.ndarray
    q: np.ndarray
    train_rows: np.ndarray

    def smoothing(self) -> Tensor:
        """The normalized adjacency of users, then items."""
        matrix = torch.zeros(self.users + self.items, self.users + self.items, dtype=torch.float64)
        for user, item in self.edges:
            matrix[user, self.users + item] = matrix[self.users + item, user] = 1
        scale = matrix.sum(1).clamp(min=1) ** -0.5
        return scale[:, None] * matrix * scale


class PlainCollab:
    """A model with its tables and its optimizers.

    Attributes:
        idle: of each dense weight, which elements had no effect on the loss of a step at least. Rounding alone then moves them,
            by steps as long as others', as Adam takes a gradient over its own size.
        kinks: likewise, which belong to a unit (of din) that was so near to 0 for some row that rounding decides on which side of
            its activation's kink it lies, and so by which slope its gradient goes.
    """

    def __init__(
        self, settings: Collab, world: World, tables: dict[str, np.ndarray], dense: dict[str, np.ndarray]
    ) -> None:
        self.settings, self.world = settings, world
        self.tables = {name: torch.tensor(rows, dtype=torch.float64).requires_grad_() for name, rows in tables.items()}
        self.dense = {name: torch.tensor(w, dtype=torch.float64).requires_grad_() for name, w in dense.items()}
        rate = world.positive_rate
        self.constant = math.log(rate / (1 - rate)) if settings.global_mean else 0.0
        self.idle = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in self.dense.items()}
        self.kinks = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in self.dense.items()}
        self.optimizers = {name: self._table_optimizer(rows) for name, rows in self.tables.items()}
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer]
        self.dense_optimizer = (
            kind(list(self.dense.values()), lr=settings.learning_rate, weight_decay=settings.weight_decay)
            if dense
            else None
        )

    def _table_optimizer(self, rows: Tensor) -> Any:
        settings = self.settings
        match settings.table_optimizer:
            case "adam":
                return torch.optim.Adam([rows], weight_decay=settings.table_weight_decay)
            case "adagrad":
                return torch.optim.Adagrad([rows], eps=EPSILON)
            case "sgd":
                return torch.optim.SGD([rows])
        assert not settings.table_weight_decay
        return RowwiseAdagrad(rows)

    def step(self, targets: list[Target], rate: float) -> float:
        """One step on a global batch: the mean loss of what has one."""
        counted = [t for t in targets if self.settings.loss == "bce" or t.label == 1]
        total = self.loss(counted) / max(1, len(counted))
        for weight in (*self.tables.values(), *self.dense.values()):
            weight.grad = torch.zeros_like(weight)
        total.backward()
        for name, weight in self.dense.items():
            assert weight.grad is not None
            self.idle[name] |= weight.grad.abs() < VANISHING
        if self.dense_optimizer is not None:
            torch.nn.utils.clip_grad_norm_(list(self.dense.values()), self.settings.clip)
            self.dense_optimizer.param_groups[0]["lr"] = self.settings.learning_rate * rate
            self.dense_optimizer.step()
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = self.settings.table_learning_rate * rate
            optimizer.step()
        return total.item()

    # Scores

    def rows(self) -> dict[str, Tensor]:
        """The tables; for lightgcn smoothed."""
        if self.settings.model != "lightgcn":
            return self.tables
        both = torch.cat([self.tables["user"], self.tables["item"]])
        last = both.shape[1] - self.settings.biases
        layers, matrix = [both[:, :last]], self.world.smoothing()
        for _ in range(self.settings.layers):
            layers.append(matrix @ layers[-1])
        smooth = torch.cat([sum(layers[1:], layers[0]) / len(layers), both[:, last:]], dim=1)
        return {"user": smooth[: self.world.users], "item": smooth[self.world.users :]}

    def scores(
        self, rows: dict[str, Tensor], target: Target, items: list[int], seen: list[bool], plain: bool = False
    ) -> Tensor:
        """Of some items for a target's user."""
        found = torch.stack([rows["item"][item] * is_seen for item, is_seen in zip(items, seen, strict=True)])
        if self.settings.model == "din":
            return torch.stack([self._din(rows, target, item) for item in found])
        return self._products(self.user(rows, target), found, plain)

    def _products(self, user: Tensor, items: Tensor, plain: bool) -> Tensor:
        if self.settings.model == "binary_mf":
            return self.constant + signs(items) @ signs(user)
        if self.settings.model == "fism":
            return self.constant + unit(items[:, :-2].detach()) @ user[:-1] + user[-1] + items[:, -1]
        if self.settings.temperature is not None and not plain:
            columns = self.settings.dim - self.settings.biases
            cosines = unit(items[:, :columns]) @ unit(user[:columns])
            biases = items[:, columns:].sum(1) + user[columns:].sum()
            return self.constant + cosines / self.settings.temperature + biases
        if not self.settings.biases:
            return self.constant + items @ user
        return self.constant + items[:, :-1] @ user[:-1] + user[-1] + items[:, -1]

    def user(self, rows: dict[str, Tensor], target: Target) -> Tensor:
        own = (
            rows["user"][target.user] * target.is_user_seen if "user" in rows else torch.zeros((), dtype=torch.float64)
        )
        history = list(target.history)
        match self.settings.model:
            case "fism":  # labels don't move the vectors of items
                mean = unit(unit(rows["item"][history, :-2].detach()).sum(0))
                return torch.cat([mean + self.dense["liking"], own[-1:]])
            case "svdpp":
                return own + rows["history"][history].sum(0) / math.sqrt(max(1, len(history)))
            case "sasrec":
                return own + self._sasrec(rows["item"][history]) if history else own.expand(self.settings.dim)
        return own

    def _sasrec(self, found: Tensor) -> Tensor:
        """[L, D] -> the state at the last item."""
        w, heads = self.dense, self.settings.heads
        states = found * math.sqrt(found.shape[1]) + w["position"][: len(found)]
        for number in range(self.settings.layers):

            def layer(name: str, x: Tensor, number: int = number) -> Tensor:
                return x @ w[f"blocks.{number}.{name}.weight"].T + w[f"blocks.{number}.{name}.bias"]

            def norm(name: str, x: Tensor, number: int = number) -> Tensor:
                return normal(x, w[f"blocks.{number}.{name}.weight"], w[f"blocks.{number}.{name}.bias"])

            query = norm("norms.0", states)
            q, k, v = layer("query", query), layer("key", states), layer("value", states)
            width = q.shape[1] // heads
            out = []
            for at in range(len(found)):  # a position sees itself and those before
                parts = []
                for head in range(heads):
                    columns = slice(head * width, (head + 1) * width)
                    logits = k[: at + 1, columns] @ q[at, columns] / math.sqrt(width)
                    parts.append(torch.softmax(logits, 0) @ v[: at + 1, columns])
                out.append(torch.cat(parts))
            states = norm("norms.1", query + layer("out", torch.stack(out)))
            states = states + layer("forward_2", torch.relu(layer("forward_1", states)))
        return normal(states, w["norm.weight"], w["norm.bias"])[-1]

    def _din(self, rows: dict[str, Tensor], target: Target, item: Tensor) -> Tensor:
        user = rows["user"][target.user] * target.is_user_seen
        pooled = torch.zeros_like(item)
        for other in target.history:
            found = rows["item"][other]
            weight = self._layers("attention", torch.cat([item, found, item - found, item * found]))
            pooled = pooled + weight * found
        score = self._layers("network", torch.cat([user, pooled, item]))
        return self.constant + score + (user[-1] + item[-1] if self.settings.biases else 0.0)

    def _layers(self, beginning: str, x: Tensor) -> Tensor:
        """Linear, PReLU and (here without effect) dropout, again and again, then Linear to one number."""
        linear = [int(n.split(".")[1]) for n in self.dense if n.startswith(beginning) and n.endswith("bias")]
        for number in sorted(linear):
            x = self.dense[f"{beginning}.{number}.weight"] @ x + self.dense[f"{beginning}.{number}.bias"]
            if number < max(linear):
                if torch.is_grad_enabled():
                    for part in ("weight", "bias"):
                        self.kinks[f"{beginning}.{number}.{part}"][x.detach().abs() < KINK] = True
                slope = self.dense[f"{beginning}.{number + 1}.weight"]
                x = torch.where(x > 0, x, slope * x)
        return x[0]

    def score(self, targets: list[Target]) -> np.ndarray:
        with torch.no_grad():
            rows = self.rows()
            plain = self.settings.plain_score
            return np.array([float(self.scores(rows, t, [t.item], [t.is_item_seen], plain)[0]) for t in targets])

    # Losses

    def loss(self, targets: list[Target]) -> Tensor:
        """Added up over the targets."""
        rows, total = self.rows(), torch.zeros((), dtype=torch.float64)
        for target in targets:
            others = self._others(target, targets)
            seen = [target.is_item_seen, *[True] * len(others)]
            score, *rest = self.scores(rows, target, [target.item, *others], seen).unbind()
            of_others = torch.stack(rest) if rest else score.new_zeros(0)
            total = total + self._of_scores(target.label, score, of_others, self._expected(target, others))
            total = total + 0.5 * self.settings.l2 * self._norms(target)
            if self.settings.model == "fism":
                total = total + self._consumed(rows["item"], target)
        return total

    def _consumed(self, items: Tensor, target: Target) -> Tensor:
        """Cross-entropy of a target's item among the seen ones, given the mean of the history and items' train rows."""
        history = list(target.history)
        logits = items[:, :-2] @ (items[history, :-2].sum(0) / max(1, len(history))) + items[:, -2]
        logits = logits + torch.from_numpy(self.world.train_rows).log()
        return logits.logsumexp(0) - logits[target.item]

    def _others(self, target: Target, targets: list[Target]) -> list[int]:
        """Items that the target's is ranked above."""
        if self.settings.loss == "bce":
            return []
        if self.settings.loss == "full-softmax":
            return [i for i in range(self.world.items) if self.world.seen[i] and i != target.item]
        if self.settings.negatives == "in-batch":
            return [t.item for t in targets if t.user != target.user and t.item != target.item]
        rows = targets if self.settings.shared_negatives else [target]
        drawn = [pair for row in rows for pair in zip(row.negatives, row.log_q, strict=True)]
        return [i for i, log_q in drawn if math.isfinite(log_q) and i != target.item]

    def _expected(self, target: Target, others: list[int]) -> Tensor:
        """How often each of some negatives is expected among them."""
        q = torch.from_numpy(self.world.q)
        left_out = {*target.liked} if target.liked and not self.settings.shared_negatives else {target.item}
        return len(others) * q[others] / (1 - q[sorted(left_out)].sum())

    def _of_scores(self, label: int, score: Tensor, others: Tensor, expected: Tensor) -> Tensor:
        match self.settings.loss:
            case "bce":
                return F.softplus(-score if label else score)
            case "bpr":
                return F.softplus(others - score).mean() if len(others) else 0 * score
            case "softmax" if not self.settings.log_q:
                return torch.log(1 + (others - score).exp().sum())
            case "softmax":
                return torch.log(1 + ((others - score).exp() / expected).sum())
            case "full-softmax":
                return torch.log(1 + (others - score).exp().sum())
        raise AssertionError

    def _norms(self, target: Target) -> Tensor:
        """Of the rows as they lie in the tables."""
        item, settings = self.tables["item"], self.settings
        total = item[target.item].square().sum()
        if "user" in self.tables:
            total = total + self.tables["user"][target.user].square().sum()
        if target.negatives:
            total = total + item[list(target.negatives)].square().sum(1).mean()
        history = list(target.history)
        if history and settings.model in ("svdpp", "sasrec", "din", "fism"):
            squares = self.tables.get("history", item)[history].square().sum(1)
            # of a sequence, each position has its own item alone
            total = total + (squares[-1] if settings.train_on == "sequences" else squares.mean())
        return total


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1, or 0."""
    return rows / rows.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)


def signs(rows: Tensor) -> Tensor:
    """Signs, with the gradient of tanh."""
    return rows.tanh() + (rows.sign() - rows.tanh()).detach()


def normal(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + EPSILON).sqrt() * weight + bias


class RowwiseAdagrad:
    """One accumulator a row, of the mean square of its gradient."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.sums = rows, torch.zeros(len(rows), dtype=rows.dtype)
        self.param_groups: list[dict[str, float]] = [{}]

    @torch.no_grad()
    def step(self) -> None:
        assert self.rows.grad is not None
        self.sums += self.rows.grad.square().mean(1)
        self.rows -= self.param_groups[0]["lr"] * self.rows.grad / (self.sums.sqrt() + EPSILON)[:, None]
