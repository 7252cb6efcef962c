"""Sweeps as a user runs them: trials that are stopped, lost, or go on after a kill; what is left; the winner as a recipe."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import main_job
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from sellarec.command_line import parse, parse_sweep
from sellarec.config import to_yaml
from sellarec.errors import StageFailed
from sellarec.pipeline import run
from sellarec.run import Run
from sellarec.tuning.results import Row
from sellarec.tuning.space import with_settings
from sellarec.tuning.sweep import sweep

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SPACE = {
    "collab.table_learning_rate": {"loguniform": [0.0001, 0.5]},
    "collab.l2": {"choice": [0.01, 0.1]},
}
"""Learning rates from hopelessly small to good: asha has something to stop."""

FLAGS = ("--stage", "collab", "--trials", "4", "--workers", "1", "--collab.epochs", "9", "--collab.patience", "9")


def write_space(folder: Path, space: dict) -> Path:
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(space))
    return path


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of each Ray session that a sweep ends, the logical CPUs that are still held when all trials are over."""
    found: list[float] = []
    shutdown = ray.shutdown

    def measured() -> None:
        total = ray.cluster_resources()["CPU"]
        deadline = time.monotonic() + 20  # what is free is told with a delay
        while (free := ray.available_resources().get("CPU", 0.0)) != total and time.monotonic() < deadline:
            time.sleep(0.5)
        found.append(total - free)
        shutdown()

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "shutdown", measured)
    return found


def arguments(folder: Path, *flags: str, space: dict = SPACE) -> list[str]:
    files = [str(main_job.write_recipe(folder)), "--space", str(write_space(folder, space))]
    return ["demo", *files, "--workspace", str(folder / "w"), *FLAGS, *flags]


def table(folder: Path) -> list[dict]:
    return pq.read_table(folder / "w/runs/demo-tiny-collab/trials.parquet").to_pylist()


def test_trials_that_are_stopped_leave_no_cpu_held_and_the_winner_is_a_recipe(tmp_path: Path, held: list) -> None:
    sweep(parse_sweep(arguments(tmp_path)))
    assert held[-1] == 0
    logs = [log.read_text(errors="replace") for log in Path("/tmp/ray/session_latest/logs").glob("worker-*.out")]
    assert any("starting 1 workers" in log for log in logs), "these are where trials print"
    assert not any("was cut off" in log for log in logs), "all came to the end of a step"
    rows = table(tmp_path)
    assert len(rows) == 4 and {row["status"] for row in rows} == {"finished", "stopped"}
    for row in rows:
        finished = row["status"] == "finished"
        assert (row["artifact"] is not None) == finished
        assert len(row["evaluations"]) == 9 if finished else len(row["evaluations"]) < 9
        assert row["value"] == max(step["auc"] for step in row["evaluations"])
    artifacts = {path.parent.name for path in (tmp_path / "w/artifacts").glob("*/manifest.json")}
    stages = [name.partition("-")[0] for name in artifacts]
    assert sorted(set(stages)) == ["collab", "prepare"], "the test split was not scored, nothing else was made"
    assert {name for name in artifacts if name.startswith("collab")} == {row["artifact"] for row in rows} - {None}

    best = tmp_path / "w/runs/demo-tiny-collab/best.yaml"
    again = Run.of(parse([str(best), "--stages", "prepare,collab"]))
    run(again)
    assert again.seconds == {"prepare": None, "collab": None}, "both stood already"
    winner = max((row for row in rows if row["artifact"]), key=lambda row: row["value"])
    assert winner["artifact"] == f"collab-{again.marks['collab']}"
    assert (again.config.collab.table_learning_rate, again.config.collab.l2) == tuple(winner[name] for name in SPACE)


def test_a_trial_whose_process_is_lost_is_taken_up_again(tmp_path: Path, held: list, capsys) -> None:
    killed = threading.Event()

    def kill() -> None:
        """Kill the first trial's process when its training is under way."""
        while not list((tmp_path / "w").glob("artifacts/collab-*/checkpoints/*/checkpoint.json")):
            time.sleep(0.1)
        while not killed.is_set():
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "ray::ResourceTrainable" in " ".join(child.cmdline()) and not killed.is_set():
                        os.kill(child.pid, signal.SIGKILL)
                        killed.set()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    space = {"collab.l2": {"choice": [0.01, 0.1]}}
    flags = ("--trials", "2", "--collab.epochs", "40", "--collab.patience", "40", "--search", "random")
    sweep(parse_sweep(arguments(tmp_path, *flags, space=space)))
    assert killed.is_set() and "lost, and taken up again" in capsys.readouterr().out
    assert held[-1] == 0
    assert [row["status"] for row in table(tmp_path)] == ["finished", "finished"]


