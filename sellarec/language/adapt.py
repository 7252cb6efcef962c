"""Stage adapt: LoRA tuning of the language model on text-only prompts (TALLRec; SeLLa-Rec's first stage)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sellarec.config import Adapt, Prompt
from sellarec.errors import UserError
from sellarec.language import llm as llms
from sellarec.language.prompts import SOFT, Prompts
from sellarec.language.scorer import PromptScorer, left_padded
from sellarec.training.task import Batch, Peers, Task, Vectors


class TextTask(Task):
    """Yes or no from a text-only prompt: the title to judge after the titles of the history.

    The score is the difference of the two answers' logits at the first position where their tokens differ; the loss is
    the logistic one of that score.
    """

    columns = ("row", "item", "label", "history")

    def __init__(self, model: nn.Module, prompts: Prompts) -> None:
        self.model = PromptScorer(model)
        self.blocks = self.model.blocks
        self.prompts = prompts
        self.prepare = prompts.prepare

    def collate(self, rows: pa.Table, step: int | None) -> Batch:
        return {
            **left_padded(rows),
            "label": torch.from_numpy(rows["label"].to_numpy().astype(np.float32)),
            "weight": torch.from_numpy(rows["weight"].to_numpy().copy()),
        }

    def targets(self, batch: Batch) -> Tensor:
        return batch["weight"].sum()

    def loss(self, model: nn.Module, batch: Batch, vectors: Vectors, peers: Peers) -> Tensor:
        return answer_loss(model(batch["tokens"], batch["mask"], {}, {}), batch, self.prompts)

    def score(self, model: nn.Module, batch: Batch, vectors: Vectors) -> Tensor:
        return answer_score(model(batch["tokens"], batch["mask"], {}, {}), self.prompts)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        prefix = "llm."
        assert all(name.startswith(prefix) for name in weights)
        state = {name.removeprefix(prefix): value for name, value in weights.items()}
        self.model.llm.save_pretrained(folder / "adapter", state_dict=state)

    def facts(self) -> dict[str, Any]:
        trained = sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
        everything = sum(weight.numel() for weight in self.model.parameters())
        return {**self.prompts.facts(), "trained_weights": trained, "weights": everything}


def answer_loss(logits: Tensor, batch: Batch, prompts: Prompts) -> Tensor:
    """Cross-entropy of the right answer against the other one at the deciding position, summed over rows of weight 1.

    It is the logistic loss of the score; the rest of the vocabulary, which is never answered with, has no part in it.
    """
    losses = F.binary_cross_entropy_with_logits(answer_score(logits, prompts), batch["label"], reduction="none")
    return (losses * batch["weight"]).sum()


def answer_score(logits: Tensor, prompts: Prompts) -> Tensor:
    """float32 [b]: logit of yes minus logit of no."""
    return logits[:, prompts.segments.yes] - logits[:, prompts.segments.no]


def make_prompts(
    folder: Path,
    titles: list[str],
    settings: Prompt,
    noun: str,
    model: nn.Module,
    kind: str,
    soft: Sequence[str] = SOFT,
) -> Prompts:
    context = llms.context_length(model.config)
    return Prompts(llms.load_tokenizer(folder), titles, settings, noun, context, kind, soft)


def build_adapt(source: llms.LlmSource, titles: list[str], prompt: Prompt, noun: str, settings: Adapt) -> TextTask:
    """The task of training a fresh adapter.

    Raises:
        UserError: the model has no layer of the names in adapt.targets, or cannot be loaded.
    """
    from peft import LoraConfig, get_peft_model

    folder = source.folder()
    model = llms.load_model(folder)
    layers = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    missing = sorted(set(settings.targets) - layers)
    if missing:
        raise UserError(
            f"adapt.targets names {', '.join(missing)}, but the linear layers of {source.name} are {', '.join(sorted(layers))}"
        )
    prompts = make_prompts(folder, titles, prompt, noun, model, "text")
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        bias="none",
        target_modules=list(settings.targets),
        task_type="CAUSAL_LM",
    )
    model.config._name_or_path = source.name  # what the adapter's own config will say that it belongs to
    return TextTask(get_peft_model(model, lora), prompts)


def build_adapted(source: llms.LlmSource, titles: list[str], prompt: Prompt, noun: str, adapter: Path) -> TextTask:
    """The task of scoring with a trained adapter."""
    folder = source.folder()
    model = llms.load_model(folder)
    prompts = make_prompts(folder, titles, prompt, noun, model, "text")
    return TextTask(llms.with_adapter(model, adapter), prompts)
