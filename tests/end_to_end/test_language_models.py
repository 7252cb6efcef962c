"""The main job with a given language model whose weights are all trained: further on the catalog's texts, and to answer."""

import shutil
from pathlib import Path

import main_job
import numpy as np
import pyarrow.parquet as pq
import pytest

import sellarec
from sellarec.data.log import read_log
from sellarec.language import llm as llms
from sellarec.serving.export import export_run

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.distributed]


def test_a_given_model_is_pretrained_further_tuned_wholly_and_exported(decoder: Path, tmp_path: Path) -> None:
    shutil.copytree(decoder, tmp_path / "given")
    recipe = main_job.write_recipe(
        tmp_path, {name: main_job.TINY[name] for name in ("data", "prompt", "collab", "align", "fuse", "evaluate")}
    )
    settings = ["--pretrain.continued", "True", "--pretrain.max-steps", "6", "--pretrain.schedule", "wsd"]
    settings += ["--adapt.method", "full", "--adapt.max-steps", "6", "--llm", tmp_path / "given"]
    workspace = tmp_path / "workspace"
    main_job.train("demo", recipe, "--workspace", workspace, "--name", "run", *map(str, settings), log=tmp_path / "log")
    made = {stage: main_job.artifact(workspace, "run", stage) for stage in ("prepare", "pretrain", "adapt", "evaluate")}
    given, pretrained, tuned = (
        dict(llms.load_model(folder).named_parameters())
        for folder in (tmp_path / "given", made["pretrain"] / "model", made["adapt"] / "model")
    )
    for name, weight in given.items():
        assert not weight.equal(pretrained[name]) and not pretrained[name].equal(tuned[name]), name
    shutil.rmtree(tmp_path / "given")
    export_run(str(workspace / "runs/run"), tmp_path / "export", histories=False, with_model=False)
    log = read_log(made["prepare"])
    test, names = log.split("test"), log.items()["external_id"].to_pylist()
    users = log.users()["external_id"].take(test["user"]).to_pylist()
    items = [names[item] for item in test["item"].to_pylist()]
    histories = [[names[item] for item in history] for history in test["history"].to_pylist()]
    found = sellarec.load(tmp_path / "export").score(users, items, histories)
    scores = pq.read_table(made["evaluate"] / "scores.parquet")
    np.testing.assert_allclose(found.scores, scores["sella-rec"].to_numpy(), atol=1e-5)
