"""What workers are started with, and what a stage waits for. With real nodes: tests/cluster/test_nodes.py."""

import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import ControllerError

from sellarec.artifacts import Place
from sellarec.errors import StageFailed, TrainingStopped, UserError
from sellarec.preflight import Node
from sellarec.training import launch
from sellarec.training.launch import (
    KEEP_FREED_MEMORY,
    Group,
    connect,
    first_workers,
    keep_logs,
    run_workers,
    takes_gpus,
)
from sellarec.training.progress import Console

CODE = """
import resource
import threading
import torch

torch.set_num_threads(1)

def steps(number):
    for _ in range(number):
        torch.zeros(20_000_000).add_(1)

def work():  # as Ray Train runs a worker's function: not in the main thread
    steps(10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    steps(20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def test_large_tensors_that_come_and_go_are_not_taken_from_the_system_again() -> None:
    faults = {}
    for how, variables in (("kept", KEEP_FREED_MEMORY), ("given back", {})):
        command, environment = [sys.executable, "-c", CODE], {**os.environ, **variables}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        faults[how] = int(done.stdout)
    assert faults["given back"] > 50_000, "pages larger than 4 KiB hide what this is about"
    assert faults["kept"] < faults["given back"] / 10


@dataclass
class Cluster:
    """Stands in for Ray: the CPUs and GPUs of living nodes, some of which other jobs hold, and a clock that sleeping moves on.

    Attributes:
        later: what the nodes have after so many seconds.
    """

    nodes: list[tuple[float, float]]
    held: float = 0
    later: tuple[float, list[tuple[float, float]]] | None = None
    seconds: float = 0

    def living_nodes(self) -> list[Node]:
        nodes = self.nodes if self.later is None or self.seconds < self.later[0] else self.later[1]
        return [Node(f"node-{i}", f"10.0.0.{i}", str(i), cpus, gpus) for i, (cpus, gpus) in enumerate(nodes)]

    def fit(self, bundles: list[dict[str, float]]) -> bool:
        return sum(bundle["CPU"] for bundle in bundles) <= sum(node.cpus for node in self.living_nodes()) - self.held

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def monotonic(self) -> float:
        return self.seconds


def use(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setattr(launch, "living_nodes", cluster.living_nodes)
    monkeypatch.setattr(launch, "_fit", cluster.fit)
    monkeypatch.setattr(launch, "time", cluster)
    return cluster


def group(workers: int, least: int | None = None, gpus: bool = False) -> Group:
    return Group(workers, gpus, workers if least is None else least, node_timeout=30)


def test_a_stage_that_the_nodes_left_can_never_hold_fails_in_the_stated_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after nodes were lost between two stages: it says what it waits for, and ends with the arithmetic."""
    for nodes, gpus, words in (
        (
            [(2, 0), (1, 0)],
            False,
            "3 workers of 1 CPU each and 1 CPU to read data (4 CPUs); CPUs are: node-0 (10.0.0.0) 2, ",
        ),
        (
            [(8, 2)],
            True,
            "3 workers of 1 CPU and 1 GPU each and 1 CPU to read data (4 CPUs); CPUs are: node-0 (10.0.0.0) 8 and 2 GPUs",
        ),
    ):
        cluster = use(Cluster(nodes), monkeypatch)
        with pytest.raises(StageFailed, match=re.escape(f"for 30 s (node_timeout) there was no room for {words}")):
            first_workers("align", group(3, gpus=gpus), Console())
        assert 30 < cluster.seconds < 33
        assert f"align     waits 30 s at most for room for {words}" in capsys.readouterr().out


def test_a_node_that_joins_in_time_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = use(Cluster([(2, 0)], later=(10, [(2, 0), (2, 0)])), monkeypatch)
    assert first_workers("align", group(3), Console()) == 3
    assert cluster.seconds == 10


def test_what_others_hold_is_left_for_ray_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a trial's CPUs are while other trials run. A group that may be smaller takes what is free instead."""
    cluster = use(Cluster([(2, 0), (2, 0)], held=2), monkeypatch)
    assert first_workers("align", group(3), Console()) == 3
    assert first_workers("align", group(3, least=1), Console()) == 1
    assert cluster.seconds == 0


