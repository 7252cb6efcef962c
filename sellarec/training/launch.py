"""The driver's side of training: start Ray, launch workers, show their progress, bring their errors home."""

import contextlib
import dataclasses
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from sellarec.artifacts import Place
from sellarec.config import WORKER_TIMEOUT, Language
from sellarec.errors import StageFailed, TrainingStopped, UserError
from sellarec.preflight import check_address, check_workspace, in_words, preflight
from sellarec.training.progress import Console, ProgressBoard, duration

KEEP_FREED_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""Variables by which glibc keeps what a worker frees, instead of handing it back to the system. Large tensors come and go at
each step of a collaborative model on a CPU, and a fault for every page of them, each time, took up to half of it. The price: a
worker's memory stays at its peak, so not where a language model is loaded whole and then sharded."""

WORKER_MEMORY = 800 << 20
"""Resident bytes of a worker that holds next to no weights (torch, torchrec, transformers, Ray; 719 MiB were measured)."""

RAY_MEMORY = 2 << 30
"""Resident bytes of the driver and of Ray's own processes on one machine (1.8 GiB were measured)."""

_LOST_PEER = re.compile(r"connection (closed|reset|refused)|gloo/transport|NCCL|broken pipe", re.IGNORECASE)
"""How a worker's failure reads that only follows from another's."""

GPU_SECONDS = 120
"""How long it may take until a GPU's memory can be asked for."""

RETRIES = 3
"""How often a stage is taken up again after a worker was lost."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What the connected Ray cluster offers.

    Attributes:
        local: Ray was started by this process, on this machine.
        gpus: whether workers get a GPU each.
        share: what each worker takes of a CPU, or of a GPU.
        groups: worker groups that may run at a time.
    """

    local: bool
    gpus: bool
    share: float = 1.0
    groups: int = 1


