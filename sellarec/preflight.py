"""Before any work on a cluster that was joined: does a cluster answer, are its nodes alike, do they see the storage and each
other, and is there room for the run? Each mistake ends the job at once, with one message that names the nodes.
"""

import os
import secrets
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sellarec.artifacts import Place, free_bytes
from sellarec.environment import FIX, PYTHON
from sellarec.errors import UserError

PACKAGES = (
    "ray",
    "torch",
    "torchrec",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "transformers",
    "peft",
    "pyarrow",
    "polars",
    "sellarec",
)
"""Whose versions have to be the same on all nodes."""

CONNECT_SECONDS = 5
"""An address has so long to answer."""

REPORT_SECONDS = 90
"""All nodes have so long to report, which takes a fresh process on each."""

NETWORK_SECONDS = 60
"""The all-reduce between nodes has so long, which takes torch on each."""

CLOCK_SECONDS = 5.0
"""Clocks may differ by so much; leases of artifacts are judged by the clock."""

FREE_DISK = 1 << 30
"""Free bytes behind the workspace, and on each node behind Ray's session folder."""

GIB = 1 << 30


@dataclass(frozen=True)
class Node:
    """A living node of the cluster.

    Attributes:
        id: Ray's, in hexadecimal.
        cpus, gpus: as it advertises.
    """

    name: str
    ip: str
    id: str
    cpus: float
    gpus: float

    def __str__(self) -> str:
        return self.ip if self.name == self.ip else f"{self.name} ({self.ip})"

    def places(self, gpus: bool, share: float) -> int:
        """Workers that it can hold, whatever else runs on it: each takes `share` of a CPU, or with `gpus` a CPU and `share` of a
        GPU, which lies on one."""
        if gpus:
            return min(int(self.cpus), int(self.gpus) * int(1 / share))
        return int(self.cpus / share)


@dataclass(frozen=True)
class Report:
    """What a node says of itself.

    Attributes:
        versions: of Python and PACKAGES; None where one is not installed. "code" is a digest of the files of package sellarec.
        sees, writes: what went wrong with the workspace; None where nothing did.
        machine: the same for nodes of one machine that share its memory.
        memory: free bytes.
        disk: free bytes behind Ray's session folder.
        clock: seconds that the node's clock is ahead of the driver's, as far as that can be told.
    """

    versions: dict[str, str | None]
    sees: str | None
    writes: str | None
    machine: str
    memory: int
    disk: int
    clock: float


@dataclass(frozen=True)
class Machine:
    """What the nodes of one machine have together.

    Attributes:
        name: of the first of them.
        places: workers for which it has CPUs.
        memory: free bytes.
    """

    name: str
    places: int
    memory: int


