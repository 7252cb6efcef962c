"""The configuration: what is laid over what, what is refused and how, and that a saved config is the same one again."""

import ast
import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sellarec.config
from sellarec.config import STAGES, Config, built_in_recipes, leaves, parse, read_recipe, result_settings, to_yaml
from sellarec.errors import UserError

ROOT = Path(__file__).parents[1]
NAMES = [name for name, _, _ in leaves(Config())]


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and gives its path."""

    def write(text: str, name: str = "mine") -> str:
        (tmp_path / f"{name}.yaml").write_text(text)
        return str(tmp_path / f"{name}.yaml")

    return write


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(arguments)
    return str(caught.value)


def usage_error(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_later_recipes_and_then_flags_win(recipe):
    first = recipe("seed: 3\ncollab: {dim: 8, l2: 0.5, epochs: 7}", "first")
    second = recipe("collab: {dim: 16, l2: 0.25}", "second")
    config = parse([first, second, "--collab.dim", "64"])
    assert (config.seed, config.collab.epochs, config.collab.l2, config.collab.dim) == (3, 7, 0.25, 64)
    assert parse([second, first]).collab.l2 == 0.5
    assert config.name == "first-second"
    assert parse([first, "--name", "other"]).name == "other"


@pytest.mark.parametrize("name", ["my run", "a/b", "..", "", "run#1", "run%20", "-x"])
def test_a_name_that_is_no_plain_folder_name_is_refused(name):
    with pytest.raises(UserError, match="names a folder below runs/"):
        parse([f"--name={name}"])


def test_without_a_recipe_the_embedded_default_runs():
    config = parse([])
    assert config.name == "demo"
    assert (config.data.source, config.llm.model) == ("world", "embedded")


def test_short_flags_mean_the_long_ones():
    short = "--data d --llm x/y --collab mf --workers 3 --seed 5 --stages prepare,collab --workspace w --name n"
    long = "--data.path d --llm.model x/y --collab.model mf --workers=3 --seed=5 --stages prepare collab --workspace=w --name=n"
    config = parse(["ml-latest-small", *short.split()])
    assert config == parse(["ml-latest-small", *long.split()])
    assert (config.data.path, config.llm.model, config.collab.model) == ("d", "x/y", "mf")
    assert (config.workers, config.seed, config.workspace, config.name) == (3, 5, "w", "n")
    assert config.stages == ("prepare", "collab")
    assert parse(["--stages=collab,align"]).stages == ("collab", "align")


def test_recipes_of_data_leave_the_method_alone():
    """They can be laid over any other recipe: they name data and the prompt's form only."""
    recipes = {name: read_recipe(name)[1] for name in built_in_recipes()}
    of_data = {name: found for name, found in recipes.items() if found.get("data.source", "world") != "world"}
    assert {"collm-ml-1m", "ml-latest-small"} <= set(of_data)
    for settings in of_data.values():
        assert {setting.split(".")[0] for setting in settings} <= {"data", "prompt"}


def test_a_typo_in_a_flag_is_refused_with_the_nearest_names(capsys):
    assert "--collab.dim" in usage_error(capsys, "--collab.dmi", "8")
    assert "--seed" in usage_error(capsys, "--sed", "3")


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("align: {temperture: 0.2}", "align.temperature"),
        ("aligm: {temperature: 0.2}", "align"),
        ("aligm.temperature: 0.2", "align.temperature"),
        ("data: {world: {user: 3}}", "data.world.users"),
        ("sed: 3", "seed"),
    ],
)
def test_a_typo_in_a_recipe_is_refused_with_the_nearest_names(recipe, text, nearest):
    path = recipe(text)
    said, _, hint = refusal(path).partition("did you mean ")
    assert path in said and nearest in hint


def test_a_recipe_that_is_none_is_refused(recipe, tmp_path):
    assert "ml-latest-small" in refusal("ml-latest-smal")
    assert "nowhere.yaml" in refusal(str(tmp_path / "nowhere.yaml"))
    assert "must hold settings" in refusal(recipe("- 1\n- 2"))
    assert "not readable YAML" in refusal(recipe("a: [1"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not readable YAML" in refusal(str(tmp_path / "binary.yaml"))


def test_a_value_of_the_wrong_type_is_refused_with_its_flag(capsys, recipe):
    assert "--seed" in usage_error(capsys, "--seed", "x")
    assert "--collab.dim" in usage_error(capsys, "--collab.dim", "32.5")
    assert "mlp" in usage_error(capsys, "--collab", "mlp")
    assert "--data.split" in usage_error(capsys, "--data.split", "0.9", "0.1")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--data some/folder", ["data.source", "world", "data.path", "some/folder"]),
        ("--llm.revision main", ["llm.revision", "main", "llm.model", "embedded"]),
        ("--stages pretrain,adapt --llm x/y", ["pretrain", "llm.model", "x/y"]),
        ("--pretrain.hidden 60 --pretrain.heads 4", ["pretrain.hidden", "60", "pretrain.heads", "4"]),
        ("--prompt.history 60", ["prompt.history", "60", "data.history_cap", "50"]),
        ("--data.split 0.5 0.2 0.2", ["data.split", "0.5", "0.2"]),
    ],
)
def test_contradictions_are_refused_naming_both(arguments, named):
    message = refusal(*arguments.split())
    assert all(word in message for word in named), message


def test_a_revision_of_a_local_folder_is_refused(tmp_path):
    message = refusal("--llm", str(tmp_path), "--llm.revision", "main")
    assert str(tmp_path) in message and "llm.revision" in message