def test_a_stage_that_is_stopped_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    use(Cluster([(1, 0)]), monkeypatch)
    stop = threading.Event()
    stop.set()
    with pytest.raises(TrainingStopped, match="stage align was stopped while it waited for room"):
        first_workers("align", group(3), Console(), stop)


def test_nodes_that_are_lost_while_others_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray gets so long at a time to find room; that it found none is no failure of the stage, as long as nodes could hold it."""
    cluster = use(Cluster([(2, 0), (2, 0)], held=4, later=(5 * 60, [(2, 0)])), monkeypatch)
    tried: list[bool] = []

    def run(self: object, workers: int, first: bool, grow_every: float) -> launch._Ended:
        tried.append(first)
        cluster.sleep(60)
        return launch._Ended(ControllerError(WorkerGroupStartupTimeoutError(workers)), [], [], [], [], False)

    monkeypatch.setattr(launch._Launch, "run", run)
    with pytest.raises(StageFailed, match="there was no room for 3 workers"):
        run_workers(lambda config: None, {}, "align", group(3), Console(), lambda record: None)
    assert tried == [True] * 5, "more often than RETRIES, and always as the first group"
    printed = capsys.readouterr().out
    assert printed.count("waits for what other jobs hold of 3 workers of 1 CPU each") == 5
    assert "waits 30 s at most for room" in printed and "cut off" not in printed


def test_gpus_for_all_workers_or_for_none() -> None:
    """GPUs that are too few are no reason to run on CPUs, unless CPUs are asked for."""
    for gpus, workers, device, groups, share, takes in (
        (0, 2, "auto", 1, 1.0, False),
        (2, 2, "auto", 1, 1.0, True),
        (2, 2, "cuda", 1, 1.0, True),
        (1, 2, "cpu", 1, 1.0, False),
        (2, 2, "cpu", 1, 1.0, False),
        (2, 1, "auto", 4, 0.5, True),
    ):
        assert takes_gpus(gpus, workers, device, groups, share) == takes
    for gpus, workers, device, groups, share, words in (
        (
            1,
            2,
            "auto",
            1,
            1.0,
            "2 workers of 1 GPU each find 1 GPUs, which have room for 1: give --workers 1, or give --device cpu",
        ),
        (8, 16, "cuda", 1, 1.0, "16 workers of 1 GPU each find 8 GPUs, which have room for 8: give --workers 8"),
        (
            2,
            1,
            "auto",
            3,
            0.6,
            "3 x 1 workers of 0.6 GPU each find 2 GPUs, which have room for 2: lower --workers or --concurrent",
        ),
        (0, 2, "cuda", 1, 1.0, "device is cuda, but there is no GPU"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            takes_gpus(gpus, workers, device, groups, share)


@pytest.mark.ray
def test_what_workers_have_printed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that was killed too; processes in which nothing was printed, and other jobs', leave no file."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    @ray.remote(num_cpus=0, max_retries=0)
    def say(text: str, is_killed: bool) -> None:
        print(text, file=sys.stderr, flush=True)
        if is_killed:
            os.kill(os.getpid(), 9)

    @ray.remote(num_cpus=0)
    def forge() -> None:
        logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
        (logs / "worker-1-1-1.err").write_text(":job_id:02000000\nanother job's\n")

    connect(1, Console(), Place.of(str(tmp_path)), device="cpu")
    try:
        ray.get(forge.remote())
        ray.get(say.remote("all is well", False))
        with pytest.raises(ray.exceptions.WorkerCrashedError):
            ray.get(say.remote("my last words", True))
        assert keep_logs(Place.of(str(tmp_path / "logs"))) == []
    finally:
        ray.shutdown()
    (node,) = (tmp_path / "logs").iterdir()
    assert all(file.suffix == ".err" for file in node.iterdir()), list(node.iterdir())
    printed = "".join(file.read_text() for file in node.iterdir())
    assert "all is well\n" in printed and "my last words\n" in printed and "another job's" not in printed