def free_memory(groups: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> tuple[int, str | None]:
    """Bytes of memory that processes here may still take, and the control group (version 2) that allows no more, a container's
    or a job step's; None where all of the machine's is free to them. What counts against a group's limit includes files that
    were read: where those are given back as soon as memory is short, they count as free."""
    from pathlib import Path

    import psutil

    free, limited = psutil.virtual_memory().available, None
    entries = Path(own).read_text().splitlines() if Path(own).is_file() else []
    name = next((entry.removeprefix("0::/") for entry in entries if entry.startswith("0::/")), "")
    folder = Path(groups) / name
    for group in (folder, *folder.parents):
        limit = group / "memory.max"
        if limit.is_file() and limit.read_text().strip() != "max":
            counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(counts["inactive_file"])
            left = max(0, int(limit.read_text()) - used)
            if left < free:
                free, limited = left, str(group)
    return free, limited


class Probe:
    """Runs on a node and looks around. Sent by value (`_probes`), as a node may lack this package: its methods know nothing of
    this module but `free_memory`, which goes with them.
    """

    def versions(self, packages: Sequence[str]) -> dict[str, str | None]:
        import hashlib
        import importlib.util
        import platform
        from importlib import metadata
        from pathlib import Path

        versions: dict[str, str | None] = {"python": platform.python_version()}
        for package in packages:
            try:
                versions[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                versions[package] = None
        found, versions["code"] = importlib.util.find_spec("sellarec"), None
        if found is not None and found.origin is not None:
            folder, digest = Path(found.origin).parent, hashlib.sha256()
            for file in sorted(folder.rglob("*.py")):
                digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
            versions["code"] = digest.hexdigest()[:12]
        return versions

    def report(self, packages: Sequence[str], uri: str, nonce: str, name: str) -> dict[str, Any]:
        import os
        import shutil
        import socket
        from pathlib import Path

        import ray
        from pyarrow import fs

        sees = writes = None
        try:
            filesystem, path = fs.FileSystem.from_uri(uri)
            with filesystem.open_input_stream(f"{path}/driver") as stream:
                if stream.read().decode() != nonce:
                    sees = "it finds another file there than the driver wrote"
        except Exception as error:
            sees = f"{type(error).__name__}: {error}"
        if sees is None:
            try:
                with filesystem.open_output_stream(f"{path}/{name}") as stream:
                    stream.write(nonce.encode())
            except Exception as error:
                writes = f"{type(error).__name__}: {error}"

        memory, limited = free_memory()
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        if limited is not None:
            machine += f" {socket.gethostname()} {limited}"
        session = ray._private.worker._global_node.get_session_dir_path()
        return {
            "versions": self.versions(packages), "sees": sees, "writes": writes, "machine": machine, "memory": memory,
            "disk": shutil.disk_usage(os.path.realpath(session)).free,
        }  # fmt: skip

    def now(self) -> float:
        import time

        return time.time()

    def listen(self, address: str) -> int:
        """On a free port of this node's address alone."""
        import socket

        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.listening = socket.create_server((address, 0), family=family)
        return self.listening.getsockname()[1]

    def all_reduce(self, address: str, port: int, rank: int, world: int, backend: str, seconds: float) -> float:
        import datetime

        import torch
        import torch.distributed as dist

        limit = datetime.timedelta(seconds=seconds)
        taken = self.listening.detach() if rank == 0 else None
        store = dist.TCPStore(address, port, world, rank == 0, limit, master_listen_fd=taken)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
        try:
            total = torch.ones(1 << 18, device="cuda:0" if backend == "nccl" else "cpu")
            dist.all_reduce(total)
            return float(total.min())
        finally:
            dist.destroy_process_group()


def check_address(address: str) -> None:
    """Refuse what is no address of a cluster's head, or where no cluster answers, in seconds (Ray would try for minutes).

    Args:
        address: RAY_ADDRESS; "auto" is what Ray finds on this machine.

    Raises:
        UserError: the address, and what is there.
    """
    if address.startswith("ray://"):
        raise UserError(
            f"RAY_ADDRESS is {address}: a run's driver has to be on the cluster, not at the other end of Ray's client: "
            "`ray job submit` brings it there (docs/cluster.md)"
        )
    given = address
    if address == "auto":
        address = _address_here()
        given = f"auto (Ray finds {address})"
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise UserError(
            f"RAY_ADDRESS is {address}, which is no HOST:PORT of a cluster's head; the address of a dashboard goes into "
            "RAY_API_SERVER_ADDRESS, for `ray job submit`"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"no cluster answers at RAY_ADDRESS {given} ({error}): correct it, start the cluster, or unset RAY_ADDRESS to run "
            "on this machine alone"
        ) from None
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    import grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            # without a token, which isn't for whoever listens there
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=CONNECT_SECONDS)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                return  # a head that wants a token: Ray says what is wrong with the one that it is given
            raise UserError(
                f"something listens at RAY_ADDRESS {given}, but it is no head of a Ray cluster ({error.code().name}): give the "
                "head's port (6379 unless it was started with another), not the dashboard's"
            ) from None


def _address_here() -> str:
    """The head of the cluster of which this machine is a node."""
    from ray._private.services import get_ray_address_from_environment

    try:
        return get_ray_address_from_environment("auto", None)
    except ConnectionError:
        raise UserError(
            "RAY_ADDRESS is auto, but Ray finds no cluster of which this machine is a node: start one, give the HOST:PORT of a "
            "head, or unset RAY_ADDRESS to run on this machine alone"
        ) from None


def check_workspace(workspace: Place) -> None:
    """Refuse a workspace inside the folder into which Ray unpacks a job's files: each node has its own, deleted after the job.

    Raises:
        UserError: naming the folder.
    """
    if workspace.is_local and "working_dir_files" in workspace.folder.resolve().parts:
        raise UserError(
            f"the workspace {workspace} lies where Ray has unpacked this job's files, which each node has for itself and deletes "
            "after the job: give --workspace the absolute path of a folder that all nodes share"
        )


def living_nodes(also_leaving: bool = False) -> list[Node]:
    """The nodes of the connected cluster, the head first.

    Args:
        also_leaving: those too that are about to be taken away, on which nothing more is started.
    """
    import ray

    nodes, drained = [], {} if also_leaving else ray._private.state.state.get_draining_nodes()
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in drained:
            resources = node["Resources"]
            found = Node(
                node["NodeName"], node["NodeManagerAddress"], node["NodeID"],
                resources.get("CPU", 0), resources.get("GPU", 0),
            )  # fmt: skip
            nodes.append(("node:__internal_head__" not in resources, found.name, found))
    return [found for _, _, found in sorted(nodes, key=lambda entry: entry[:2])]


def preflight(
    workers: int, gpus: bool, worker_memory: int, workspace: Place, groups: int = 1, share: float = 1.0
) -> list[tuple[Node, Report]]:
    """Check the connected cluster for a run; gives what its nodes reported.

    Args:
        workers: of one group.
        gpus: whether each worker is to have a GPU.
        worker_memory: bytes that a worker takes at least.
        workspace: has to be seen and written to by all nodes.
        groups: worker groups that are to run at a time.
        share: what each worker takes of a CPU, or of a GPU.

    Raises:
        UserError: what doesn't fit, with the nodes' names.
    """
    import ray

    nodes = living_nodes()
    check_workspace(workspace)
    probes = _probes(nodes)
    try:
        found = _reports(nodes, probes, workspace)
        driver = ("the driver", Probe().versions(PACKAGES))
        check_versions([driver, *((str(node), report.versions) for node, report in found)])
        check_storage(found, workspace)
        check_clocks(found)
        check_disks(found, workspace)
        check_resources(found, workers, gpus, worker_memory, groups, share)
        _check_network(nodes, probes, gpus)
    finally:
        for probe in probes:
            ray.kill(probe)
    return found


def _probes(nodes: Sequence[Node]) -> list[Any]:
    """A probe on each node."""
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # sent by value: a node without this package, or with another version of it, shall say so rather than fail to load it
    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)
    remote = ray.remote(num_cpus=0)(Probe)
    try:
        return [
            remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote()
            for node in nodes
        ]
    finally:
        cloudpickle.unregister_pickle_by_value(here)


