"""Stage fuse: three projected tokens in the prompt of the frozen, adapted language model (SeLLa-Rec's third stage).

Shapes: b rows, D columns of a collaborative row, H width of the language model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sellarec.config import Fuse, Prompt
from sellarec.data.keys import mix
from sellarec.fusion.projection import HybridProjection, Projection
from sellarec.language import llm as llms
from sellarec.language.adapt import answer_loss, answer_score, make_prompts
from sellarec.language.prompts import SOFT, Prompts
from sellarec.language.scorer import PromptScorer, left_padded
from sellarec.training.tables import RowReader, Table
from sellarec.training.task import Batch, Gather


class Recommender(nn.Module):
    """The frozen language model, and the projections whose tokens it reads."""

    def __init__(self, llm: nn.Module, projection: HybridProjection) -> None:
        super().__init__()
        self.scorer = PromptScorer(llm)
        self.projection = projection

    def train(self, mode: bool = True) -> "Recommender":
        """The language model stays as it is evaluated: it is frozen, so dropout in it would only be noise."""
        super().train(mode)
        self.scorer.eval()
        return self

    def forward(self, batch: Batch, vectors: dict[str, Tensor]) -> Tensor:
        """Logits [b, V] at the deciding position."""
        tokens = self.projection(vectors["user"], vectors["item"], vectors["semantic"])
        return self.scorer(batch["tokens"], batch["mask"], {name: batch[f"{name}_position"] for name in SOFT}, tokens)


class FuseTask:
    """Yes or no from a prompt with three soft tokens.

    Trained: the tables and the projections. A user or item that isn't in the train split stands for a row of zeros;
    so that the projection knows what that means, `unseen_dropout` of the training rows are treated so too.
    """

    columns = ("row", "user", "item", "label", "history", "user_seen", "item_seen")

    def __init__(
        self, recommender: Recommender, tables: tuple[Table, ...], prompts: Prompts, unseen_dropout: float, seed: int
    ) -> None:
        self.model = recommender
        self.blocks = recommender.scorer.blocks
        self.tables = tables
        self.prompts = prompts
        self.prepare = prompts.prepare
        self._unseen_dropout, self._seed = unseen_dropout, seed

    def collate(self, rows: pa.Table, step: int | None) -> Batch:
        seen = {name: rows[name].to_numpy().astype(np.float32) for name in ("user_seen", "item_seen")}
        if step is not None:
            for number, name in enumerate(seen):
                drawn = uniform(rows["row"].to_numpy(), self._seed, step, number)
                seen[name] = seen[name] * (drawn >= self._unseen_dropout)
        return {
            **left_padded(rows),
            **{name: torch.from_numpy(rows[name].to_numpy().copy()) for name in ("user", "item")},
            **{name: torch.from_numpy(value.astype(np.float32)) for name, value in seen.items()},
            "label": torch.from_numpy(rows["label"].to_numpy().astype(np.float32)),
            "weight": torch.from_numpy(rows["weight"].to_numpy().copy()),
        }

    def lookups(self, batch: Batch) -> dict[str, Tensor]:
        return {"user": batch["user"], "item": batch["item"], "semantic": batch["item"]}

    def targets(self, batch: Batch) -> Tensor:
        return batch["weight"].sum()

    def _logits(self, model: nn.Module, batch: Batch, vectors: dict[str, Tensor]) -> Tensor:
        known = {
            "user": vectors["user"] * batch["user_seen"][:, None],
            "item": vectors["item"] * batch["item_seen"][:, None],
            "semantic": vectors["semantic"],
        }
        return model(batch, known)

    def loss(self, model: nn.Module, batch: Batch, vectors: dict[str, Tensor], gather: Gather) -> Tensor:
        return answer_loss(self._logits(model, batch, vectors), batch, self.prompts)

    def score(self, model: nn.Module, batch: Batch, vectors: dict[str, Tensor]) -> Tensor:
        return answer_score(self._logits(model, batch, vectors), self.prompts)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        prefix = "projection."
        assert all(name.startswith(prefix) for name in weights)
        save_file({n.removeprefix(prefix): w for n, w in weights.items()}, folder / "projection.safetensors")

    def facts(self) -> dict[str, Any]:
        trained = sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
        return {**self.prompts.facts(), "trained_weights": trained}


def uniform(rows: np.ndarray, *salt: int) -> np.ndarray:
    """float64 in [0, 1), a function of (row, salt) alone (splitmix64), whatever else is in the batch."""
    state = np.random.SeedSequence(salt).generate_state(1, np.uint64)[0]
    with np.errstate(over="ignore"):
        x = (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + state
    return (mix(x) >> np.uint64(11)) / float(1 << 53)


def build_fuse(
    source: llms.LlmSource,
    titles: list[str],
    prompt: Prompt,
    noun: str,
    adapter: Path,
    tables: Mapping[str, tuple[int, int, RowReader]],
    hidden: int,
    projection: Path | None,
    trained: Path | None,
    settings: Fuse,
    seed: int,
) -> FuseTask:
    """The task of training the projections, or (with `trained`) of scoring with trained ones.

    Args:
        tables: by name (user, item, semantic): rows, columns and where the rows start from.
        hidden: width of the collaborative projection's hidden layer.
        projection: file of the aligned projection to start from; None for random weights.
        trained: file of trained projections.
    """  # fmt: skip
    folder = source.folder()
    model = llms.load_model(folder)
    prompts = make_prompts(folder, titles, prompt, noun, model, "fused")
    embeddings = model.get_input_embeddings().weight
    norm = embeddings.detach().float().norm(dim=1).mean().item()
    width = embeddings.shape[1]
    adapted = llms.with_adapter(model, adapter)
    for weight in adapted.parameters():
        weight.requires_grad_(False)
    collaborative = Projection(tables["user"][1], hidden, width)
    if projection is not None:
        collaborative.load_state_dict(load_file(projection))
    hybrid = HybridProjection(collaborative, width, norm)
    if trained is not None:
        hybrid.load_state_dict(load_file(trained))
    declared = tuple(Table(name, rows, dim, (name,), read=read) for name, (rows, dim, read) in tables.items())
    return FuseTask(Recommender(adapted, hybrid), declared, prompts, settings.unseen_dropout, seed)
