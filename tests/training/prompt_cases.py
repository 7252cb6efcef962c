"""Training with a language model as each worker of a test does, without Ray."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_cases import rate_at, rows_of, workers_of

from sellarec.collab.task import build_collab
from sellarec.config import Adapt, Collab, Fuse, Prompt, Tables
from sellarec.data.log import Log
from sellarec.fusion.fuse import build_fuse
from sellarec.language import llm as llms
from sellarec.language.adapt import build_adapt
from sellarec.training import dense
from sellarec.training import engine as engine_module
from sellarec.training.engine import Engine
from sellarec.training.stream import Order, row_groups, slices
from sellarec.training.table import Table
from sellarec.training.task import WORTH_SHARING

USERS, ITEMS, DIM = 7, 10, 4
BATCH, STEPS, SEED = 7, 3, 1
CANDIDATES = 12
"""Rows of a global batch that is scored."""
TITLES = [
    "sea",
    "golden anchor",
    "lunar orbit space",
    "crime",
    "Toy Story",
    "2001",
    "x",
    "tide",
    "the last voyage",
    "y",
]


@dataclass(frozen=True)
class Case:
    """A stage that is trained for some steps.

    Attributes:
        decoder: folder of the language model.
        rows: Parquet file of the rows.
        loss: `adapt.loss`, or `fuse.loss`.
        adapter: the adapter that stage fuse reads; None for stage adapt.
        log: what stage fuse's collaborative model is made for.
    """

    decoder: Path
    rows: Path
    loss: str
    adapter: Path | None = None
    log: Log | None = None
    micro_batch: int = 2


def task_of(case: Case) -> Any:
    torch.manual_seed(SEED)
    source, prompt = llms.find_llm(str(case.decoder), None), Prompt(template="compact")
    if case.adapter is None:
        task = build_adapt(source, TITLES, prompt, "movie", settings_of(case))
        for name, weight in task.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)  # else there is no gradient but of these
        return task
    collab = build_collab(case.log, Collab(dim=DIM), None)
    rows = np.random.default_rng(2).standard_normal((ITEMS, 16)).astype(np.float32)
    semantic = Table("semantic", ITEMS, 16, ("semantic",), read=lambda low, high: rows[low:high])
    return build_fuse(
        source, TITLES, prompt, "movie", case.adapter, collab, semantic, 6, None, None, settings_of(case), SEED
    )


def score_candidates(case: Case) -> dict[str, Any]:
    """Scores of rows of which many begin alike, alone and with what they share; and how often the first decoder layer was called
    on this worker."""
    workers, task, calls = workers_of(), task_of(case), []
    engine = Engine(task, workers, SEED, settings_of(case), Tables(), "float32")
    task.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    order = Order(tuple(row_groups([str(case.rows)])), CANDIDATES, None)
    size, steps = workers.world_size, order.steps_per_epoch
    scores, of_calls = [], []
    for worth in (0, WORTH_SHARING):
        engine_module.WORTH_SHARING = worth
        calls.clear()
        rows = rows_of(order, task, task.prepare_to_score, 0, steps)
        scores.append(engine.score(slices(rows, order, workers.rank, size, 0, steps), lambda _: None))
        of_calls.append(len(calls))
    return {"alone": scores[0], "shared": scores[1], "calls": of_calls}


def settings_of(case: Case) -> Any:
    if case.adapter is None:
        return Adapt(rank=2, loss=case.loss, micro_batch=case.micro_batch)
    return Fuse(loss=case.loss, micro_batch=case.micro_batch, learning_rate=1e-3, unseen_dropout=0.2)


def train(case: Case) -> dict[str, Any]:
    """The losses, and on worker 0 the trained dense weights and the rows' scores."""
    workers, task = workers_of(), task_of(case)
    engine = Engine(task, workers, SEED, settings_of(case), Tables(), "float32")
    order = Order(tuple(row_groups([str(case.rows)])), BATCH, None)
    size = workers.world_size
    rows = rows_of(order, task, task.prepare, 0, STEPS)
    losses = [
        engine.step(part, step, rate_at(step))
        for step, part in enumerate(slices(rows, order, workers.rank, size, 0, STEPS, case.micro_batch))
    ]
    last = order.steps_per_epoch
    rows = rows_of(order, task, task.prepare_to_score, 0, last)
    scores = engine.score(slices(rows, order, workers.rank, size, 0, last), lambda _: None)
    weights = {name: value.numpy() for name, value in dense.trained_weights(task.model).items()}
    return {"losses": losses, "scores": scores, "weights": weights}
