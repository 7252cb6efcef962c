"""Running the main job as a user would, with a budget that takes a minute."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]

TINY: dict[str, Any] = {
    "device": "cpu",  # also where there is a GPU, but not one for each worker
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

WEIGHTS = (0.0, 0.5, 1.0)
FUSE = {**TINY["fuse"], "collab_score": True, "language_weights": list(WEIGHTS)}
SETTINGS = {**TINY, "fuse": FUSE}

LONGER = {
    "pretrain": ["--pretrain.max-steps", "400", "--pretrain.epochs", "400"],
    # with dropout: a restart draws the same masks
    "adapt": [
        "--adapt.dropout",
        "0.2",
        "--adapt.max-steps",
        "90",
        "--adapt.batch",
        "33",
        "--adapt.validate-every",
        "0.15",
    ],
    "align": ["--align.epochs", "60", "--align.validate-every", "6", "--align.patience", "99"],
    "collab": ["--collab.epochs", "80", "--collab.validate-every", "8", "--collab.patience", "99"],
    "fuse": ["--fuse.max-steps", "90", "--fuse.batch", "33", "--fuse.validate-every", "0.15"],
}
"""Long enough for a kill in the middle, with several evaluations, so that a best state is kept across it."""


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
    return to_end(start(*arguments, log=log), log, status, seconds)


def to_end(process: subprocess.Popen, log: Path, status: int = 0, seconds: float = 600) -> str:
    """Wait for a job, check its exit status, give back what it printed."""
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
    process.wait()  # a lease of a process that is not waited for counts as held
    for child in started:
        if child.is_running():
            child.kill()


def wait_for(log: Path, text: str, process: subprocess.Popen, seconds: float = 600) -> None:
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


def assert_same(stage: str, undisturbed: Path, disturbed: Path) -> None:
    """What a stage of the run left in two workspaces, bit for bit."""
    first, second = (artifact(w, "run", stage) for w in (undisturbed, disturbed))
    facts = [read_json(folder / "training.json") for folder in (first, second)]
    assert facts[0]["evaluations"] == facts[1]["evaluations"]
    assert facts[0]["kept_step"] == facts[1]["kept_step"]
    assert facts[0]["first_losses"] == facts[1]["first_losses"]
    assert facts[0].get("measured") == facts[1].get("measured")
    files = sorted(path.relative_to(first) for path in first.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(second) for path in second.rglob("*.safetensors"))
    assert files
    for file in files:
        expected, found = load_file(first / file), load_file(second / file)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{file}: {name}")


BEFORE = {
    "pretrain": "prepare",
    "adapt": "prepare,pretrain",
    "collab": "prepare",
    "align": "prepare,pretrain,adapt,collab,distil",
    "fuse": "prepare,pretrain,adapt,collab,distil,align",
}
"""Stages that a stage reads, directly or through others."""


def inputs_of(stage: str, folder: Path) -> Path:
    """A workspace in which what a stage reads stands, made in `folder` where it isn't there yet."""
    workspace = folder / "inputs"
    train("demo", write_recipe(folder), "--workspace", workspace, "--stages", BEFORE[stage], log=folder / "inputs.log")
    shutil.rmtree(workspace / "runs")
    return workspace


class Runs(dict[int, tuple[Path, str]]):
    """By number of workers: the workspace, and what the job printed. A run is made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._recipe = folder, write_recipe(folder, SETTINGS)

    def __missing__(self, workers: int) -> tuple[Path, str]:
        workspace = self._folder / f"workers-{workers}"
        arguments = ["demo", self._recipe, "--workers", str(workers), "--workspace", workspace, "--name", "run"]
        arguments += ["--profile.stages", "collab", "--profile.first", "3", "--profile.steps", "2"]
        self[workers] = (workspace, train(*arguments, log=self._folder / f"{workers}.log", seconds=1800))
        return self[workers]
