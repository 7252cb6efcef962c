"""Rows/s of a training that a node joins: `python benchmarks/growth.py --out FILE.json`.

jobs/train.py trains stage collab (SASRec on a generated log of the case launch's kind: more computing than exchange) with
`--min-workers 1` on real Ray nodes of this machine (cluster/local.py) of one CPU, one of which reads the data; each worker has a
core of its own:

    joined      two nodes, so one worker; after some steps a third joins, and the training goes on with two
    from start  all three are there at first

By what workers noted after each step (timed_job.py): rows/s with one worker, with two after a node has joined, and with two
from the start, each from one step to the last with so many. Two workers can't be faster than the machine's cores allow: what
two processes that share nothing reach together on them is in the results too (`two processes`, of one).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import machine
import timed_job
from nodes import cluster, variables
from sides.launch import flags, inputs

HERE = Path(__file__).parent
WARM_UP = 10
"""Steps of each number of workers that aren't counted."""

ALONE = 60
"""Steps after which a node joins."""


def train(work: dict[str, Any], folder: Path, joins: bool) -> dict[int, float]:
    """Rows/s by number of workers."""
    state, notes = Path(f"/tmp/sellarec-g{os.getpid()}"), folder / f"notes-{joins}"
    notes.mkdir()
    printed = cluster("up", state, f"--nodes={2 if joins else 3}", "--cpus=1")
    try:
        given = [*flags(work, folder, seed=1 + joins), "--collab.model=sasrec", "--min-workers=1", "--grow-every=2"]
        given.append("--device=cpu")
        command = [sys.executable, HERE / "timed_job.py", "--bind", notes, *given]
        job = subprocess.Popen(command, stdout=sys.stderr, env={**os.environ, **variables(printed)})
        if joins:
            while _steps(notes) < ALONE:
                if job.poll() is not None:
                    raise SystemExit("the job ended before a node had joined: its message is above")
                time.sleep(0.5)
            cluster("add", state)
        if job.wait():
            raise SystemExit("the job has failed: its message is above")
    finally:
        cluster("down", state)
    return _rates(notes, work["batch"])


def _steps(notes: Path) -> int:
    return max(
        (note["step"] for of in timed_job.read(notes).values() for note in of if note["event"] == "step"), default=0
    )


def _rates(notes: Path, batch: int) -> dict[int, float]:
    """By how many workers took each step."""
    taken: dict[int, list[float]] = {}
    for of in timed_job.read(notes).values():
        for note in of:
            if note["event"] == "step":
                taken.setdefault(note["step"], []).append(note["time"])
    found = {}
    for workers in sorted({len(times) for times in taken.values()}):
        steps = sorted(step for step, times in taken.items() if len(times) == workers)[WARM_UP:]
        if len(steps) > WARM_UP:
            found[workers] = (steps[-1] - steps[0]) * batch / (max(taken[steps[-1]]) - max(taken[steps[0]]))
    return found


def _turns(core: int) -> float:
    """Turns a second of a loop on a core."""
    os.sched_setaffinity(0, [core])
    turns, start = 0, time.monotonic()
    while time.monotonic() - start < 5:
        sum(range(10_000))
        turns += 1
    return turns / (time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--interactions", type=int, default=300_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2_048, help="rows of the global batch")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    settings = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("this takes two cores at least")
    work = {name: getattr(settings, name) for name in ("users", "items", "interactions", "dim", "batch", "epochs")}
    work["workers"] = 2
    with get_context("spawn").Pool(2) as pool:
        alone = pool.map(_turns, cores[:1])
        both = pool.map(_turns, cores[:2], chunksize=1)
    found: dict[str, Any] = {"two processes": sum(both) / alone[0]}
    with tempfile.TemporaryDirectory() as folder:
        inputs(work, Path(folder))
        joined = train(work, Path(folder), True)
        found |= {"one worker": joined[1], "two after one has joined": joined[2]}
        found["two from the start"] = train(work, Path(folder), False)[2]
    print(
        f"rows/s: {joined[1]:,.0f} with one worker, {joined[2]:,.0f} after a node has joined "
        f"({joined[2] / joined[1]:.2f} times), {found['two from the start']:,.0f} with two from the start; two processes that "
        f"share nothing do {found['two processes']:.2f} times the work of one"
    )
    facts = machine.facts(("sellarec", "torch", "torchrec", "fbgemm-gpu", "ray"))
    settings.out.write_text(json.dumps({**work, **facts, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
