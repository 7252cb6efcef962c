"""Stage adapt: tuning of the language model on text-only prompts (TALLRec; SeLLa-Rec's first stage)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sellarec.config import ALL_LINEAR, Adapt, Prompt
from sellarec.errors import UserError
from sellarec.language import llm as llms
from sellarec.language.prompts import SOFT, Coded, Prompts
from sellarec.language.scorer import (
    NO_TARGET,
    PromptScorer,
    base_model,
    left_padded,
    next_tokens,
    prefixes_of,
    share_prefixes,
)
from sellarec.training.stream import Prepare
from sellarec.training.task import Batch, Peers, Task, Vectors

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""By what part of the largest logit those of what was saved may differ from the trained one's, by the type of computing:
rounding differs where prompts are padded and batched otherwise."""


class TextTask(Task):
    """Yes or no from a text-only prompt: the title to judge after the titles of the history.

    The score is the difference of the two answers' logits at the first position where their tokens differ.

    Args:
        loss: what it is trained by, see `Adapt.loss`.
    """

    columns: Sequence[str] = ("row", "item", "label", "history")

    def __init__(self, source: llms.LlmSource, model: nn.Module, prompts: Prompts, loss: str = "answer") -> None:
        self.source = source
        self.model = PromptScorer(model, prompts.segments.deciding)
        self.blocks = self.model.blocks
        self.prompts = prompts
        self.prepare: Prepare = partial(prompts.prepare, answers=loss != "answer")
        self._loss = loss
        self._has_adapter = base_model(model) is not model

    @property
    def prepare_to_score(self) -> Prepare:
        return self.prompts.prepare

    def collate(self, rows: pa.Table, step: int | None) -> Batch:
        return {
            **prompt_batch(rows, self._loss),
            "label": torch.from_numpy(rows["label"].to_numpy().astype(np.float32)),
            "weight": torch.from_numpy(rows["weight"].to_numpy().copy()),
        }

    def targets(self, batch: Batch) -> Tensor:
        return count_targets(batch)

    def loss(self, model: nn.Module, batch: Batch, vectors: Vectors, peers: Peers) -> Tensor:
        return prompt_loss(model(batch["tokens"], batch["mask"], {}, {}, batch.get("targets")), batch)

    def score(self, model: nn.Module, batch: Batch, vectors: Vectors) -> Tensor:
        logits = model(batch["tokens"], batch["mask"], {}, {}, prefix=prefixes_of(batch))
        return answer_score(logits)

    def share(self, rows: pa.Table, size: int) -> tuple[pa.Table, float, int]:
        return share_prefixes(self.model, rows, size)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        state = of_part(weights, "llm.")
        assert len(state) == len(weights)
        if self._has_adapter:
            self.model.llm.save_pretrained(folder / llms.ADAPTER, state_dict=state)
        else:
            tokenizer = llms.load_tokenizer(self.source.folder())
            llms.save_model(self.model.llm, state, tokenizer, folder / "model")

    def check_saved(
        self, model: nn.Module, batch: Batch, folder: Path | None, dtype: torch.dtype, weights: dict[str, Tensor]
    ) -> None:
        with self.model.all_logits():
            logits = model(batch["tokens"], batch["mask"], {}, {})
        if folder is not None:
            compare_saved(of_part(weights, "llm."), logits, batch, self.source, folder, self._has_adapter, dtype)

    def facts(self) -> dict[str, Any]:
        trained = sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
        everything = sum(weight.numel() for weight in self.model.parameters())
        return {**self.prompts.facts(), "trained_weights": trained, "weights": everything}


@torch.no_grad()
def compare_saved(
    weights: dict[str, Tensor],
    logits: Tensor,
    batch: Batch,
    source: llms.LlmSource,
    folder: Path,
    has_adapter: bool,
    dtype: torch.dtype,
) -> None:
    """Compare a trained model with PEFT's or Transformers' own loading of it: each trained weight, which has to be the same, and
    the logits of each prompt's last position, which are made without padding, and on the CPU, where the worker has held the whole
    model before.

    Args:
        weights: the trained ones, float32, by their names in the model.
        logits: float32 [b, V].
        folder: where it was saved, as `adapter` where it `has_adapter`, else as `model`.

    Raises:
        UserError: weights differ, or logits by more than rounding.
    """
    from peft import PeftModel

    if has_adapter:
        what = f"the adapter in {folder / 'adapter'}, loaded with PEFT {version('peft')},"
        base = llms.load_model(source.folder(), source.storage)
        plain = PeftModel.from_pretrained(base, folder / llms.ADAPTER).eval()
    else:
        what = f"the model in {folder / 'model'}, loaded with Transformers {version('transformers')},"
        plain = llms.load_model(folder / "model").eval()
    loaded = plain.state_dict()
    wrong = [name for name, weight in weights.items() if name not in loaded or not torch.equal(loaded[name], weight)]
    if wrong:
        raise UserError(
            f"{what} has other weights than the trained model: {len(wrong)} of {len(weights)} trained ones, {wrong[0]} the first "
            "of them. Whatever loads it would score otherwise, so the stage ends here: report it with the output of jobs/env.py"
        )
    for weight in plain.parameters():
        if weight.itemsize > dtype.itemsize:
            weight.data = weight.data.to(dtype)
    llms.compute_in(plain, dtype)
    logits, every_token, every_mask = logits.cpu(), batch["tokens"].cpu(), batch["mask"].cpu()
    prompts = (tokens[mask][None] for tokens, mask in zip(every_token, every_mask, strict=True))
    again = torch.stack([plain(input_ids=tokens, use_cache=False).logits[0, -1].float() for tokens in prompts])
    difference = (again - logits).abs().max().item()
    allowed = TOLERANCE[dtype] * logits.abs().max().item()
    if not difference <= allowed:
        raise UserError(
            f"{what} gives other logits than the trained model: they differ by up to {difference:.3g}, and {allowed:.3g} is "
            "allowed for rounding. Whatever loads it would score otherwise, so the stage ends here: report it with the "
            "output of jobs/env.py"
        )


