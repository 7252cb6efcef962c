"""The stages of a recipe, as its settings make them, with small data and a small model, on each worker of a test."""

from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_cases import SEED, workers_of

from sellarec.alignment.align import build_align
from sellarec.artifacts import Place
from sellarec.collab.task import build_collab
from sellarec.config import Config, Dense
from sellarec.data.log import read_log
from sellarec.fusion.fuse import build_fuse
from sellarec.language.adapt import build_adapt
from sellarec.language.llm import find_llm
from sellarec.training.engine import Engine
from sellarec.training.loop import Position, Training, _facts
from sellarec.training.stream import Order, prepared, row_groups, slices
from sellarec.training.table import Table
from sellarec.training.task import Task

WIDTH = 16
"""Of the language model."""


@dataclass(frozen=True)
class Case:
    """A stage of a config.

    Attributes:
        inputs: folder of `log`, `llama` and, for fuse, `adapter`.
        at: the steps that are taken, of so many in all.
    """

    stage: str
    config: Config
    inputs: Path
    at: tuple[int, ...]
    steps: int


def vectors(start: int, stop: int) -> np.ndarray:
    return np.random.default_rng(8).standard_normal((100, WIDTH)).astype(np.float32)[start:stop]


def task_of(case: Case) -> Task:
    torch.manual_seed(SEED)
    config, log = case.config, read_log(case.inputs / "log")
    items = log.facts["items"]
    language = (
        find_llm(str(case.inputs / "llama"), None),
        [f"title {item}" for item in range(items)],
        config.prompt,
        "movie",
    )
    if case.stage == "adapt":
        return build_adapt(*language, config.adapt)
    collab = build_collab(log, config.collab, None)
    if case.stage == "collab":
        return collab
    if case.stage == "align":
        return build_align(collab, WIDTH, vectors, config.collab.dim, config.align, np.arange(3), SEED)
    semantic = Table("semantic", items, WIDTH, ("semantic",), read=vectors)
    adapter = case.inputs / "adapter"
    return build_fuse(*language, adapter, collab, semantic, config.align.hidden, None, None, config.fuse, SEED)


def train(case: Case) -> dict[str, Any]:
    """What training.json says of the optimizers; of the optimizers themselves their classes, and at each step what it was taken
    with: learning rate, betas and weight decay."""
    config, settings = case.config, getattr(case.config, case.stage)
    workers, task = workers_of(), task_of(case)
    dtype = config.llm.dtype if case.stage in ("adapt", "fuse") else "float32"
    engine = Engine(task, workers, SEED, settings, config.tables, dtype)
    running = {"dense": engine.optimizer, "tables": engine.tables._adam if engine.tables is not None else None}
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name, optimizer in running.items() if optimizer is not None}
    for name in taken:
        running[name].register_step_pre_hook(partial(_note, taken[name]))
    paths = [str(path) for path in read_log(case.inputs / "log").split_paths("train")]
    order = Order(tuple(row_groups(paths)), settings.batch, SEED)
    for step in case.at:
        rows = chain.from_iterable(prepared(order, piece, task.columns, task.prepare) for piece in order.pieces(0, 1))
        (part,) = slices(rows, order, workers.rank, workers.world_size, 0, 1)
        engine.step(part, step, engine.rate(step, case.steps))
    place = Place.of(str(case.inputs))
    training = Training(case.stage, partial(task_of, case), settings, SEED, order, None, place)
    assert isinstance(settings, Dense)
    return {
        "recorded": _facts(training, engine, Position())["optimizers"],
        "classes": {name: type(running[name]).__name__ for name in taken},
        "taken": taken,
    }


def _note(taken: list[dict[str, Any]], optimizer: torch.optim.Optimizer, *_: Any) -> None:
    (group,) = optimizer.param_groups
    taken.append({name: group[name] for name in ("lr", "betas", "weight_decay")})
