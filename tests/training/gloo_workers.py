"""Processes that serve many tests, over gloo and without Ray: this file run as a script is one of them.

A test names a function of a module in this folder; each of as many workers as it asks for calls it, and what they return comes
back by rank. The processes are kept; a test for another number of workers makes new process groups in them.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PROCESSES = 3
PATIENCE = 120
"""Seconds that a call may take."""
HANG = 60
"""Seconds that a worker waits for the others."""


class Gloo:
    """PROCESSES processes, of which a call takes the first ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen] = []
        self.connections: list[Connection] = []
        self.generation = self.workers = 0

    def start(self) -> None:
        paths = [str(Path(__file__).parent), *sys.path]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        with open(self.folder / "log", "a") as log:
            for rank in range(PROCESSES):
                own, theirs = Pipe()
                with theirs:
                    command = [sys.executable, __file__, str(theirs.fileno()), str(self.folder), str(rank)]
                    process = subprocess.Popen(
                        command, pass_fds=[theirs.fileno()], stdout=log, stderr=log, env=environment
                    )
                self.connections.append(own)
                self.processes.append(process)

    def call(self, workers: int, function: Callable, *arguments: Any) -> list[Any]:
        """What `function(*arguments)` returns on each worker, by rank."""
        if not self.processes:
            self.start()
        if workers != self.workers:
            self.generation, self.workers = self.generation + 1, workers
        message = (self.generation, workers, function.__module__, function.__name__, arguments)
        for connection in self.connections[:workers]:
            connection.send(message)
        answers: dict[Connection, Any] = {}
        while waiting := [connection for connection in self.connections[:workers] if connection not in answers]:
            for connection in (ready := wait(waiting, PATIENCE)):
                try:
                    answers[connection] = connection.recv()
                except EOFError:
                    answers[connection] = Failure("the process has ended")
            failures = [answer for answer in answers.values() if isinstance(answer, Failure)]
            if failures or not ready:
                self.end()  # the others may wait for the one that failed
                told = "\n".join(failures) or "no answer"
                raise AssertionError(f"{workers} workers: {told}\n{(self.folder / 'log').read_text()[-3000:]}")
        return [answers[connection] for connection in self.connections[:workers]]

    def regroup(self) -> None:
        """Have the next call make new process groups."""
        self.workers = 0

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for connection in self.connections:
            connection.close()
        self.processes, self.connections, self.workers = [], [], 0


class Failure(str):
    """What went wrong in a worker."""


def serve(pipe: int, folder: str, rank: int) -> None:
    """One of the processes, until it is ended or the tests are."""
    torch.set_num_threads(1)
    warm_up(f"{folder}/store-of-{os.getpid()}")
    connection, current = Connection(pipe), 0
    with contextlib.suppress(EOFError):
        while True:
            generation, workers, module, name, arguments = connection.recv()
            try:
                if generation != current:
                    if dist.is_initialized():
                        dist.destroy_process_group()
                    join(f"{folder}/store-{generation}", rank, workers)
                    current = generation
                answer = getattr(import_module(module), name)(*arguments)
                pickle.dumps(answer)
            except BaseException as error:  # CheckpointException is no Exception
                if isinstance(error, KeyboardInterrupt):
                    raise
                answer = Failure(f"rank {rank}: {traceback.format_exc()}")
            connection.send(answer)


def join(store: str, rank: int, workers: int) -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, workers),
        rank=rank,
        world_size=workers,
        timeout=timedelta(seconds=HANG),
    )


def warm_up(store: str) -> None:
    """What TorchRec does once a process, with others; so that processes that took part in other calls are alike in it."""
    from torchrec.distributed.collective_utils import init_collective_validation

    join(store, 0, 1)
    init_collective_validation(dist.group.WORLD)
    dist.destroy_process_group()


if __name__ == "__main__":
    # what is pickled names classes of the module, not of the script
    import_module("gloo_workers").serve(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
