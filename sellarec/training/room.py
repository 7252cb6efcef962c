"""Room for a stage's workers on the nodes that live, and waiting for it."""

import threading
import time

from sellarec.errors import StageFailed, TrainingStopped
from sellarec.preflight import living_nodes
from sellarec.training.autoscaler import ASK_SECONDS, set_aside
from sellarec.training.cluster import Group
from sellarec.training.progress import Console

ROOM_SECONDS = 3.0
"""How long it may take until the cluster has set room aside that is there."""


def first_workers(stage: str, group: Group, console: Console, stop: threading.Event | None = None) -> int:
    """How many workers a stage starts with: where their number is given, these, once there are nodes that can hold them. Ray
    waits for what other jobs hold there.

    Raises:
        StageFailed, TrainingStopped: as `find_room`.
    """
    return find_room(stage, group, console, stop, is_free=not waits_for_others(group, first=True))


def find_room(stage: str, group: Group, console: Console, stop: threading.Event | None, is_free: bool = True) -> int:
    """Wait for room for the group's workers: how many find some. An autoscaler is asked for the least
    of them.

    Args:
        is_free: what other jobs hold is no room.

    Raises:
        StageFailed: there was none for `node_timeout` seconds.
        TrainingStopped: `stop` was set meanwhile.
    """
    start, told = time.monotonic(), False
    while True:
        workers = room_now(group, group.least, group.most) if is_free else min(group.most, _places(group))
        if workers >= group.least:
            return workers
        needed = needed_in_words(group)
        if time.monotonic() - start > group.node_timeout:
            raise StageFailed(
                f"stage {stage}: for {group.node_timeout:g} s (node_timeout) there was no room for {needed}. Checkpoints are "
                "kept: the same command goes on from the newest, also with fewer --workers"
            )
        if stop is not None and stop.is_set():
            raise TrainingStopped(f"stage {stage} was stopped while it waited for room")
        if not told:
            console.line(f"{stage:<9} waits {group.node_timeout:g} s at most for room for {needed}")
            told = True
        if group.autoscaler:
            left = group.node_timeout - (time.monotonic() - start)
            set_aside(_bundles(group, group.least), min(ASK_SECONDS, max(1.0, left)))
        time.sleep(1)


def waits_for_others(group: Group, first: bool) -> bool:
    """Whether a group waits without limit for what other jobs hold, as a sweep's trials do: where the number of its workers is
    given, and none of them have run yet."""
    return first and group.least == group.most


def room_now(group: Group, least: int, most: int, beside: int = 0) -> int:
    """How many workers find room now, from `least` to `most`; 0 where not even the least do. What other jobs hold is no room, nor
    is a node that has died without the cluster having noticed.

    Args:
        beside: workers that run already.
    """
    found = 0
    low, high = least, min(most, _places(group) - beside)
    workers = high
    while low <= high:
        if set_aside(_bundles(group, workers, reads=not beside), ROOM_SECONDS):
            found, low = workers, workers + 1
        else:
            high = workers - 1
        workers = (low + high + 1) // 2
    return found


def _places(group: Group) -> int:
    """How many workers the living nodes can hold, whatever else runs on them."""
    nodes = living_nodes()
    places = sum(node.places(group.gpus, group.share) for node in nodes)
    # one CPU is left to read data
    return min(places, int((sum(node.cpus for node in nodes) - 1) / group.taken["CPU"]))


def _bundles(group: Group, workers: int, reads: bool = True) -> list[dict[str, float]]:
    """What so many of a group's workers take, and with `reads` the CPU that data is read with."""
    return [group.taken] * workers + [{"CPU": 1.0}] * reads


def needed_in_words(group: Group) -> str:
    """What the least of a group's workers take, and what the living nodes have, in words."""
    cpu, nodes = group.taken["CPU"], living_nodes()
    gpu = f" and {group.taken['GPU']:g} GPU" if group.gpus else ""
    has = ", ".join(f"{node} {node.cpus:g}" + (f" and {node.gpus:g} GPUs" if group.gpus else "") for node in nodes)
    needed = f"{group.least} workers of {cpu:g} CPU{gpu} each and 1 CPU to read data ({group.least * cpu + 1:g} CPUs)"
    return f"{needed}; CPUs are: {has}"


def leaving(placement_group: str) -> list[str]:
    """Names of the nodes that hold a part of a placement group and are about to be taken away, as Ray was told: by
    `ray drain-node`, or by an autoscaler that was.

    Args:
        placement_group: its id, in hexadecimal digits.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, PlacementGroupID, placement_group_table

    drained = ray._private.state.state.get_draining_nodes()
    if not drained:
        return []
    table = placement_group_table(PlacementGroup(PlacementGroupID(bytes.fromhex(placement_group))))
    nodes = drained.keys() & set(table["bundles_to_node_id"].values())
    return sorted(node["NodeName"] for node in ray.nodes() if node["NodeID"] in nodes)
