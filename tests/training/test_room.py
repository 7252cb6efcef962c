"""What a stage waits for. With real nodes: tests/cluster/test_nodes.py."""

import re
import threading
from dataclasses import dataclass, field, replace

import pytest
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.exceptions import ControllerError

from sellarec.errors import StageFailed, TrainingStopped
from sellarec.preflight import Node
from sellarec.training import launch, room
from sellarec.training.cluster import Group
from sellarec.training.launch import run_workers
from sellarec.training.progress import Console
from sellarec.training.room import first_workers


@dataclass
class Cluster:
    """Stands in for Ray: the CPUs and GPUs of living nodes, some of which other jobs hold, and a clock that sleeping moves on.

    Attributes:
        later: what the nodes have after so many seconds.
        asked: what an autoscaler was asked for.
    """

    nodes: list[tuple[float, float]]
    held: float = 0
    later: tuple[float, list[tuple[float, float]]] | None = None
    seconds: float = 0
    asked: list[list[dict[str, float]]] = field(default_factory=list)

    def living_nodes(self) -> list[Node]:
        nodes = self.nodes if self.later is None or self.seconds < self.later[0] else self.later[1]
        return [Node(f"node-{i}", f"10.0.0.{i}", str(i), cpus, gpus) for i, (cpus, gpus) in enumerate(nodes)]

    def set_aside(self, bundles: list[dict[str, float]], seconds: float) -> bool:
        if seconds > room.ROOM_SECONDS:  # asked for until it is there
            self.asked.append(bundles)
            self.sleep(seconds)
        return sum(bundle["CPU"] for bundle in bundles) <= sum(node.cpus for node in self.living_nodes()) - self.held

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def monotonic(self) -> float:
        return self.seconds


def use(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setattr(room, "living_nodes", cluster.living_nodes)
    monkeypatch.setattr(room, "set_aside", cluster.set_aside)
    monkeypatch.setattr(room, "time", cluster)
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


def test_an_autoscaler_is_asked_for_the_fewest_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """And for the CPU that data is read with. Where there is none, nothing is asked for."""
    for autoscaler in (True, False):
        cluster = use(Cluster([(2, 0)], later=(25, [(2, 0), (2, 0)])), monkeypatch)
        asking = replace(group(4, least=3), autoscaler=autoscaler)
        assert first_workers("align", asking, Console()) == 3
        assert cluster.asked == [4 * [{"CPU": 1}]] * 3 * autoscaler
        assert cluster.seconds == (31 if autoscaler else 25)


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


@pytest.mark.parametrize("new_checkpoints", [False, True])
def test_a_stage_that_is_cut_off_again_and_again(
    new_checkpoints: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fails after RETRIES attempts without a new checkpoint, over a minute; what gets on goes on at once."""
    cluster, runs = use(Cluster([(8, 0)]), monkeypatch), 10
    monkeypatch.setattr(launch, "time", cluster)
    started: list[float] = []

    def run(self: object, workers: int, first: bool, grow_every: float) -> launch._Ended:
        started.append(cluster.seconds)
        failure = None if len(started) == runs else ControllerError(OSError(f"storage is away, {len(started)}"))
        return launch._Ended(failure, [], [], [10 * len(started) if new_checkpoints else 0], [], False)

    monkeypatch.setattr(launch._Launch, "run", run)
    if new_checkpoints:
        assert run_workers(lambda config: None, {}, "align", group(3), Console(), lambda record: None) is None
        assert started == [0] * runs
        return
    with pytest.raises(StageFailed, match=r"3 times without a new checkpoint\): .*storage is away, 4"):
        run_workers(lambda config: None, {}, "align", group(3), Console(), lambda record: None)
    assert started == [0, 0, 20, 60]
    printed = capsys.readouterr().out
    assert "storage is away, 1): is taken up again\n" in printed
    assert "storage is away, 3): is taken up again in 40 s\n" in printed
