"""Nodes that an autoscaler adds because a job asks for them; Ray's own is real here, its nodes are raylets on this machine."""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sellarec.preflight import Node
from sellarec.training import autoscaler
from sellarec.training.progress import Console

ROOT = Path(__file__).parents[2]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH", "SELLAREC_"))}
HEAD_TYPE = "ray.head.default"
HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""Under which that autoscaler knows the head."""

ALL = {
    **CLEAN, "PYTHONPATH": str(ROOT), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0",
}  # fmt: skip


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a head with a CPU, whose autoscaler may add two nodes with as many."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    of_types = {name: {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0} for name in (HEAD_TYPE, "worker")}
    config = tmp_path / "autoscaler.json"
    config.write_text(
        json.dumps(
            {
                "cluster_name": "test", "max_workers": 2, "upscaling_speed": 1.0, "idle_timeout_minutes": 5, "docker": {},
                "provider": {
                    "type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}", "head_node_id": HEAD,
                    "use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True,
                },
                "auth": {}, "head_node_type": HEAD_TYPE, "file_mounts": {}, "cluster_synced_files": [],
                "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
                "initialization_commands": [], "setup_commands": [], "head_setup_commands": [],
                "worker_setup_commands": [], "head_start_ray_commands": [], "worker_start_ray_commands": [],
                "available_node_types": {
                    HEAD_TYPE: {**of_types[HEAD_TYPE], "max_workers": 0}, "worker": {**of_types["worker"], "max_workers": 2},
                },
            }
        )
    )  # fmt: skip
    environment = {
        **ALL,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "RAY_CLOUD_INSTANCE_ID": HEAD,
    }
    ray = Path(sys.executable).with_name("ray")
    command = [
        ray, "start", "--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=1", "--block",
        "--object-store-memory=200000000", f"--autoscaling-config={config}", "--include-dashboard=false",
        "--dashboard-agent-listen-port=0",
    ]  # fmt: skip
    with open(tmp_path / "head.log", "w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while "To connect to this Ray cluster" not in (tmp_path / "head.log").read_text():
            assert head.poll() is None and time.monotonic() < deadline, (tmp_path / "head.log").read_text()
            time.sleep(0.5)
        yield f"127.0.0.1:{port}"
    finally:
        # of the nodes that were added too
        started = [] if head.poll() is not None else psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        _, alive = psutil.wait_procs(started, timeout=20)
        for process in alive:
            process.kill()
        head.wait(60)


def preflight(address: str, folder: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "jobs" / "preflight.py", "--workspace", folder, "--device", "cpu", *flags]
    environment = {**ALL, "RAY_ADDRESS": address}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.ray
@pytest.mark.slow
def test_nodes_that_lack_are_asked_for(address: str, tmp_path: Path) -> None:
    """A run of two workers needs three nodes of a CPU. More than the autoscaler may add it doesn't, so that is waited for in
    vain, as long as was said."""
    found = preflight(address, tmp_path, "--workers", "2")
    assert found.returncode == 2 and "need 3 CPUs; the cluster has 1" in found.stderr, found.stderr
    found = preflight(address, tmp_path, "--workers", "2", "--autoscaler", "True")
    assert found.returncode == 0, found.stdout + found.stderr
    assert (
        "asks the autoscaler for nodes that hold 2 workers and 1 CPUs to read data (3 CPUs), where there are 1 CPUs and "
        in found.stdout
    )
    assert re.search(r"preflight passed in \d+ s: 3 nodes", found.stdout)
    found = preflight(address, tmp_path, "--workers", "3", "--autoscaler", "True", "--node-timeout", "12")
    assert found.returncode == 1, found.stdout
    assert (
        "no nodes joined in 12 s (node_timeout) that hold 3 workers and 1 CPUs to read data (4 CPUs), where there are 3 CPUs"
        in found.stderr
    ), found.stderr


def machines(*of: tuple[float, float]) -> list[Node]:
    return [Node(f"node-{i}", f"10.0.0.{i}", str(i), cpus, gpus) for i, (cpus, gpus) in enumerate(of)]


@pytest.mark.parametrize(
    ("workers", "groups", "gpus", "share", "lacks", "holds"),
    [
        (2, 1, False, 1.0, machines((2, 0)), machines((2, 0), (1, 0))),
        # shares whose sum is rounded
        (1, 5, False, 0.2, machines((5, 0)), machines((6, 0))),
        # two shares of .4 lie on a GPU, so five take three GPUs, though two are as much
        (1, 5, True, 0.4, machines((10, 2)), machines((10, 3))),
        # GPUs whose node has too few CPUs for them
        (2, 1, True, 1.0, machines((1, 2), (8, 0)), machines((1, 2), (8, 0), (1, 1))),
    ],
)
def test_nodes_are_asked_for_until_preflight_would_pass(
    workers: int, groups: int, gpus: bool, share: float, lacks: list[Node], holds: list[Node],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Asked for is what preflight counts, however a cluster's totals look."""
    nodes, asked = lacks, []

    def set_aside(bundles: list[dict[str, float]], seconds: float) -> bool:
        nonlocal nodes
        asked.append(bundles)
        nodes = holds if len(asked) == 2 else nodes
        return False

    monkeypatch.setattr(autoscaler, "living_nodes", lambda: nodes)
    monkeypatch.setattr(autoscaler, "set_aside", set_aside)
    autoscaler.wait_for_nodes(workers, groups, gpus, share, 60, Console())
    taken = {"CPU": 1, "GPU": share} if gpus else {"CPU": share}
    assert asked == 2 * [groups * [*workers * [taken], {"CPU": 1.0}]]