def _reports(nodes: Sequence[Node], probes: Sequence[Any], workspace: Place) -> list[tuple[Node, Report]]:
    nonce = secrets.token_hex(16)
    name = f".preflight-{nonce[:8]}"
    shared = workspace / name
    shared.write_text("driver", nonce)
    try:
        answers = _gather(
            nodes,
            [
                probe.report.remote(PACKAGES, shared.uri, nonce, node.id)
                for node, probe in zip(nodes, probes, strict=True)
            ],
            REPORT_SECONDS,
        )
        written = set(shared.names())
    finally:
        workspace.delete(name)
    found = []
    for node, probe, answer in zip(nodes, probes, answers, strict=True):
        if answer["sees"] is None and answer["writes"] is None and node.id not in written:
            answer["writes"] = "the driver doesn't see what it wrote"
        found.append((node, Report(**answer, clock=_clock(node, probe))))
    return found


def _gather(nodes: Sequence[Node], references: Sequence[Any], seconds: float) -> list[Any]:
    """What the nodes answer.

    Raises:
        UserError: the nodes that failed to, or took longer.
    """
    import ray

    ray.wait(list(references), num_returns=len(references), timeout=seconds)
    answers, failures = [], []
    for node, reference in zip(nodes, references, strict=True):
        try:
            answers.append(ray.get(reference, timeout=0.1))
        except ray.exceptions.GetTimeoutError:
            failures.append(f"{node} gave no answer in {seconds:.0f} s")
        except ray.exceptions.RayError as error:
            failures.append(f"{node}: {str(error).strip().splitlines()[-1]}")
    if failures:
        raise UserError(f"preflight: {'; '.join(failures)}")
    return answers


