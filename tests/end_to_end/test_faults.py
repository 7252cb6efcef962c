"""The grid of faults and stages: after each fault a stage comes to the result of an undisturbed run, bit for bit.

Workers that are killed or hang, and signals, are in test_recovery.py; nodes in tests/cluster/test_nodes.py.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import main_job
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STAGES = ("collab", "adapt", "pretrain", "align", "fuse")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """By stage, the workspace with what it reads, and one in which it was trained; each made when it is first asked for."""
    folder = tmp_path_factory.mktemp("undisturbed")

    @cache
    def of(stage: str) -> tuple[Path, Path]:
        inputs = main_job.inputs_of(stage, folder)
        shutil.copytree(inputs, folder / stage)
        main_job.train(*flags(stage, folder / stage), log=folder / f"{stage}.log")
        return inputs, folder / stage

    return of


def flags(stage: str, workspace: Path) -> list[str | Path]:
    recipe = main_job.write_recipe(workspace.parent)
    common = ["demo", recipe, "--name", "run", "--stages", stage, "--workspace", workspace, *main_job.LONGER[stage]]
    return [*common, f"--{stage}.checkpoint-every", "0.5"]


def checkpoints_of(workspace: Path, stage: str) -> list[Path]:
    return sorted(workspace.glob(f"artifacts/{stage}-*/checkpoints/step-*"))


def whole(workspace: Path, stage: str) -> list[Path]:
    return [folder for folder in checkpoints_of(workspace, stage) if (folder / "checkpoint.json").exists()]


def wait_for_checkpoints(number: int, workspace: Path, stage: str, job: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 600
    while len(whole(workspace, stage)) < number:
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


Fault = Callable[[str, Path, Path], None]
"""(stage, workspace, log) -> runs the stage's job to its end, through the fault."""


def kill_after(checkpoints: int, stage: str, workspace: Path, log: Path) -> None:
    """SIGKILL to the stage's whole job once it has so many whole checkpoints."""
    job = main_job.start(*flags(stage, workspace), log=log)
    try:
        wait_for_checkpoints(checkpoints, workspace, stage, job, log)
    finally:
        main_job.end(job)


def driver_killed(stage: str, workspace: Path, log: Path) -> None:
    """SIGKILL to the whole job; it is submitted again."""
    kill_after(1, stage, workspace, log)
    printed = main_job.train(*flags(stage, workspace), log=log)
    assert f"{stage:<9} goes on from its checkpoint at step" in printed


def checkpoint_damaged(stage: str, workspace: Path, log: Path) -> None:
    """The newest checkpoint of a killed job has lost the end of a file."""
    kill_after(2, stage, workspace, log)
    before, newest = whole(workspace, stage)[-2:]
    with open(next(newest.glob("__*.distcp")), "r+b") as file:
        file.truncate(100)
    printed = main_job.train(*flags(stage, workspace), log=log)
    step = int(newest.name.removeprefix("step-"))
    assert f"the checkpoint of step {step} is damaged (__" in printed
    assert f"goes on from its checkpoint at step {int(before.name.removeprefix('step-'))}/" in printed


def checkpoint_cut_off(stage: str, workspace: Path, log: Path) -> None:
    """SIGKILL to all workers while they write a checkpoint."""
    job = main_job.start(*flags(stage, workspace), log=log)
    try:
        wait_for_checkpoints(1, workspace, stage, job, log)
        workers = main_job.training_workers(job)
        deadline = time.monotonic() + 300
        while True:
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()
            standing = checkpoints_of(workspace, stage)
            if standing and not (standing[-1] / "checkpoint.json").exists():
                for worker in workers:
                    os.kill(worker.pid, signal.SIGKILL)
                break
        assert job.wait(600) == 0, log.read_text()
    finally:
        main_job.end(job)
    printed = log.read_text()
    assert "was cut off while it was written: it is left out" in printed
    assert f"{stage:<9} was cut off (worker" in printed
    assert f"{stage:<9} goes on from its checkpoint at step" in printed


