"""Several real Ray nodes on this machine: a head and workers, each a raylet of its own.

python cluster/local.py up --nodes 3     starts them (the head is one of the nodes) and prints what clients have to export
python cluster/local.py add              one node more, while jobs run
python cluster/local.py status           the nodes, and whether they are alive
python cluster/local.py down             ends what `up` started, and nothing else

All nodes are at 127.0.0.1, on ports of their own. With --network namespaces (root) each has a network namespace and an IP
address of its own, on a bridge that leads nowhere else.
"""

import argparse
import contextlib
import ctypes
import ipaddress
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from sellarec.environment import check_environment
from sellarec.errors import UserError, exit_status

START_SECONDS = 180
"""A cluster that isn't up after so long is taken down again."""

GRACE_SECONDS = 15
"""What has not ended so long after SIGTERM gets SIGKILL."""

LONGEST_STATE = 30
"""Characters of the state folder's path: Ray puts sockets below it, whose paths the system limits to 107."""

JOB_STOP_SECONDS = 120
"""What `ray job stop` waits between SIGTERM and SIGKILL: a stage that trains ends its step and leaves a checkpoint."""

STORE_MIB = 256
"""Object store of each node."""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    default = Path(f"/tmp/sellarec-cluster-{os.getuid()}")
    parsers = {}
    for name, aliases, text in (
        ("up", ["start"], "start the nodes"),
        ("add", [], "start one node more"),
        ("status", [], "show the nodes"),
        ("down", ["stop"], "end the nodes"),
    ):
        parsers[name] = commands.add_parser(name, aliases=aliases, help=text)
        parsers[name].add_argument("--state", type=Path, default=default, help=f"folder of this cluster ({default})")
    up_parser = parsers["up"]
    up_parser.add_argument("--nodes", type=int, default=3, help="nodes, the head included (3)")
    up_parser.add_argument(
        "--cpus", type=int, default=2, help="CPUs that each node advertises, whatever the machine has (2)"
    )
    up_parser.add_argument("--port", type=int, help="port of the head (default: a free one)")
    up_parser.add_argument(
        "--dashboard-port", type=int, help="port of the dashboard and its jobs API (default: a free one)"
    )
    up_parser.add_argument(
        "--network",
        choices=("loopback", "namespaces"),
        default="loopback",
        help="what nodes have for themselves: ports of 127.0.0.1, or (as root) network namespaces and addresses (loopback)",
    )
    given = parser.parse_args(arguments)
    state = given.state.absolute()
    if given.command in ("up", "start"):
        check_environment()
        up(state, given.nodes, given.cpus, given.port, given.dashboard_port, given.network)
    elif given.command == "add":
        add(state)
    elif given.command == "status":
        status(state)
    else:
        down(state)


