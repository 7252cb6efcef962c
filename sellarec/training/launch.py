"""The driver's side of training: start Ray, launch workers, show their progress, bring their errors home."""

import contextlib
import dataclasses
import os
import re
import signal
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sellarec.artifacts import Place
from sellarec.config import GROW_EVERY, NODE_TIMEOUT, STORAGE_TIMEOUT, WORKER_TIMEOUT, Language
from sellarec.errors import StageFailed, TrainingStopped, UserError
from sellarec.preflight import check_address, check_workspace, in_words, living_nodes, preflight
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

CHECKPOINTS = "checkpoints"
"""Folder in an unfinished artifact."""

RETRIES = 3
"""How often in a row a stage is taken up again after workers were lost, where it left no new checkpoint in between."""

ROOM_SECONDS = 3.0
"""How long it may take until the cluster has set room aside that is there."""

CAUSE_CHARACTERS = 240
"""Of the cause for which a stage is taken up again, what is printed; Ray adds advice to it."""

MANY = 1 << 20
"""More workers than there ever are."""

START_SECONDS = 60.0
"""How long a group of workers that found room may take to start."""

LOG_BYTES = 1 << 20
"""Of what a process has printed, the last so many bytes are kept after a failure."""

LOG_SECONDS = 30.0
"""How long nodes may take to write that down."""

RARER = 2
"""How many times rarer room for more workers is looked for after it was found in vain: what is free at one moment, as a CPU
that reads data now and then, may be taken at the next."""


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


@dataclasses.dataclass(frozen=True)
class Group:
    """The workers of a stage, and how long it waits for what fails.

    Attributes:
        most: workers.
        gpus: whether each takes one, or a share of one.
        least: with how many the stage goes on where no more find room.
        share: what each takes of a CPU, or of a GPU.
        worker_timeout: seconds after which a worker that doesn't answer counts as lost.
        storage_timeout: seconds for which storage that fails is tried again.
        node_timeout: seconds for which room for `least` workers is waited for, where nodes are too few or were lost.
        grow_every: seconds after which workers that are fewer than `most` make place for more, where there is room.
    """

    most: int
    gpus: bool
    least: int
    share: float = 1.0
    worker_timeout: float = WORKER_TIMEOUT
    storage_timeout: float = STORAGE_TIMEOUT
    node_timeout: float = NODE_TIMEOUT
    grow_every: float = GROW_EVERY

    @property
    def taken(self) -> dict[str, float]:
        """What a worker takes of Ray's resources."""
        return {"CPU": 1, "GPU": self.share} if self.gpus else {"CPU": self.share}


