"""A run: what its stages depend on, and what it starts from."""

import dataclasses
import json
from pathlib import Path

import pytest

from sellarec.config import STAGES, Align, Collab, Config, result_settings
from sellarec.errors import UserError
from sellarec.run import Run, facts_of, inputs_of, settings_of

OF_TRAINING = {
    *("batch", "epochs", "max_steps", "validate_every", "valid_rows", "patience", "select_on"),
    *("train_on", "changes"),
    *("optimizer", "learning_rate", "weight_decay", "beta2", "schedule", "warmup", "decay", "clip"),
    *("table_optimizer", "table_learning_rate", "table_weight_decay"),
}
"""Settings that say how stage collab trains its model."""


@pytest.mark.parametrize("name", list(result_settings(Collab())))
def test_align_from_scratch_depends_on_what_collabs_model_is_not_on_how_stage_collab_trains_it(name):
    """From collab's model it does on all, as that is among its inputs."""
    config = Config(align=Align(init="scratch"))
    changed = dataclasses.replace(config, collab=dataclasses.replace(config.collab, **{name: "another"}))
    assert settings_of("collab", config) != settings_of("collab", changed)
    assert "collab" not in inputs_of("align", config) and "collab" in inputs_of("align", Config())
    assert (settings_of("align", config) == settings_of("align", changed)) == (name in OF_TRAINING)


def test_rows_that_are_left_out_of_training_are_settings_of_what_is_trained_alone():
    config = Config()
    changed = dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, with_history=True))
    differ = {stage for stage in STAGES if settings_of(stage, config) != settings_of(stage, changed)}
    assert differ == {"adapt", "fuse"}, "all test rows are scored"


def run_from(folder: Path, **settings) -> Run:
    """A run whose collab starts from the artifact in a folder."""
    this = Run.of(Config(collab=Collab(init_from=str(folder), **settings)))
    this.marks["prepare"] = "0" * 16
    return this


def write_collab(folder: Path, **settings) -> None:
    """The manifest of an artifact of stage collab, as a run with these settings leaves it."""
    found = settings_of("collab", Config(collab=Collab(**settings)))
    (folder / "manifest.json").write_text(json.dumps({"stage": "collab", "fingerprint": "f" * 16, "settings": found}))


@pytest.mark.parametrize(
    ("earlier", "now", "named"),
    [
        ({"model": "mf"}, {"model": "lightgcn"}, ["collab.model is lightgcn", "with mf", "--collab.model mf"]),
        ({"model": "mf"}, {"model": "binary_mf"}, ["collab.model is binary_mf", "with mf"]),
        ({"model": "sasrec"}, {"model": "mf"}, ["collab.model is mf", "with sasrec"]),
        ({"model": "svdpp"}, {"model": "mf"}, ["collab.model is mf", "with svdpp"]),
        ({"dim": 32}, {"dim": 64}, ["collab.dim is 64", "with 32"]),
        ({"biases": True}, {"biases": False}, ["collab.biases is False", "with True", "--collab.biases True"]),
        ({"model": "lightgcn"}, {"model": "lightgcn", "layers": 3}, ["collab.layers is 3", "with 2"]),
        ({"model": "sasrec"}, {"model": "sasrec", "layers": 3}, ["collab.layers is 3", "with 2"]),
        ({"model": "sasrec"}, {"model": "sasrec", "heads": 2}, ["collab.heads is 2", "with 1"]),
        ({"model": "sasrec", "history": 20}, {"model": "sasrec"}, ["collab.history is 50", "with 20"]),
        (
            {"model": "sasrec", "user_rows": False},
            {"model": "sasrec"},
            ["collab.user_rows is True", "--collab.user-rows False"],
        ),
        ({"model": "din"}, {"model": "din", "hidden": (8, 4)}, ["collab.hidden is 8 4", "--collab.hidden 200 80"]),
    ],
)
def test_another_model_to_start_from_is_refused_naming_both_values(earlier, now, named, tmp_path):
    write_collab(tmp_path, **earlier)
    with pytest.raises(UserError) as caught:
        facts_of(run_from(tmp_path, **now), "collab")
    assert all(word in str(caught.value) for word in (*named, f"collab.init_from {tmp_path}")), caught.value


@pytest.mark.parametrize(
    ("earlier", "now"),
    [
        ({}, {"loss": "bpr", "l2": 0.0, "global_mean": False, "table_learning_rate": 0.1}),
        ({"temperature": 0.2}, {"temperature": 0.1}),
        ({"model": "mf", "layers": 3}, {"model": "mf", "hidden": (8,)}),
        ({"model": "sasrec"}, {"model": "sasrec", "dropout": 0.2, "learning_rate": 0.1, "batch": 7}),
        ({"model": "din", "hidden": (8, 4)}, {"model": "din", "hidden": (8, 4)}),
    ],
)
def test_the_same_model_may_be_trained_on_otherwise(earlier, now, tmp_path):
    write_collab(tmp_path, **earlier)
    assert facts_of(run_from(tmp_path, **now), "collab")["init_from"] == "f" * 16


def test_a_model_is_compared_with_each_config_that_a_run_takes(tmp_path):
    """As a sweep's, whose run reads the earlier manifest once."""
    write_collab(tmp_path)
    this = run_from(tmp_path)
    facts_of(this, "collab")
    this.config = dataclasses.replace(this.config, collab=dataclasses.replace(this.config.collab, dim=64))
    with pytest.raises(UserError, match=r"collab\.dim is 64"):
        facts_of(this, "collab")


def test_only_an_artifact_of_stage_collab_is_started_from(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"stage": "align", "fingerprint": "f" * 16, "settings": {}}))
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="no finished artifact of stage collab"):
            facts_of(run_from(folder), "collab")