def up(
    state: Path,
    nodes: int,
    cpus: int,
    port: int | None = None,
    dashboard_port: int | None = None,
    network: str = "loopback",
) -> None:
    """Start the nodes and print `address: ...` and one `export ...` line per variable that a client needs.

    Raises:
        UserError: a cluster that is up, a port in use, a state folder that can't be used, nodes that didn't start.
    """
    for name, number in (("--nodes", nodes), ("--cpus", cpus)):
        if number < 1:
            raise UserError(f"{name} is {number}: at least 1")
    if len(str(state)) > LONGEST_STATE:
        raise UserError(
            f"--state {state} is {len(str(state))} characters long: give a folder of at most {LONGEST_STATE}"
        )
    if (state / "cluster.json").exists():
        if _is_running(_read(state)["keeper"]):
            raise UserError(
                f"a cluster is up already, in {state}: `python cluster/local.py down` ends it, or give another --state"
            )
        raise UserError(
            f"{state} is left from a cluster that has died: `python cluster/local.py down --state {state}` clears it"
        )
    if state.is_symlink() or (state.exists() and state.stat().st_uid != os.getuid()):
        raise UserError(f"--state {state} is a link, or another user's: give another folder")
    if state.exists() and any(state.iterdir()):
        raise UserError(f"--state {state} is not empty, and no cluster's: give another folder")
    if network == "namespaces" and not _may_make_namespaces():
        raise UserError("--network namespaces takes root and the command `ip` (iproute2): take --network loopback")
    ports = {"--port": port, "--dashboard-port": dashboard_port}
    for name, number in ports.items():
        if number is not None and network == "loopback" and not _is_free(number):
            raise UserError(f"{name} {number} is in use on this machine: give another, or none for a free one")

    state.mkdir(parents=True, exist_ok=True)
    state.chmod(0o700)
    (state / "ray").mkdir()
    token = state / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    subnet = _free_subnet() if network == "namespaces" else None
    facts: dict[str, Any] = {
        "network": network,
        "subnet": None if subnet is None else str(subnet),
        "nodes": [{"name": "head" if i == 0 else f"worker-{i}", "cpus": cpus} for i in range(nodes)],
        "port": port or _free_port(),
        "dashboard_port": dashboard_port or _free_port(),
    }
    for i, node in enumerate(facts["nodes"]):
        node |= _address(subnet, i)
    address = f"http://{facts['nodes'][0]['ip']}:{facts['dashboard_port']}"
    variables = {"RAY_API_SERVER_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    if network == "loopback":
        # where nodes have namespaces, this machine is none, and only jobs that are submitted can join
        variables["RAY_ADDRESS"] = f"127.0.0.1:{facts['port']}"
        # despite its name it works everywhere: Ray then keeps to 127.0.0.1 instead of the machine's own address
        variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    facts |= {"address": address, "variables": variables}
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")},
        **{name: value for name, value in variables.items() if not name.endswith("ADDRESS")},
        "RAY_TMPDIR": str(state / "ray"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": str(JOB_STOP_SECONDS),
        **dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo" if network == "loopback" else "eth0"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # what jobs call `python`
    }
    with open(state / "keeper.log", "w") as log:
        command = [sys.executable, __file__, "keep", str(state)]
        # a session of its own: Ctrl-C here doesn't end the nodes later
        keeper = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    facts["keeper"] = _mark(keeper.pid)
    _write(state, facts)
    try:
        if subnet is not None:
            _make_namespaces(facts)
        (state / "go").touch()
        _wait_until_up(state, keeper)
    except BaseException:
        down(state, keep_log=True)
        raise
    print(f"address: {address}")
    for name, value in variables.items():
        print(f"export {name}={value}")


def _wait_until_up(state: Path, keeper: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not (state / "up").exists():
        if keeper.poll() is not None or time.monotonic() > deadline:
            lines = (state / "keeper.log").read_text().strip().splitlines() or ["no message"]
            what = "ended" if keeper.poll() is not None else f"were not up after {START_SECONDS} s"
            raise UserError(f"the nodes {what}: {lines[-1]} (all of it: {state}/keeper.log)")
        time.sleep(0.2)


def keep(state: Path) -> None:
    """Start the nodes as children of this process, and wait for SIGTERM. Runs in a process of its own, which `up` starts."""
    while not (state / "go").exists():
        time.sleep(0.05)
    facts = _read(state)
    from ray.cluster_utils import Cluster

    cluster = Cluster(shutdown_at_exit=True)

    def start(i: int, node: dict[str, Any], wait: bool = True) -> None:
        if node["namespace"] is not None:
            _enter(node["namespace"])  # this thread, and so what it starts
        ports = {"gcs_server_port": facts["port"], "dashboard_port": facts["dashboard_port"]} if i == 0 else {}
        cluster.add_node(
            node_ip_address=node["ip"],
            node_name=node["name"],
            num_cpus=node["cpus"],
            object_store_memory=STORE_MIB << 20,
            include_dashboard=i == 0,
            dashboard_host=facts["nodes"][0]["ip"],
            dashboard_agent_listen_port=_free_port(),
            # a folder each: nodes that share one unpack a job's files over each other's, also while the job runs in them
            temp_dir=None if i == 0 else str(state / "ray" / str(i)),
            wait=wait,
            **ports,
        )

    for i, node in enumerate(facts["nodes"]):
        start(i, node)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # Ray's exit hooks end the nodes
    _wait_for_jobs_api(facts["address"])
    (state / "up").touch()
    started = len(facts["nodes"])
    while True:
        time.sleep(0.2)
        for i, node in enumerate(_read(state)["nodes"][started:], started):
            started += 1
            try:
                start(i, node, wait=False)  # `add` waits for it
            except Exception:  # must not end the others; `add` tells where to look
                logging.exception("%s did not start", node["name"])


def _wait_for_jobs_api(address: str) -> None:
    """Wait until jobs can be submitted; the dashboard comes up some seconds after its node."""
    from ray.job_submission import JobSubmissionClient

    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            JobSubmissionClient(address).list_jobs()
            return
        except (ConnectionError, RuntimeError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def add(state: Path) -> None:
    """Start one node more, like the last one, and print its name.

    Raises:
        UserError: no cluster is up, or the node didn't start.
    """
    facts = _running(state)
    number = len(facts["nodes"])
    subnet = None if facts["subnet"] is None else ipaddress.IPv4Network(facts["subnet"])
    node = {"name": f"worker-{number}", "cpus": facts["nodes"][-1]["cpus"], **_address(subnet, number)}
    if subnet is not None:
        _make_namespace(node, subnet)
    facts["nodes"].append(node)
    _write(state, facts)  # the keeper starts what it finds there
    deadline = time.monotonic() + START_SECONDS
    while node["name"] not in _raylets(facts):
        if time.monotonic() > deadline:
            raise UserError(
                f"{node['name']} was not up after {START_SECONDS} s: what its keeper says is in {state}/keeper.log"
            )
        time.sleep(0.2)
    print(node["name"])


def status(state: Path) -> None:
    """Print the nodes and whether they are alive.

    Raises:
        UserError: no cluster is up.
    """
    facts = _running(state)
    raylets = _raylets(facts)
    print(f"address: {facts['address']}")
    for node in facts["nodes"]:
        pid = raylets.get(node["name"])
        print(f"{node['name']:<10} {node['ip']:<15} {node['cpus']} CPUs  {'dead' if pid is None else f'raylet {pid}'}")
    for name, value in facts["variables"].items():
        print(f"export {name}={value}")


def down(state: Path, keep_log: bool = False) -> None:
    """End the nodes and all that runs on them, by their process ids, and clear the state folder.

    Args:
        keep_log: leave keeper.log behind.

    Raises:
        UserError: there is no cluster.
    """
    if not (state / "cluster.json").exists():
        raise UserError(f"no cluster is up in {state}: `python cluster/local.py up` starts one")
    facts = _read(state)
    with contextlib.suppress(psutil.NoSuchProcess):
        if _is_running(facts["keeper"]):
            keeper = psutil.Process(facts["keeper"]["pid"])
            processes = [keeper, *keeper.children(recursive=True)]
            facts["processes"] = []
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    facts["processes"].append(_mark(process.pid))
            _write(state, facts)  # a `down` that is cut off here can be repeated
            keeper.terminate()
    # where the keeper had died before, its nodes are found by the folder that all of Ray's processes are told of
    left = [*facts.get("processes", []), *_of_session(state)]
    processes = []
    for mark in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            if _is_running(mark):
                processes.append(psutil.Process(mark["pid"]))
    _, alive = psutil.wait_procs(processes, timeout=GRACE_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=GRACE_SECONDS)
    if facts["subnet"] is not None:
        _remove_namespaces(facts)
    (state / "cluster.json").unlink(missing_ok=True)  # another `down` may have been at it too
    if keep_log:
        for name in ("ray", "token", "go", "up"):
            path = state / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    else:
        shutil.rmtree(state)


def _running(state: Path) -> dict[str, Any]:
    if not (state / "cluster.json").exists():
        raise UserError(f"no cluster is up in {state}: `python cluster/local.py up` starts one")
    facts = _read(state)
    if not _is_running(facts["keeper"]):
        raise UserError(f"the cluster in {state} has died: `python cluster/local.py down` clears what is left")
    return facts


def _raylets(facts: dict[str, Any]) -> dict[str, int]:
    """Process id of each node's raylet, by the node's name."""
    found = {}
    for child in psutil.Process(facts["keeper"]["pid"]).children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if child.name() == "raylet":
                name = next(word for word in child.cmdline() if word.startswith("--node-name="))
                found[name.partition("=")[2]] = child.pid
    return found


def _of_session(state: Path) -> list[dict[str, Any]]:
    """Processes whose environment names this cluster's own folder for Ray, as that of all its nodes and jobs does."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            if process.pid != os.getpid() and process.environ().get("RAY_TMPDIR") == str(state / "ray"):
                found.append(_mark(process.pid))
    return found


def _mark(pid: int) -> dict[str, Any]:
    """A process by its id and the time it was started at: ids are given out again."""
    return {"pid": pid, "started": psutil.Process(pid).create_time()}


def _is_running(mark: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(mark["pid"])
        return abs(process.create_time() - mark["started"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _read(state: Path) -> dict[str, Any]:
    return json.loads((state / "cluster.json").read_text())


def _write(state: Path, facts: dict[str, Any]) -> None:
    (state / "cluster.json.new").write_text(json.dumps(facts, indent=1) + "\n")
    os.replace(state / "cluster.json.new", state / "cluster.json")


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _is_free(port: int) -> bool:
    with socket.socket() as wanted:
        try:
            wanted.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _may_make_namespaces() -> bool:
    return (
        os.geteuid() == 0
        and shutil.which("ip") is not None
        and shutil.which("unshare") is not None
        and (subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0)
    )


def _free_subnet() -> ipaddress.IPv4Network:
    """A private network of 254 addresses that this machine has no address in and no route to."""
    routes = json.loads(_ip("-json", "-4", "route", "show", "table", "all"))
    taken = [ipaddress.ip_network(r["dst"]) for r in routes if r.get("dst", "default") != "default"]
    for third in range(256):
        subnet = ipaddress.IPv4Network(f"10.213.{third}.0/24")
        if not any(subnet.overlaps(other) for other in taken):
            return subnet
    raise UserError("10.213.0.0/16 is in use on this machine: take --network loopback")


def _address(subnet: ipaddress.IPv4Network | None, number: int) -> dict[str, Any]:
    """IP address and network namespace of a node, by its number."""
    if subnet is None:
        return {"ip": "127.0.0.1", "namespace": None}
    return {"ip": str(subnet[number + 2]), "namespace": f"{_link(subnet)}-{number}"}


def _link(subnet: ipaddress.IPv4Network) -> str:
    return f"sella{subnet.network_address.packed[2]}"


def _make_namespaces(facts: dict[str, Any]) -> None:
    """A bridge with this machine at .1, and a namespace per node, which has a link to the bridge and no other."""
    subnet = ipaddress.IPv4Network(facts["subnet"])
    bridge = _link(subnet)
    _ip("link", "add", bridge, "type", "bridge")
    _ip("address", "add", f"{subnet[1]}/24", "dev", bridge)
    _ip("link", "set", bridge, "up")
    for node in facts["nodes"]:
        _make_namespace(node, subnet)


def _make_namespace(node: dict[str, Any], subnet: ipaddress.IPv4Network) -> None:
    namespace = node["namespace"]
    _ip("netns", "add", namespace)
    _ip("link", "add", namespace, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _ip("link", "set", namespace, "master", _link(subnet), "up")
    _ip("-netns", namespace, "address", "add", f"{node['ip']}/24", "dev", "eth0")
    for link in ("lo", "eth0"):
        _ip("-netns", namespace, "link", "set", link, "up")


def _remove_namespaces(facts: dict[str, Any]) -> None:
    """Removes what `_make_namespaces` made, or the part of it that it came to make."""
    bridge = _link(ipaddress.IPv4Network(facts["subnet"]))
    namespaces = {found["name"] for found in json.loads(_ip("-json", "netns", "list") or "[]")}
    for node in facts["nodes"]:
        if Path("/sys/class/net", node["namespace"]).exists():  # else it goes some time after its namespace
            _ip("link", "delete", node["namespace"])
        if node["namespace"] in namespaces:
            _ip("netns", "delete", node["namespace"])
    if Path("/sys/class/net", bridge).exists():
        _ip("link", "delete", bridge)


def _enter(namespace: str) -> None:
    """Move this thread into a network namespace."""
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) != 0:
            raise OSError(ctypes.get_errno(), f"this process can't enter the network namespace {namespace}")


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"`ip {' '.join(arguments)}` failed ({done.stderr.strip()}): take --network loopback")
    return done.stdout


if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"]:
        keep(Path(sys.argv[2]))
    sys.exit(exit_status(main, sys.argv[1:]))
