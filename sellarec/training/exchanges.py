"""How long a worker waits in the exchanges of tables' ids, vectors and gradients."""

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all_single",
    "reduce_scatter",
    "reduce_scatter_tensor",
)
"""By which TorchRec and the graph exchange rows: those of whole rows by all-to-all, those of bags by reduce-scatter and
all-gather, whose numbers are agreed upon first."""


class Waited:
    """Seconds that the host has spent in the collectives of one group: starting them, and until their results are there. Gloo's
    are there when the host has them, so that is what they take beyond the work that it does meanwhile. On GPUs only streams
    wait, so it is what starting them costs: nothing is synchronised for the clock."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


class _Work(dist.Work):
    """A collective under way, the wait for which is counted."""

    def __init__(self, work: dist.Work, waited: Waited) -> None:
        super().__init__()
        self._work, self._waited = work, waited

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        with self._waited.counting():
            return self._work.wait(timeout)


@contextlib.contextmanager
def counted(group: dist.ProcessGroup, waited: Waited) -> Iterator[None]:
    """Count what is waited in a group's collectives. TorchRec starts and awaits its own, forwards and backwards, so torch's
    functions are stood in for meanwhile; those of other groups are left alone."""

    def counting(collective: Callable[..., dist.Work | None]) -> Callable[..., dist.Work | None]:
        def call(*arguments: Any, **settings: Any) -> dist.Work | None:
            if settings.get("group") is not group:
                return collective(*arguments, **settings)
            with waited.counting():
                work = collective(*arguments, **settings)
            return None if work is None else _Work(work, waited)

        return call

    torchs = {name: getattr(dist, name) for name in COLLECTIVES}
    for name, collective in torchs.items():
        setattr(dist, name, counting(collective))
    try:
        yield
    finally:
        for name, collective in torchs.items():
            setattr(dist, name, collective)