def _clock(node: Node, probe: Any) -> float:
    """Seconds by which a node's clock is ahead: 0 where that is within the time that asking takes."""
    asked = time.time()
    (there,) = _gather([node], [probe.now.remote()], REPORT_SECONDS)
    answered = time.time()
    return there - min(max(there, asked), answered)


def check_versions(found: Sequence[tuple[str, dict[str, str | None]]]) -> None:
    """Refuse a cluster whose nodes and driver have not the same Python (minor version), packages, and code of sellarec.

    Args:
        found: who, and the versions there.

    Raises:
        UserError: each version, and who has it.
    """
    lacking = [who for who, versions in found if versions["code"] is None]
    if lacking:
        raise UserError(
            f"preflight: package sellarec is not on {', '.join(lacking)}: submit the job with --working-dir, or install the "
            "package there"
        )
    series = ".".join(map(str, PYTHON))
    for name in ("python", *PACKAGES, "code"):
        by_version: dict[str, list[str]] = {}
        for who, versions in found:
            version = versions[name] or "none"
            if name == "python" and version.startswith(f"{series}."):
                version = series
            by_version.setdefault(version, []).append(who)
        if len(by_version) > 1:
            what = "the code of sellarec" if name == "code" else name
            listed = "; ".join(f"{version} on {', '.join(names)}" for version, names in by_version.items())
            raise UserError(
                f"preflight: {what} is not the same on all nodes: {listed}. Start all from one image, or {FIX}"
            )


def check_storage(found: Sequence[tuple[Node, Report]], workspace: Place) -> None:
    """Raises UserError naming the nodes that don't see the workspace, or can't write to it; for a URI, where there are several
    machines."""
    for what, failures in (
        ("is not seen by", [(node, report.sees) for node, report in found if report.sees is not None]),
        ("can't be written to by", [(node, report.writes) for node, report in found if report.writes is not None]),
    ):
        if failures:
            listed = "; ".join(f"{node}: {why}" for node, why in failures)
            raise UserError(
                f"preflight: the workspace {workspace} {what} {len(failures)} of {len(found)} nodes ({listed}): give --workspace "
                "a folder that all nodes share under the same path"
            )
    if not workspace.is_local and len({report.machine for _, report in found}) > 1:
        raise UserError(
            f"preflight: the workspace is {workspace}, of which a run reads copies that its driver makes on its own machine, "
            "where other machines don't find them: mount that storage on all nodes, and give --workspace the folder"
        )


def check_clocks(found: Sequence[tuple[Node, Report]]) -> None:
    """Raises UserError where a node's clock is more than CLOCK_SECONDS from the driver's."""
    wrong = [f"{node} is {report.clock:+.1f} s off" for node, report in found if abs(report.clock) > CLOCK_SECONDS]
    if wrong:
        raise UserError(
            f"preflight: clocks differ from the driver's by more than {CLOCK_SECONDS:g} s: {', '.join(wrong)}: set them (NTP)"
        )


def check_disks(found: Sequence[tuple[Node, Report]], workspace: Place) -> None:
    """Raises UserError where less than FREE_DISK is free behind the workspace or behind a node's session folder."""
    needed = FREE_DISK / GIB
    full = [f"{node} has {report.disk / GIB:.2f} GiB" for node, report in found if report.disk < FREE_DISK]
    if full:
        raise UserError(
            f"preflight: {needed:g} GiB of disk have to be free behind Ray's session folder: {', '.join(full)}: make room there"
        )
    free = free_bytes(workspace)
    if free is not None and free < FREE_DISK:
        raise UserError(
            f"preflight: {needed:g} GiB of disk have to be free behind the workspace {workspace}, which has "
            f"{free / GIB:.2f} GiB: make room there, or give another --workspace"
        )