def connect(workers: int, console: Console, workspace: Place, groups: int = 1, share: float = 1.0) -> Cluster:
    """Join the cluster that RAY_ADDRESS names and check it (`preflight.py`), or start Ray on this machine.

    Args:
        groups: worker groups that are to run at a time, of `workers` each.
        share: what each worker takes of a CPU, or of a GPU where there are some for all.

    Raises:
        UserError: no cluster answers, or it doesn't fit: versions, storage, network, room, with the arithmetic.
    """
    # Reports wait for the controller's next poll, 2 s by default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # its progress is told by ours
    cores = os.cpu_count() or 1
    address = os.environ.get("RAY_ADDRESS")
    local = not joins_cluster()
    if local:
        # Despite its name it works everywhere: every Ray process of this run listens on the loopback address only.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # A stage starts a handful of processes at once; by default more than one a core is warned about.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(workers + 8))
    import logging

    import ray

    handler = signal.getsignal(signal.SIGTERM)
    if local:
        console.line(f"starting Ray on this machine ({cores} cores, {workers} workers)")
        if workers > cores:
            console.line(f"note: {workers} workers share {cores} cores")
        ray.init(
            address="local",
            num_cpus=max(cores, groups * (workers + 2)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    else:
        console.line(f"joining the Ray cluster at {address}")
        check_address(str(address))
        check_workspace(workspace)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
            # another version of Ray or Python, no token or a wrong one, a machine that is no node of the cluster
            raise UserError(
                f"the cluster at RAY_ADDRESS {address} can't be joined: {' '.join(str(error).split())}"
            ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # ray.init takes its place
    gpus = ray.cluster_resources().get("GPU", 0)
    has_gpus = int(gpus) * int(1 / share) >= groups * workers  # a share lies on one GPU
    if has_gpus and share < 1 and workers > 1:
        raise UserError(
            f"share is {share:g} and workers {workers}, but NCCL takes no two workers of a group on one GPU: give --workers 1, "
            "or leave share out"
        )
    if not local:
        start = time.monotonic()
        found = preflight(workers, has_gpus, WORKER_MEMORY, workspace, groups, share)
        for line in in_words(found):
            console.line(f"  {line}")
        console.line(f"preflight passed in {time.monotonic() - start:.0f} s: {len(found)} nodes")
    if gpus > 0 and not has_gpus:
        console.line(
            f"note: {groups * workers} workers find {gpus:g} GPUs, so they run on CPUs: "
            f"{'lower --workers or --concurrent' if groups > 1 else f'give --workers {gpus:g}'} to use them"
        )
    return Cluster(local=local, gpus=has_gpus, share=share, groups=groups)


def joins_cluster() -> bool:
    """Whether this job joins a cluster instead of starting Ray on this machine."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def room_of_worker(workers: int) -> int:
    """Bytes that each of so many workers on this machine has for tables or a model, beside what a worker takes itself."""
    import psutil

    return max(0, psutil.virtual_memory().available // workers - WORKER_MEMORY)


def free_gpu_memory(share: float) -> int:
    """Bytes that a worker with such a share of a GPU finds free: of a GPU that others share too, its part of the whole.

    Raises:
        UserError: no GPU comes free in GPU_SECONDS.
    """
    import ray

    def ask() -> tuple[int, int]:
        import torch

        return torch.cuda.mem_get_info()

    # outside of the placement group of a trial, which holds no GPU itself
    asked = ray.remote(num_gpus=share, num_cpus=0, scheduling_strategy="DEFAULT")(ask).remote()
    try:
        free, total = ray.get(asked, timeout=GPU_SECONDS)
    except ray.exceptions.GetTimeoutError as error:
        ray.cancel(asked)
        raise UserError(
            f"no GPU came free in {GPU_SECONDS} s, whose memory was to be asked for: `ray status` tells what holds them"
        ) from error
    return min(free, int(total * share))


def check_room(workers: int) -> None:
    """Raises UserError where this machine's memory can't hold so many workers."""
    import psutil

    available = psutil.virtual_memory().available
    needed = RAY_MEMORY + workers * WORKER_MEMORY
    if needed > available:
        room = (available - RAY_MEMORY) // WORKER_MEMORY
        advice = f"lower --workers to {room}" if room > 0 else "free some memory, or take a larger machine"
        raise UserError(
            f"{workers} workers x {WORKER_MEMORY / 2**30:.2f} GiB + {RAY_MEMORY / 2**30:.0f} GiB for Ray = "
            f"{needed / 2**30:.1f} GiB (before any table or model), but {available / 2**30:.1f} GiB of memory are free on this "
            f"machine: {advice}"
        )


def train(
    training: Any,
    workers: int,
    gpus: bool,
    console: Console,
    on_record: Callable[[dict], None],
    timeout: float,
    stop: threading.Event | None = None,
    share: float = 1.0,
) -> None:
    """Run one stage's training to its end, surviving lost workers.

    Args:
        training: a `loop.Training` without its board.
        on_record: takes each progress record of rank 0, for TensorBoard.
        timeout: seconds after which a worker that doesn't answer counts as lost.
        stop: once it is set, the training ends after its step.
        share: what each worker takes of a CPU, or of a GPU.

    Raises:
        UserError: a mistake that a worker found.
        TrainingStopped: `stop` was set before its end.
        StageFailed: it failed for another reason, and again after RETRIES restarts.
    """
    from sellarec.training.loop import train_worker

    run_workers(
        train_worker, {"training": training}, training.stage, training.output, workers, gpus, console, on_record,
        keep_freed_memory=not isinstance(training.settings, Language), stops=True, timeout=timeout, stop=stop, share=share,
    )  # fmt: skip


def run_workers(
    function: Callable[[dict], None],
    config: dict[str, Any],
    stage: str,
    place: Place,
    workers: int,
    gpus: bool,
    console: Console,
    on_record: Callable[[dict], None],
    keep_freed_memory: bool = False,
    stops: bool = False,
    timeout: float = WORKER_TIMEOUT,
    stop: threading.Event | None = None,
    share: float = 1.0,
) -> None:
    """Run a function on a group of workers under Ray Train; `config`'s dataclass gets the progress board.

    Args:
        keep_freed_memory: see KEEP_FREED_MEMORY; without effect on GPUs.
        stops: whether the workers leave a checkpoint and end when the board asks for it, as it does after the first SIGINT
            or SIGTERM, or once `stop` is set. Others are broken off.
        timeout: seconds after which a worker that doesn't answer counts as lost.
        stop: see `train`.
        share: see `train`.

    Raises:
        UserError: a mistake that a worker found.
        StageFailed: it failed for another reason, and again after RETRIES restarts.
        TrainingStopped: `stop` was set.
        KeyboardInterrupt: after SIGINT or SIGTERM.
    """
    import ray
    import ray.train
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    board = _board()
    config = {name: dataclasses.replace(value, board=board, timeout=timeout) for name, value in config.items()}
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(timeout)
    storage = str(place.folder) if place.is_local else place.uri
    taken = {"CPU": 1, "GPU": share} if gpus else {"CPU": share}
    trainer = TorchTrainer(
        function,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus, resources_per_worker=taken),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=round(timeout)),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=storage,
            failure_config=FailureConfig(max_failures=RETRIES),
            worker_runtime_env={"env_vars": KEEP_FREED_MEMORY} if keep_freed_memory and not gpus else {},
            # the best by the number of improvements, and always the newest, to resume from
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="rank_of_best"),
        ),
    )
    console.line(f"{stage:<9} starting {workers} workers")
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # raised below, in the driver's own thread
            failures.append(error)

    asked = False
    # in a thread of its own, where Ray Train leaves signals alone; it dies with the process where it is not waited for
    training = threading.Thread(target=fit, daemon=True)
    with _showing(board, console, on_record) as (errors, starts, stopped), _signals() as arrived:
        training.start()
        while training.is_alive():
            if len(arrived) > 1 or (arrived and not (stops and starts)):
                raise KeyboardInterrupt  # at once also where nothing has been trained yet
            if not asked and (arrived or (stop is not None and stop.is_set())):
                if arrived:
                    console.line(f"{stage:<9} stops after a checkpoint (again: at once)")
                ray.get(board.stop.remote())
                asked = True
            training.join(0.2)
    if failures:
        (error,) = failures
        if not isinstance(error, TrainingFailedError):
            raise error
        raise StageFailed(
            f"stage {stage} failed, also when it was taken up again ({RETRIES} times at most): {cause_of(error)}"
        ) from error
    if errors:
        raise UserError(errors[0])
    if arrived:
        raise KeyboardInterrupt
    if stopped:
        raise TrainingStopped(f"stage {stage} was stopped at step {stopped[0]}")
    place.delete("checkpoints")


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


def run_task(function: Callable[..., dict[str, Any]], stage: str, console: Console, **arguments: Any) -> dict[str, Any]:
    """Run a function as a Ray task, so that its work and its logs stay off the driver; it gets a progress `board`.

    Raises:
        UserError: as the function raised it.
        StageFailed: the function failed for another reason.
    """
    import ray

    board = _board()
    with _showing(board, console, lambda record: None):
        try:
            return ray.get(ray.remote(num_cpus=0)(function).remote(**arguments, board=board))
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


@contextlib.contextmanager
def _showing(
    board: Any, console: Console, on_record: Callable[[dict], None]
) -> Iterator[tuple[list[str], list[int], list[int]]]:
    """Print what arrives on the board while the block runs; gives the list of errors that workers put there, the steps at which
    they started or took up their work, and the one at which they stopped, if they were asked to."""
    import ray

    errors: list[str] = []
    stopped: list[int] = []
    starts: list[int] = []
    failures: list[BaseException] = []
    ended = threading.Event()

    def show() -> None:
        while True:
            last = ended.wait(0.5)
            for record in ray.get(board.take.remote()):
                if "error" in record:
                    errors.append(record["error"])
                elif "stopped" in record:
                    stopped.append(record["stopped"])
                elif "group" in record:
                    on_record(record)
                elif "started" in record:
                    starts.append(record["started"])
                    if record["started"]:
                        what = f"goes on from its checkpoint at step {record['started']}/{record['steps']}"
                        console.line(f"{record['stage']:<9} {what}")
                    elif len(starts) > 1:
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
            failures.append(failure)

    thread = threading.Thread(target=show_or_note)
    thread.start()
    try:
        yield errors, starts, stopped
    finally:
        ended.set()
        thread.join()
        ray.kill(board)
    if failures:
        raise failures[0]


def cause_of(error: BaseException) -> str:
    """What went wrong on the workers: the last line of each one's failure, of those that say the same the first.

    A worker whose peer has gone fails too, with a word of the connection; such failures are left out where others are.
    """
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return last_line(error)
    by_line: dict[str, int] = {}
    for rank, failure in sorted(failures.items()):
        by_line.setdefault(last_line(failure), rank)
    own = {line: rank for line, rank in by_line.items() if not _LOST_PEER.search(line)}
    return "; ".join(f"worker {rank}: {line}" for line, rank in (own or by_line).items())


def last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def describe(record: dict[str, Any]) -> str:
    """One progress line."""
    if "items" in record:
        return f"{record['stage']:<9} {record['done']:,}/{record['items']:,} items"
    if "scored" in record:
        return f"{record['stage']:<9} {record['what']}: {record['scored']:,}/{record['rows']:,} {record['done']}"
    if "model" in record:
        return f"{record['stage']:<9} {record['model']}: {record['rows']:,} rows scored in {record['seconds']:.1f} s"
    head = f"{record['stage']:<9} step {record['step']}/{record['steps']}"
    if "valid" in record:
        best = " (best so far)" if record["best"] == record["step"] else f" (best at step {record['best']})"
        metrics = "  ".join(f"{name.upper()} {_number(value)}" for name, value in record["valid"].items())
        return f"{head}  valid {metrics}{best}"
    percent = 100 * record["step"] / max(1, record["steps"])
    left = "" if record["seconds left"] is None else f"  {duration(record['seconds left'])} left"
    return (
        f"{head} ({percent:.0f}%)  loss {record['loss']:.4f}  {record['rows/s']:,.0f} rows/s  "
        f"waiting for data {record['data wait %']:.0f}%{left}"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
