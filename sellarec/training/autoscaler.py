"""Having an autoscaler add nodes: what is asked for is a placement group, which it sees while that waits for its resources."""

import time
from collections.abc import Mapping, Sequence

from sellarec.errors import StageFailed
from sellarec.preflight import living_nodes
from sellarec.training.progress import Console

ASK_SECONDS = 10.0
"""How long resources are asked for at a time. An autoscaler looks at what is asked for every 5 s."""


def taken_by_worker(gpus: bool, share: float) -> dict[str, float]:
    """What a worker takes of Ray's resources: `share` of a CPU, or with `gpus` a CPU and `share` of a GPU."""
    return {"CPU": 1, "GPU": share} if gpus else {"CPU": share}


def set_aside(bundles: Sequence[Mapping[str, float]], seconds: float) -> bool:
    """Whether the cluster can set these resources aside, now or before so long. They are given back at once."""
    from ray.util.placement_group import placement_group, remove_placement_group

    held, end = placement_group([dict(bundle) for bundle in bundles]), time.monotonic() + seconds
    try:
        while not held.wait(max(0.0, min(1.0, end - time.monotonic()))):  # Ray hears no signal while it waits
            if time.monotonic() >= end:
                return False
        return True
    finally:
        remove_placement_group(held)


def wait_for_nodes(workers: int, groups: int, gpus: bool, share: float, seconds: float, console: Console) -> None:
    """Ask for nodes until those that live can hold a run, as `sellarec.preflight.check_resources` counts CPUs and GPUs.

    Args:
        workers, groups, gpus, share: as there.

    Raises:
        StageFailed: they did not come in so many seconds.
    """
    taken = taken_by_worker(gpus, share)
    bundles = groups * [*workers * [taken], {"CPU": 1.0}]
    cpus = groups * (workers * taken["CPU"] + 1)
    of_gpus = f" with {share:g} GPU each" if gpus else ""
    start, told = time.monotonic(), False
    while True:
        nodes = living_nodes()
        there, places = sum(node.cpus for node in nodes), sum(node.places(gpus, share) for node in nodes)
        if places >= groups * workers and there >= cpus:
            return
        lack = (
            f"{groups * workers} workers{of_gpus} and {groups} CPUs to read data ({cpus:g} CPUs), where there are {there:g} CPUs "
            f"and places for {places}"
        )
        waited = time.monotonic() - start
        if told and waited > seconds:
            raise StageFailed(
                f"no nodes joined in {seconds:g} s (node_timeout) that hold {lack}: has the cluster an autoscaler, and may it "
                "add them? `ray status` tells what it does"
            )
        if not told:
            console.line(f"  asks the autoscaler for nodes that hold {lack}; waits {seconds:g} s at most")
            told = True
        if set_aside(bundles, min(ASK_SECONDS, max(1.0, seconds - waited))):
            time.sleep(1)  # a node may be known to Ray's scheduler before it is to others
