"""Processes that serve many tests, over gloo and without Ray: this file run as a script is one of them.

A test names a function of a module in this folder; each of as many workers as it asks for calls it, and what they return comes
back by rank. The processes are kept, as many for each number of workers. Each call has process groups of its own: those that it
leaves would keep threads and sockets. Workers leave them one after the other, so that none closes connections that another one is
just closing.
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


class Gloo:
    """Processes for each number of workers, started when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pools: dict[int, Pool] = {}

    def call(self, workers: int, function: Callable, *arguments: Any) -> list[Any]:
        """What `function(*arguments)` returns on each worker, by rank."""
        if workers not in self._pools:
            (folder := self._folder / str(workers)).mkdir()
            self._pools[workers] = Pool(folder, workers)
        return self._pools[workers].call(function, *arguments)

    def end(self) -> None:
        for pool in self._pools.values():
            pool.end()


class Pool:
    """So many processes."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.folder, self.workers, self.calls = folder, workers, 0
        self.processes: list[subprocess.Popen] = []
        self.connections: list[Connection] = []

    def start(self) -> None:
        paths = [str(Path(__file__).parent), *sys.path]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        with open(self.folder / "log", "a") as log:
            for rank in range(self.workers):
                own, theirs = Pipe()
                with theirs:
                    command = [sys.executable, __file__, str(theirs.fileno()), str(rank), str(self.workers)]
                    process = subprocess.Popen(
                        command, pass_fds=[theirs.fileno()], stdout=log, stderr=log, env=environment
                    )
                self.connections.append(own)
                self.processes.append(process)

    def call(self, function: Callable, *arguments: Any) -> list[Any]:
        if not self.processes:
            self.start()
        self.calls += 1
        store = str(self.folder / f"store-{self.calls}")
        for connection in self.connections:
            connection.send((store, function.__module__, function.__name__, arguments))
        answers = self.answers(self.connections)
        for connection in self.connections:
            connection.send(None)
            self.answers([connection])
        return answers

    def answers(self, connections: list[Connection]) -> list[Any]:
        """One answer of each."""
        found: dict[Connection, Any] = {}
        while waiting := [connection for connection in connections if connection not in found]:
            for connection in (ready := wait(waiting, PATIENCE)):
                try:
                    found[connection] = connection.recv()
                except EOFError:
                    found[connection] = Failure("the process has ended")
            failures = [answer for answer in found.values() if isinstance(answer, Failure)]
            if failures or not ready:
                self.end()  # the others may wait for the one that failed
                told = "\n".join(failures) or "no answer"
                raise AssertionError(f"{self.workers} workers: {told}\n{(self.folder / 'log').read_text()[-6000:]}")
        return [found[connection] for connection in connections]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for connection in self.connections:
            connection.close()
        self.processes, self.connections = [], []


class Failure(str):
    """What went wrong in a worker."""


def serve(pipe: int, rank: int, workers: int) -> None:
    """One of the processes, until it is ended or the tests are."""
    faulthandler.enable()
    torch.set_num_threads(1)
    connection = Connection(pipe)
    with contextlib.suppress(EOFError):
        while True:
            asked = connection.recv()
            answer = None
            try:
                if asked is None:
                    dist.destroy_process_group()
                else:
                    store, module, name, arguments = asked
                    join(store, rank, workers)
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
    import_module("gloo_workers").serve(*map(int, sys.argv[1:]))