def check_resources(
    found: Sequence[tuple[Node, Report]],
    workers: int,
    gpus: bool,
    worker_memory: int,
    groups: int = 1,
    share: float = 1.0,
) -> None:
    """Refuse a run that the nodes could never hold, whatever else ends on them.

    A worker takes `share` of a CPU (with `gpus` a CPU, and `share` of a GPU), and `worker_memory`; reading data takes one CPU
    more for each of `groups` groups of `workers`.

    Raises:
        UserError: what is needed, and what each node has.
    """
    shared = [report.machine for _, report in found]
    places, lines, cpu = 0, [], 1.0 if gpus else share
    for node, report in found:
        memory = max(0, report.memory) // shared.count(report.machine)
        room = min(node.places(gpus, share), memory // worker_memory)
        places += room
        has_gpus = f", {node.gpus:g} GPUs" if gpus else ""
        lines.append(f"{node} {room} ({node.cpus:g} CPUs{has_gpus}, {memory / GIB:.1f} GiB of memory free)")
    cpus = sum(node.cpus for node, _ in found)
    has_gpu = f", {share:g} GPU" if gpus else ""
    needed = groups * (workers * cpu + 1)
    if groups * workers > places or needed > cpus:
        several, fewer = (f"{groups} x ", "--workers or --concurrent") if groups > 1 else ("", "--workers")
        raise UserError(
            f"preflight: {several}{workers} workers of {cpu:g} CPU{has_gpu} and {worker_memory / GIB:.2f} GiB each (before any "
            f"table or model) and {several}1 CPU to read data need {needed:g} CPUs; the cluster has {cpus:g}, and room for "
            f"{places} workers: {'; '.join(lines)}: lower {fewer}, add nodes, or, where "
            "CPUs or GPUs lack, have the cluster's autoscaler add some for a run or a sweep (--autoscaler True)"
        )


def machines_of(found: Sequence[tuple[Node, Report]], cpu: float) -> tuple[Machine, ...]:
    """The machines of the nodes that reported, for workers that take so much of a CPU each."""
    there: dict[str, list[tuple[Node, Report]]] = {}
    for node, report in found:
        there.setdefault(report.machine, []).append((node, report))
    return tuple(
        Machine(str(nodes[0][0]), sum(int(n.cpus / cpu) for n, _ in nodes), min(r.memory for _, r in nodes))
        for nodes in there.values()
    )


def _check_network(nodes: Sequence[Node], probes: Sequence[Any], gpus: bool) -> None:
    """An all-reduce over all nodes that workers can be placed on, by the backend that they will use.

    Raises:
        UserError: the nodes that failed.
    """
    able = [i for i, node in enumerate(nodes) if node.cpus >= 1 and (node.gpus >= 1 or not gpus)]
    if len(able) < 2:
        return
    backend, first = "nccl" if gpus else "gloo", able[0]
    address = nodes[first].ip
    (port,) = _gather([nodes[first]], [probes[first].listen.remote(address)], REPORT_SECONDS)
    chosen = [nodes[i] for i in able]
    # torch's own limit ends first, as its message says more than ours
    references = [
        probes[i].all_reduce.remote(address, port, rank, len(able), backend, NETWORK_SECONDS / 2)
        for rank, i in enumerate(able)
    ]
    try:
        sums = _gather(chosen, references, NETWORK_SECONDS)
    except UserError as error:
        raise UserError(
            f"{error}: workers on different nodes can't reach each other by {backend}: open the ports between the nodes, and "
            "where they have several networks name the one to take in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        ) from None
    if sums != [len(able)] * len(able):
        raise UserError(f"preflight: an all-reduce of ones over {len(able)} nodes gave {sums} by {backend}")


def in_words(found: Sequence[tuple[Node, Report]]) -> list[str]:
    """A line per node."""
    return [
        f"{node}: {node.cpus:g} CPUs, {node.gpus:g} GPUs, {report.memory / GIB:.1f} GiB of memory and "
        f"{report.disk / GIB:.1f} GiB of disk free, clock {report.clock:+.2f} s, code {report.versions['code']}"
        for node, report in found
    ]
