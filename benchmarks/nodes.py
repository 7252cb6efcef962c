"""The same training on one node and on two: `python benchmarks/nodes.py --out FILE.json`.

jobs/train.py trains stage collab (matrix factorisation on a generated log of the case launch's kind) with two workers on real Ray
nodes of this machine (cluster/local.py):

    1 node      both workers on one node of three CPUs
    2 nodes     a node of one CPU for each worker, and a third that reads the data

By what workers noted after each step (timed_job.py): rows/s, from one step of the epoch to its last, and bytes that a worker
sent in such a step, the mean of workers (most of one), beside those that docs/collab.md counts; what Ray's own messages add is in
them. All nodes are at 127.0.0.1 and share the machine's cores: this shows whether more is sent, not what links cost.

    python benchmarks/nodes.py --quick --out FILE.json     (some minutes)
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import timed_job
from sides.launch import ROOT, flags, inputs

sys.path.append(str(Path(__file__).parent / "tables"))  # benchmarks share their helpers

from traffic import FEATURES, formula

HERE = Path(__file__).parent
CASES = {"1 node": (1, 3), "2 nodes": (3, 1)}
"""Nodes, and CPUs of each."""

WORKERS, WARM_UP = 2, 5


def cluster(command: str, state: Path, *arguments: str) -> str:
    """cluster/local.py: what it prints."""
    given = [sys.executable, ROOT / "cluster/local.py", command, "--state", state, *arguments]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(given, check=True, stdout=subprocess.PIPE, text=True, env=clean).stdout


def variables(printed: str) -> dict[str, str]:
    """What a cluster's clients have to export, by what `up` printed."""
    lines = [line.removeprefix("export ") for line in printed.splitlines() if line.startswith("export")]
    return dict(line.split("=", 1) for line in lines)


def train(work: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """Train on such nodes: what the workers noted comes to."""
    nodes, cpus = CASES[name]
    state, notes = Path(f"/tmp/sellarec-b{os.getpid()}"), folder / name
    notes.mkdir()
    printed = cluster("up", state, f"--nodes={nodes}", f"--cpus={cpus}")
    try:
        job = [sys.executable, HERE / "timed_job.py", notes, *flags(work, folder, seed=nodes), "--device=cpu"]
        subprocess.run(job, check=True, stdout=sys.stderr, env={**os.environ, **variables(printed)})
    finally:
        cluster("down", state)
    workers = list(timed_job.read(notes).values())
    used = len({notes[0]["node"] for notes in workers})
    if (len(workers), used) != (WORKERS, int(name.split()[0])):
        raise SystemExit(f"{name}: {len(workers)} workers ran on {used} nodes: was a worker lost, or placed otherwise?")
    taken = [[note for note in notes if note["event"] == "step"][WARM_UP:-1] for notes in workers]
    first, last = taken[0][0], taken[0][-1]
    steps = last["step"] - first["step"]
    sent = [(notes[-1]["sent"] - notes[0]["sent"]) / steps for notes in taken]
    return {
        "case": name,
        "steps": steps,
        "rows/s": steps * work["batch"] / (last["time"] - first["time"]),
        "sent bytes": sum(sent) / WORKERS,
        "most sent bytes": max(sent),
        "formula bytes without repeated ids": formula(
            "row-wise", FEATURES * (work["batch"] // WORKERS), work["dim"], WORKERS
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--interactions", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8_192, help="rows of the global batch")
    parser.add_argument("--quick", action="store_true", help="a small log")
    parser.add_argument("--out", type=Path, required=True)
    settings = parser.parse_args()
    if settings.quick:
        settings.users, settings.items, settings.interactions, settings.batch = 2_000, 500, 60_000, 2_048
    work = {name: getattr(settings, name) for name in ("users", "items", "interactions", "dim", "batch")}
    work |= {"workers": WORKERS, "epochs": 1}
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        inputs(work, Path(folder))
        for name in CASES:
            cases.append(train(work, Path(folder), name))
            case = cases[-1]
            print(
                f"{name}: {case['rows/s']:,.0f} rows/s; sent {case['sent bytes']:,.0f} bytes a step and worker (most "
                f"{case['most sent bytes']:,.0f}, formula {case['formula bytes without repeated ids']:,.0f} if no id came twice)",
                flush=True,
            )
            facts = machine.facts(("sellarec", "torch", "torchrec", "fbgemm-gpu", "ray"))
            settings.out.write_text(json.dumps({**work, **facts, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
