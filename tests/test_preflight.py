"""What preflight makes of nodes' reports, and of addresses; its job. On real nodes: tests/cluster/test_local.py."""

import http.server
import importlib.util
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

import sellarec.training.cluster
from sellarec import preflight
from sellarec.artifacts import Place
from sellarec.command_line import parse_preflight
from sellarec.errors import UserError
from sellarec.preflight import GIB, Machine, Node, Report

VERSIONS: dict[str, str | None] = {
    "python": "3.11.7",
    **dict.fromkeys(preflight.PACKAGES, "1.0"),
    "fbgemm-gpu": None,
    "code": "aaaa",
}
FINE = Report(versions=VERSIONS, sees=None, writes=None, machine="m", memory=16 * GIB, disk=9 * GIB, clock=0.0)
NODES = [Node(name, f"10.0.0.{i}", str(i), cpus=2, gpus=0) for i, name in enumerate(("head", "worker-1", "worker-2"))]


def cluster(**change: object) -> list[tuple[Node, Report]]:
    """Three nodes that are machines of their own, the last of which reports otherwise."""
    found = [(node, replace(FINE, machine=node.id)) for node in NODES]
    return [*found[:2], (NODES[2], replace(found[2][1], **change))]  # type: ignore[arg-type]


def refused(*words: str) -> pytest.RaisesExc[UserError]:
    return pytest.raises(UserError, match="(?s)" + ".*".join(words))


def test_versions() -> None:
    def check(**change: str | None) -> None:
        preflight.check_versions([("the driver", VERSIONS), ("head", VERSIONS), ("worker-1", {**VERSIONS, **change})])

    check()
    check(python="3.11.9")  # Ray asks for the same minor version
    cases = (("torch", "2.12"), ("torch", None), ("ray", "2.59.0"), ("fbgemm-gpu", "1.8"), ("python", "3.12.1"))
    for name, version in cases:
        with refused(f"{name} is not the same", "on the driver, head", f"{version or 'none'} on worker-1"):
            check(**{name: version})
    with refused("the code of sellarec is not the same", "aaaa on the driver, head; bbbb on worker-1"):
        check(code="bbbb")
    with refused("sellarec is not on worker-1:"):
        check(sellarec=None, code=None)


def test_storage() -> None:
    place = Place.of("/shared/runs")
    preflight.check_storage(cluster(), place)
    with refused("/shared/runs is not seen by 1 of 3 nodes .worker-2 .10.0.0.2.: No such file"):
        preflight.check_storage(cluster(sees="No such file"), place)
    with refused("s3://bucket/runs, of which", "mount that storage on all nodes"):
        preflight.check_storage(cluster(), Place("s3://bucket/runs"))
    preflight.check_storage([(node, FINE) for node in NODES], Place("s3://bucket/runs"))  # nodes of one machine
    with refused("/shared/runs can't be written to by 1 of 3 nodes .worker-2 .10.0.0.2.: Read-only"):
        preflight.check_storage(cluster(writes="Read-only"), place)


