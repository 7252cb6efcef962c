"""Running the main job as a user would, with a budget that takes a minute."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[2]

TINY: dict[str, Any] = {
    "data": {"world": {"users": 200, "items": 200, "interactions": 4000, "genres": 4}},
    "prompt": {"template": "compact", "max_tokens": 34},
    "pretrain": {"max_steps": 22, "hidden": 96},
    "adapt": {"max_steps": 24, "batch": 66, "validate_every": 0.25},
    "collab": {"epochs": 6},
    "align": {"epochs": 3},
    "fuse": {"max_steps": 24, "batch": 66, "validate_every": 0.25},
    "evaluate": {"replicates": 50},
}
"""A small world and few steps. The batch of 66 is no multiple of 4, so slices of some workers are padded; some histories don't
fit beside soft tokens."""


def write_recipe(folder: Path, settings: dict[str, Any] = TINY) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def start(*arguments: str | Path, log: Path) -> subprocess.Popen:
    """jobs/train.py in a process of its own; what it prints goes to `log`."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), *map(str, arguments)]
    with open(log, "w") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)


def train(*arguments: str | Path, log: Path, status: int = 0, seconds: float = 600) -> str:
    """Run jobs/train.py to its end, check its exit status, give back what it printed."""
    process = start(*arguments, log=log)
    try:
        found = process.wait(seconds)
    finally:
        end(process)
    printed = log.read_text()
    assert found == status, f"exit status {found}, not {status}:\n{printed}"
    return printed


def end(process: subprocess.Popen) -> None:
    """End a job and all that it started, where it still runs."""
    if process.poll() is not None:
        return
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in started:
        if child.is_running():
            child.kill()


def wait_for(log: Path, text: str, process: subprocess.Popen, seconds: float = 240) -> None:
    """Wait until a job has printed `text`."""
    deadline = time.monotonic() + seconds
    while text not in log.read_text():
        assert process.poll() is None, f"the job ended before it printed {text!r}:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"{text!r} was not printed in {seconds} s:\n{log.read_text()}"
        time.sleep(0.05)


def training_workers(process: subprocess.Popen) -> list[psutil.Process]:
    """The Ray Train workers of a job, of this job alone."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.is_running() and "RayTrainWorker" in " ".join(child.cmdline()):
            found.append(child)
    return found


def artifact(workspace: Path, name: str, stage: str) -> Path:
    marks = json.loads((workspace / "runs" / name / "artifacts.json").read_text())
    return workspace / "artifacts" / marks[stage]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