def test_trials_that_all_fail_end_the_sweep_with_their_cause(tmp_path: Path, held: list, capsys) -> None:
    """And with what their workers have printed in one place."""
    space = {"collab.table_learning_rate": {"choice": [1e30, 1e31]}}
    with pytest.raises(StageFailed, match=r"none came to its end: .*stage collab"):
        sweep(parse_sweep(arguments(tmp_path, "--trials", "2", "--collab.table-optimizer", "sgd", space=space)))
    assert held[-1] == 0
    rows = table(tmp_path)
    assert [row["status"] for row in rows] == ["failed", "failed"] and all(row["cause"] for row in rows)
    logs = tmp_path / "w/runs/demo-tiny-collab/logs"
    assert f"what workers have printed is in {logs}" in capsys.readouterr().out
    printed = [file.read_text() for file in logs.glob("*/worker-*")]
    assert sum("starting 1 workers" in text for text in printed) == 2, "one of each trial's processes"


def killed_at(text: str, folder: Path, *flags: str) -> tuple[list[str], dict[str, str]]:
    """Kill a sweep's job, driver and all, once it has printed a text; its command and environment."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, str(main_job.ROOT / "jobs/tune.py"), *arguments(folder, *flags)]
    log = folder / "first.log"
    with open(log, "w") as file:
        job = subprocess.Popen(command, cwd=main_job.ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        main_job.wait_for(log, text, job)
    finally:
        main_job.end(job)
    return command, environment


@pytest.mark.parametrize("search", ["random", "optuna", "asha"])
def test_a_sweep_goes_on_after_its_driver_was_killed(search: str, tmp_path: Path) -> None:
    """Under asha it stops the trials that a sweep stops which was not killed."""
    flags = ("--search", search)
    statuses = ["finished"] * 4
    if search == "asha":
        (tmp_path / "whole").mkdir()
        sweep(parse_sweep(arguments(tmp_path / "whole", *flags)))
        statuses = [row["status"] for row in table(tmp_path / "whole")]
        assert set(statuses) == {"finished", "stopped"}
    if search == "optuna":
        pytest.importorskip("optuna")
    reached = "trial 3/4  collab" if search == "asha" else "trial 2/4  evaluation"
    command, environment = killed_at(reached, tmp_path, *flags)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "w/artifacts").glob("collab-*/manifest.json")}
    assert before
    done = subprocess.run(command, cwd=main_job.ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the sweep goes on" in done.stdout
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "w/artifacts").glob("collab-*/manifest.json")}
    assert before.items() <= after.items(), "what was finished was not trained again"
    assert len(after) == statuses.count("finished")
    assert sorted(row["status"] for row in table(tmp_path)) == sorted(statuses)
    if search == "asha":
        of_whole, of_killed = (
            {tuple(row[name] for name in SPACE): (row["status"], row["evaluations"]) for row in table(folder)}
            for folder in (tmp_path / "whole", tmp_path)
        )
        assert of_killed == of_whole

    # and what is finished stands
    done = subprocess.run(command, cwd=main_job.ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0 and "the sweep stands already" in done.stdout
    refused = subprocess.run(
        [*command, "--trials", "5"], cwd=main_job.ROOT, capture_output=True, text=True, env=environment
    )
    assert refused.returncode == 2 and "trials 4 then, 5 now" in refused.stderr


def test_trials_of_several_workers_that_share_cpus(tmp_path: Path, held: list) -> None:
    """Two trials at a time, of two workers each that take half a CPU: they come to what one worker comes to. By UAUC, which each
    trial keeps its state by too."""
    space = {"collab.l2": {"choice": [0.01, 0.1]}}
    flags = ("--search", "random", "--trials", "2", "--collab.epochs", "2", "--metric", "uauc")
    for name, workers in (("two", ("--workers", "2", "--share", "0.5", "--concurrent", "2")), ("one", ())):
        (tmp_path / name).mkdir()
        sweep(parse_sweep([*arguments(tmp_path / name, space=space), *flags, *workers]))
        assert held[-1] == 0
    two, one = (sorted(table(tmp_path / name), key=lambda row: row["collab.l2"]) for name in ("two", "one"))
    assert [row["status"] for row in two] == ["finished"] * 2
    for row in two:
        assert row["value"] == row["valid uauc"] == max(step["uauc"] for step in row["evaluations"])
        assert main_job.read_json(tmp_path / "two/w/artifacts" / row["artifact"] / "training.json")["workers"] == 2
    np.testing.assert_allclose([row["value"] for row in two], [row["value"] for row in one], atol=1e-4)
    best = tmp_path / "two/w/runs/demo-tiny-collab/best.yaml"
    assert parse([str(best)]).collab.select_on == "uauc"
    assert parse([str(best)]).collab.l2 == max(two, key=lambda row: row["value"])["collab.l2"]


OF_STAGES = {
    "adapt": {"adapt.rank": {"choice": [2, 4, 8]}},
    "align": {
        "align.hidden": {"choice": [16, 32, 64]},
        "align.layers": {"choice": [1, 2]},
        "align.temperature": {"loguniform": [0.05, 1.0]},
    },
    "fuse": {
        "fuse.tokens": {"choice": [["user", "item"], ["item", "semantic"], ["user", "item", "semantic"]]},
        "fuse.warm_start": {"choice": [True, False]},
    },
}
"""LoRA's rank; the projection's width and depth, and the temperature; the tokens that are injected, and the warm start."""


@pytest.mark.parametrize("stage", OF_STAGES)
def test_trials_share_what_they_read_and_read_no_test_rows(
    stage: str, runs: main_job.Runs, tmp_path: Path, held: list
) -> None:
    """What a run has made stands. The test rows are not even there while the sweep runs."""
    space, workspace, name = OF_STAGES[stage], tmp_path / "w", f"demo-tiny-{stage}"
    earlier = main_job.BEFORE[stage].split(",")
    for each in earlier:
        made = main_job.artifact(runs[2][0], "run", each)
        shutil.copytree(made, workspace / "artifacts" / made.name)
    (test,) = workspace.glob("artifacts/prepare-*/interactions/test")
    away = test.rename(tmp_path / "test")
    recipe = main_job.write_recipe(tmp_path, main_job.SETTINGS)
    files = [str(recipe), "--space", str(write_space(tmp_path, space))]
    flags = ["--stage", stage, "--search", "random", "--trials", "3", "--workers", "1", "--workspace", str(workspace)]
    sweep(parse_sweep(["demo", *files, *flags]))
    away.rename(test)
    assert held[-1] == 0
    rows = pq.read_table(workspace / f"runs/{name}/trials.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["finished"] * 3
    assert all(len({row[setting] for row in rows}) > 1 for setting in space), "each had several values"
    drawn = {tuple(row[setting] for setting in space) for row in rows}
    assert len({str(row["evaluations"]) for row in rows}) == len(drawn), "which made a difference"
    names = [path.parent.name for path in workspace.glob("artifacts/*/manifest.json")]
    assert sorted(each.partition("-")[0] for each in names) == sorted([*earlier, *[stage] * len(drawn)])
    assert {row["artifact"] for row in rows} == {each for each in names if each.startswith(f"{stage}-")}

    best, stages = workspace / f"runs/{name}/best.yaml", ",".join([*earlier, stage])
    printed = main_job.train(best, "--stages", stages, log=tmp_path / "log")
    assert printed.count("stands already") == len(earlier) + 1
    winner = max(rows, key=lambda row: row["value"])
    assert main_job.artifact(workspace, f"{name}-best", stage).name == winner["artifact"]


POPULATION = ("--search", "pbt", "--trials", "4", "--perturb-every", "2", "--collab.epochs", "6")


def check_population(folder: Path) -> None:
    """All members came to their end, after two comparisons some by others' checkpoints, and a member's recipe makes its artifact
    again."""
    rows = [Row(**row) for row in main_job.read_json(folder / "w/runs/demo-tiny-collab/sweep/trials.json")]
    assert [row.status for row in rows] == ["finished"] * 4
    for row in rows:
        assert [step for step, _ in row.evaluations] == sorted({step for step, _ in row.evaluations})
        assert len(row.evaluations) == 6
    artifacts = folder / "w/artifacts"
    standing = {path.parent.name for path in artifacts.glob("collab-*/manifest.json")}
    assert standing == {row.artifact for row in rows}
    left = {path for path in artifacts.glob("collab-*/*") if path.parent.name not in standing}
    assert not left, "nothing stays of trainings that were given up"
    assert all(row["changes"] == list(mine.changes) for row, mine in zip(table(folder), rows, strict=True))

    changed = [row for row in rows if row.changes]
    assert {text.split()[0] for row in changed for text in row.changes} <= {"2", "4"}
    assert changed, "the worst went on from the best"
    row = max(changed, key=lambda row: len(row.changes))
    assert row.begun is not None and "table_learning_rate=" in row.changes[0]
    base = parse_sweep(arguments(folder, *POPULATION)).base()
    recipe = folder / "member.yaml"
    config = with_settings(base, {**row.recipe("collab"), "name": "again", "workspace": str(folder / "again")})
    recipe.write_text(to_yaml(config))
    run(Run.of(parse([str(recipe), "--stages", "prepare,collab"])))
    again = folder / "again/artifacts" / str(row.artifact)
    assert main_job.read_json(again / "training.json")["evaluations"] == [list(each) for each in row.evaluations]
    for path in sorted((artifacts / str(row.artifact) / "tables").iterdir()):
        assert path.read_bytes() == (again / "tables" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("concurrent", ["1", "2"])
def test_a_population_leaves_recipes_that_make_its_members_again(tmp_path: Path, held: list, concurrent: str) -> None:
    sweep(parse_sweep(arguments(tmp_path, *POPULATION, "--concurrent", concurrent)))
    assert held[0] == 0
    check_population(tmp_path)


def test_a_population_goes_on_after_its_driver_was_killed(tmp_path: Path) -> None:
    command, environment = killed_at("goes on from trial", tmp_path, *POPULATION, "--concurrent", "2")
    done = subprocess.run(command, cwd=main_job.ROOT, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    check_population(tmp_path)
