"""A worker that is killed: the run goes on from its last checkpoint to the result of an undisturbed run."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import main_job
import numpy as np
import psutil
import pytest

from sellarec.training.launch import KEEP_FREED_MEMORY
from sellarec.training.table import SavedTable

pytestmark = pytest.mark.ray

COLLAB = ["--name", "run", "--stages", "prepare,collab", *main_job.LONGER["collab"]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which all stages before fuse stand."""
    folder = tmp_path_factory.mktemp("inputs")
    stages = "prepare,pretrain,adapt,collab,distil,align"
    recipe = main_job.write_recipe(folder)
    main_job.train("demo", recipe, "--workspace", folder / "w", "--stages", stages, log=folder / "log")
    shutil.rmtree(folder / "w" / "runs")
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which collab was trained on two workers, which of what stands before it needs the log alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    main_job.train("demo", main_job.write_recipe(folder), *COLLAB, "--workspace", folder / "w", log=folder / "log")
    return folder / "w"


def prepared(stage: str, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, list[str | Path]]:
    """A workspace in which a stage was trained undisturbed, and the flags by which it is to be trained in `tmp_path`/w, where
    what it reads stands."""
    recipe, workspace = main_job.write_recipe(tmp_path), tmp_path / "w"
    if stage == "collab":
        return request.getfixturevalue("undisturbed"), ["demo", recipe, *COLLAB, "--workspace", workspace]
    undisturbed = tmp_path / "undisturbed"
    for copy in (undisturbed, workspace):
        shutil.copytree(request.getfixturevalue("inputs") / "w", copy)
    common = ["demo", recipe, "--name", "run", *main_job.LONGER[stage], "--stages", stage]
    main_job.train(*common, "--workspace", undisturbed, log=tmp_path / "log")
    return undisturbed, [*common, "--workspace", workspace]


@pytest.mark.slow
def test_interrupted_job(inputs: Path, tmp_path: Path) -> None:
    """Ctrl-C in a stage with workers, and in one without after it: a word of it, its exit status, and the job goes on later."""
    shutil.copytree(inputs / "w", tmp_path / "w")
    for stage in ("collab", "distil"):
        (folder,) = (tmp_path / "w/artifacts").glob(f"{stage}-*")
        shutil.rmtree(folder)
    common = ["demo", inputs / "tiny.yaml", "--name", "run", "--stages", "collab,distil", "--workspace", tmp_path / "w"]
    for number, reached in enumerate(("collab    step", "collab    done")):
        log = tmp_path / f"{number}.log"
        job = main_job.start(*common, log=log)
        try:
            main_job.wait_for(log, reached, job)
            os.kill(job.pid, signal.SIGINT)
            assert job.wait(120) == 130, log.read_text()
        finally:
            main_job.end(job)
        assert log.read_text().splitlines()[-1].startswith("interrupted: what is finished is kept")
    main_job.train(*common, log=tmp_path / "last.log")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["collab", "pretrain", "adapt", "align", "fuse"])
def test_killed_worker(stage: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    undisturbed, common = prepared(stage, tmp_path, request)
    log = tmp_path / "killed.log"
    job = main_job.start(*common, f"--{stage}.checkpoint-every", "0.5", log=log)
    try:
        main_job.wait_for(log, f"{stage:<9} step" if stage == "pretrain" else "valid AUC", job)
        workers = main_job.training_workers(job)
        assert len(workers) == 2
        keeps = KEEP_FREED_MEMORY.items() <= workers[0].environ().items()
        assert keeps == (stage in ("collab", "align")), "not where a language model is loaded"
        os.kill(workers[1].pid, signal.SIGKILL)
        assert job.wait(300) == 0, log.read_text()
    finally:
        main_job.end(job)

    assert f"{stage:<9} goes on from its checkpoint at step" in log.read_text()
    main_job.assert_same(stage, undisturbed, tmp_path / "w")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["collab", "fuse"])
