"""Real nodes on this machine, jobs submitted to them, and what preflight says of a node that is not like the others."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import main_job
import psutil
import pyarrow.parquet as pq
import pytest
from cluster_jobs import CLEAN, ROOT, exported, local


def processes_of(state: Path) -> list[psutil.Process]:
    """What runs with this cluster's folder in its environment or its arguments."""
    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join([*process.cmdline(), process.environ().get("RAY_TMPDIR", "")])
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # ended meanwhile, or not this user's
            continue
        if f"{state}/" in words and process.pid != os.getpid():
            found.append(process)
    return found


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a short path, as Ray's sockets lie below it; whatever runs there ends with the tests."""
    folder = Path(f"/tmp/sellarec-{os.getpid()}")
    try:
        yield folder
    finally:
        if (folder / "cluster.json").exists():
            local("down", folder)


@pytest.fixture(scope="module")
def variables(state: Path) -> dict[str, str]:
    """A head and two workers of 2 CPUs each, and the variables of their clients."""
    return exported(local("up", state, "--nodes", "3", "--cpus", "2", "--network", "loopback"))


PREFLIGHT_SECONDS = 60
"""On two cores that are busy otherwise too: processes of three nodes, and torch in them, start at once."""


def preflight_seconds(printed: str) -> int:
    return int(printed.partition("preflight passed in ")[2].partition(" s:")[0])


Submit = Callable[..., tuple[int, str]]


