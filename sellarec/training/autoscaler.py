"""Having an autoscaler add nodes: what is asked for is a placement group, which it sees while that waits for its resources."""

import time
from collections.abc import Mapping, Sequence

from sellarec.errors import StageFailed
from sellarec.training.progress import Console

ASK_SECONDS = 10.0
"""How long resources are asked for at a time. An autoscaler looks at what is asked for every 5 s."""

ROUNDING = 1e-6
"""By how much sums of workers' shares may differ from what nodes have."""


def set_aside(bundles: Sequence[Mapping[str, float]], seconds: float) -> bool:
    """Whether the cluster can set these resources aside, now or before so long. They are given back at once."""
    from ray.util.placement_group import placement_group, remove_placement_group

    held = placement_group([dict(bundle) for bundle in bundles])
    try:
        return held.wait(seconds)
    finally:
        remove_placement_group(held)


def wait_for_nodes(bundles: Sequence[Mapping[str, float]], seconds: float, console: Console) -> None:
    """Ask for nodes until the cluster has these resources, whoever holds them.

    Raises:
        StageFailed: they did not come in so many seconds.
    """
    import ray

    needed: dict[str, float] = {}
    for bundle in bundles:
        for name, number in bundle.items():
            needed[name] = needed.get(name, 0) + number

    def lacking() -> list[str]:
        has = ray.cluster_resources()
        return [
            f"{number:g} {name}s, of which {has.get(name, 0):g} are there"
            for name, number in needed.items()
            if number - has.get(name, 0) > ROUNDING
        ]

    start, told = time.monotonic(), False
    while found := lacking():
        waited = time.monotonic() - start
        if told and waited > seconds:
            raise StageFailed(
                f"for {seconds:g} s (node_timeout) there were no nodes with {', '.join(found)}: has the cluster an autoscaler, "
                "and may it add them? `ray status` tells what it does"
            )
        if not told:
            console.line(f"  asks the autoscaler for {', '.join(found)}; waits {seconds:g} s at most")
            told = True
        if set_aside(bundles, min(ASK_SECONDS, max(1.0, seconds - waited))):
            return
