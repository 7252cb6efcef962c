"""The main job on 1, 2 and 3 workers: the same steps, the same results; and what it leaves behind."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import main_job
import numpy as np
import pyarrow.parquet as pq
import pytest
from main_job import SETTINGS, WEIGHTS, Runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sellarec
from sellarec.data.log import read_log
from sellarec.serving.export import export_run

pytestmark = pytest.mark.ray

ONE, THREE = (pytest.param(workers, marks=pytest.mark.slow) for workers in (1, 3))
"""One and three workers: runs of their own, which `make test-all` makes. Without Ray, tests/training compares 1 to 3 workers in
each run of the tests."""

TRAINED = ("pretrain", "adapt", "collab", "align", "fuse")
FROM_TRAINED = ("adapt", "align", "fuse")
"""Stages that begin with what others have trained."""


def first_losses(workspace: Path, stage: str) -> list[float]:
    return main_job.read_json(main_job.artifact(workspace, "run", stage) / "training.json")["first_losses"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "workers"),
    [(stage, workers) for stage in TRAINED for workers in (1, 3)],
)
def test_same_losses(runs: Runs, stage: str, workers: int, tmp_path: Path) -> None:
    """The stage's first 20 losses from the same artifacts: what earlier stages differ by would add up in later ones."""
    workspace = runs[workers][0]
    if stage in FROM_TRAINED:
        workspace = tmp_path / "workspace"
        shutil.copytree(runs[2][0], workspace)
        shutil.rmtree(main_job.artifact(workspace, "run", stage))
        recipe = main_job.write_recipe(tmp_path, SETTINGS)
        arguments = ["demo", recipe, "--workers", str(workers), "--workspace", workspace, "--name", "run"]
        main_job.train(*arguments, "--stages", stage, log=tmp_path / "log")
        assert main_job.read_json(main_job.artifact(workspace, "run", stage) / "training.json")["workers"] == workers
    expected, found = first_losses(runs[2][0], stage), first_losses(workspace, stage)
    assert len(expected) == 20
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow  # tests/training/test_loop.py has every model and loss step for step, without Ray
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("svdpp", "bpr", "popularity"), id="histories and drawn negatives"),
        pytest.param(("mf", "softmax", "in-batch"), id="negatives of all workers"),
    ],
)
def test_same_losses_of_ranking_models(settings: tuple[str, str, str], tmp_path: Path) -> None:
    model, loss, negatives = settings
    recipe = main_job.write_recipe(tmp_path, {**main_job.TINY, "collab": {"max_steps": 20, "l2": 0.01}})
    found = {}
    for workers in (1, 3):
        arguments = ["demo", recipe, "--workers", str(workers), "--workspace", tmp_path / str(workers), "--name", "run"]
        arguments += ["--collab.model", model, "--collab.loss", loss, "--collab.negatives", negatives]
        arguments += ["--collab.select-on", "uauc", "--align.select-on", "uauc"]
        main_job.train(*arguments, "--stages", "prepare,collab", log=tmp_path / "log")
        found[workers] = first_losses(tmp_path / str(workers), "collab")
    assert len(found[1]) == 20 and found[1][-1] < found[1][0]
    np.testing.assert_allclose(found[3], found[1], rtol=1e-5)


@pytest.mark.parametrize("workers", [ONE, THREE])
def test_same_results(runs: Runs, workers: int) -> None:
    expected, found = (main_job.read_json(runs[n][0] / "runs/run/results.json") for n in (2, workers))
    assert [(r["model"], r["rows"], r["metric"], r["count"]) for r in expected] == [
        (r["model"], r["rows"], r["metric"], r["count"]) for r in found
    ]
    for one, other in zip(expected, found, strict=True):
        if one["rows"] == "all":
            assert other["value"] == pytest.approx(one["value"], abs=1e-3), one