@pytest.mark.parametrize(
    "arguments",
    [
        "--workers 0",
        "--seed -1",
        "--collab.dim 30",
        "--collab.dim 0",
        "--collab.batch 0",
        "--adapt.epochs 0",
        "--adapt.max-steps 0",
        "--adapt.learning-rate -0.1",
        "--adapt.learning-rate nan",
        "--align.temperature 0",
        "--align.weight inf",
        "--adapt.dropout 1",
        "--adapt.warmup 1.5",
        "--fuse.unseen-dropout 1.0",
        "--fuse.validate-every 0",
        "--prompt.history 0",
        "--evaluate.replicates 0",
        "--data.split nan nan nan",
        "--data.split 1.1 -0.2 0.1",
        "--name a/b",
        "--name ..",
    ],
)
def test_values_out_of_range_are_refused_by_name(arguments):
    name = arguments.split()[0].removeprefix("--").replace("-", "_")
    assert name in refusal(*arguments.split())


def test_an_unknown_stage_is_refused_with_the_nearest():
    assert "did you mean align" in refusal("--stages", "prepare,aline")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["collm-ml-1m", "--data", "a folder/with spaces", "--llm", "x/y", "--llm.revision", "abc"],
        ["ml-latest-small", "--data.split", "0.7", "0.2", "0.1", "--adapt.max-steps", "7", "--stages", "prepare,fuse"],
        ["--fuse.warm-start", "False", "--adapt.targets", "q_proj", "v_proj", "--adapt.learning-rate", "1e-05"],
    ],
)
def test_a_saved_config_is_the_same_when_read_again(arguments, tmp_path):
    config = parse(arguments)
    saved = tmp_path / "some-run" / "config.yaml"
    saved.parent.mkdir()
    saved.write_text(to_yaml(config))
    assert parse([str(saved)]) == config
    assert parse([str(saved), "--seed", "9"]) == dataclasses.replace(config, seed=9)


def test_none_takes_back_what_a_recipe_set(recipe):
    path = recipe("adapt: {max_steps: 5}\nname: named")
    assert parse([path]).adapt.max_steps == 5
    assert parse([path, "--adapt.max-steps", "None"]).adapt.max_steps is None
    assert parse([path, recipe("adapt: {max_steps: null}", "back")]).adapt.max_steps is None


def test_what_results_depend_on_leaves_out_how_a_run_is_carried_out():
    config = parse(["ml-latest-small"])
    settings = result_settings(config)
    flags = (
        "--workers 7 --workspace elsewhere --name other --stages prepare --data some/path --llm.revision x --llm x/y"
    )
    flags += " --adapt.micro-batch 3 --adapt.checkpoint-every 5 --evaluate.batch 3"
    moved = parse(["ml-latest-small", *flags.split()])
    assert result_settings(moved) == settings
    assert not {"workers", "workspace", "name", "stages", "data.path", "llm.model"} & set(settings)
    assert {"seed", "data.split", "adapt.rank", "prompt.template", "data.world.users"} <= set(settings)
    assert result_settings(parse(["ml-latest-small", "--adapt.rank", "4"])) != settings


def test_every_setting_says_what_it_is():
    tree = ast.parse(inspect.getsource(sellarec.config))
    for section in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        assert ast.get_docstring(section), section.name
        for field, following in zip(section.body, [*section.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and "default_factory" not in ast.unparse(field):
                said = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert said and following.value.value.strip(), f"{section.name}.{ast.unparse(field.target)}"


def test_help_names_every_flag_with_its_default():
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "train.py"), "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout.replace("_", "-")
    for name in NAMES:
        flag = f"--{name.replace('_', '-')} "
        assert flag in shown, flag
    assert shown.count("(default:") >= len(NAMES)
    assert all(stage in shown for stage in STAGES)
    assert all(name in shown for name in built_in_recipes())


def test_the_job_prints_a_mistake_in_one_line_and_ends_with_2():
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "train.py"), "--prompt.history", "60"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: prompt.history is 60") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["collm-ml-1m", "--data", "x", "--data.positive-rating", "3"], "data.positive_rating is 3"),
        (["ml-latest-small", "--data", "x", "--data.world.users", "5"], "data.world.users is 5"),
        (["--data.positive-rating", "3"], "data.positive_rating is 3"),
    ],
)
def test_data_settings_that_mean_nothing_for_the_source_are_refused(arguments, name):
    assert name in refusal(*arguments)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("align: {temperature: warm}", "align.temperature is 'warm'"),
        ("adapt: {max_steps: many}", "adapt.max_steps is 'many'"),
        ("seed:", "seed is None"),
        ("data: {split: [0.5, 0.5]}", r"data.split is \[0.5, 0.5\]"),
        ("adapt: 3", "adapt is a section"),
    ],
)
def test_a_value_that_a_recipe_gets_wrong_is_refused_with_recipe_and_setting(recipe, text, said):
    with pytest.raises(UserError, match=said) as caught:
        parse([recipe(text)])
    assert "mine.yaml" in str(caught.value)


def test_a_recipes_value_may_begin_with_a_dash(recipe):
    assert parse(["collm-ml-1m", recipe("data: {noun: --seed}"), "--data", "x"]).data.noun == "--seed"


@pytest.mark.parametrize("flags", [["--stages"], ["--stages", "--seed", "2"], ["--stages="], ["--stages", ","]])
def test_stages_without_a_name_are_refused(flags):
    assert "--stages names none" in refusal(*flags)


def test_stages_may_have_blanks_around_commas():
    assert parse(["--stages", "prepare, collab"]).stages == ("prepare", "collab")
    assert parse(["--stages=prepare , collab"]).stages == ("prepare", "collab")


@pytest.mark.parametrize("name", ["data.history_cap", "data.world.users"])
def test_a_number_beyond_all_bounds_is_refused(name):
    assert f"{name} is" in refusal(f"--{name.replace('_', '-')}", "1000000000000000")
