"""Steps of SASRec at all positions of sequences, which lie in memory: the training loop's engine, and the algorithm of the widely
used PyTorch code.

Shapes: b sequences, L positions, D columns.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sides.engine import engine_of
from torch import Tensor, nn
from torch.nn import functional as F

from sellarec.collab.model import Sizes
from sellarec.collab.models.sasrec import Block, Model
from sellarec.collab.negatives import Negatives
from sellarec.collab.rows import lists
from sellarec.collab.task import CollabTask
from sellarec.config import Collab
from sellarec.training.table import initial_rows

RATE, BETA2 = 1e-3, 0.98
"""As published."""

ROWS = "rows.parquet"


def settings_of(work: dict[str, Any]) -> Collab:
    return Collab(
        dim=work["dim"], layers=work["layers"], heads=work["heads"], history=work["history"], train_on="sequences",
        loss="bpr", negatives_per_row=1, user_rows=False, biases=False, global_mean=False, l2=0.0, batch=work["batch"],
        optimizer="adam", learning_rate=RATE, beta2=BETA2, weight_decay=0.0, clip=1e9, table_optimizer="adam",
        table_learning_rate=RATE,
    )  # fmt: skip


def task_of(work: dict[str, Any], settings: Collab) -> CollabTask:
    """With the same dense weights each time."""
    torch.manual_seed(0)
    counts = np.ones((2, work["items"]), np.int64)
    model = Model(Sizes(1, work["items"], 1.0), settings)
    return CollabTask(model, settings, counts[0] > 0, Negatives("uniform", counts, 1, 0))


def inputs(work: dict[str, Any], folder: Path) -> None:
    """Sequences of all steps, their targets, and a negative of each. Lengths are long-tailed, and so are items' degrees."""
    generator, number = np.random.default_rng(0), work["batch"] * work["steps"]
    lengths = generator.lognormal(np.log(work["median"]), 1.0, number).astype(np.int64).clip(1, work["history"])
    weights = generator.lognormal(0.0, 1.0, work["items"])
    items = generator.choice(work["items"], lengths.sum() + number, p=weights / weights.sum())
    known = np.ones(number, bool)
    rows = pa.table(
        {
            "row": np.arange(number), "user": np.zeros(number, np.int64), "item": items[lengths.sum() :],
            "label": np.ones(number, np.int8), "user_seen": known, "item_seen": known,
            "history": lists(items[: lengths.sum()], lengths),
        }
    )  # fmt: skip
    rows = task_of(work, settings_of(work)).prepare(rows, 0, np.zeros(number, np.int64))
    pq.write_table(rows.append_column("weight", pa.array(np.ones(number, np.float32))), folder / ROWS)


def batches_of(work: dict[str, Any], folder: Path) -> list[pa.Table]:
    rows = pq.read_table(folder / ROWS)
    return [rows.slice(step * work["batch"], work["batch"]).combine_chunks() for step in range(work["steps"])]


def repetition(
    work: dict[str, Any], batches: list[pa.Table], step: Callable[[int], float]
) -> Callable[[], tuple[int, dict]]:
    """Steps over the same batches each time; `step` takes a batch's number and gives its loss."""
    targets = sum(len(batch["targets"].combine_chunks().flatten()) for batch in batches)

    def repeat() -> tuple[int, dict]:
        losses = [step(number) for number in range(len(batches))]
        share = targets / (work["batch"] * work["steps"] * work["history"])
        return targets, {"first loss": losses[0], "losses": losses, "share of positions with a target": share}

    return repeat


def ours(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    settings, batches, taken = settings_of(work), batches_of(work, folder), 0
    engine = engine_of(task_of(work, settings), settings)

    def step(number: int) -> float:
        nonlocal taken
        taken += 1
        return engine.step(batches[number], taken - 1, 1.0)

    return repetition(work, batches, step)


class PointWise(nn.Module):
    """The feed-forward layers, as convolutions over one position."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        dim = len(block.forward_1.bias)
        self.first, self.second = nn.Conv1d(dim, dim, kernel_size=1), nn.Conv1d(dim, dim, kernel_size=1)
        for layer, given in ((self.first, block.forward_1), (self.second, block.forward_2)):
            layer.load_state_dict({"weight": given.weight[:, :, None], "bias": given.bias})

    def forward(self, states: Tensor) -> Tensor:
        """[b, L, D] -> the same."""
        return states + self.second(F.relu(self.first(states.transpose(1, 2)))).transpose(1, 2)


class Plain(nn.Module):
    """Items are counted from 1; 0 is padding. Starts from the weights that ours start from."""

    def __init__(self, work: dict[str, Any]) -> None:
        super().__init__()
        ours = task_of(work, settings_of(work)).network
        (table,) = ours.tables
        rows = torch.from_numpy(initial_rows(table, 0, 0, table.rows))
        self.item, self.position = (
            nn.Embedding(len(given) + 1, work["dim"], padding_idx=0, _weight=F.pad(given.detach(), (0, 0, 1, 0)))
            for given in (rows, ours.position)
        )
        self.attention_norms = nn.ModuleList(block.norms[0] for block in ours.blocks)
        self.attentions = nn.ModuleList(self._attention(block, work) for block in ours.blocks)
        self.forward_norms = nn.ModuleList(block.norms[1] for block in ours.blocks)
        self.forwards = nn.ModuleList(PointWise(block) for block in ours.blocks)
        self.norm = ours.norm

    def _attention(self, block: Block, work: dict[str, Any]) -> nn.Module:
        layer, parts = nn.MultiheadAttention(work["dim"], work["heads"]), (block.query, block.key, block.value)
        weights = {f"in_proj_{name}": torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias")}
        weights |= {f"out_proj.{name}": getattr(block.out, name) for name in ("weight", "bias")}
        layer.load_state_dict(weights)
        return layer

    def forward(self, history: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
        """int64 [b, L] each -> the mean loss over targets."""
        length = history.shape[1]
        states = self.item(history) * self.item.embedding_dim**0.5
        states = states + self.position(torch.arange(1, length + 1) * (history != 0))
        later = ~torch.tril(torch.ones(length, length, dtype=torch.bool))
        for number, attention in enumerate(self.attentions):
            states = states.transpose(0, 1)
            query = self.attention_norms[number](states)
            found, _ = attention(query, states, states, attn_mask=later)
            states = self.forwards[number](self.forward_norms[number]((query + found).transpose(0, 1)))
        states = self.norm(states)
        score, other = ((states * self.item(ids)).sum(-1) for ids in (targets, negatives))
        real = targets != 0
        return F.softplus(other[real] - score[real]).mean()


def published(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    batches, model = batches_of(work, folder), Plain(work)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.9, BETA2))
    padded = []
    for batch in batches:
        columns = (batch[name].to_pylist() for name in ("history", "targets", "negative"))
        padded.append([torch.stack([_padded(ids, work["history"]) for ids in column]) for column in columns])

    def step(number: int) -> float:
        optimizer.zero_grad()
        loss = model(*padded[number])
        loss.backward()
        optimizer.step()
        return loss.item()

    return repetition(work, batches, step)


def _padded(ids: list[int], length: int) -> Tensor:
    """Counted from 1, then zeros: int64 [length]."""
    return F.pad(torch.tensor(ids) + 1, (0, length - len(ids)))
