"""Processes that serve many tests, over gloo and without Ray: this file run as a script is one of them.

A test names a function of a module in this folder; each of as many workers as it asks for calls it, and what they return comes
back by rank. The processes are kept: for each number of workers there are as many, which stay one process group.
"""

import contextlib
import faulthandler
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

PATIENCE = 120
"""Seconds that a call may take."""
HANG = 60
"""Seconds that a worker waits for the others."""
CALLS = 40
"""Calls before other processes take the place of a group's: the process groups that each call makes keep threads and sockets."""


class Gloo:
    """A group of processes for each number of workers, made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._groups: dict[int, Group] = {}

    def call(self, workers: int, function: Callable, *arguments: Any) -> list[Any]:
        """What `function(*arguments)` returns on each worker, by rank."""
        if workers not in self._groups:
            (folder := self._folder / str(workers)).mkdir(exist_ok=True)
            self._groups[workers] = Group(folder, workers)
        return self._groups[workers].call(function, *arguments)

    def regroup(self, workers: int) -> None:
        """Have the next call with so many workers make a new process group in them."""
        self._groups[workers].generation += 1

    def end(self) -> None:
        for group in self._groups.values():
            group.end()


class Group:
    """So many processes."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.folder, self.workers, self.generation, self.calls = folder, workers, 0, 0
        self.processes: list[subprocess.Popen] = []
        self.connections: list[Connection] = []

    def start(self) -> None:
        self.generation += 1
        paths = [str(Path(__file__).parent), *sys.path]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        with open(self.folder / "log", "a") as log:
            for rank in range(self.workers):
                own, theirs = Pipe()
                with theirs:
                    handed = [str(theirs.fileno()), str(self.folder), str(rank), str(self.workers)]
                    command = [sys.executable, __file__, *handed]
                    process = subprocess.Popen(
                        command, pass_fds=[theirs.fileno()], stdout=log, stderr=log, env=environment
                    )
                self.connections.append(own)
                self.processes.append(process)

    def call(self, function: Callable, *arguments: Any) -> list[Any]:
        if self.calls == CALLS:
            self.end()
        if not self.processes:
            self.start()
        self.calls += 1
        for connection in self.connections:
            connection.send((self.generation, function.__module__, function.__name__, arguments))
        answers: dict[Connection, Any] = {}
        while waiting := [connection for connection in self.connections if connection not in answers]:
            for connection in (ready := wait(waiting, PATIENCE)):
                try:
                    answers[connection] = connection.recv()
                except EOFError:
                    answers[connection] = Failure("the process has ended")
            failures = [answer for answer in answers.values() if isinstance(answer, Failure)]
            if failures or not ready:
                self.end()  # the others may wait for the one that failed
                told = "\n".join(failures) or "no answer"
                raise AssertionError(f"{self.workers} workers: {told}\n{(self.folder / 'log').read_text()[-6000:]}")
        return [answers[connection] for connection in self.connections]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for connection in self.connections:
            connection.close()
        self.processes, self.connections, self.calls = [], [], 0


class Failure(str):
    """What went wrong in a worker."""


def serve(pipe: int, folder: str, rank: int, workers: int) -> None:
    """One of the processes, until it is ended or the tests are."""
    faulthandler.enable()
    torch.set_num_threads(1)
    connection, current = Connection(pipe), 0
    with contextlib.suppress(EOFError):
        while True:
            generation, module, name, arguments = connection.recv()
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


if __name__ == "__main__":
    # what is pickled names classes of the module, not of the script
    import_module("gloo_workers").serve(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
