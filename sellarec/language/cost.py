"""What the stages of a run compute with the language model, by arithmetic: tokens, floating-point operations, hours of GPUs.

Counted is what the model's definition asks for (model FLOPs, as in Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B): of a
token two operations for each weight of the decoder layers forward, two backward to its input, two more for each weight that is
trained; attention over half of the prompt on average; the output layer where logits are made. Layers that are computed again
(`checkpoint_activations`) are counted as often as they run. Tables, projections, data and the collaborative stages are not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sellarec.config import MFU, Config
from sellarec.language.memory import Shape, largest, phases, use_of
from sellarec.training.plan import GIB

STAGES = ("pretrain", "adapt", "distil", "fuse", "evaluate")
"""Stages that run the language model."""


@dataclass(frozen=True)
class Gpu:
    """A GPU by its maker's data sheet.

    Attributes:
        memory: GiB that a process finds free on an idle one, rounded down.
        bfloat16, float32: peak of dense products, in 10^12 operations a second; of float32 without tensor cores.
    """

    memory: int
    bfloat16: float
    float32: float


GPUS = {
    "L4": Gpu(22, 121, 30),
    "L40S": Gpu(44, 362, 91),
    "A100-40GB": Gpu(39, 312, 19.5),
    "A100-80GB": Gpu(79, 312, 19.5),
    "H100": Gpu(79, 989, 67),
    "H200": Gpu(139, 989, 67),
}


@dataclass(frozen=True)
class Cost:
    """What a stage computes.

    Attributes:
        steps: optimizer steps; 0 where nothing is trained.
        trained, scored: prompts (texts) that gradients are made of, and that are only read.
        tokens: most tokens of one.
        operations: floating-point operations, of all workers together.
        dtype: that it computes in.
    """

    stage: str
    steps: int
    trained: int
    scored: int
    tokens: int
    operations: float
    dtype: str

    def hours(self, gpu: Gpu, workers: int, mfu: float) -> float:
        """Of so many GPUs that reach the share `mfu` of their peak."""
        return self.operations / (getattr(gpu, self.dtype) * 1e12 * mfu * workers) / 3600


def operations(shape: Shape, prompts: int, tokens: int, logits: int) -> float:
    """Of reading prompts of so many tokens, with logits at so many positions of each."""
    weights = shape.layers * shape.layer + shape.adapter
    attention = 2 * shape.layers * shape.hidden * tokens
    return prompts * (tokens * (2.0 * weights + attention) + logits * 2.0 * shape.hidden * shape.vocabulary)


def training_operations(shape: Shape, prompts: int, tokens: int, logits: int, trains: str, checkpoints: bool) -> float:
    """Of reading prompts and of the gradients.

    Args:
        trains: of `model`, `adapter` and `nothing` what of the language model is trained.
        checkpoints: whether layers are computed again for the backward pass.
    """
    body = operations(shape, prompts, tokens, 0)
    attention = 2.0 * shape.layers * shape.hidden * tokens * tokens * prompts
    trained = {"model": shape.layers * shape.layer, "adapter": shape.adapter, "nothing": 0}[trains]
    of_logits = prompts * logits * 2.0 * shape.hidden * shape.vocabulary
    # logits at many positions are made again in the backward pass; attention has two products forward and four backward
    times = (3 if logits > 1 else 2) + (trains == "model")
    return body * (2 + checkpoints) + attention + 2.0 * trained * tokens * prompts + times * of_logits


def cost_of(stage: str, config: Config, shape: Shape, context: int, rows: Mapping[str, int]) -> Cost:
    """What a stage computes at most: with all its epochs, and prompts as long as they may be.

    Args:
        context: the model's, in tokens.
        rows: of `train`, `valid` and `test`, and how many `users` and `items` there are.
    """
    settings, use = getattr(config, stage), use_of(stage, config, context)
    if stage in ("distil", "evaluate"):
        scored = 2 * rows["test"]  # text-only and SeLLa-Rec
        if stage == "distil":
            scored = rows["items"] + rows["users"] * config.reads_profiles
        found = operations(shape, scored, use.tokens, 0 if stage == "distil" else 1)
        return Cost(stage, 0, 0, scored, use.tokens, found, use.dtype)
    per_epoch = math.ceil(rows["items" if stage == "pretrain" else "train"] / settings.batch)
    steps = math.ceil(settings.epochs * per_epoch)
    steps = min(steps, settings.max_steps or steps)
    logits = (
        1 if use.logits == "answer" else 2 if stage != "pretrain" and settings.loss == "answer-tokens" else use.tokens
    )
    trained, scored = steps * settings.batch, 0
    if stage != "pretrain":
        every = max(1, round(settings.validate_every * per_epoch))
        scored = math.ceil(steps / every) * min(rows["valid"], settings.valid_rows)
        if stage == "fuse" and len(config.fuse.language_weights) > 1:  # to choose among them
            scored += min(rows["valid"], settings.valid_rows)
    found = training_operations(shape, trained, use.tokens, logits, use.trains, use.checkpoints)
    found += operations(shape, scored, use.tokens, 1)
    return Cost(stage, steps, trained, scored, use.tokens, found, use.dtype)


def costs(config: Config, shape: Shape, context: int, rows: Mapping[str, int], stages: Sequence[str]) -> list[Cost]:
    """Of those of the stages that run the language model of a run."""
    run = [stage for stage in STAGES if stage in stages and (stage != "pretrain" or config.pretrains)]
    return [cost_of(stage, config, shape, context, rows) for stage in run]


def in_words(found: Sequence[Cost]) -> list[str]:
    """One line a stage, and their sum."""
    lines = []
    for cost in found:
        parts = []
        if cost.trained:
            parts.append(f"{cost.steps:,} steps, {cost.trained:,} prompts trained on")
        if cost.scored:
            parts.append(f"{cost.scored:,} {'texts' if cost.stage == 'distil' else 'prompts'} read")
        amount = f"{(cost.trained + cost.scored) * cost.tokens / 1e6:,.1f} million tokens"
        lines.append(
            f"{cost.stage:<9} {' and '.join(parts)}, of at most {cost.tokens:,} tokens: {amount}, {cost.operations:.2e} "
            f"operations in {cost.dtype}"
        )
    return lines


def hours_in_words(found: Sequence[Cost], names: Sequence[str], workers: int, mfu: float = MFU) -> list[str]:
    """One line a GPU: hours of all stages on so many of them."""
    lines = []
    for name in names:
        hours = {cost.stage: cost.hours(GPUS[name], workers, mfu) for cost in found}
        parts = ", ".join(f"{stage} {amount:.2f}" for stage, amount in hours.items())
        lines.append(f"{workers} x {name}: {sum(hours.values()):.2f} hours ({parts})")
    return lines


def assumptions(mfu: float = MFU) -> list[str]:
    """What the numbers of hours rest on."""
    return [
        f"assumed: {mfu:.0%} of the peak of dense products (bfloat16, or float32 without tensor cores) is reached",
        "assumed: all epochs or max_steps are taken, without an early stop; prompts are as long as prompt.max_tokens allows",
        "not counted: starting, reading data, tables, projections, the collaborative stages, padding, saving",
    ]


def memory_of(config: Config, shape: Shape, context: int, stages: Sequence[str], workers: int) -> int:
    """Bytes that the stage with the most of them takes of each of so many workers on GPUs, beside tables."""
    uses = [replace(use_of(stage, config, context), on_gpu=True) for stage in stages]
    uses = [use if use.workers == 1 and not use.sharded else replace(use, workers=workers) for use in uses]
    return max(sum(largest(phases(shape, use))[1].values()) for use in uses)


def fewest_workers(
    config: Config, shape: Shape, context: int, stages: Sequence[str], tables: int, gpu: Gpu
) -> int | None:
    """The fewest workers, of 1, 2, 4, ... 1,024, on whose GPUs the model and an equal share of the tables fit; None: no number
    of them does, as each worker of stage distil holds the whole model, unless it is `sharded`.

    Args:
        tables: bytes of all tables with their optimizer.
    """
    for workers in (2**power for power in range(11)):
        if memory_of(config, shape, context, stages, workers) + tables // workers <= gpu.memory * GIB:
            return workers
    return None


def known_rows(config: Config, facts: Mapping[str, Any] | None) -> dict[str, int] | None:
    """How many rows, users and items there are: of a prepared log's facts, or of what the dataset is known to hold; None where
    neither is there."""
    if facts is not None:
        return {**facts["rows"], "users": facts["users"], "items": facts["items"]}
    if config.data.expected is not None:
        return dict(zip(("train", "valid", "test", "users", "items"), config.data.expected, strict=True))
    return None