@pytest.mark.parametrize("workers", [ONE, 2, THREE])
def test_every_test_row_is_scored_once(runs: Runs, workers: int) -> None:
    workspace = runs[workers][0]
    rows = pq.read_table(main_job.artifact(workspace, "run", "prepare") / "interactions/test")["row"]
    scores = pq.read_table(main_job.artifact(workspace, "run", "evaluate") / "scores.parquet")
    assert scores["row"].to_pylist() == rows.to_pylist()


@pytest.mark.parametrize("workers", [ONE, 2, THREE])
def test_histories_that_were_cut_are_counted_alike(runs: Runs, workers: int) -> None:
    """By the manifests, what is printed and the report; of the test split as many as there are rows."""
    workspace, printed = runs[workers]
    report = (workspace / "runs/run/report.html").read_text()
    rows = pq.read_table(main_job.artifact(workspace, "run", "prepare") / "interactions/test").num_rows
    for stage, read in (("adapt", "train"), ("adapt", "valid"), ("fuse", "train"), ("evaluate", "sella-rec")):
        found, expected = (
            main_job.read_json(main_job.artifact(runs[n][0], "run", stage) / "manifest.json")["facts"]["histories"]
            for n in (workers, 2)
        )
        assert found == expected
        counts = found[read]
        assert counts["shortened"] <= counts["titles left out"] and counts["shortened"] < counts["prompts"]
        if stage != "adapt":  # prompts without soft tokens are shorter, and all fit
            assert counts["shortened"] > 0
        if stage == "evaluate":
            assert counts["prompts"] == rows
        said = f"{read}: {counts['shortened']:,} of {counts['prompts']:,} prompts, {counts['titles left out']:,} titles"
        assert (said in printed) == any(of_split["shortened"] for of_split in found.values())
        assert f"{counts['titles left out']:,}" in report


def test_what_the_run_leaves(runs: Runs) -> None:
    workspace, printed = runs[2]
    folder = workspace / "runs/run"
    for name in ("results.json", "report.html", "config.yaml", "artifacts.json"):
        assert (folder / name).is_file()
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    for stage in TRAINED:
        shown = {"loss", "rows per s", "data wait (%)", "data wait (%), most", "memory GiB", "memory GiB, most"}
        shown |= {"learning rate", "tokens per s"} if stage in ("pretrain", "adapt", "fuse") else set()
        shown |= (
            {"table learning rate", "tables (%)", "all-to-all (%)"} if stage in ("collab", "align", "fuse") else set()
        )
        assert {f"{stage}/{name}" for name in shown} <= set(board.Tags()["scalars"])
    for stage in ("collab", "align", "fuse"):
        for most in ("", ", most"):
            spent, exchanged = (
                [e.value for e in board.Scalars(f"{stage}/{what} (%){most}")] for what in ("tables", "all-to-all")
            )
            assert all(0 < of_it < whole <= 100 for whole, of_it in zip(spent, exchanged, strict=True)), stage
    memory = {e.value for e in board.Scalars("collab/memory GiB, most")}
    assert all(0.2 < value < 8 for value in memory)
    for rank in range(2):
        with gzip.open(folder / f"profile/collab-step-3-worker-{rank}.json.gz", "rt") as file:
            names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
        # of two steps, each with an exchange of ids and one of vectors at the least
        assert sum("all_to_all" in name for name in names) >= 4, f"worker {rank}"
    assert (main_job.artifact(workspace, "run", "align") / "alignment.json").is_file()
    assert "items find their vector first" in printed and "rows that find" in (folder / "report.html").read_text()
    assert "https://" not in (folder / "report.html").read_text()
    for words in ("sella-rec", "best attainable", "report.html", "results.json", "tensorboard --logdir"):
        assert words in printed
    records = json.loads((folder / "results.json").read_text())
    assert {r["rows"] for r in records} == {"all", "warm", "cold", "cold_user", "cold_item", "with_history"}
    keys = {"model", "rows", "metric", "value", "low", "high", "count", "unit", "seed", "split", "protocol"}
    assert all(set(r) == keys for r in records)


