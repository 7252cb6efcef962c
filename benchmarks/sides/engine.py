"""The training loop's own engine in one process, without Ray: what a worker of Ray Train runs."""

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist

from sellarec.config import Tables
from sellarec.training.engine import Engine
from sellarec.training.task import Task
from sellarec.training.workers import Workers


def engine_of(task: Task, settings: Any, device: str = "cpu", dtype: str = "float32") -> Engine:
    """An engine whose only worker is this process; `dtype` is what its dense part computes in."""
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    return Engine(task, Workers(0, 1, torch.device(device), group, group), 0, settings, Tables(), dtype)


def steps_of(
    engine: Engine, batches: Sequence[pa.Table], units: int, more: dict[str, float] | None = None
) -> Callable[[], tuple[int, dict]]:
    """A repetition: a step on each batch, which gives the loss as a number, for which a GPU is waited for.

    Args:
        more: what is found beside the losses.
    """
    taken = 0

    def repeat() -> tuple[int, dict]:
        nonlocal taken
        losses = []
        for batch in batches:
            losses.append(engine.step(batch, taken, 1.0))
            taken += 1
        return units, {"first loss": losses[0], "losses": losses, **(more or {})}

    return repeat
