"""Stage fuse: three projected tokens in the prompt of the frozen, adapted language model (SeLLa-Rec's third stage).

Shapes: b rows, D columns of a collaborative row, H width of the language model.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sellarec.alignment.align import PROJECTION
from sellarec.collab.model import CollabModel
from sellarec.collab.task import WEIGHTS, CollabTask, save_parts
from sellarec.config import Fuse, Prompt
from sellarec.data.keys import uniform
from sellarec.fusion.projection import HybridProjection, Projection
from sellarec.fusion.rows import prepare
from sellarec.language import llm as llms
from sellarec.language.adapt import answer_score, count_targets, make_prompts, prompt_batch, prompt_loss
from sellarec.language.prompts import SOFT, Prompts
from sellarec.language.scorer import PromptScorer
from sellarec.training.stream import Prepare
from sellarec.training.table import Table
from sellarec.training.task import Batch, Peers, Task, Vectors


class Recommender(nn.Module):
    """The frozen language model, the projections whose tokens it reads, and the collaborative model that they are made of."""

    def __init__(self, llm: nn.Module, projection: HybridProjection, network: CollabModel) -> None:
        super().__init__()
        self.scorer = PromptScorer(llm)
        self.projection = projection
        self.network = network

    def train(self, mode: bool = True) -> "Recommender":
        """The language model stays as it is evaluated: it is frozen, so dropout in it would only be noise."""
        super().train(mode)
        self.scorer.eval()
        return self

    def forward(self, batch: Batch, vectors: Vectors) -> Tensor:
        """Logits [b, V] at the deciding position; where the batch has `targets`, their losses [b]."""
        user, item = self.network.represent(batch, vectors)
        tokens = self.projection(user, item, vectors["semantic"])
        slots = {name: batch[f"{name}_position"] for name in SOFT}
        return self.scorer(batch["tokens"], batch["mask"], slots, tokens, batch.get("targets"))


class FuseTask(Task):
    """Yes or no from a prompt with three soft tokens.

    Trained: the tables (but for a frozen semantic one) and the projections. A user or item that isn't in the train split stands
    for a row of zeros in the collaborative model; so that the projection knows what that means, `unseen_dropout` of the training
    rows are treated so too.
    """

    def __init__(
        self,
        recommender: Recommender,
        collab: CollabTask,
        semantic: Table,
        prompts: Prompts,
        unseen_dropout: float,
        seed: int,
        loss: str = "answer",
    ) -> None:
        self.model = recommender
        self.blocks = recommender.scorer.blocks
        self.collab = collab
        self.tables, self.graph = (*collab.tables, semantic), collab.graph
        self.prompts = prompts
        self.columns = tuple(dict.fromkeys([*collab.columns, "history"]))
        self.prepare = partial(prepare, prompts, collab.prepare_to_score, answers=loss != "answer")
        self._loss = loss
        self._unseen_dropout, self._seed = unseen_dropout, seed

    @property
    def prepare_to_score(self) -> Prepare:
        return partial(prepare, self.prompts, self.collab.prepare_to_score)

    def collate(self, rows: pa.Table, step: int | None) -> Batch:
        batch = {**self.collab.collate(rows, step), **prompt_batch(rows, self._loss)}
        if step is not None:
            for number, name in enumerate(("user_seen", "item_seen")):
                drawn = uniform(rows["row"].to_numpy(), self._seed, step, number)
                batch[name] = batch[name] * torch.from_numpy(drawn >= self._unseen_dropout)
        return batch

    def lookups(self, batch: Batch) -> Batch:
        return {**self.collab.lookups(batch), "semantic": batch["item"]}

    def targets(self, batch: Batch) -> Tensor:
        return count_targets(batch)

    def propagate(self, rows: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        return self.collab.propagate(rows, multiply)

    def loss(self, model: nn.Module, batch: Batch, vectors: Vectors, peers: Peers) -> Tensor:
        return prompt_loss(model(batch, vectors), batch, self.prompts)

    def score(self, model: nn.Module, batch: Batch, vectors: Vectors) -> Tensor:
        return answer_score(model(batch, vectors), self.prompts)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        save_parts(weights, {"projection.": folder / PROJECTION, "network.": folder / WEIGHTS})

    def facts(self) -> dict[str, Any]:
        trained = sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
        return {**self.prompts.facts(), "trained_weights": trained}


def build_fuse(
    source: llms.LlmSource,
    titles: list[str],
    prompt: Prompt,
    noun: str,
    adapter: Path,
    collab: CollabTask,
    semantic: Table,
    hidden: int,
    projection: Path | None,
    trained: Path | None,
    settings: Fuse,
    seed: int,
) -> FuseTask:
    """The task of training the projections, or (with `trained`) of scoring with trained ones.

    Args:
        collab: the collaborative model, with the rows that it starts from.
        semantic: the table of distilled vectors.
        hidden: width of the collaborative projection's hidden layer.
        projection: file of the aligned projection to start from; None for random weights.
        trained: file of trained projections.
    """  # fmt: skip
    folder = source.folder()
    model = llms.load_model(folder, source.storage)
    loss = settings.loss if trained is None else "answer"
    prompts = make_prompts(folder, titles, prompt, noun, model, "fused", loss)
    embeddings = model.get_input_embeddings().weight
    norm = embeddings.detach().float().norm(dim=1).mean().item()
    width = embeddings.shape[1]
    adapted = llms.with_adapter(model, adapter)
    for weight in adapted.parameters():
        weight.requires_grad_(False)
    semantic = replace(semantic, frozen=settings.semantic == "frozen")
    columns = next(table.dim for table in collab.tables if table.name == "item")
    collaborative = Projection(columns, hidden, width)
    if projection is not None:
        collaborative.load_state_dict(load_file(projection))
    hybrid = HybridProjection(collaborative, width, norm)
    if trained is not None:
        hybrid.load_state_dict(load_file(trained))
    return FuseTask(
        Recommender(adapted, hybrid, collab.network), collab, semantic, prompts, settings.unseen_dropout, seed, loss
    )
