"""Stage fuse: soft tokens in the prompt of the adapted language model, projected (SeLLa-Rec's third stage; CoLLM's second), or
learnt for each user and item (PersonPrompt: Li et al., "Personalized Prompt Learning", arXiv 2202.07371); or, without any, codes.

Shapes: b rows, D columns of a collaborative row, H width of the language model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from sellarec.alignment.align import PROJECTION
from sellarec.collab.model import CollabModel
from sellarec.collab.task import WEIGHTS, CollabTask, save_parts
from sellarec.config import Collab, Fuse, Prompt
from sellarec.data.keys import uniform
from sellarec.errors import UserError
from sellarec.fusion.codes import CodesTask, build_codes
from sellarec.fusion.projection import HybridProjection, MixtureProjection, Projection
from sellarec.fusion.rows import prepare
from sellarec.language import llm as llms
from sellarec.language.adapt import (
    answer_score,
    compare_saved,
    count_targets,
    make_prompts,
    of_part,
    prompt_batch,
    prompt_loss,
)
from sellarec.language.prompts import SOFT, Prompts
from sellarec.language.scorer import PromptScorer, prefixes_of, share_prefixes
from sellarec.training.stream import Prepare
from sellarec.training.table import SavedTable, Table
from sellarec.training.task import Batch, Peers, Task, Vectors

LLM = "scorer.llm."
"""What names of the language model's weights begin with in `Recommender`."""

LEARNED_STD = 0.02
"""Standard deviation that learned tokens start with: the usual one of fresh input embeddings."""


