"""The training loop's own engine in one process, without Ray: what a worker of Ray Train runs."""

from typing import Any

import torch
import torch.distributed as dist

from sellarec.config import Tables
from sellarec.training.engine import Engine, Workers
from sellarec.training.task import Task


def engine_of(task: Task, settings: Any, device: str = "cpu") -> Engine:
    """An engine whose only worker is this process."""
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    return Engine(task, Workers(0, 1, torch.device(device), group, group), 0, settings, Tables(), "float32")