def of_part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those of the weights whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def prompt_batch(rows: pa.Table, loss: str) -> Batch:
    """The prompts' tokens and what they share, and where they go on with answers, `targets`: what is to be predicted, by
    `Adapt.loss`."""
    batch = left_padded(rows)
    if "prefix" in rows.column_names:
        batch |= {name: torch.from_numpy(rows[name].to_numpy().copy()) for name in ("prefix", "prefix_tokens")}
    if "answer" not in rows.column_names:
        return batch
    answer = torch.from_numpy(rows["answer"].to_numpy().copy())
    return {**batch, "targets": next_tokens(batch, answer if loss == "answer-tokens" else None)}


def count_targets(batch: Batch) -> Tensor:
    """What the summed loss is divided by: rows, or the tokens to predict, of weight 1."""
    if "targets" not in batch:
        return batch["weight"].sum()
    return ((batch["targets"] != NO_TARGET).sum(1) * batch["weight"]).sum()


def prompt_loss(found: Tensor, batch: Batch) -> Tensor:
    """The loss summed over targets of weight 1, from what `PromptScorer` finds: logits, or losses where there are targets."""
    return (found * batch["weight"]).sum() if "targets" in batch else answer_loss(found, batch)


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the right answer against the other one at the deciding position, summed over rows of weight 1.

    It is the logistic loss of the score; the rest of the vocabulary, which is never answered with, has no part in it.
    """
    losses = F.binary_cross_entropy_with_logits(answer_score(logits), batch["label"], reduction="none")
    return (losses * batch["weight"]).sum()


def answer_score(logits: Tensor) -> Tensor:
    """float32 [b]: of logits [b, 2] that of yes minus that of no."""
    return logits[:, 0] - logits[:, 1]


def make_prompts(
    folder: Path,
    titles: list[str],
    settings: Prompt,
    noun: str,
    model: nn.Module,
    kind: str,
    loss: str = "answer",
    soft: Sequence[str] = SOFT,
    coded: Coded | None = None,
) -> Prompts:
    """The prompts that a model reads; a loss over tokens wants room for the answer, when scoring too.

    Raises:
        UserError: they can't be made for it.
    """
    context, tokenizer = llms.context_length(model.config), llms.load_tokenizer(folder)
    return Prompts(tokenizer, titles, settings, noun, context, kind, answers=loss != "answer", soft=soft, coded=coded)


def build_adapt(
    source: llms.LlmSource, titles: list[str], prompt: Prompt, noun: str, settings: Adapt, later_loss: str = "answer"
) -> TextTask:
    """The task of training a fresh adapter: LoRA (arXiv 2106.09685), as rsLoRA (2312.03732) or DoRA (2402.09353) where asked for;
    or of training all weights, which are then held in float32 however frozen ones are stored.

    Args:
        later_loss: that of stage fuse, which the model's logits have to go with too: long before that stage is a time to say so.

    Raises:
        UserError: the model has no layer of the names in adapt.targets, its logits don't go with the loss, or it can't be
            loaded.
    """
    from peft import LoraConfig, get_peft_model

    folder, is_full = source.folder(), settings.method == "full"
    if is_full:
        source = replace(source, storage="float32")
    model = llms.load_model(folder, source.storage, source.attention)
    if {settings.loss, later_loss} != {"answer"}:
        llms.check_logits(model)
    prompts = make_prompts(folder, titles, prompt, noun, model, "text", settings.loss)
    if is_full:
        return TextTask(source, model, prompts, settings.loss)
    linear = llms.linear_layers(model)
    is_transposed = not all(isinstance(module, nn.Linear) for module in linear.values())  # as in GPT-2
    llms.check_targets(settings.targets, linear, source.name)  # before any stage too, but for those that a sweep draws
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        bias="none",
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        target_modules=ALL_LINEAR if settings.targets == (ALL_LINEAR,) else list(settings.targets),
        fan_in_fan_out=is_transposed,
        task_type="CAUSAL_LM",
    )
    model.config._name_or_path = source.name  # what the adapter's own config will say that it belongs to
    return TextTask(source, get_peft_model(model, lora), prompts, settings.loss)


def build_adapted(
    source: llms.LlmSource, titles: list[str], prompt: Prompt, noun: str, adapter: Path | None, loss: str
) -> TextTask:
    """The task of scoring with an adapter that was trained with a loss, on the prompts that it was trained on; without one,
    with a model that was trained so itself."""
    folder = source.folder()
    model = llms.load_model(folder, source.storage, source.attention)
    prompts = make_prompts(folder, titles, prompt, noun, model, "text", loss)
    return TextTask(source, llms.with_adapter(model, adapter), prompts)