def test_a_worker_that_hangs_is_lost_in_the_stated_time(
    stage: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Stopped, not killed: it holds its connections, and the others wait for it."""
    undisturbed, common = prepared(stage, tmp_path, request)
    log, timeout = tmp_path / "hanging.log", 20
    flags = ["--worker-timeout", str(timeout), f"--{stage}.checkpoint-every", "0.5"]
    job = main_job.start(*common, *flags, log=log)
    try:
        main_job.wait_for(log, "valid AUC", job)
        workers = main_job.training_workers(job)
        os.kill(workers[1].pid, signal.SIGSTOP)
        stopped = time.monotonic()
        main_job.wait_for(log, f"{stage:<9} was cut off", job)
        # it counts as lost once it hasn't answered for `worker_timeout`; ending the others too may take a busy machine a minute
        assert timeout / 2 < time.monotonic() - stopped < timeout + 60, log.read_text()
        main_job.wait_for(log, "goes on from its checkpoint at step", job)
        assert not workers[1].is_running() or workers[1].status() == psutil.STATUS_ZOMBIE
        assert job.wait(300) == 0, log.read_text()
    finally:
        main_job.end(job)
    main_job.assert_same(stage, undisturbed, tmp_path / "w")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stage", ["collab", "adapt"])
def test_a_stage_that_is_told_to_stop_leaves_a_checkpoint(
    stage: str, number: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """And the same command goes on from there, to the result of an undisturbed run."""
    undisturbed, common = prepared(stage, tmp_path, request)
    log = tmp_path / "stopped.log"
    job = main_job.start(*common, f"--{stage}.checkpoint-every", "9999", log=log)
    try:
        main_job.wait_for(log, f"{stage:<9} step", job)
        os.kill(job.pid, number)
        assert job.wait(120) == 130, log.read_text()
    finally:
        main_job.end(job)
    lines = log.read_text().splitlines()
    assert any(line.endswith("stops after a checkpoint: asked to (again: at once)") for line in lines)
    assert lines[-1].startswith("interrupted: what is finished is kept")
    main_job.train(*common, log=tmp_path / "last.log")
    (resumed,) = re.findall(r"goes on from its checkpoint at step (\d+)", (tmp_path / "last.log").read_text())
    assert resumed == re.findall(r"step (\d+)/", log.read_text())[-1], "the stop left it, not an earlier improvement"
    main_job.assert_same(stage, undisturbed, tmp_path / "w")


CHANGES = ["--collab.changes", "3 table_learning_rate=0.05", "6 table_learning_rate=0.3 l2=0.01"]


@pytest.mark.slow
def test_a_stage_whose_settings_change_goes_on_from_any_part(tmp_path: Path) -> None:
    """Killed in its second part, stopped in its third: the result is that of an undisturbed run."""
    common = ["demo", main_job.write_recipe(tmp_path), *COLLAB, *CHANGES]
    printed = main_job.train(*common, "--workspace", tmp_path / "undisturbed", log=tmp_path / "undisturbed.log")
    told = ["after evaluation 3: table_learning_rate 0.05", "after evaluation 6: table_learning_rate 0.3, l2 0.01"]
    assert all(text in printed for text in told)
    for number, (reached, kill) in enumerate(zip(told, (signal.SIGKILL, signal.SIGTERM), strict=True)):
        log = tmp_path / f"{number}.log"
        job = main_job.start(*common, "--workspace", tmp_path / "w", "--collab.checkpoint-every", "0.5", log=log)
        try:
            main_job.wait_for(log, reached, job)
            after = len(log.read_text())
            main_job.wait_for(log, "goes on from its checkpoint", job)
            deadline = time.monotonic() + 60
            while "collab    step" not in log.read_text()[after:] and time.monotonic() < deadline:
                time.sleep(0.2)
            if kill == signal.SIGTERM:
                os.kill(job.pid, kill)
                assert job.wait(120) == 130, log.read_text()
        finally:
            main_job.end(job)
    printed = main_job.train(*common, "--workspace", tmp_path / "w", log=tmp_path / "last.log")
    assert "goes on from its checkpoint" in printed
    main_job.assert_same("collab", tmp_path / "undisturbed", tmp_path / "w")
    changed = main_job.read_json(main_job.artifact(tmp_path / "w", "run", "collab") / "manifest.json")
    assert changed["facts"]["optimizers"]["changes"].startswith("after evaluation 3: table_learning_rate 0.05;")

    # a name belongs to its changes too
    refused = main_job.train(
        "demo", tmp_path / "tiny.yaml", *COLLAB, "--workspace", tmp_path / "w", log=tmp_path / "refused.log", status=2
    )
    assert "collab.changes" in refused


@pytest.mark.slow  # tests/training/test_rows_seen.py has it for the rows that are read
def test_killed_job_goes_on_with_more_workers(undisturbed: Path, tmp_path: Path) -> None:
    """Trained on 2 workers, killed, gone on with on 3: the curve, the state that is kept and its rows are those of 2 alone."""
    common = ["demo", main_job.write_recipe(tmp_path), *COLLAB, "--workspace", tmp_path / "w"]
    log = tmp_path / "killed.log"
    job = main_job.start(*common, "--collab.checkpoint-every", "0.5", log=log)
    try:
        main_job.wait_for(log, "valid AUC", job)
    finally:
        main_job.end(job)
    printed = main_job.train(*common, "--workers", "3", log=tmp_path / "continued.log")
    assert "collab    starting 3 workers" in printed and "collab    goes on from its checkpoint at step" in printed

    first, second = (main_job.artifact(w, "run", "collab") for w in (undisturbed, tmp_path / "w"))
    expected, found = (main_job.read_json(folder / "training.json") for folder in (first, second))
    assert found["kept_step"] == expected["kept_step"]
    curves = [[(step, m["auc"], m["uauc"]) for step, m in facts["evaluations"]] for facts in (expected, found)]
    assert len(curves[0]) == 10
    np.testing.assert_allclose(curves[1], curves[0], atol=1e-4)
    for name in ("user", "item"):
        rows = [SavedTable(folder / "tables", name) for folder in (first, second)]
        count = rows[0].facts["rows"]
        np.testing.assert_allclose(rows[1].read(0, count), rows[0].read(0, count), rtol=1e-4, atol=1e-5)
