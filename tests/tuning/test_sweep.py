"""What of a sweep is refused before any work."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import yaml

from sellarec.command_line import parse, parse_sweep
from sellarec.config import Config, Sweep, to_yaml
from sellarec.errors import UserError
from sellarec.pipeline import origins_of
from sellarec.run import Run
from sellarec.tuning.space import with_settings
from sellarec.tuning.sweep import _check_name, sweep


def test_the_metric_is_what_each_trial_keeps_its_state_by() -> None:
    assert parse_sweep(["demo", "--metric", "uauc"]).base().align.select_on == "uauc"
    assert parse_sweep(["demo", "--stage", "fuse", "--fuse.select-on", "uauc"]).base().fuse.select_on == "uauc"


def test_a_sweep_has_the_name_of_its_recipes_and_stage() -> None:
    assert parse_sweep(["demo", "longer", "--stage", "fuse"]).name == "demo-longer-fuse"
    assert parse_sweep(["demo", "--name", "mine"]).name == "mine"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stages", "collab"], ["stages is collab", "leave it out"]),
        (["--trials", "0"], ["trials is 0", "at least 1"]),
        (["--concurrent", "0"], ["concurrent is 0"]),
        (["--share", "0"], ["share is 0"]),
        (["--share", "1.5"], ["share is 1.5"]),
        (["--max-failures", "-1"], ["max_failures is -1"]),
        (["--align.temperature", "0"], ["align.temperature"]),
    ],
)
def test_flags_that_are_refused(flags: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        parse_sweep(["demo", *flags])
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_optuna_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="optuna is not installed"):
        sweep(parse_sweep(["demo", "--search", "optuna", "--workspace", str(tmp_path / "w")]))
    assert not (tmp_path / "w").exists()


def test_trials_with_a_number_of_workers_that_changes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"min_workers is 1, but a sweep's trials have 2 workers"):
        sweep(parse_sweep(["demo", "--min-workers", "1", "--workers", "2", "--workspace", str(tmp_path / "w")]))
    assert not (tmp_path / "w").exists()


def test_a_refused_space_makes_nothing(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("align.temprature: {uniform: [0.1, 1.0]}")
    with pytest.raises(UserError, match=r"did you mean align\.temperature"):
        sweep(parse_sweep(["demo", "--space", str(space), "--workspace", str(tmp_path / "w")]))
    assert not (tmp_path / "w").exists()


def test_the_config_of_a_trial_comes_back_from_its_recipe(tmp_path: Path) -> None:
    drawn = {
        "align.temperature": 0.0001234,
        "align.epochs": 2.0,
        "fuse.tokens": ("user", "item"),
        "align.max_steps": None,
    }
    config = with_settings(parse_sweep(["demo"]).base(), drawn)
    path = tmp_path / "best.yaml"
    path.write_text(f"# a trial\n{to_yaml(config)}")
    assert yaml.safe_load(path.read_text())["align"]["temperature"] == 0.0001234
    assert parse([str(path)]) == config


def test_a_name_belongs_to_what_a_sweep_reads_too(models: dict[str, Path], tmp_path: Path) -> None:
    """Which language model and which rows a path stands for is no setting of a result, but what they hold is."""

    def of(*flags: str) -> tuple[Sweep, Config, Run, dict]:
        settings = parse_sweep(["demo", "--stage", "adapt", "--workspace", str(tmp_path / "w"), *flags])
        this = Run.of(settings.base())
        return settings, this.config, this, origins_of(this, ("prepare", "adapt"))

    def check(*flags: str) -> None:
        settings, config, this, origins = of(*flags)
        place = this.place / "sweep"
        place.write_json("sweep.json", _check_name(place, settings, config, [], origins))

    check("--llm", str(models["llama"]))
    shutil.copytree(models["llama"], tmp_path / "elsewhere")
    check("--llm", str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"llm .* then, .* now"):
        check("--llm", str(models["gpt2"]))
