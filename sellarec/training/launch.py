"""The driver's side of training: launch workers, show their progress, bring their errors home."""

import contextlib
import dataclasses
import os
import signal
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from sellarec.config import Language
from sellarec.errors import StageFailed, TrainingStopped, UserError
from sellarec.training.cluster import Group
from sellarec.training.failures import cause_of
from sellarec.training.progress import Console, ProgressBoard, describe
from sellarec.training.room import find_room, first_workers, leaving, needed_in_words, room_now, waits_for_others

KEEP_FREED_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""Variables by which glibc keeps what a worker frees, instead of handing it back to the system. Large tensors come and go at
each step of a collaborative model on a CPU, and a fault for every page of them, each time, took up to half of it. The price: a
worker's memory stays at its peak, so not where a language model is loaded whole and then sharded."""

CHECKPOINTS = "checkpoints"
"""Folder in an unfinished artifact."""

RETRIES = 3
"""How often in a row a stage is taken up again after workers were lost, where it left no new checkpoint in between."""

RETRY_PAUSE = 20.0
"""Seconds before the second time in a row that it is taken up again, twice as many before the third: storage from which rows or
weights can't be read for a minute is so outlived."""

CAUSE_CHARACTERS = 240
"""Of the cause for which a stage is taken up again, what is printed; Ray adds advice to it."""

WATCH_SECONDS = 2.0
"""After so long it is looked again for nodes that are about to be taken away."""

START_SECONDS = 60.0
"""How long a group of workers that found room may take to start."""

RARER = 2
"""How many times rarer room for more workers is looked for after it was found in vain: what is free at one moment, as a CPU
that reads data now and then, may be taken at the next."""


def train(
    training: Any,
    group: Group,
    console: Console,
    on_record: Callable[[dict], None],
    stop: threading.Event | None = None,
) -> list[Any] | None:
    """Run one stage's training to its end, or to where it pauses, surviving lost workers. Its checkpoints stay.

    Args:
        training: a `loop.Training` without its board.
        on_record: takes each progress record of rank 0, for TensorBoard.
        stop: once it is set, the training ends after its step.

    Returns:
        None at its end; where it paused, the evaluations that it has behind it.

    Raises:
        UserError: a mistake that a worker found.
        TrainingStopped: `stop` was set before its end.
        StageFailed: it failed for another reason, and again after RETRIES restarts.
    """
    from sellarec.training.loop import train_worker

    return run_workers(
        train_worker, {"training": training}, training.stage, group, console, on_record,
        keep_freed_memory=not isinstance(training.settings, Language), stops=True, stop=stop,
    )  # fmt: skip


def run_workers(
    function: Callable[[dict], None],
    config: dict[str, Any],
    stage: str,
    group: Group,
    console: Console,
    on_record: Callable[[dict], None],
    keep_freed_memory: bool = False,
    stops: bool = False,
    stop: threading.Event | None = None,
) -> list[Any] | None:
    """Run a function on a group of workers under Ray Train; `config`'s dataclass gets the progress board.

    Where workers are lost, the function is run again, on as many as then find room.

    Args:
        keep_freed_memory: see KEEP_FREED_MEMORY; without effect on GPUs.
        stops: whether the workers leave a checkpoint and end when the board asks for it, as it does after the first SIGINT
            or SIGTERM, once `stop` is set, or to go on with more workers. Others are broken off.
        stop: see `train`.

    Returns:
        See `train`.

    Raises:
        UserError: a mistake that a worker found.
        StageFailed: it failed for another reason, and again after RETRIES restarts, or found no room for its workers.
        TrainingStopped: `stop` was set.
        KeyboardInterrupt: after SIGINT or SIGTERM.
    """
    config = {
        name: dataclasses.replace(value, timeout=group.worker_timeout, storage_timeout=group.storage_timeout)
        for name, value in config.items()
    }
    variables = KEEP_FREED_MEMORY if keep_freed_memory and not group.gpus else {}
    launch = _Launch(function, config, stage, variables, stops, group, console, on_record, stop)
    workers = first_workers(stage, group, console, stop)
    lost, reached, first, grow_every = 0, -1, True, group.grow_every
    while True:
        console.line(f"{stage:<9} starting {workers} workers")
        ended = launch.run(workers, first, grow_every)
        is_held_up = waits_for_others(group, first) and _found_no_room(ended.failure)
        first = first and is_held_up
        if ended.errors:
            raise UserError(ended.errors[0])
        if ended.failed:
            raise StageFailed(ended.failed[0])
        if ended.interrupted:
            raise KeyboardInterrupt
        if ended.failure is not None and stop is not None and stop.is_set():
            raise TrainingStopped(f"stage {stage} was stopped, and a worker lost") from ended.failure
        if is_held_up:  # which may take as long as it likes; but nodes may have gone meanwhile
            console.line(f"{stage:<9} waits for what other jobs hold of {needed_in_words(group)}")
            workers = first_workers(stage, group, console, stop)
        elif ended.failure is not None:
            # what fails after each new checkpoint gets on; what fails again and again without one doesn't
            started = ended.starts[-1] if ended.starts else reached
            lost = 1 if started > reached else lost + 1
            reached = max(reached, started)
            cause = cause_of(ended.failure)
            if lost > RETRIES:
                raise StageFailed(
                    f"stage {stage} failed, also when it was taken up again ({RETRIES} times without a new checkpoint): {cause}"
                ) from ended.failure
            short = textwrap.shorten(cause, CAUSE_CHARACTERS, placeholder=" ...")
            pause = RETRY_PAUSE * (lost - 1)
            later = f" in {pause:g} s" if pause else ""
            console.line(f"{stage:<9} was cut off ({short}): is taken up again{later}")
            if stop is None:
                time.sleep(pause)
            else:
                stop.wait(pause)
            workers = find_room(stage, group, console, stop)
        elif ended.paused:
            return ended.paused[0]
        elif stop is not None and stop.is_set() and ended.stopped:
            raise TrainingStopped(f"stage {stage} was stopped at step {ended.stopped[0]}")
        elif ended.stopped:
            before, workers = workers, find_room(stage, group, console, stop)
            if ended.tried_to_grow:
                grow_every = group.grow_every if workers > before else RARER * grow_every
        else:
            return None