@pytest.mark.parametrize("workers", [ONE, 2, THREE])
def test_the_language_models_weight_is_the_best_one_on_valid_rows(runs: Runs, workers: int) -> None:
    """Of which 1 is what the training itself has measured of the state it kept, and 0 the collaborative model alone."""
    workspace, printed = runs[workers]
    facts = main_job.read_json(main_job.artifact(workspace, "run", "fuse") / "manifest.json")["facts"]
    found = facts["valid by language weight"]
    assert list(found) == [str(weight) for weight in WEIGHTS]
    chosen = facts["language_weight"]
    assert found[str(chosen)] == max(found.values()) and f"counts {chosen:g} times" in printed
    assert found["1.0"] == pytest.approx(dict(facts["evaluations"])[facts["kept_step"]]["auc"], abs=1e-6)
    assert len(set(found.values())) == len(WEIGHTS)


def test_standing_artifacts_are_not_made_again(runs: Runs, tmp_path: Path) -> None:
    workspace = runs[2][0]
    before = {path: path.stat().st_mtime_ns for path in (workspace / "artifacts").rglob("manifest.json")}
    recipe = main_job.write_recipe(tmp_path, SETTINGS)
    arguments = ["demo", recipe, "--workspace", workspace, "--name", "run", "--workers", "1"]
    printed = main_job.train(*arguments, log=tmp_path / "log")
    assert printed.count("stands already") == 8
    assert before == {path: path.stat().st_mtime_ns for path in (workspace / "artifacts").rglob("manifest.json")}


def test_an_export_scores_as_the_run_did(runs: Runs, tmp_path: Path) -> None:
    """In this process, without Ray: the scores of stage evaluate; and by jobs/evaluate.py, its metrics."""
    workspace = runs[2][0]
    log = main_job.artifact(workspace, "run", "prepare")
    export_run(str(workspace / "runs/run"), tmp_path / "export", histories=True, with_model=False)
    left = main_job.read_json(main_job.artifact(workspace, "run", "adapt") / "manifest.json")["facts"]["adapter_hash"]
    assert main_job.read_json(tmp_path / "export/export.json")["adapter"] == left
    test = read_log(log).split("test")
    ids = {name: read_log(log).users() if name == "user" else read_log(log).items() for name in ("user", "item")}
    users, items = (ids[name]["external_id"].take(test[name]).to_pylist() for name in ("user", "item"))
    names = ids["item"]["external_id"].to_pylist()
    histories = [[names[item] for item in history] for history in test["history"].to_pylist()]
    found = sellarec.load(tmp_path / "export").score(users, items, histories)
    scores = pq.read_table(main_job.artifact(workspace, "run", "evaluate") / "scores.parquet")
    np.testing.assert_allclose(found.scores, scores["sella-rec"].to_numpy(), atol=1e-5)

    settings = ["--artifact", tmp_path / "export", "--data", log, "--out", tmp_path / "out.json", "--replicates", "50"]
    command = [sys.executable, main_job.ROOT / "jobs/evaluate.py", *settings]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=main_job.ROOT)
    assert done.returncode == 0, done.stderr
    expected = [r for r in main_job.read_json(workspace / "runs/run/results.json") if r["model"] == "sella-rec"]
    measured = main_job.read_json(tmp_path / "out.json")
    assert [(r["rows"], r["metric"], r["count"]) for r in measured] == [
        (r["rows"], r["metric"], r["count"]) for r in expected
    ]
    for one, other in zip(expected, measured, strict=True):
        assert other["value"] == pytest.approx(one["value"], abs=1e-4), one


def test_a_name_belongs_to_one_config(runs: Runs, tmp_path: Path) -> None:
    recipe = main_job.write_recipe(tmp_path, SETTINGS)
    arguments = ["demo", recipe, "--workspace", runs[2][0], "--name", "run", "--seed", "2"]
    printed = main_job.train(*arguments, log=tmp_path / "log", status=2)
    assert "seed 1 then, 2 now" in printed


def test_saved_config_runs_again(runs: Runs, tmp_path: Path) -> None:
    saved = runs[2][0] / "runs/run/config.yaml"
    printed = main_job.train(saved, log=tmp_path / "log")
    assert printed.count("stands already") == 8
