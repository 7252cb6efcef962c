"""A worker's place among all, and what workers tell each other."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sellarec.errors import UserError
from sellarec.language.llm import reading

Made = TypeVar("Made")


@dataclass
class Workers:
    """This worker's place among all, and the groups it talks over."""

    rank: int
    world_size: int
    device: torch.device
    tables: dist.ProcessGroup
    control: dist.ProcessGroup

    @classmethod
    def join(cls, timeout: float) -> "Workers":
        """Make the process groups: tables, FSDP (its mesh makes its own) and control messages don't share one. A collective that
        has waited `timeout` seconds for a worker fails."""
        import ray.train.torch

        context = ray.train.get_context()
        device = ray.train.torch.get_device()
        if device.type == "cpu":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
        return cls(
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            device=device,
            tables=dist.new_group(timeout=timedelta(seconds=timeout)),
            control=dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)),
        )

    def sum(self, *values: float) -> list[float]:
        """Sums over all workers, in float64."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def tell(self, *values: float) -> np.ndarray:
        """Each worker's values on all workers: float64 [W, n]."""
        told = torch.zeros(self.world_size, len(values), dtype=torch.float64)
        told[self.rank] = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(told, group=self.control)  # each worker adds to zeros
        return told.numpy()

    def collect(self, value: Any) -> list[Any] | None:
        """Each worker's value, by rank, on worker 0; None on the others."""
        gathered: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, gathered, dst=0, group=self.control)
        return gathered

    def gather(self, rows: Tensor) -> Tensor:
        """[b, ...] of each worker -> [W b, ...]; the gradient of a row is summed over all that used it."""
        if self.world_size == 1:
            return rows
        from torch.distributed.nn.functional import all_gather

        return torch.cat(list(all_gather(rows.contiguous())))

    def share_of(self, number: int) -> Tensor:
        """int64 [b]: which of so many this worker takes, as many as each other one does; past the last they begin again."""
        share = -(-number // self.world_size)
        return torch.arange(self.rank * share, (self.rank + 1) * share) % number

    def own(self, rows: Tensor) -> Tensor:
        """[W b, ...] of all -> [b, ...], those of this worker."""
        share = len(rows) // self.world_size
        return rows[self.rank * share : (self.rank + 1) * share]

    def add(self, values: Tensor) -> Tensor:
        """The sum over workers; the gradient of a worker's summand is the sum of all workers' gradients."""
        if self.world_size == 1:
            return values
        from torch.distributed.nn.functional import all_reduce

        return all_reduce(values.contiguous())

    def largest(self, values: Tensor) -> Tensor:
        """The maximum over workers, element by element. Without a gradient."""
        found = values.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found


def together(make: Callable[[], Made], workers: Workers) -> Made:
    """What `make` gives; where any worker is refused, all end, instead of waiting for that one in a collective."""
    refusal: UserError | None = None
    try:
        made = make()
    except UserError as error:
        refusal = error
    messages: list[Any] = [None] * workers.world_size
    dist.all_gather_object(messages, str(refusal) if refusal else None, group=workers.control)
    found = [message for message in messages if message is not None]
    if found:
        raise UserError(found[0]) from refusal
    return made


def together_of_first(make: Callable[[], Made], workers: Workers) -> Made:
    """As `together`, where language models that are loaded are read by worker 0 alone: `sellarec.language.llm.reading`."""
    with reading(weights=workers.rank == 0):
        return together(make, workers)
