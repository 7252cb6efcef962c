"""Checkpoints that are cut off or damaged, and storage that fails for a while: real files, processes and file systems."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import checkpoint_cases
import numpy as np
import pytest

from sellarec.training.table import SavedTable

pytestmark = pytest.mark.distributed


def cut(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def saved(gloo, tmp_path_factory) -> Path:
    """Checkpoints of two workers: of step 3, the best one, and of steps 5 and 6."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = gloo.call(2, checkpoint_cases.save, folder, [(1, 1), (2, 1), (3, 3), (5, 3), (6, 3)])
    assert found == [{"told": [], "failed": None}] * 2
    return folder


def test_kept_are_the_newest_the_one_before_and_their_best(saved):
    assert names(saved) == [f"step-{step:09d}" for step in (3, 5, 6)]
    assert names(saved / "step-000000006") == [".metadata", "__0_0.distcp", "__1_0.distcp", "checkpoint.json"]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_newest_is_loaded_on_any_number_of_workers(gloo, saved, workers):
    for found in gloo.call(workers, checkpoint_cases.load, saved):
        assert found == {"position": {"step": 6, "best_step": 3}, "told": [], "same": True}


@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        ("__1_0.distcp", cut, "is damaged (__1_0.distcp has"),
        (".metadata", cut, "is damaged (.metadata has"),
        ("__0_0.distcp", zero, "is damaged (__0_0.distcp has other content than was written)"),
        ("__0_0.distcp", Path.unlink, "is damaged (__0_0.distcp is missing)"),
        ("checkpoint.json", cut, "was cut off while it was written"),
        ("checkpoint.json", Path.unlink, "was cut off while it was written"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_left_out_with_a_word(gloo, saved, tmp_path, file, damage, told):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    damage(folder / "step-000000006" / file)
    first, second = gloo.call(2, checkpoint_cases.load, folder)
    for found in (first, second):
        assert found["position"] == {"step": 5, "best_step": 3} and found["same"]
    (line,) = first["told"]
    assert line.startswith(f"the checkpoint of step 6 {told}") and line.endswith("it is left out")
    assert second["told"] == []
    # it goes on from there, past the one that was left out, whose files are written again
    assert gloo.call(2, checkpoint_cases.save, folder, [(6, 3)])[0]["failed"] is None
    for found in gloo.call(3, checkpoint_cases.load, folder):
        assert found["position"] == {"step": 6, "best_step": 3} and found["same"] and found["told"] == []


def test_a_best_state_that_is_damaged_takes_those_that_name_it_with_it(gloo, saved, tmp_path):
    """At the end it is the best state that is kept: the one that names it can't be gone on from. Nothing is lost silently."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    cut(folder / "step-000000003" / "__0_0.distcp")
    for found in gloo.call(2, checkpoint_cases.load, folder):
        assert "no checkpoint in" in found["failed"] and "delete the folder to begin the stage again" in found["failed"]
    told = gloo.call(2, checkpoint_cases.load, folder)[0]["told"]
    assert [line.split(" is damaged")[0] for line in told] == [f"the checkpoint of step {step}" for step in (6, 5, 3)]
    assert "its best state, of step 3: __0_0.distcp has" in told[0]


def test_one_that_was_cut_off_alone_is_none(gloo, saved, tmp_path):
    shutil.copytree(saved / "step-000000006", tmp_path / "step-000000006")
    (tmp_path / "step-000000006" / "checkpoint.json").unlink()
    found = gloo.call(2, checkpoint_cases.load, tmp_path)[0]
    assert found["position"] is None and "was cut off" in found["told"][0]


def test_a_process_that_is_killed_while_it_writes_leaves_the_one_before(gloo, tmp_path):
    """Real SIGKILLs in the middle of a file of 64 MB."""
    command = [sys.executable, checkpoint_cases.__file__, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None and process.stdout.readline() == "1\n"
        unfinished = tmp_path / "step-000000002"
        deadline = time.monotonic() + 60
        while not (unfinished / "__0_0.distcp").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not (unfinished / "checkpoint.json").exists()
    assert gloo.call(1, checkpoint_cases.newest, tmp_path) == [
        ({"step": 1, "best_step": 0}, ["the checkpoint of step 2 was cut off while it was written: it is left out"])
    ]


def swapped(folder: Path, seconds: float) -> threading.Thread:
    """For so long a file is in the place of a folder."""
    away = folder.with_name("away")
    folder.rename(away)
    folder.touch()

    def bring_back() -> None:
        time.sleep(seconds)
        folder.unlink()
        away.rename(folder)

    thread = threading.Thread(target=bring_back)
    thread.start()
    return thread


def test_storage_that_comes_back_loses_nothing(gloo, saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    gloo.call(2, checkpoint_cases.load, folder)
    thread = swapped(folder, 1.5)
    first, second = gloo.call(2, checkpoint_cases.save, folder, [(7, 3)], 30)
    thread.join()
    assert first["failed"] is None and second["told"] == []
    assert "failed (worker 0: NotADirectoryError: [Errno 20]" in first["told"][0] and str(folder) in first["told"][0]
    assert first["told"][0].endswith("tries again in 1 s") and "s after it had failed" in first["told"][-1]
    for found in gloo.call(2, checkpoint_cases.load, folder):
        assert found["position"] == {"step": 7, "best_step": 3} and found["same"]


@pytest.mark.parametrize(
    ("act", "arguments", "step"), [(checkpoint_cases.load, [], 6), (checkpoint_cases.save, [[(7, 3)]], 7)]
)
def test_an_artifact_that_is_out_of_sight_is_waited_for(gloo, saved, tmp_path, act, arguments, step):
    """Not taken for one without checkpoints, nor made anew in another place."""
    folder, away = tmp_path / "artifact" / "checkpoints", tmp_path / "away"
    shutil.copytree(saved, folder)
    folder.parent.rename(away)
    timer = threading.Timer(1.5, away.rename, [folder.parent])
    timer.start()
    first, second = gloo.call(2, act, folder, *arguments, 30)
    timer.join()
    assert (
        "FileNotFoundError: [Errno 2] its storage is away" in first["told"][0]
        and str(folder.parent) in first["told"][0]
    )
    assert "s after it had failed" in first["told"][-1] and second["told"] == []
    for found in gloo.call(2, checkpoint_cases.load, folder):
        assert found["position"] == {"step": step, "best_step": 3} and found["same"]


def test_later_checkpoints_outlive_a_run_that_began_before_them(gloo, saved, tmp_path):
    """What was not to be read when the run began may be whole."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    (folder / "step-000000006" / "checkpoint.json").rename(tmp_path / "kept")
    (folder / "step-000000005" / "checkpoint.json").unlink()
    assert gloo.call(2, checkpoint_cases.save, folder, [(4, 3)])[0]["failed"] is None
    (tmp_path / "kept").rename(folder / "step-000000006" / "checkpoint.json")
    for found in gloo.call(2, checkpoint_cases.load, folder):
        assert found["position"] == {"step": 6, "best_step": 3} and found["same"]
    # and it goes as it has been passed
    assert gloo.call(2, checkpoint_cases.save, folder, [(7, 3), (8, 3)])[0]["failed"] is None
    assert names(folder) == [f"step-{step:09d}" for step in (3, 7, 8)]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A file system with room for little more than a checkpoint or two, and what makes it larger."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "small", folder]).returncode:
        pytest.skip("a file system of its own takes root")

    def enlarge() -> None:
        subprocess.run(["mount", "-o", "remount,size=8m", folder], check=True)

    yield folder, enlarge
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_told_and_waited_for(gloo, full_disk):
    """Checkpoints until nothing more fits; then a failure that names the cause; with room made in time none."""
    folder, enlarge = full_disk
    failed = gloo.call(2, checkpoint_cases.save, folder / "checkpoints", [(step, 0) for step in range(1, 9)], 1)[0]
    assert "No space left on device" in failed["failed"] and "storage_timeout" in failed["failed"], failed
    whole = gloo.call(2, checkpoint_cases.load, folder / "checkpoints")[0]
    assert whole["position"]["step"] >= 1 and whole["same"]
    timer = threading.Timer(1.5, enlarge)
    timer.start()
    step = whole["position"]["step"] + 1
    more = [(step + further, 0) for further in range(3)]
    found = gloo.call(2, checkpoint_cases.save, folder / "checkpoints", more, 30)[0]
    timer.join()
    assert found["failed"] is None and any("No space left on device" in line for line in found["told"])
    loaded = gloo.call(2, checkpoint_cases.load, folder / "checkpoints")[0]
    assert loaded["position"]["step"] == step + 2 and loaded["same"]


def test_an_artifact_is_written_once_storage_is_back(gloo, tmp_path):
    folder = tmp_path / "artifact"
    folder.mkdir()
    thread = swapped(folder, 1.5)
    first, second = gloo.call(2, checkpoint_cases.export, folder, 30)
    thread.join()
    assert "writing the artifact" in first["told"][0] and "tries again in 1 s" in first["told"][0]
    rows = SavedTable(folder / "tables", "row").read(0, checkpoint_cases.ROWS)
    np.testing.assert_array_equal(rows, first["rows"])
    np.testing.assert_array_equal(rows, second["rows"])
