"""Training stage fuse as each worker of a test does, without Ray."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from engine_cases import SEED, rate_at, storage_of, workers_of
from language_cases import spoil
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sellarec.artifacts import Place
from sellarec.collab.task import build_collab
from sellarec.config import Collab, Evaluate, Fuse, Prompt, Tables
from sellarec.data.log import read_log
from sellarec.errors import UserError
from sellarec.fusion.codes import CodesTask
from sellarec.fusion.fuse import FuseTask, build_fuse, represented, semantic_table, token_rows
from sellarec.language.llm import find_llm
from sellarec.training.engine import Engine
from sellarec.training.stream import Order, prepared, row_groups, slices
from sellarec.training.task import Batch, Peers, Vectors

STEPS, HIDDEN = 5, 6


@dataclass(frozen=True)
class Case:
    """A recommender that is trained for STEPS steps.

    Attributes:
        inputs: folder of `decoder`, `adapter`, `log`, and what stage align leaves.
        output: what is exported goes there.
        stop_before: the training is broken off before this step, of which there is a checkpoint, and goes on from it.
    """

    settings: Fuse
    collab: Collab
    inputs: Path
    output: Path
    stop_before: int | None = None


def titles_of(inputs: Path) -> list[str]:
    words = ("golden", "harbor", "lunar", "alibi", "winter", "voyage", "whale")
    items = read_log(inputs / "log").facts["items"]
    return [f"the {words[i % 7]} {words[i % 5]}" for i in range(items)]


def task_of(case: Case, trained: bool) -> FuseTask | CodesTask:
    """As the pipeline builds it: to train, or with what a training left."""
    torch.manual_seed(SEED)
    left = case.settings.train if trained else ()
    tables = case.output if "tables" in left else case.inputs
    log, source = read_log(case.inputs / "log"), find_llm(str(case.inputs / "decoder"), None)
    start = None if case.settings.represent == "learned" and not trained else tables
    collab = None
    if case.settings.tokens:
        settings = token_rows(case.settings, case.collab, source)
        collab = build_collab(log, settings, start, represented=represented(case.settings))
    semantic = semantic_table(tables / "tables", case.settings)
    return build_fuse(
        source, titles_of(case.inputs), Prompt(template="compact"), "movie",
        (case.output if "adapter" in left else case.inputs) / "adapter", collab, semantic, HIDDEN,
        None if "projections" in left else case.inputs / "projection.safetensors",
        case.output / "projection.safetensors" if "projections" in left else None, case.settings, SEED,
    )  # fmt: skip


def order_of(case: Case, split: str, batch: int, seed: int | None) -> Order:
    return Order(
        tuple(row_groups([str(path) for path in read_log(case.inputs / "log").split_paths(split)])), batch, seed
    )


def slices_of(order: Order, task: FuseTask, first: int, last: int) -> Any:
    pieces = (prepared(order, piece, task.columns, task.prepare) for piece in order.pieces(first, last))
    return slices(chain.from_iterable(pieces), order, dist.get_rank(), dist.get_world_size(), first, last)


def scores_of(case: Case, task: FuseTask, engine: Engine) -> Any:
    valid = order_of(case, "valid", 7, None)
    return engine.score(slices_of(valid, task, 0, valid.steps_per_epoch), lambda _: None)


@contextmanager
def noted(norms: list[tuple[float, float]]) -> Iterator[None]:
    """Steps in it leave the norms of their dense gradients: before these are clipped, and after."""
    clip = torch.nn.utils.clip_grad_norm_

    def clip_and_note(weights: list[nn.Parameter], largest: float) -> Tensor:
        norm = clip(weights, largest)
        both = norm, torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        before, after = (float(each.full_tensor() if isinstance(each, DTensor) else each) for each in both)
        norms.append((before, after))
        return norm

    torch.nn.utils.clip_grad_norm_ = clip_and_note
    try:
        yield
    finally:  # the process serves other tests too
        torch.nn.utils.clip_grad_norm_ = clip


def train(case: Case) -> dict[str, Any]:
    """What a worker finds: losses, norms of gradients, what its task trains, what the check of the export says, of what was
    written and of a spoilt adapter, and on worker 0 scores, by the engine that has trained and by one that is made of what was
    exported."""
    workers = workers_of()
    task = task_of(case, trained=False)
    make = partial(Engine, workers=workers, seed=SEED, storage=Tables(), dtype="float32")
    engine = make(task, settings=case.settings)
    order, losses, norms = order_of(case, "train", case.settings.batch, SEED), [], []
    for step, part in enumerate(slices_of(order, task, 0, STEPS)):
        if step == case.stop_before:
            engine.save_checkpoint(str(case.output / "checkpoint"))
            task = task_of(case, trained=False)
            engine = make(task, settings=case.settings)
            engine.load_checkpoint(str(case.output / "checkpoint"))
        with noted(norms):
            losses.append(engine.step(part, step, rate_at(step)))
    engine.export(Place.of(str(case.output)), storage_of(workers))
    dist.barrier(group=workers.control)
    found = {"losses": losses, "norms": norms, "facts": task.facts(), "scores": scores_of(case, task, engine)}
    found["checked"] = check(case, task, engine)
    again = task_of(case, trained=True)
    found["again"] = scores_of(case, again, make(again, settings=Evaluate()))
    if "adapter" in case.settings.train:
        dist.barrier(group=workers.control)
        kept = (case.output / "adapter" / "adapter_model.safetensors").read_bytes()
        if workers.rank == 0:
            spoil(case.output / "adapter" / "adapter_model.safetensors")
        found["spoilt"] = check(case, task, engine)
        if workers.rank == 0:
            (case.output / "adapter" / "adapter_model.safetensors").write_bytes(kept)
    return found


def check(case: Case, task: FuseTask | CodesTask, engine: Engine) -> str | None:
    """What the check of the export says on this worker."""
    valid = order_of(case, "valid", 7, None)
    pieces = (prepared(valid, piece, task.columns, task.prepare_to_score) for piece in valid.pieces(0, 1))
    (some,) = slices(chain.from_iterable(pieces), valid, dist.get_rank(), dist.get_world_size(), 0, 1)
    try:
        engine.check_export(some.slice(0, 2), Place.of(str(case.output)))
    except UserError as error:
        return str(error)
    return None


def refused(case: Case, rank: int, at: int, what: str) -> dict[str, Any]:
    """What a worker finds where at a step one of them, `rank`, comes upon what is not finite, see `damaged`: the step that it
    refused, in which words, and what it held before the step that went before, before that one, and after it."""
    workers, task = workers_of(), task_of(case, trained=False)
    engine = Engine(task, workers, SEED, case.settings, Tables(), "float32")
    found: dict[str, Any] = {"held": []}
    for step, part in enumerate(slices_of(order_of(case, "train", case.settings.batch, SEED), task, 0, STEPS)):
        if step >= at - 1:
            found["held"].append(held(engine._state()))
        if step == at and workers.rank == rank:
            task.loss = partial(damaged, task.loss, what)
        try:
            engine.step(part, step, rate_at(step))
        except FloatingPointError as error:
            found["held"].append(held(engine._state()))
            return {**found, "step": step, "told": str(error)}
    return found


def damaged(
    loss: Callable[..., Tensor], what: str, model: nn.Module, batch: Batch, rows: Vectors, peers: Peers
) -> Tensor:
    """The loss of users' vectors that are no numbers; or, of the same vectors, a loss whose gradient alone is none, as of a root
    at 0."""
    if what == "vectors":
        return loss(model, batch, rows | {"user": rows["user"] * float("nan")}, peers)
    return loss(model, batch, rows, peers) + (0 * rows["user"].sum()).sqrt()


def held(state: Any, name: str = "") -> dict[str, np.ndarray]:
    """By name, this worker's part of all tensors of a checkpoint: trained rows and weights, and what their optimizers keep."""
    if isinstance(state, dict):
        return {key: part for each, value in state.items() for key, part in held(value, f"{name}/{each}").items()}
    if hasattr(state, "local_shards"):
        return {f"{name} {i}": shard.tensor.detach().numpy().copy() for i, shard in enumerate(state.local_shards())}
    if isinstance(state, DTensor):
        state = state.to_local()
    return {name: state.detach().numpy().copy()} if isinstance(state, Tensor) else {}
