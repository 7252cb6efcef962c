"""A worker that is killed: the run goes on from its last checkpoint to the result of an undisturbed run."""

import os
import shutil
import signal
from pathlib import Path

import main_job
import numpy as np
import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.ray

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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which all stages before fuse stand."""
    folder = tmp_path_factory.mktemp("inputs")
    stages = "prepare,pretrain,adapt,collab,distil,align"
    recipe = main_job.write_recipe(folder)
    main_job.train("demo", recipe, "--workspace", folder / "w", "--stages", stages, log=folder / "log")
    shutil.rmtree(folder / "w" / "runs")
    return folder


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


@pytest.mark.parametrize(
    "stage",
    ["collab", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pretrain", "adapt", "align", "fuse"))],
)
def test_killed_worker(stage: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    common = ["demo", main_job.write_recipe(tmp_path), "--name", "run", *LONGER[stage]]
    if stage == "collab":  # of what stands before it needs the log alone
        common += ["--stages", "prepare,collab"]
    else:
        common += ["--stages", stage]
        for workspace in ("undisturbed", "killed"):
            shutil.copytree(request.getfixturevalue("inputs") / "w", tmp_path / workspace)
    main_job.train(*common, "--workspace", tmp_path / "undisturbed", log=tmp_path / "log")

    log = tmp_path / "killed.log"
    flags = [f"--{stage}.checkpoint-every", "0.5"]
    job = main_job.start(*common, *flags, "--workspace", tmp_path / "killed", log=log)
    try:
        main_job.wait_for(log, "step" if stage == "pretrain" else "valid AUC", job)
        workers = main_job.training_workers(job)
        assert len(workers) == 2
        os.kill(workers[1].pid, signal.SIGKILL)
        assert job.wait(300) == 0, log.read_text()
    finally:
        main_job.end(job)

    assert f"{stage:<9} goes on from its checkpoint at step" in log.read_text()
    first, second = (main_job.artifact(tmp_path / w, "run", stage) for w in ("undisturbed", "killed"))
    facts = [main_job.read_json(folder / "training.json") for folder in (first, second)]
    assert facts[0]["evaluations"] == facts[1]["evaluations"]
    assert facts[0]["kept_step"] == facts[1]["kept_step"]
    assert facts[0]["first_losses"] == facts[1]["first_losses"]
    files = sorted(path.relative_to(first) for path in first.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(second) for path in second.rglob("*.safetensors"))
    assert files
    for file in files:
        expected, found = load_file(first / file), load_file(second / file)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{file}: {name}")
