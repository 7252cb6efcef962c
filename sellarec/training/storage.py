"""What workers do on storage, together, and again while it fails."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from sellarec.artifacts import Place, pauses
from sellarec.errors import StageFailed

if TYPE_CHECKING:
    from sellarec.training.workers import Workers

Done = TypeVar("Done")


@dataclass(frozen=True)
class Storage:
    """What workers do on storage, together, and again while it fails.

    Attributes:
        stage: named in messages.
        seconds: how long it is tried again, all pauses together.
        tell: takes a line about it, on worker 0.
        output: the artifact that is made, whose folder the driver has made for the lease: where it is not there, storage is away.
    """

    workers: "Workers"
    stage: str
    seconds: float
    tell: Callable[[str], None]
    output: Place

    def wait(self) -> None:
        """Wait until storage is there: what is not, says nothing of what it holds."""
        self.first(f"reaching {self.output}", lambda: None)

    def attempt(self, what: str, act: Callable[[], Done]) -> list[Done]:
        """What `act` gives on each worker, by rank. All workers call it; `act` may call collectives where it fails on all alike.

        Raises:
            StageFailed: on all workers: storage failed for longer than `seconds`.
        """
        waited = 0.0
        for pause in (*pauses(self.seconds), None):
            # before collectives of `act`, in which no worker may be missing
            _, failures = self._on_all(self.output.reach)
            if not failures:
                done, failures = self._on_all(act)
            if not failures:
                if waited:
                    self.tell_once(f"{what} succeeded, {waited:.0f} s after it had failed")
                return done
            causes = "; ".join(f"worker {rank}: {told}" for told, rank in failures.items())
            if pause is None:
                raise StageFailed(
                    f"stage {self.stage}: {what} failed, and again for {waited:.0f} s (storage_timeout): {causes}. Checkpoints "
                    "that are whole are kept: once storage is back, the same command goes on from the newest"
                )
            self.tell_once(f"{what} failed ({causes}): tries again in {pause:g} s")
            time.sleep(pause)
            waited += pause
        raise AssertionError("the last attempt returns or raises")

    def _on_all(self, act: Callable[[], Done]) -> tuple[list[Done], dict[str, int]]:
        """What `act` gives on each worker, by rank; how it failed, and the first worker on which it did so."""
        done, failure = None, None
        try:
            done = act()
        except (OSError, SafetensorError, CheckpointException) as error:
            if isinstance(error, CheckpointException) and not _is_of_storage(error):
                raise  # on all workers, as it is
            failure = _cause(error)
        everyone: list[Any] = [None] * self.workers.world_size
        dist.all_gather_object(everyone, (done, failure), group=self.workers.control)
        failures = {told: rank for rank, (_, told) in reversed(list(enumerate(everyone))) if told is not None}
        return [done for done, _ in everyone], failures

    def first(self, what: str, act: Callable[[], Done]) -> Done:
        """What `act` gives on worker 0, which alone carries it out."""

        def on_first() -> Done | None:
            return act() if self.workers.rank == 0 else None

        return cast(Done, self.attempt(what, on_first)[0])  # worker 0's, of which `act` has made it

    def tell_once(self, line: str) -> None:
        """Have worker 0 tell a line that all workers know."""
        if self.workers.rank == 0:
            self.tell(line)


def _is_of_storage(error: CheckpointException) -> bool:
    """Whether what Torch Distributed Checkpoint met is an error of files; that of a zip's writer is a plain RuntimeError."""
    causes = [cause for cause, _ in error.failures.values()]
    return all(isinstance(cause, OSError) or type(cause) is RuntimeError for cause in causes)


def _cause(error: BaseException) -> str:
    """One line; of a checkpoint that could not be written, what Torch Distributed Checkpoint met."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