@dataclasses.dataclass
class _Ended:
    """How a group of workers has ended.

    Attributes:
        failure: what Ray Train raised.
        errors: users' mistakes that workers found.
        failed: other reasons of theirs for which the stage has failed.
        starts: the steps at which they started or took up their work.
        stopped: the step at which they stopped, if they were asked to.
        interrupted: SIGINT or SIGTERM arrived.
        tried_to_grow: they were stopped for room that more workers had.
        paused: the evaluations that lie behind them where they paused.
    """

    failure: BaseException | None
    errors: list[str]
    failed: list[str]
    starts: list[int]
    stopped: list[int]
    interrupted: bool
    tried_to_grow: bool = False
    paused: list[list[Any]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Launch:
    """What is the same for all groups of workers that run a stage one after the other; see `run_workers`."""

    function: Callable[[dict], None]
    config: dict[str, Any]
    stage: str
    variables: dict[str, str]
    stops: bool
    group: Group
    console: Console
    on_record: Callable[[dict], None]
    stop: threading.Event | None

    def run(self, workers: int, first: bool, grow_every: float) -> _Ended:
        """Run the function on a group of so many workers.

        Args:
            grow_every: seconds after which it is looked for room for more.
            first: there was none before.

        Raises:
            KeyboardInterrupt: a second SIGINT or SIGTERM, or one where there is nothing to leave a checkpoint of.
        """
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError

        from sellarec.training.rendezvous import OneAddress

        group, board = self.group, _board()
        timeout = group.worker_timeout
        os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(timeout)
        patience = max(START_SECONDS, group.node_timeout) if waits_for_others(group, first) else START_SECONDS
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(patience)
        failures: list[BaseException] = []

        def fit(folder: str) -> None:
            try:
                TorchTrainer(
                    self.function,
                    train_loop_config={
                        name: dataclasses.replace(value, board=board) for name, value in self.config.items()
                    },
                    scaling_config=ScalingConfig(
                        num_workers=workers, use_gpu=group.gpus, resources_per_worker=group.taken
                    ),
                    torch_config=OneAddress(backend="nccl" if group.gpus else "gloo", timeout_s=round(timeout)),
                    run_config=RunConfig(
                        name=self.stage,
                        storage_path=folder,  # nothing lies there: checkpoints are the loop's own
                        worker_runtime_env={"env_vars": self.variables} if self.variables else {},
                        # groups that fail are started again here, on as many workers as then find room
                        failure_config=FailureConfig(
                            max_failures=0,
                            max_preemption_failures=0,
                            controller_failure_limit=0,
                        ),
                    ),
                ).fit()
            except BaseException as error:  # raised below, in the driver's own thread
                failures.append(error)

        with (
            tempfile.TemporaryDirectory(prefix="sellarec-") as folder,
            _showing(board, self.console, self.on_record, first) as told,
            _signals() as arrived,
        ):
            # in a thread of its own, where Ray Train leaves signals alone; it dies with the process where it is not waited for
            training = threading.Thread(target=fit, args=(folder,), daemon=True)
            training.start()
            asked, is_room, looked, watched = False, False, time.monotonic(), time.monotonic()
            while training.is_alive():
                if len(arrived) > 1 or (arrived and not (self.stops and told.starts)):
                    raise KeyboardInterrupt  # at once also where nothing has been trained yet
                may_stop = self.stops and told.starts and not asked
                why = None
                if may_stop and time.monotonic() - watched > WATCH_SECONDS:
                    nodes, watched = leaving(told.groups[-1]), time.monotonic()
                    why = f"{', '.join(nodes)} is about to be taken away" if nodes else None
                if may_stop and not why and workers < group.most and time.monotonic() - looked > grow_every:
                    is_room, looked = room_now(group, 1, group.most - workers, workers) > 0, time.monotonic()
                    why = "there is room for more workers" if is_room else None
                if not asked and arrived:
                    why = "asked to (again: at once)"
                if not asked and (why or told.failures or (self.stop is not None and self.stop.is_set())):
                    if why:
                        self.console.line(f"{self.stage:<9} stops after a checkpoint: {why}")
                    ray.get(board.stop.remote())
                    asked = True
                training.join(0.2)
        if failures and not isinstance(failures[0], TrainingFailedError):
            raise failures[0]
        failure = failures[0] if failures else None
        reached = told.starts, told.stopped, bool(arrived), is_room, told.paused
        return _Ended(failure, told.errors, told.failed, *reached)


def _found_no_room(failure: BaseException | None) -> bool:
    """Whether a group of workers ended because Ray found no room for it in the time that it had."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(getattr(failure, "controller_failure", None), WorkerGroupStartupTimeoutError)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM that arrive while the block runs, which then do nothing else. In other threads than the main one they
    can't be had."""
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in kept:
        signal.signal(number, lambda received, frame: arrived.append(received))
    try:
        yield arrived
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def run_task(function: Callable[..., None], stage: str, console: Console, **arguments: Any) -> None:
    """Run a function as a Ray task, so that its work and its logs stay off the driver; it gets a progress `board`.

    Raises:
        UserError: as the function raised it.
        StageFailed: the function failed for another reason.
    """
    import ray

    board = _board()
    with _showing(board, console, lambda record: None):
        try:
            ray.get(ray.remote(num_cpus=0)(function).remote(**arguments, board=board))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise StageFailed(f"stage {stage} failed: {error.cause}") from error


def _board() -> Any:
    """A progress board on the driver's own node: it is lost with the driver alone."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(ProgressBoard).remote()


@dataclasses.dataclass
class _Told:
    """What workers have put on the board.

    Attributes:
        errors: users' mistakes.
        failed: other reasons for which the stage has failed.
        starts: the step at which they started or took up their work.
        stopped: the one at which they stopped, if they were asked to.
        paused: the evaluations that lie behind them where they paused.
        groups: their placement group.
        failures: why nothing is shown any more.
    """

    errors: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    starts: list[int] = dataclasses.field(default_factory=list)
    stopped: list[int] = dataclasses.field(default_factory=list)
    paused: list[list[Any]] = dataclasses.field(default_factory=list)
    groups: list[str] = dataclasses.field(default_factory=list)
    failures: list[BaseException] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def _showing(board: Any, console: Console, on_record: Callable[[dict], None], first: bool = True) -> Iterator[_Told]:
    """Print what arrives on the board while the block runs. Why nothing is shown any more is raised when the block ends.

    Args:
        first: there was no group of workers before.
    """
    import ray

    told, ended = _Told(), threading.Event()

    def show() -> None:
        while True:
            last = ended.wait(0.5)
            for record in ray.get(board.take.remote()):
                if "error" in record:
                    told.errors.append(record["error"])
                elif "failed" in record:
                    told.failed.append(record["failed"])
                elif "note" in record:
                    console.line(record["note"])
                elif "stopped" in record:
                    told.stopped.append(record["stopped"])
                elif "paused" in record:
                    told.paused.append(record["paused"])
                elif "group" in record:
                    told.groups.append(record["group"])
                    on_record(record)
                elif "started" in record:
                    told.starts.append(record["started"])
                    if record["started"]:
                        what = f"goes on from its checkpoint at step {record['started']}/{record['steps']}"
                        console.line(f"{record['stage']:<9} {what}")
                    elif not first:
                        console.line(
                            f"{record['stage']:<9} starts again: a worker was lost before the first checkpoint"
                        )
                else:
                    console.line(describe(record))
                    on_record(record)
            if last:
                return

    def show_or_note() -> None:
        try:
            show()
        except BaseException as failure:
            told.failures.append(failure)

    thread = threading.Thread(target=show_or_note)
    thread.start()
    try:
        yield told
    finally:
        ended.set()
        thread.join()
        ray.kill(board)
    if told.failures:
        raise told.failures[0]
