"""Run a function in several processes of one gloo group, for the benchmarks beside this file."""

import json
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def measure(function: Callable[..., dict | None], workers: int, *arguments: Any) -> dict:
    """What worker 0's `function(rank, workers, *arguments)` gives; each worker has one thread.

    Raises:
        SystemExit: a worker failed.
    """
    context = mp.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        given = (workers, f"{folder}/meeting", function, arguments, answers)
        processes = [context.Process(target=_run, args=(rank, *given)) for rank in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"{function.__name__} failed on {workers} workers")
    return answers.get()


def _run(rank: int, workers: int, meeting: str, function: Callable, arguments: tuple, answers: mp.Queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    answer = function(rank, workers, *arguments)
    if rank == 0:
        answers.put(answer)
    dist.barrier()
    dist.destroy_process_group()


def write(out: Path, facts: dict[str, Any], cases: list[dict]) -> None:
    """Put the cases and the machine into a JSON file."""
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
    out.write_text(json.dumps({**facts, **machine, "cases": cases}, indent=1) + "\n")
