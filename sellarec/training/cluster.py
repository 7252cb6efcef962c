"""The Ray cluster that a run has: started on this machine or joined, and what its nodes hold."""

import dataclasses
import logging
import os
import signal
import threading
import time

from sellarec.artifacts import Place
from sellarec.config import GROW_EVERY, NODE_TIMEOUT, STORAGE_TIMEOUT, WORKER_TIMEOUT
from sellarec.errors import StageFailed, UserError
from sellarec.preflight import Machine, check_address, check_workspace, free_memory, in_words, machines_of, preflight
from sellarec.training.autoscaler import taken_by_worker, wait_for_nodes
from sellarec.training.progress import Console

WORKER_MEMORY = 800 << 20
"""Resident bytes of a worker that holds next to no weights (torch, torchrec, transformers, Ray; 719 MiB were measured)."""

RAY_MEMORY = 2 << 30
"""Resident bytes of the driver and of Ray's own processes on one machine (1.8 GiB were measured)."""

GPU_SECONDS = 120
"""How long it may take until a GPU's memory can be asked for."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What the connected Ray cluster offers.

    Attributes:
        local: Ray was started by this process, on this machine.
        gpus: whether workers get a GPU each.
        share: what each worker takes of a CPU, or of a GPU.
        groups: worker groups that may run at a time.
        machines: of a cluster that was joined, as they were then.
    """

    local: bool
    gpus: bool
    share: float = 1.0
    groups: int = 1
    machines: tuple[Machine, ...] = ()


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
        autoscaler: room that is waited for is asked for.
    """

    most: int
    gpus: bool
    least: int
    share: float = 1.0
    worker_timeout: float = WORKER_TIMEOUT
    storage_timeout: float = STORAGE_TIMEOUT
    node_timeout: float = NODE_TIMEOUT
    grow_every: float = GROW_EVERY
    autoscaler: bool = False

    @property
    def taken(self) -> dict[str, float]:
        """What a worker takes of Ray's resources."""
        return taken_by_worker(self.gpus, self.share)


def connect(
    workers: int,
    console: Console,
    workspace: Place,
    groups: int = 1,
    share: float = 1.0,
    stopping: int = 0,
    device: str = "auto",
    autoscaler: bool = False,
    node_timeout: float = NODE_TIMEOUT,
) -> Cluster:
    """Join the cluster that RAY_ADDRESS names and check it (`preflight.py`), or start Ray on this machine.

    Args:
        groups: worker groups that are to run at a time, of `workers` each.
        share: what each worker takes of a CPU, or of a GPU where there are some.
        stopping: groups that may still take their last step while those run, for which a Ray that is started here has CPUs too.
        device: what workers run on, see `Config.device`.
        autoscaler: nodes that lack are asked for, and waited for `node_timeout` seconds, before the cluster is checked.

    Raises:
        UserError: no cluster answers, or it doesn't fit: versions, storage, network, room, GPUs, with the arithmetic.
        StageFailed: Ray's processes don't come up on this machine, or the autoscaler's nodes on theirs.
    """
    # Reports wait for the controller's next poll, 2 s by default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    # Nodes that are about to be taken away are looked for by the driver (launch.py): Ray's own actor for it would only make
    # each launch longer.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # its progress is told by ours
    cores = os.cpu_count() or 1
    address = os.environ.get("RAY_ADDRESS")
    local = not joins_cluster()
    if local:
        # Despite its name it works everywhere: every Ray process of this run listens on the loopback address only.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # gloo and NCCL listen where the machine's name leads, which others may reach
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, _loopback())
        # A stage starts a handful of processes at once; by default more than one a core is warned about.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(workers + 8))

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
        check_given_cluster(workspace, autoscaler)
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
    gpus = ray.cluster_resources().get("GPU", 0)
    if share < 1 and workers > 1 and (device == "cuda" or (device == "auto" and gpus > 0)):
        raise UserError(
            f"share is {share:g} and workers {workers}, but NCCL takes no two workers of a group on one GPU: give --workers 1, "
            "or leave share out"
        )
    if autoscaler:  # with what runs on what is decided before nodes join
        device = "cuda" if device == "cuda" or (device == "auto" and gpus > 0) else "cpu"
        wait_for_nodes(workers, groups, device == "cuda", share, node_timeout, console)
        gpus = ray.cluster_resources().get("GPU", 0)
    has_gpus = takes_gpus(gpus, workers, device, groups, share)
    machines: tuple[Machine, ...] = ()
    if not local:
        start = time.monotonic()
        found = preflight(workers, has_gpus, WORKER_MEMORY, workspace, groups, share)
        for line in in_words(found):
            console.line(f"  {line}")
        console.line(f"preflight passed in {time.monotonic() - start:.0f} s: {len(found)} nodes")
        machines = machines_of(found, 1.0 if has_gpus else share)
    return Cluster(local=local, gpus=has_gpus, share=share, groups=groups, machines=machines)


def _loopback() -> str:
    """The network interface that has 127.0.0.1."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            return name
    raise UserError("no network interface of this machine has the address 127.0.0.1, by which workers on it meet")


def joins_cluster() -> bool:
    """Whether this job joins a cluster instead of starting Ray on this machine."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def check_given_cluster(workspace: Place, autoscaler: bool) -> None:
    """Before anything is read, refuse a cluster that doesn't answer, a workspace that its nodes can't share, or
    `autoscaler` where no cluster is joined.

    Raises:
        UserError: also as `check_address` and `check_workspace`.
    """
    if joins_cluster():
        check_address(os.environ["RAY_ADDRESS"])
        check_workspace(workspace)
    elif autoscaler:
        raise UserError(
            "autoscaler is True, but RAY_ADDRESS names no cluster whose autoscaler could be asked for nodes: leave it out, or "
            "submit the job to a cluster"
        )


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


def room_of_worker(workers: int, memory: int | None = None) -> int:
    """Bytes that each of so many workers on a machine has for tables and a model, beside what a worker takes itself.

    Args:
        memory: that is free there; None asks this machine.
    """
    free = free_memory()[0] if memory is None else memory
    return max(0, free // workers - WORKER_MEMORY)


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


def check_room(workers: int, trials: int | None = None) -> None:
    """Raises UserError where this machine's memory can't hold so many workers, or so many trials of a sweep at a time, each of
    which has a process of its own beside its workers."""
    available = free_memory()[0]
    what, processes = f"{workers} workers", workers
    if trials is not None:
        what = f"{trials} trials at a time x ({workers} workers and a process of their own)"
        processes = trials * (workers + 1)
    needed = RAY_MEMORY + processes * WORKER_MEMORY
    if needed > available:
        room = (available - RAY_MEMORY) // WORKER_MEMORY
        if trials is None:
            advice = f"lower --workers to {room}" if room > 0 else ""
        elif room > workers:
            advice = f"lower --concurrent to {room // (workers + 1)}"
        else:
            advice = f"give --concurrent 1 and --workers {room - 1}" if room > 1 else ""
        raise UserError(
            f"{what} x {WORKER_MEMORY / 2**30:.2f} GiB + {RAY_MEMORY / 2**30:.0f} GiB for Ray = "
            f"{needed / 2**30:.1f} GiB (before any table or model), but {available / 2**30:.1f} GiB of memory are free on this "
            f"machine: {advice or 'free some memory, or take a larger machine'}"
        )