def test_clocks_and_disks(tmp_path: Path) -> None:
    place = Place.of(str(tmp_path))
    preflight.check_clocks(cluster(clock=preflight.CLOCK_SECONDS))
    for off in (61.5, -61.5):
        with refused(f"worker-2 .10.0.0.2. is .{abs(off)} s off"):
            preflight.check_clocks(cluster(clock=off))
    with refused("1 GiB of disk", "worker-2 .10.0.0.2. has 0.50 GiB"):
        preflight.check_disks(cluster(disk=GIB // 2), place)


def test_room_is_counted_by_node() -> None:
    """2 CPUs a node, one of the six for reading. GPUs, memory, and memory that two nodes of one machine share bound it too."""
    preflight.check_resources(cluster(), 5, False, GIB)
    with refused(
        "6 workers of 1 CPU and 1.00 GiB each",
        "need 7 CPUs; the cluster has 6",
        "worker-1 .10.0.0.1. 2 .2 CPUs, 16.0 GiB",
    ):
        preflight.check_resources(cluster(), 6, False, GIB)
    preflight.check_resources(cluster(memory=GIB), 5, False, GIB)
    with refused("room for 4 workers", "worker-2 .10.0.0.2. 0 .2 CPUs, 0.5 GiB"):
        preflight.check_resources(cluster(memory=GIB // 2), 5, False, GIB)
    preflight.check_resources([(node, replace(FINE, memory=6 * GIB)) for node in NODES], 5, False, GIB)
    with refused("room for 3 workers", "1 .2 CPUs, 1.7 GiB"):
        preflight.check_resources([(node, replace(FINE, memory=5 * GIB)) for node in NODES], 4, False, GIB)
    nodes = [(replace(node, gpus=i), FINE) for i, node in enumerate(NODES)]
    preflight.check_resources(nodes, 3, True, GIB)
    with refused("4 workers of 1 CPU, 1 GPU", "head .10.0.0.0. 0 .2 CPUs, 0 GPUs"):
        preflight.check_resources(nodes, 4, True, GIB)
    preflight.check_resources(nodes, 4, True, GIB, share=0.5)
    with refused("4 workers of 1 CPU, 0.6 GPU", "room for 3 workers"):  # two of .6 don't lie on one GPU
        preflight.check_resources(nodes, 4, True, GIB, share=0.6)
    # trials of a sweep: each reads its own data
    preflight.check_resources(cluster(), 2, False, GIB, groups=2)
    preflight.check_resources(cluster(), 4, False, GIB, groups=2, share=0.5)
    with refused("2 x 3 workers of 1 CPU", "2 x 1 CPU to read data need 8 CPUs", "lower --workers or --concurrent"):
        preflight.check_resources(cluster(), 3, False, GIB, groups=2)


def test_nodes_of_one_machine_share_its_memory() -> None:
    found = cluster(memory=9 * GIB)
    assert preflight.machines_of(found, 0.5) == (
        Machine("head (10.0.0.0)", 4, 16 * GIB), Machine("worker-1 (10.0.0.1)", 4, 16 * GIB),
        Machine("worker-2 (10.0.0.2)", 4, 9 * GIB),
    )  # fmt: skip
    together = [found[0], *((node, replace(report, machine="m")) for node, report in found[1:])]
    assert preflight.machines_of(together, 1.0)[1:] == (Machine("worker-1 (10.0.0.1)", 4, 9 * GIB),)


def test_a_workspace_in_the_jobs_unpacked_files() -> None:
    preflight.check_workspace(Place.of("/shared/runs"))
    with refused("/session/runtime_resources/working_dir_files/_ray_pkg_1/runs lies where Ray has unpacked"):
        preflight.check_workspace(Place.of("/session/runtime_resources/working_dir_files/_ray_pkg_1/runs"))


@pytest.fixture
def web_server() -> Iterator[int]:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def test_addresses_where_no_cluster_answers(web_server: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        free = taken.getsockname()[1]
        with refused(f"no cluster answers at RAY_ADDRESS 127.0.0.1:{free}", "refused"):
            preflight.check_address(f"127.0.0.1:{free}")
    start = time.monotonic()
    with refused(f"something listens at RAY_ADDRESS 127.0.0.1:{web_server}, but it is no head"):
        preflight.check_address(f"127.0.0.1:{web_server}")
    assert time.monotonic() - start < 3 * preflight.CONNECT_SECONDS
    for address in ("http://127.0.0.1:8265", "127.0.0.1", ":6379", "127.0.0.1:head"):
        with refused("is no HOST:PORT"):
            preflight.check_address(address)
    with refused("ray://", "ray job submit"):
        preflight.check_address("ray://127.0.0.1:10001")


@pytest.fixture
def grpc_server() -> Iterator[Callable[..., str]]:
    """Starts servers that speak gRPC, and answer calls of these names of Ray's head with a status; their addresses."""
    started: list[grpc.Server] = []

    def start(**calls: grpc.StatusCode) -> str:
        def answer(code: grpc.StatusCode) -> grpc.RpcMethodHandler:
            def call(request: bytes, context: grpc.ServicerContext) -> bytes:
                if code != grpc.StatusCode.OK:
                    context.abort(code, "no")
                return b""

            return grpc.unary_unary_rpc_method_handler(call)

        server = grpc.server(ThreadPoolExecutor(1))
        handlers = {name: answer(code) for name, code in calls.items()}
        service = grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", handlers)
        server.add_generic_rpc_handlers((service,))
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        started.append(server)
        return address

    yield start
    for server in started:
        server.stop(None).wait()


def test_what_speaks_as_a_head_does_and_is_none(
    grpc_server: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = time.monotonic()
    with refused("it is no head of a Ray cluster .UNIMPLEMENTED"):
        preflight.check_address(grpc_server())
    assert time.monotonic() - start < preflight.CONNECT_SECONDS
    preflight.check_address(grpc_server(CheckAlive=grpc.StatusCode.OK))
    preflight.check_address(grpc_server(CheckAlive=grpc.StatusCode.UNAUTHENTICATED))  # Ray says why
    monkeypatch.setattr(preflight, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent, refused("it is no head of a Ray cluster .DEADLINE_EXCEEDED"):
        preflight.check_address(f"127.0.0.1:{silent.getsockname()[1]}")


def test_a_cluster_that_ray_is_to_find(
    grpc_server: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this machine's own raylets, which belong to others, none is seen."""
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with refused("RAY_ADDRESS is auto, but Ray finds no cluster of which this machine is a node"):
        preflight.check_address("auto")
    (tmp_path / "ray").mkdir()
    current = tmp_path / "ray" / "ray_current_cluster"  # which `ray start` writes
    current.write_text(grpc_server(CheckAlive=grpc.StatusCode.OK))
    preflight.check_address("auto")
    current.write_text(grpc_server())
    with refused(f"listens at RAY_ADDRESS auto .Ray finds {current.read_text()}., but it is no head"):
        preflight.check_address("auto")


def test_the_job_asks_for_what_a_run_or_a_sweep_would_ask_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = Path(__file__).parents[1] / "jobs" / "preflight.py"
    spec = importlib.util.spec_from_file_location("preflight_job", job)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    asked: list[tuple] = []
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setattr(
        sellarec.training.cluster,
        "connect",
        lambda workers, console, place, groups, share, **named: asked.append(
            (workers, groups, share, named["device"], named["autoscaler"], named["node_timeout"])
        ),
    )
    for flags, expected in (
        ([], (2, 1, 1.0, "auto", False, 600.0)),
        (["--workers", "16", "--min-workers", "4"], (4, 1, 1.0, "auto", False, 600.0)),
        (
            ["--workers", "1", "--concurrent", "8", "--share", "0.5", "--device", "cuda"],
            (1, 8, 0.5, "cuda", False, 600.0),
        ),
        (["--autoscaler", "True", "--node-timeout", "90"], (2, 1, 1.0, "auto", True, 90.0)),
    ):
        module.main([*flags, "--workspace", str(tmp_path)])
        assert asked.pop() == expected


def test_what_the_job_refuses() -> None:
    for flags, words in (
        (["--min-workers", "3"], "min_workers is 3 and workers 2"),
        (["--share", "0"], "share is 0"),
        (["--concurrent", "0"], "concurrent is 0"),
        (["--node-timeout", "90"], "node_timeout is 90, but no nodes are waited for without autoscaler"),
        (["--min-workers", "1", "--concurrent", "2"], "min_workers is 1 and concurrent 2"),
    ):
        with refused(words):
            parse_preflight(flags)


def test_free_memory_is_what_the_control_groups_leave(tmp_path: Path) -> None:
    """Files that were read and can be given back don't count as taken; the tightest of the nested groups tells."""
    groups, own = tmp_path / "groups", tmp_path / "own"

    def group(name: str, limit: str, current: int, files: int) -> None:
        (groups / name).mkdir(parents=True, exist_ok=True)
        for file, text in (
            ("memory.max", limit),
            ("memory.current", str(current)),
            ("memory.stat", f"anon 1\ninactive_file {files}"),
        ):
            (groups / name / file).write_text(f"{text}\n")

    def free() -> tuple[int, str | None]:
        return preflight.free_memory(str(groups), str(own))

    own.write_text("0::/job/step\n")
    assert free()[1] is None, "there are no such groups"
    group("job", "max", 1 << 60, 0)
    group("job/step", "max", 1 << 60, 0)
    assert free()[1] is None, "none is limited"
    group("job", "1000000", 900_000, 700_000)
    assert free() == (800_000, str(groups / "job"))
    group("job/step", "500000", 100_000, 0)
    assert free() == (400_000, str(groups / "job/step"))
    group("job/step", "500000", 600_000, 0)
    assert free() == (0, str(groups / "job/step"))
    own.write_text("4:memory:/old\n")
    assert free()[1] is None, "version 1"
    group("", "300000", 100_000, 0)  # a container sees its own group as the root
    own.write_text("0::/\n")
    assert free() == (200_000, str(groups))