@pytest.fixture
def submit(variables: dict[str, str]) -> Submit:
    """`ray job submit` of the project's root: exit status, and what it and the job printed."""

    def call(*entrypoint: str | Path) -> tuple[int, str]:
        command = [Path(sys.executable).parent / "ray", "job", "submit", "--working-dir", ".", "--runtime-env"]
        command += ["cluster/runtime_env.yaml", "--", *entrypoint]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env={**CLEAN, **variables}, timeout=600
        )
        return done.returncode, done.stdout + done.stderr

    return call


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_is_submitted_and_spreads_over_the_nodes(
    submit: Submit, variables: dict[str, str], state: Path, tmp_path: Path
) -> None:
    """All stages, by three workers, of which nodes of 2 CPUs hold two at most. Preflight comes first; the same command goes on
    from what stands.
    """
    command = ["python", "jobs/train.py", main_job.write_recipe(tmp_path), "--name", "one"]
    command += ["--workers", "3", "--workspace", tmp_path / "w"]
    status, printed = submit(*command)
    assert status == 0, printed
    assert printed.index("preflight passed") < printed.index("run one: stages") < printed.index("prepare   done")
    assert preflight_seconds(printed) <= PREFLIGHT_SECONDS
    assert f"  Ray dashboard: {variables['RAY_API_SERVER_ADDRESS']}\n" in printed
    for name in ("head", "worker-1", "worker-2"):
        assert f"  {name} (127.0.0.1): 2 CPUs" in printed
    assert {record["model"] for record in main_job.read_json(tmp_path / "w/runs/one/results.json")} >= {
        "collab",
        "sella-rec",
    }
    assert [
        path.name for path in (tmp_path / "w").iterdir() if path.name.startswith(".")
    ] == []  # preflight's folder is gone
    status, printed = submit(*command)
    assert status == 0 and printed.count("stands already") == 8, printed
    assert "head       127.0.0.1       2 CPUs  raylet" in local("status", state)


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_is_submitted(submit: Submit, tmp_path: Path) -> None:
    """Two trials at a time, of two workers each, which with the CPU to read data take all six CPUs; one more is refused."""
    (tmp_path / "space.yaml").write_text("collab.l2: {choice: [0.01, 0.1, 0.2]}\n")
    command = ["python", "jobs/tune.py", main_job.write_recipe(tmp_path), "--space", tmp_path / "space.yaml"]
    command += ["--stage", "collab", "--search", "random", "--trials", "3", "--collab.epochs", "2"]
    command += ["--workers", "2", "--workspace", tmp_path / "w", "--name", "sweep"]
    status, printed = submit(*command, "--concurrent", "2")
    assert status == 0, printed
    rows = pq.read_table(tmp_path / "w/runs/sweep/trials.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["finished"] * 3
    for row in rows:
        assert main_job.read_json(tmp_path / "w/artifacts" / row["artifact"] / "training.json")["workers"] == 2
    status, printed = submit(*command, "--concurrent", "3", "--name", "larger")
    assert status != 0 and "need 9 CPUs; the cluster has 6" in printed and "trial 1/3" not in printed


@pytest.mark.ray
@pytest.mark.slow
def test_a_stage_that_fails_is_the_jobs_failure(submit: Submit, tmp_path: Path) -> None:
    """A loss that is not finite, found by the workers: the job has failed, and says why."""
    recipe = main_job.write_recipe(tmp_path)
    flags = ["--stages", "prepare,collab", "--collab.table-learning-rate", "1e38", "--collab.table-optimizer", "sgd"]
    status, printed = submit("python", "jobs/train.py", recipe, *flags, "--name", "one", "--workspace", tmp_path / "w")
    assert status == 1 and "error: " in printed and "finite" in printed, printed


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_that_is_stopped_has_time_for_a_checkpoint(variables: dict[str, str], tmp_path: Path) -> None:
    """`ray job stop` sends SIGTERM, and waits longer than the 3 s that are Ray's own default."""
    (tmp_path / "job.py").write_text(
        "import signal, sys, time\n"
        "def stop(number, frame):\n"
        "    time.sleep(6)\n"
        f"    open('{tmp_path}/left', 'w').close()\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"open('{tmp_path}/runs', 'w').close()\n"
        "time.sleep(300)\n"
    )
    ray, environment = Path(sys.executable).parent / "ray", {**CLEAN, **variables}
    submit = [ray, "job", "submit", "--no-wait", "--submission-id", "stopped", "--", "python", tmp_path / "job.py"]
    subprocess.run(submit, check=True, env=environment, capture_output=True, timeout=300)
    deadline = time.monotonic() + 120
    while not (tmp_path / "runs").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    subprocess.run([ray, "job", "stop", "stopped"], check=True, env=environment, capture_output=True, timeout=120)
    assert (tmp_path / "left").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_jobs_that_are_refused(submit: Submit, tmp_path: Path) -> None:
    """Non-zero, one line, and no stage was begun: a run too large for the nodes, a workspace that only the job has."""
    for flags, words in (
        (
            ["--workers", "9", "--workspace", tmp_path / "w"],
            ("need 10 CPUs; the cluster has 6", "worker-2 (127.0.0.1) 2 (2 CPUs"),
        ),
        ([], ("lies where Ray has unpacked", "--workspace")),
    ):
        status, printed = submit("python", "jobs/train.py", "demo", *flags)
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert status != 0 and len(set(errors)) == 1, printed  # Ray shows it a second time when the job has ended
        assert all(word in errors[0] for word in words) and "prepare   done" not in printed


@pytest.mark.ray
@pytest.mark.slow
def test_without_the_token_nobody_gets_in(variables: dict[str, str], tmp_path: Path) -> None:
    ray = Path(sys.executable).parent / "ray"
    for name, mode, status in (("with", "token", 0), ("without", "disabled", 1)):
        environment = {**CLEAN, **variables, "RAY_AUTH_MODE": mode}
        done = subprocess.run([ray, "job", "list"], capture_output=True, text=True, env=environment)
        assert (done.returncode != 0) == (status != 0), f"{name} the token: {done.stdout}{done.stderr}"
    check = [sys.executable, ROOT / "jobs" / "preflight.py", "--workspace", tmp_path]
    environment = {**CLEAN, **variables, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(check, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 2 and "can't be joined" in done.stderr, done.stdout + done.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_all_that_listens_is_on_loopback(variables: dict[str, str], state: Path) -> None:
    found = [c for p in processes_of(state) for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert len(found) >= 7  # two of each raylet, one of the head's GCS
    assert {c.laddr.ip.removeprefix("::ffff:") for c in found} == {"127.0.0.1"}


ODD = """
import json, sys
from ray._private.node import Node
from ray._private.parameter import RayParams
address, folder, change = *sys.argv[1:3], json.loads(sys.argv[3])
params = RayParams(
    gcs_address=address, redis_address=address, node_ip_address="127.0.0.1", node_name="odd", num_cpus=1, num_gpus=0,
    object_store_memory=100 << 20, min_worker_port=0, max_worker_port=0, node_manager_port=0, include_log_monitor=False,
    dashboard_agent_listen_port=None, env_vars=change, temp_dir=folder,
)
Node(params, head=False, shutdown_at_exit=True, spawn_reaper=True)
print("up", flush=True)
sys.stdin.read()
"""


HIDES = """
import sys
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, *given): return None if name == "sellarec" else self.finder.find_spec(name, *given)
sys.meta_path[:] = map(Without, sys.meta_path)
"""
"""sitecustomize.py of a node that lacks the package."""

MOUNTS = {
    "storage": 'mount -t tmpfs none "$WORKSPACE"',
    "read-only storage": 'mount --bind "$WORKSPACE" "$WORKSPACE" && mount -o remount,bind,ro "$WORKSPACE"',
    "disk": 'mkdir -p "$TEMP" && mount -t tmpfs -o size=500m none "$TEMP"',
}
"""What a node sees that no other does."""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("package", ["torchrec is not the same on all nodes: ", "; 1.7.0 on odd (127.0.0.1)"]),
        ("code", ["package sellarec is not on odd (127.0.0.1): submit the job with --working-dir"]),
        ("storage", ["/w is not seen by 1 of 4 nodes (odd (127.0.0.1): FileNotFoundError"]),
        ("read-only storage", ["/w can't be written to by 1 of 4 nodes (odd (127.0.0.1): OSError", "Read-only"]),
        ("disk", ["1 GiB of disk have to be free behind Ray's session folder: odd (127.0.0.1) has 0.4"]),
        ("network", ["odd (127.0.0.1): ", "none0", "can't reach each other by gloo"]),
    ],
)
def test_a_node_that_is_not_like_the_others_is_named(
    what: str, expected: list[str], variables: dict[str, str], state: Path, tmp_path: Path
) -> None:
    """One more node joins, with another torchrec installed, without the package, with a network interface that isn't there, or
    with a file system of its own as the workspace or as its session folder."""
    workspace, temp, site = tmp_path / "w", state / "ray" / what.replace(" ", "-"), tmp_path / "site"
    workspace.mkdir()
    site.mkdir()
    change: dict[str, str] = {}
    command: list[str | Path] = [sys.executable, "-c", ODD, variables["RAY_ADDRESS"], temp]
    if what == "package":
        folder = site / "torchrec-1.7.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: torchrec\nVersion: 1.7.0\n")
        change["PYTHONPATH"] = f"{site}:{ROOT}"
    elif what == "code":
        (site / "sitecustomize.py").write_text(HIDES)
        change["PYTHONPATH"] = str(site)
    elif what == "network":
        change["GLOO_SOCKET_IFNAME"] = "none0"
    else:
        if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
            pytest.skip("a mount of its own takes root")
        command = ["unshare", "--mount", "sh", "-c", f'{MOUNTS[what]} && exec "$@"', "sh", *command]
    command.append(json.dumps(change))
    environment = {**CLEAN, **variables, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(state / "ray")}
    environment |= {"WORKSPACE": str(workspace), "TEMP": str(temp)}  # for MOUNTS
    odd = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        assert odd.stdout is not None and odd.stdout.readline() == "up\n"
        check = [sys.executable, ROOT / "jobs" / "preflight.py", "--workers", "3", "--workspace", workspace]
        done = subprocess.run(check, capture_output=True, text=True, env=environment)
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.count("error: ") == 1
        for word in expected:
            assert word in done.stderr, done.stderr
    finally:
        odd.terminate()
        odd.wait(60)
        main_job.end(odd)


@pytest.mark.ray
@pytest.mark.slow
def test_a_second_cluster_in_the_same_place_is_refused(variables: dict[str, str], state: Path) -> None:
    assert "a cluster is up already" in local("up", state, status=2)


def test_what_up_and_down_refuse(tmp_path: Path) -> None:
    """Nothing is started, nothing is left."""
    folder = Path(f"/tmp/sellarec-none-{os.getpid()}")
    assert "no cluster is up in" in local("down", folder, status=2)
    assert "no cluster is up in" in local("status", folder, status=2)
    assert "--nodes is 0: at least 1" in local("up", folder, "--nodes", "0", status=2)
    assert "characters long" in local("up", folder / "a-path-that-is-much-too-long-for-a-socket", status=2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        assert f"--dashboard-port {port} is in use" in local(
            "up", folder, "--dashboard-port", port, "--network", "loopback", status=2
        )
    assert not folder.exists()


@pytest.mark.ray
@pytest.mark.slow
def test_down_leaves_nothing(variables: dict[str, str], state: Path) -> None:
    """Runs last: other tests need the cluster."""
    assert len(processes_of(state)) > 6
    start = time.monotonic()
    local("down", state)
    assert processes_of(state) == [] and not state.exists()
    assert time.monotonic() - start < 60


@pytest.mark.ray
@pytest.mark.slow
def test_nodes_in_network_namespaces_have_addresses_of_their_own(tmp_path: Path) -> None:
    """Two workers train, each on a node of its own, as none has CPUs for two."""
    folder = Path(f"/tmp/sellarec-ns-{os.getpid()}")
    if os.geteuid() != 0 or subprocess.run(["unshare", "--net", "ip", "link"], capture_output=True).returncode != 0:
        pytest.skip("network namespaces take root and iproute2")
    printed = local("up", folder, "--nodes", "3", "--cpus", "1", "--network", "namespaces")
    try:
        command = [Path(sys.executable).parent / "ray", "job", "submit", "--working-dir", ROOT, "--runtime-env"]
        command += [
            ROOT / "cluster" / "runtime_env.yaml",
            "--",
            "python",
            "jobs/train.py",
            main_job.write_recipe(tmp_path),
        ]
        command += ["--name", "one", "--stages", "prepare,collab", "--workers", "2", "--workspace", tmp_path / "w"]
        done = subprocess.run(command, capture_output=True, text=True, env={**CLEAN, **exported(printed)}, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        facts = json.loads((folder / "cluster.json").read_text())
        assert len({node["ip"] for node in facts["nodes"]}) == 3
        for node in facts["nodes"]:
            assert f"{node['name']} ({node['ip']}): 1 CPUs" in done.stdout
        assert preflight_seconds(done.stdout) <= PREFLIGHT_SECONDS
        training = main_job.read_json(main_job.artifact(tmp_path / "w", "one", "collab") / "training.json")
        assert training["workers"] == 2 and training["steps"] > 0
    finally:
        local("down", folder)
    namespaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not any(node["namespace"] in namespaces for node in facts["nodes"])
    assert processes_of(folder) == []