class Recommender(nn.Module):
    """The language model, the projections whose tokens it reads, and the collaborative model that they are made of.

    Args:
        answers: the tokens (of the vocabulary) of yes and no, see `PromptScorer`.
        adds_collab: whether the collaborative model's score is added to the logit of yes.
        language_weight: what the language model's logits are multiplied by before that.
    """

    def __init__(
        self,
        llm: nn.Module,
        projection: HybridProjection,
        network: CollabModel,
        answers: tuple[int, int],
        adds_collab: bool,
        language_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.scorer = PromptScorer(llm, answers)
        self.projection = projection
        self.network = network
        self.adds_collab = adds_collab
        self.language_weight = language_weight

    def train(self, mode: bool = True) -> "Recommender":
        """What is frozen stays as it is evaluated: dropout in it would only be noise."""
        super().train(mode)
        for part in (self.scorer, self.network):
            if not any(weight.requires_grad for weight in part.parameters()):
                part.eval()
        return self

    def forward(self, batch: Batch, vectors: Vectors | None) -> Tensor:
        """Logits [b, 2] of yes and no at the deciding position; where the batch has `targets`, their losses [b]. Without vectors
        the language model's own logits, of prompts with the tokens that stand in their slots."""
        if vectors is None:
            return self.scorer(batch["tokens"], batch["mask"], {}, {})
        made_by: dict[str, Callable[[], Tensor]] = {
            "user": partial(self._collaborative, "represent_user", batch, vectors),
            "item": partial(self._collaborative, "represent_item", batch, vectors),
            "semantic": lambda: vectors["semantic"],
        }
        tokens = self.projection({name: made_by[name]() for name in self.projection.tokens})
        slots = {name: batch[f"{name}_position"] for name in tokens}
        found = self.scorer(batch["tokens"], batch["mask"], slots, tokens, batch.get("targets"), prefixes_of(batch))
        if self.language_weight != 1:
            found = self.language_weight * found
        if not self.adds_collab:
            return found
        yes, no = found.unbind(1)  # the score is their difference, so this adds to it
        return torch.stack([yes + self._collaborative("score", batch, vectors), no], dim=1)

    def _collaborative(self, method: str, *arguments: Any) -> Tensor:
        """What a method of the collaborative model gives, in float32: the language model's type of computing is for itself, but
        that FSDP2 has rounded dense weights to it."""
        weights = {f"network.{name}": weight.float() for name, weight in self.network.named_parameters()}
        return functional_call(_Method(self.network, method), weights, arguments)


class _Method(nn.Module):
    """A collaborative model that is called by one of its methods."""

    def __init__(self, network: CollabModel, method: str) -> None:
        super().__init__()
        self.network, self._method = network, method

    def forward(self, *arguments: Any) -> Tensor:
        return getattr(self.network, self._method)(*arguments)


class FuseTask(Task):
    """Yes or no from a prompt with soft tokens.

    Trained: what `settings.train` names; of the tables the semantic one stays as it is where `settings.semantic` says so. A user
    or item that isn't in the train split stands for a row of zeros in the collaborative model; so that the projection knows what
    that means, `unseen_dropout` of the training rows are treated so too.

    Args:
        collab: the collaborative model, with the tables that the tokens take.
        semantic: the table of distilled vectors; None where no token takes it.
    """

    def __init__(
        self,
        source: llms.LlmSource,
        recommender: Recommender,
        collab: CollabTask,
        semantic: Table | None,
        prompts: Prompts,
        settings: Fuse,
        seed: int,
    ) -> None:
        self.source = source
        self.model = recommender
        self.blocks = recommender.scorer.blocks
        self.collab = collab
        self.tables = tables_of(collab, semantic, settings)
        self.graph = collab.graph if collab.tables else None
        self.prompts = prompts
        self.tokens = recommender.projection.tokens
        self.columns = tuple(dict.fromkeys([*collab.columns, "history"]))
        self.prepare = partial(prepare, prompts, collab.prepare_to_score, answers=settings.loss != "answer")
        self._settings, self._seed = settings, seed

    @property
    def prepare_to_score(self) -> Prepare:
        return partial(prepare, self.prompts, self.collab.prepare_to_score)

    def collate(self, rows: pa.Table, step: int | None) -> Batch:
        batch = {**self.collab.collate(rows, None), **prompt_batch(rows, self._settings.loss)}
        if step is not None:
            for number, name in enumerate(("user_seen", "item_seen")):
                drawn = uniform(rows["row"].to_numpy(), self._seed, step, number)
                batch[name] = batch[name] * torch.from_numpy(drawn >= self._settings.unseen_dropout)
        return batch

    def lookups(self, batch: Batch) -> Batch:
        found = self.collab.lookups(batch)
        return {**found, "semantic": batch["item"]} if "semantic" in self.tokens else found

    def targets(self, batch: Batch) -> Tensor:
        return count_targets(batch)

    def propagate(self, rows: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        return self.collab.propagate(rows, multiply)

    def loss(self, model: nn.Module, batch: Batch, vectors: Vectors, peers: Peers) -> Tensor:
        return prompt_loss(model(batch, vectors), batch)

    def score(self, model: nn.Module, batch: Batch, vectors: Vectors) -> Tensor:
        return answer_score(model(batch, vectors))

    def share(self, rows: pa.Table, size: int) -> tuple[pa.Table, float, int]:
        told_by: list[str] = []
        if "user_position" in rows.column_names and self.collab.network.is_product:
            told_by = [name for name in ("user", "user_seen", "history") if name in rows.column_names]
        elif "user_position" in rows.column_names:
            # the user's token is made for the item too
            before = pc.min_element_wise(rows["prefix_tokens"], rows["user_position"])
            rows = rows.set_column(rows.column_names.index("prefix_tokens"), "prefix_tokens", before)
        return share_prefixes(self.model.scorer, rows, size, told_by)

    @contextmanager
    def without(self, token: str) -> Iterator[None]:
        """Scores in it have the token that a row of zeros gives in the place of one."""

        def zeros(module: nn.Module, given: tuple[dict[str, Tensor]]) -> tuple[dict[str, Tensor]]:
            (rows,) = given
            return ({**rows, token: torch.zeros_like(rows[token])},)

        handle = self.model.projection.register_forward_pre_hook(zeros)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def without_collab_score(self) -> Iterator[None]:
        """Scores in it leave out the collaborative model's."""
        kept, self.model.adds_collab = self.model.adds_collab, False
        try:
            yield
        finally:
            self.model.adds_collab = kept

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        save_parts(weights, {"projection.": folder / PROJECTION, "network.": folder / WEIGHTS})
        adapter = of_part(weights, LLM)
        if adapter:
            self.model.scorer.llm.save_pretrained(folder / llms.ADAPTER, state_dict=adapter)

    @torch.no_grad()
    def check_saved(
        self, model: nn.Module, batch: Batch, folder: Path | None, dtype: torch.dtype, weights: dict[str, Tensor]
    ) -> None:
        """The adapter, where it was trained, on prompts as text: what other programs load knows no soft tokens."""
        if "adapter" not in self._settings.train:
            return
        with self.model.scorer.all_logits():
            logits = model(batch, None)
        if folder is not None:
            compare_saved(of_part(weights, LLM), logits, batch, self.source, folder, True, dtype)

    def facts(self) -> dict[str, Any]:
        trained = sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
        return {
            **self.prompts.facts(),
            "tokens": list(self.tokens),
            "trained": list(self._settings.train),
            "collab_score": self._settings.collab_score,
            "trained_weights": trained,
        }


def build_fuse(
    source: llms.LlmSource,
    titles: list[str],
    prompt: Prompt,
    noun: str,
    adapter: Path | None,
    collab: CollabTask | None,
    semantic: Table | None,
    hidden: int,
    projection: Path | None,
    trained: Path | None,
    settings: Fuse,
    seed: int,
    language_weight: float = 1.0,
    layers: int = 1,
) -> FuseTask | CodesTask:
    """The task of training what `settings.train` names, or (with `trained`) of scoring with trained projections.

    Args:
        adapter: folder of the adapter that it starts from; None where adapt left a whole model.
        collab: the collaborative model, with the rows that it starts from, of what the tokens take; see `token_rows`. None where
            there is no token.
        semantic: the table of distilled vectors; None where no token takes it.
        hidden: width of the collaborative projection's hidden layers.
        projection: file of the aligned projection to start from; None for random weights.
        trained: file of trained projections.
        language_weight: of those that `settings` names, the one that was kept.
        layers: hidden layers of the collaborative projection.
    """  # fmt: skip
    if collab is None or settings.represent == "codes":
        tables = () if collab is None else collab.network.tables
        return build_codes(source, titles, prompt, noun, adapter, tables, settings, seed)
    folder = source.folder()
    model = llms.load_model(folder, source.storage, source.attention)
    tokens = soft_tokens(settings)
    if settings.loss != "answer":
        llms.check_logits(model)
    prompts = make_prompts(folder, titles, prompt, noun, model, "fused", settings.loss, tokens)
    norm, width = llms.embedding_norm(model), model.get_input_embeddings().embedding_dim
    adapted = llms.with_adapter(model, adapter, trains="adapter" in settings.train)
    projections: dict[str, nn.Module] = {}
    projected = collaborative_tokens(tokens)
    named = projected if settings.projections == "separate" else ("collaborative",) if projected else ()
    learned = settings.represent == "learned"
    if learned:
        projections["collaborative"], named = nn.Identity(), ()
    for name in named:
        experts = [Projection(collab.network.dim, hidden, width, layers) for _ in range(settings.experts)]
        if projection is not None:
            for expert in experts:  # they then drift apart by what the gate, which is drawn, gives them
                expert.load_state_dict(load_file(projection))
        projections[name] = MixtureProjection(experts, collab.network.dim) if len(experts) > 1 else experts[0]
    if "semantic" in tokens:
        projections["semantic"] = nn.Linear(width, width)
    hybrid = HybridProjection(tokens, projections, norm if settings.norm == "match" and not learned else None)
    if trained is not None:
        hybrid.load_state_dict(load_file(trained))
    hybrid.requires_grad_("projections" in settings.train)
    # items are represented by their rows alone
    collab.network.requires_grad_("tables" in settings.train and ("user" in tokens or settings.collab_score))
    recommender = Recommender(
        adapted, hybrid, collab.network, prompts.segments.deciding, settings.collab_score, language_weight
    )
    return FuseTask(source, recommender, collab, semantic, prompts, settings, seed)


def made_by(settings: Fuse) -> dict[str, str]:
    """The stage whose artifact holds the tables, the projections and the adapter (or the wholly tuned model) of a fused model:
    what fuse doesn't train is where it was read from."""
    before = {"tables": "align", "projections": "align", "adapter": "adapt"}
    if settings.represent == "learned":  # from nothing, and without projections
        before = {"tables": "fuse", "adapter": "adapt"}
    elif settings.represent == "codes":
        before = {"tables": "collab", "adapter": "adapt"}
    if not settings.tokens:
        before = {"adapter": "adapt"}
    return {part: "fuse" if part in settings.train else stage for part, stage in before.items()}


def token_rows(settings: Fuse, collab: Collab, source: llms.LlmSource) -> Collab:
    """Settings of the model that represents users and items: those of stage collab, or (learned) of plain rows as wide as the
    language model.

    Raises:
        UserError: tables can't have rows of that width.
    """
    if settings.represent != "learned":
        return replace(collab, train_on="rows")
    width = llms.hidden_width(source)
    if width % 4:
        raise UserError(f"the language model is {width} wide, but the table kernels need a multiple of 4")
    return Collab(dim=width, init_std=LEARNED_STD)


def tables_of(collab: CollabTask, semantic: Table | None, settings: Fuse) -> tuple[Table, ...]:
    """The tables that a fused model looks up in, of which those are frozen that stage fuse doesn't train."""
    if settings.represent == "codes" or not settings.tokens:
        return ()
    frozen = "tables" not in settings.train
    tables = tuple(replace(table, frozen=frozen) for table in collab.tables)
    if semantic is not None:
        tables += (replace(semantic, frozen=frozen or settings.semantic == "frozen"),)
    return tables


def semantic_table(folder: Path, settings: Fuse) -> Table | None:
    """The saved distilled vectors among the tables of a folder; None where no token takes them."""
    if "semantic" not in settings.tokens:
        return None
    saved = SavedTable(folder, "semantic")
    return Table("semantic", saved.facts["rows"], saved.facts["columns"], ("semantic",), read=saved.read)


def soft_tokens(settings: Fuse) -> tuple[str, ...]:
    """The tokens that are injected, in one order however they are named."""
    return tuple(name for name in SOFT if name in settings.tokens)


def represented(settings: Fuse) -> tuple[str, ...] | None:
    """Of user and item, what the collaborative model is only asked to represent; None: all that it does, where it scores too."""
    return None if settings.collab_score else collaborative_tokens(soft_tokens(settings))


def collaborative_tokens(tokens: Sequence[str]) -> tuple[str, ...]:
    """Those of the tokens that are made of the collaborative model."""
    return tuple(name for name in tokens if name != "semantic")