def connect(
    workers: int,
    console: Console,
    workspace: Place,
    groups: int = 1,
    share: float = 1.0,
    stopping: int = 0,
    device: str = "auto",
) -> Cluster:
    """Join the cluster that RAY_ADDRESS names and check it (`preflight.py`), or start Ray on this machine.

    Args:
        groups: worker groups that are to run at a time, of `workers` each.
        share: what each worker takes of a CPU, or of a GPU where there are some.
        stopping: groups that may still take their last step while those run, for which a Ray that is started here has CPUs too.
        device: what workers run on, see `Config.device`.

    Raises:
        UserError: no cluster answers, or it doesn't fit: versions, storage, network, room, GPUs, with the arithmetic.
        StageFailed: Ray's processes don't come up on this machine.
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
        try:
            joined = ray.init(
                address="local",
                num_cpus=max(cores, (groups + stopping) * (workers + 2)),
                num_gpus=gpus_here(device),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:  # Ray raises no type of its own where its processes don't come up in time
            raise StageFailed(
                f"Ray did not start on this machine: {' '.join(str(error).split())} Is it busy with other work, or short of "
                "memory? The same command goes on from what is finished"
            ) from error
    else:
        console.line(f"joining the Ray cluster at {address}")
        check_address(str(address))
        check_workspace(workspace)
        try:
            joined = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
            # another version of Ray or Python, no token or a wrong one, a machine that is no node of the cluster
            raise UserError(
                f"the cluster at RAY_ADDRESS {address} can't be joined: {' '.join(str(error).split())}"
            ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # ray.init takes its place
    if joined.dashboard_url:
        console.line(f"  Ray dashboard: http://{joined.dashboard_url}")
    has_gpus = takes_gpus(ray.cluster_resources().get("GPU", 0), workers, device, groups, share)
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
    return Cluster(local=local, gpus=has_gpus, share=share, groups=groups)


def joins_cluster() -> bool:
    """Whether this job joins a cluster instead of starting Ray on this machine."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def gpus_here(device: str) -> int:
    """GPUs of this machine that workers may take: those that torch can use, which CUDA_VISIBLE_DEVICES limits."""
    if device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def takes_gpus(gpus: float, workers: int, device: str, groups: int = 1, share: float = 1.0) -> bool:
    """Whether workers get a GPU each, or a share of one.

    Args:
        gpus: that there are.
        device, groups, share: see `connect`.

    Raises:
        UserError: there are GPUs, but not for all workers, or none, and `device` asks for them: on CPUs a run would take many
            times as long.
    """
    if device == "cpu":
        return False
    places, needed = int(gpus) * int(1 / share), groups * workers  # a share lies on one GPU
    if gpus > 0 and places < needed:
        several = f"{groups} x {workers} workers" if groups > 1 else f"{workers} workers"
        advice = (
            "lower --workers or --concurrent" if groups > 1 else f"give --workers {places}" if places else "add GPUs"
        )
        raise UserError(
            f"{several} of {share:g} GPU each find {gpus:g} GPUs, which have room for {places}: {advice}, or give --device cpu "
            "to run on CPUs"
        )
    if gpus == 0 and device == "cuda":
        raise UserError(
            "device is cuda, but there is no GPU that Ray and torch know of: give --device cpu, or add GPUs (`jobs/env.py` tells "
            "what torch finds here, `ray status` what a cluster has)"
        )
    return gpus > 0


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
    group: Group,
    console: Console,
    on_record: Callable[[dict], None],
    stop: threading.Event | None = None,
) -> None:
    """Run one stage's training to its end, surviving lost workers. Its checkpoints stay.

    Args:
        training: a `loop.Training` without its board.
        on_record: takes each progress record of rank 0, for TensorBoard.
        stop: once it is set, the training ends after its step.

    Raises:
        UserError: a mistake that a worker found.
        TrainingStopped: `stop` was set before its end.
        StageFailed: it failed for another reason, and again after RETRIES restarts.
    """
    from sellarec.training.loop import train_worker

    run_workers(
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
) -> None:
    """Run a function on a group of workers under Ray Train; `config`'s dataclass gets the progress board.

    Where workers are lost, the function is run again, on as many as then find room.

    Args:
        keep_freed_memory: see KEEP_FREED_MEMORY; without effect on GPUs.
        stops: whether the workers leave a checkpoint and end when the board asks for it, as it does after the first SIGINT
            or SIGTERM, once `stop` is set, or to go on with more workers. Others are broken off.
        stop: see `train`.

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
        is_held_up = _waits_for_others(group, first) and _found_no_room(ended.failure)
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
            console.line(f"{stage:<9} waits for what other jobs hold of {_needed(group)}")
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
            console.line(f"{stage:<9} was cut off ({short}): is taken up again")
            workers = find_room(stage, group, console, stop)
        elif stop is not None and stop.is_set() and ended.stopped:
            raise TrainingStopped(f"stage {stage} was stopped at step {ended.stopped[0]}")
        elif ended.stopped:
            before, workers = workers, find_room(stage, group, console, stop)
            grow_every = group.grow_every if workers > before else RARER * grow_every
        else:
            return


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
    """

    failure: BaseException | None
    errors: list[str]
    failed: list[str]
    starts: list[int]
    stopped: list[int]
    interrupted: bool


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
        patience = max(START_SECONDS, group.node_timeout) if _waits_for_others(group, first) else START_SECONDS
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

        growing = False
        with (
            tempfile.TemporaryDirectory(prefix="sellarec-") as folder,
            _showing(board, self.console, self.on_record, first) as (errors, failed, starts, stopped, unshown),
            _signals() as arrived,
        ):
            # in a thread of its own, where Ray Train leaves signals alone; it dies with the process where it is not waited for
            training = threading.Thread(target=fit, args=(folder,), daemon=True)
            training.start()
            asked, looked = False, time.monotonic()
            while training.is_alive():
                if len(arrived) > 1 or (arrived and not (self.stops and starts)):
                    raise KeyboardInterrupt  # at once also where nothing has been trained yet
                may_grow = self.stops and starts and not asked and workers < group.most
                if may_grow and time.monotonic() - looked > grow_every:
                    growing, looked = _room(group, 1, group.most - workers, workers) > 0, time.monotonic()
                    if growing:
                        self.console.line(f"{self.stage:<9} stops after a checkpoint: there is room for more workers")
                if not asked and (growing or arrived or unshown or (self.stop is not None and self.stop.is_set())):
                    if arrived:
                        self.console.line(f"{self.stage:<9} stops after a checkpoint (again: at once)")
                    ray.get(board.stop.remote())
                    asked = True
                training.join(0.2)
        if failures and not isinstance(failures[0], TrainingFailedError):
            raise failures[0]
        return _Ended(failures[0] if failures else None, errors, failed, starts, stopped, bool(arrived))


def _places(group: Group) -> int:
    """How many workers the living nodes can hold, whatever else runs on them."""
    nodes, taken = living_nodes(), group.taken
    places = sum(
        min(int(node.cpus / taken["CPU"]), int(node.gpus) * int(1 / taken["GPU"]) if group.gpus else MANY)
        for node in nodes
    )
    # one CPU is left to read data
    return min(places, int((sum(node.cpus for node in nodes) - 1) / taken["CPU"]))


def _room(group: Group, least: int, most: int, beside: int = 0) -> int:
    """How many workers find room now, from `least` to `most`; 0 where not even the least do. What other jobs hold is no room, nor
    is a node that has died without the cluster having noticed.

    Args:
        beside: workers that run already.
    """
    taken, found = group.taken, 0
    low, high = least, min(most, _places(group) - beside)
    workers = high
    while low <= high:
        if _fit([taken] * workers + [{"CPU": 1.0}] * (not beside)):
            found, low = workers, workers + 1
        else:
            high = workers - 1
        workers = (low + high + 1) // 2
    return found


