"""Run a function in several processes of one gloo group, for the benchmarks beside this file."""

import faulthandler
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks share their helpers

import machine

from sellarec.training.launch import KEEP_FREED_MEMORY


def measure(
    function: Callable[..., dict | None],
    workers: int,
    *arguments: Any,
    environment: Mapping[str, str] = KEEP_FREED_MEMORY,
) -> dict:
    """What worker 0's `function(rank, workers, *arguments)` gives; each worker has one thread.

    Args:
        environment: variables that they are started with; by default as the training's own workers of tables are.

    Raises:
        SystemExit: a worker failed.
    """
    context = mp.get_context("spawn")
    answers, answer_end = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        given = (workers, f"{folder}/meeting", function, arguments, answer_end)
        processes = [context.Process(target=_run, args=(rank, *given)) for rank in range(workers)]
        before = dict(os.environ)
        os.environ.update(environment)  # read by a process at its start
        for process in processes:
            process.start()
        os.environ.clear()
        os.environ.update(before)
        running, found = {process.sentinel: process for process in processes}, []
        while running:
            for ready in wait([answers, *running]):
                if ready is answers:  # at once: who sends a large answer waits until it is taken
                    found.append(answers.recv())
                elif running.pop(ready).exitcode:
                    wait(list(running), 5)  # what the others say of it
                    for process in running.values():
                        process.kill()
                    raise SystemExit(f"{function.__name__} failed on {workers} workers")
        return found[0] if found else answers.recv()


def _run(rank: int, workers: int, meeting: str, function: Callable, arguments: tuple, answers: Connection) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    answer = function(rank, workers, *arguments)
    if rank == 0:
        answers.send(answer)
    dist.barrier()
    dist.destroy_process_group()


def measure_alone(function: Callable[[], None]) -> None:
    """Call a function in this process, with one thread, in a group of its own."""
    with tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        function()
        dist.destroy_process_group()


def popularity(number: int) -> np.ndarray:
    """How likely each of some ids is drawn, float64 [number]: long-tailed, log-normal as MovieLens-1M's degrees are."""
    weights = np.random.default_rng(number).lognormal(0.0, 1.2, number)
    return weights / weights.sum()


def write(
    out: Path,
    facts: dict[str, Any],
    cases: list[dict],
    packages: Sequence[str] = ("sellarec", "torchrec", "fbgemm-gpu", "numpy"),
) -> None:
    """Put the cases, the machine, versions (torch's and those of packages), commit and date into a JSON file."""
    out.write_text(json.dumps({**facts, **machine.facts(("torch", *packages)), "cases": cases}, indent=1) + "\n")
