"""The time that a lost worker costs: `python benchmarks/recovery.py --out FILE.json`.

jobs/train.py trains a stage on two workers, of which one gets SIGKILL `--steps` steps after the first checkpoint; the job goes
on by itself. Checkpoints are those of evaluations on the valid split alone, one an epoch, so as many steps are made again, and
those that are made until the signal arrives. A workspace with what the stage reads is made once, and copied for each round.
Seconds from the kill to the first new step, by when workers noted what (timed_job.py) and when the job printed that the stage
was cut off:

    noticing        until the driver knows, and has ended the other worker
    starting        until new workers have joined and built model and tables: processes, imports, process groups
    restoring       until the newest checkpoint is found, checked and loaded
    first step      until the first step is made again: the valid split and the first rows are read
    steps again     until the first step is made that had not been made: all others since the checkpoint

    collab          matrix factorisation on a generated log of the case launch's kind
    adapt           LoRA tuning of a small decoder that the demo's stages make, on the demo's data

    python benchmarks/recovery.py --quick --out FILE.json     (some minutes)
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import machine
import psutil
import timed_job
import yaml
from sides.launch import ROOT, inputs

HERE = Path(__file__).parent
PARTS = ("noticing", "starting", "restoring", "first step", "steps again")
WAIT = 900.0
"""Seconds after which a job that has not come so far has failed."""

STAGES: dict[str, dict[str, Any]] = {
    "collab": {
        "before": "prepare",
        "flags": ["--collab.dim", "64", "--collab.batch", "4096", "--collab.epochs", "3", "--collab.patience", "99"],
    },
    "adapt": {
        "before": "prepare,pretrain",
        "flags": ["--adapt.batch", "64", "--adapt.epochs", "3", "--adapt.max-steps", "100", "--adapt.patience", "99"],
    },
}
"""Of each stage, those that it reads, and its flags; one evaluation an epoch."""

DEMO = {
    "data": {"world": {"users": 200, "items": 200, "interactions": 4_000, "genres": 4}},
    "prompt": {"template": "compact", "max_tokens": 64},
    "pretrain": {"max_steps": 20, "hidden": 96},
}
"""Settings of the demo by which a model is there in a minute. What it has learnt is of no account here."""


def prepare(stage: str, settings: argparse.Namespace, folder: Path) -> list[str]:
    """Make what a stage reads, in folder/w; gives the arguments of jobs/train.py that all its runs share."""
    if stage == "collab":
        inputs(vars(settings), folder)
        recipe = ["log", f"--data={folder / 'generated/log'}"]
    else:
        (folder / "demo.yaml").write_text(yaml.safe_dump(DEMO))
        recipe = ["demo", str(folder / "demo.yaml")]
    shared = [*recipe, "--device=cpu", "--workers=2", "--name=run"]
    job = [
        sys.executable,
        ROOT / "jobs/train.py",
        *shared,
        f"--stages={STAGES[stage]['before']}",
        f"--workspace={folder / 'w'}",
    ]
    subprocess.run(job, check=True, stdout=sys.stderr)
    shutil.rmtree(folder / "w/runs")
    return shared


def end(job: subprocess.Popen) -> None:
    """End a job and all that it started, where it still runs."""
    if job.poll() is None:
        started = psutil.Process(job.pid).children(recursive=True)
        for process in (job, *(child for child in started if child.is_running())):
            process.kill()
        job.wait()


def steps_of(notes: list[dict[str, Any]]) -> dict[int, float]:
    """When a worker had taken each step."""
    return {note["step"]: note["time"] for note in notes if note["event"] == "step"}


def time_of(event: str, notes: list[dict[str, Any]]) -> float:
    return next(note["time"] for note in notes if note["event"] == event)


def recover(stage: str, settings: argparse.Namespace, shared: list[str], folder: Path) -> dict[str, float]:
    """One round: the seconds of each part, and the steps."""
    log, notes = folder / "log", folder / "notes"
    notes.mkdir()
    command = [
        sys.executable, HERE / "timed_job.py", notes, *shared, f"--stages={stage}", f"--workspace={folder / 'w'}",
        *STAGES[stage]["flags"], f"--{stage}.checkpoint-every=9999",
    ]  # fmt: skip
    with log.open("w") as printed:
        job = subprocess.Popen(command, stdout=printed, stderr=printed)

    def wait_for(what: str, found: Any) -> Any:
        """What `found` gives once it is something."""
        deadline = time.monotonic() + WAIT
        while not (value := found()):
            if job.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{stage}: the job didn't come to {what}:\n{log.read_text()[-4000:]}")
            time.sleep(0.01)
        return value

    def second_worker() -> int | None:
        """Its process, once it has taken the stated steps after its first checkpoint."""
        for pid, worker in timed_job.read(notes).items():
            saved = next((note["step"] for note in worker if note["event"] == "saved" and note["rank"] == 1), None)
            if saved is not None and worker[-1]["step"] >= saved + settings.steps:
                return pid
        return None

    try:
        lost = wait_for(f"{settings.steps} steps after a checkpoint", second_worker)
        killed, before = time.time(), set(timed_job.read(notes))
        os.kill(lost, signal.SIGKILL)
        wait_for("being taken up again", lambda: "is taken up again" in log.read_text())
        noticed = time.time()
        if job.wait(WAIT):
            raise SystemExit(f"{stage}: the job failed:\n{log.read_text()[-4000:]}")
    finally:
        end(job)
    found = timed_job.read(notes)
    done = max(max(steps_of(worker)) for pid, worker in found.items() if pid in before)
    again = next(worker for pid, worker in found.items() if pid not in before and worker[0]["rank"] == 0)
    checkpoint = next(note["step"] for note in again if note["event"] == "restored")
    taken = steps_of(again)
    times = [
        killed,
        noticed,
        time_of("restoring", again),
        time_of("restored", again),
        taken[checkpoint + 1],
        taken[done + 1],
    ]
    parts = dict(zip(PARTS, (later - earlier for earlier, later in pairwise(times)), strict=True))
    return {**parts, "all": times[-1] - killed, "steps made again": done - checkpoint, "steps when killed": done}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--users", type=int, default=100_000, help="of the log of collab")
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--interactions", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=20, help="steps between the first checkpoint and the kill")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of small logs")
    parser.add_argument("--out", type=Path, required=True)
    settings = parser.parse_args()
    if settings.quick:
        settings.users, settings.items, settings.interactions = 2_000, 500, 100_000
        settings.steps, settings.rounds = 10, 1
    print("  ".join(f"{name:>16}" for name in ("stage", *PARTS, "all", "steps made again")), flush=True)
    cases = []
    for stage in settings.stages:
        with tempfile.TemporaryDirectory() as folder:
            shared, rounds = prepare(stage, settings, Path(folder)), []
            for number in range(settings.rounds):
                (own := Path(folder, str(number))).mkdir()
                shutil.copytree(Path(folder, "w"), own / "w")
                rounds.append(recover(stage, settings, shared, own))
        middle = {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}
        lowest, highest = (of(found["all"] for found in rounds) for of in (min, max))
        cases.append({"stage": stage, "median": middle, "lowest, highest of all": [lowest, highest], "rounds": rounds})
        numbers = (*(f"{middle[name]:.2f} s" for name in (*PARTS, "all")), f"{middle['steps made again']:,.0f}")
        print("  ".join(f"{text:>16}" for text in (stage, *numbers)), flush=True)
        facts = {name: getattr(settings, name) for name in ("users", "items", "interactions", "steps")}
        packages = ("sellarec", "torch", "torchrec", "ray", "transformers", "peft")
        result = {**facts, "flags": STAGES, **machine.facts(packages), "cases": cases}
        settings.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