def swap(folder: Path) -> Path:
    """Put a file in a folder's place: nothing can be written there."""
    away = folder.with_name("away")
    folder.rename(away)
    folder.touch()
    return away


def bring_back(folder: Path, away: Path) -> None:
    folder.unlink()
    away.rename(folder)


def storage_away(stage: str, workspace: Path, log: Path) -> None:
    """Checkpoints can't be written for some seconds."""
    job = main_job.start(*flags(stage, workspace), log=log)
    try:
        wait_for_checkpoints(1, workspace, stage, job, log)
        folder = whole(workspace, stage)[0].parent
        away = swap(folder)
        main_job.wait_for(log, "tries again in 2 s", job)
        bring_back(folder, away)
        assert job.wait(600) == 0, log.read_text()
    finally:
        main_job.end(job)
    printed = log.read_text()
    # it may be met while a checkpoint is written, or while older ones are deleted after that
    assert "writing the checkpoint of step" in printed or "deleting old checkpoints in" in printed
    assert "NotADirectoryError" in printed and str(folder) in printed
    assert "s after it had failed" in printed and "goes on from its checkpoint" not in printed


def storage_away_for_too_long(stage: str, workspace: Path, log: Path) -> None:
    """The stage fails with the cause; submitted again when storage is back, it goes on."""
    job = main_job.start(*flags(stage, workspace), "--storage-timeout", "2", log=log)
    try:
        wait_for_checkpoints(1, workspace, stage, job, log)
        folder = whole(workspace, stage)[0].parent
        away = swap(folder)
        assert job.wait(300) == 1, log.read_text()
    finally:
        main_job.end(job)
    *before, line = log.read_text().splitlines()
    assert line.startswith("error: ") and not any(other.startswith("error: ") for other in before)
    assert "and again for 2 s (storage_timeout)" in line and "NotADirectoryError" in line
    assert list(workspace.glob("runs/*/logs/*/*")), "what workers have printed"
    bring_back(folder, away)
    printed = main_job.train(*flags(stage, workspace), log=log)
    assert f"{stage:<9} goes on from its checkpoint at step" in printed


@pytest.mark.parametrize("stage", ["collab", "adapt"])
def test_workspace_away(stage: str, undisturbed: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """All that a job reads and writes is out of sight, for longer than workers take to start again; one is killed meanwhile."""
    inputs, expected = undisturbed(stage)
    workspace, away, log = tmp_path / "w", tmp_path / "away", tmp_path / "log"
    shutil.copytree(inputs, workspace)
    job = main_job.start(*flags(stage, workspace), log=log)
    try:
        wait_for_checkpoints(1, workspace, stage, job, log)
        workspace.rename(away)
        gone = time.monotonic()
        os.kill(main_job.training_workers(job)[1].pid, signal.SIGKILL)
        main_job.wait_for(log, "was cut off", job)
        again = len(log.read_text())
        while time.monotonic() < gone + 20 or "tries again in 4 s" not in log.read_text()[again:]:
            assert job.poll() is None and time.monotonic() < gone + 300, log.read_text()
            time.sleep(0.1)
        assert not workspace.exists(), "what is made there would hide it"
        away.rename(workspace)
        assert job.wait(600) == 0, log.read_text()
    finally:
        main_job.end(job)
    printed = log.read_text()[again:]
    assert f"reaching {workspace}/artifacts/{stage}-" in printed and "its storage is away" in printed
    assert f"{stage:<9} goes on from its checkpoint at step" in printed
    main_job.assert_same(stage, expected, workspace)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "fault",
    [driver_killed, checkpoint_damaged, checkpoint_cut_off, storage_away, storage_away_for_too_long],
    ids=lambda fault: fault.__name__,
)
def test_fault(fault: Fault, stage: str, undisturbed: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    inputs, expected = undisturbed(stage)
    shutil.copytree(inputs, tmp_path / "w")
    fault(stage, tmp_path / "w", tmp_path / "log")
    main_job.assert_same(stage, expected, tmp_path / "w")