def _fit(bundles: list[dict[str, float]]) -> bool:
    """Whether the cluster can set these resources aside now."""
    from ray.util.placement_group import placement_group, remove_placement_group

    held = placement_group(bundles)
    try:
        return held.wait(ROOM_SECONDS)
    finally:
        remove_placement_group(held)


def _waits_for_others(group: Group, first: bool) -> bool:
    """Whether a group waits without limit for what other jobs hold, as a sweep's trials do: where the number of its workers is
    given, and none of them have run yet."""
    return first and group.least == group.most


def _found_no_room(failure: BaseException | None) -> bool:
    """Whether a group of workers ended because Ray found no room for it in the time that it had."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    return isinstance(getattr(failure, "controller_failure", None), WorkerGroupStartupTimeoutError)


def first_workers(stage: str, group: Group, console: Console, stop: threading.Event | None = None) -> int:
    """How many workers a stage starts with: where their number is given, these, once there are nodes that can hold them. Ray
    waits for what other jobs hold there.

    Raises:
        StageFailed, TrainingStopped: as `find_room`.
    """
    return find_room(stage, group, console, stop, is_free=not _waits_for_others(group, first=True))


def find_room(stage: str, group: Group, console: Console, stop: threading.Event | None, is_free: bool = True) -> int:
    """Wait for room for the group's workers: how many find some.

    Args:
        is_free: what other jobs hold is no room.

    Raises:
        StageFailed: there was none for `node_timeout` seconds.
        TrainingStopped: `stop` was set meanwhile.
    """
    start, told = time.monotonic(), False
    while True:
        workers = _room(group, group.least, group.most) if is_free else min(group.most, _places(group))
        if workers >= group.least:
            return workers
        needed = _needed(group)
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
        time.sleep(1)


def _needed(group: Group) -> str:
    """What the least of a group's workers take, and what the living nodes have, in words."""
    cpu, nodes = group.taken["CPU"], living_nodes()
    gpu = f" and {group.taken['GPU']:g} GPU" if group.gpus else ""
    has = ", ".join(f"{node} {node.cpus:g}" + (f" and {node.gpus:g} GPUs" if group.gpus else "") for node in nodes)
    needed = f"{group.least} workers of {cpu:g} CPU{gpu} each and 1 CPU to read data ({group.least * cpu + 1:g} CPUs)"
    return f"{needed}; CPUs are: {has}"


def keep_logs(place: Place) -> list[str]:
    """Copy what this job's processes have printed on all living nodes, its workers' last words among them, to NODE/FILE in a
    place that they all see.

    Returns: the nodes of which not all came, and why.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes, job, copy = living_nodes(), ray.get_runtime_context().get_job_id(), ray.remote(num_cpus=0)(_copy_logs)
    copied = [
        copy.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(
            place / node.name, job
        )
        for node in nodes
    ]
    ray.wait(copied, num_returns=len(copied), timeout=LOG_SECONDS)
    failures = []
    for node, reference in zip(nodes, copied, strict=True):
        try:
            ray.get(reference, timeout=0.1)
        except ray.exceptions.RayError as error:
            failures.append(f"{node}: {last_line(error)}")
    return failures


def _copy_logs(place: Place, job: str) -> None:
    """Copy this node's part of a job's logs. Ray writes a file for each of a process's two streams, heads it with the job, and
    says in lines that begin with a colon what runs in it; files in which nothing else stands are left out."""
    import ray

    for file in sorted(Path(ray._private.worker._global_node.get_session_dir_path(), "logs").glob("worker-*")):
        head = f":job_id:{job}\n".encode()
        with open(file, "rb") as stream:
            if stream.read(len(head)) != head:
                continue
            stream.seek(max(len(head), file.stat().st_size - LOG_BYTES))
            text = stream.read().decode(errors="replace")
        if any(line and not line.startswith(":") for line in text.splitlines()):
            place.write_text(file.name, text)


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
    board: Any, console: Console, on_record: Callable[[dict], None], first: bool = True
) -> Iterator[tuple[list[str], list[str], list[int], list[int], list[BaseException]]]:
    """Print what arrives on the board while the block runs; gives the errors of users and the other reasons to fail that workers
    put there, the step at which they started or took up their work, the one at which they stopped, if they were asked to, and
    why nothing is shown any more, which is raised when the block ends.

    Args:
        first: there was no group of workers before.
    """
    import ray

    errors: list[str] = []
    failed: list[str] = []
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
                elif "failed" in record:
                    failed.append(record["failed"])
                elif "note" in record:
                    console.line(record["note"])
                elif "stopped" in record:
                    stopped.append(record["stopped"])
                elif "group" in record:
                    on_record(record)
                elif "started" in record:
                    starts.append(record["started"])
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
            failures.append(failure)

    thread = threading.Thread(target=show_or_note)
    thread.start()
    try:
        yield errors, failed, starts, stopped, failures
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
