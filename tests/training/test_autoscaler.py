"""Nodes that an autoscaler adds because a job asks for them: Ray's own, whose nodes are raylets on this machine."""

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

ROOT = Path(__file__).parents[2]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH", "SELLAREC_"))}
HEAD_TYPE = "ray.head.default"
HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""Under which that autoscaler knows the head."""

ALL = {
    **CLEAN, "PYTHONPATH": str(ROOT), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0",
}  # fmt: skip

pytestmark = [pytest.mark.ray, pytest.mark.slow]


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


def test_nodes_that_lack_are_asked_for(address: str, tmp_path: Path) -> None:
    """A run of two workers needs three nodes of a CPU. More than the autoscaler may add it doesn't, so that is waited for in
    vain, as long as was said."""
    found = preflight(address, tmp_path, "--workers", "2")
    assert found.returncode == 2 and "need 3 CPUs; the cluster has 1" in found.stderr, found.stderr
    found = preflight(address, tmp_path, "--workers", "2", "--autoscaler", "True")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "asks the autoscaler for 3 CPUs, of which 1 are there; waits 600 s at most" in found.stdout
    assert re.search(r"preflight passed in \d+ s: 3 nodes", found.stdout)
    found = preflight(address, tmp_path, "--workers", "3", "--autoscaler", "True", "--node-timeout", "12")
    assert found.returncode == 1, found.stdout
    assert "for 12 s (node_timeout) there were no nodes with 4 CPUs, of which 3 are there" in found.stderr, found.stderr
