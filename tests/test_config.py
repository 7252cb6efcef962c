"""The configuration: what is laid over what, what is refused and how, and that a saved config is the same one again."""

import ast
import dataclasses
import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sellarec.config
from sellarec import command_line
from sellarec.checks import check
from sellarec.command_line import built_in_recipes, parse, parse_evaluation, read_recipe
from sellarec.config import COLLAB_MODELS, STAGES, Align, Collab, Config, Fuse, Tables, leaves, result_settings, to_yaml
from sellarec.errors import UserError

ROOT = Path(__file__).parents[1]
NAMES = [name for name, _, _ in leaves(Config())]
CODES = "--fuse.represent codes --fuse.tokens user item --fuse.train adapter --collab binary_mf"


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


def test_settings_take_the_values_of_built_in_recipes():
    """Which a command line doesn't check again."""
    for name in built_in_recipes():
        command_line._check_values(name, read_recipe(name)[1])


def test_recipes_of_data_leave_the_method_alone():
    """They can be laid over any other recipe: they name data and the prompt's form only."""
    recipes = {name: read_recipe(name)[1] for name in built_in_recipes()}
    of_data = {name: found for name, found in recipes.items() if found.get("data.source", "world") != "world"}
    assert {"collm-ml-1m", "ml-latest-small"} <= set(of_data)
    for settings in of_data.values():
        assert {setting.split(".")[0] for setting in settings} <= {"data", "prompt"}


def test_of_a_prepared_log_its_noun_and_what_it_is_known_to_hold_may_be_given():
    data = parse(["log", "--data", "x", "--data.noun", "book", "--data.expected", "8", "1", "1", "3", "4"]).data
    assert (data.source, data.path, data.noun, data.expected) == ("log", "x", "book", (8, 1, 1, 3, 4))


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
        ("--pretrain.epochs 2 --llm x/y", ["pretrain.epochs is 2", "x/y", "pretrain.continued True"]),
        ("--pretrain.continued True", ["pretrain.continued is True", "llm.model is embedded"]),
        (
            "--pretrain.continued True --llm x/y --pretrain.layers 2",
            ["pretrain.layers is 2", "pretrain.continued", "x/y"],
        ),
        ("--min-workers 3 --workers 2", ["min_workers is 3", "workers 2"]),
        ("--min-workers 0", ["min_workers is 0"]),
        ("--grow-every 5", ["grow_every is 5", "min_workers"]),
        ("--pretrain.hidden 60 --pretrain.heads 4", ["pretrain.hidden", "60", "pretrain.heads", "4"]),
        ("--prompt.history 60", ["prompt.history", "60", "data.history_cap", "50"]),
        ("--data.split 0.5 0.2 0.2", ["data.split", "0.5", "0.2"]),
        ("--align.rince-q 0.5", ["align.rince_q", "0.5", "align.contrastive", "info-nce"]),
        ("--align.rince-lambda 0.5", ["align.rince_lambda", "0.5", "align.contrastive", "info-nce"]),
        ("--align.history 5", ["align.history", "5", "align.side", "items"]),
        ("--align.side both --data.history-cap 20", ["align.history", "50", "data.history_cap", "20"]),
        ("--adapt.decay 0.2", ["adapt.decay", "0.2", "adapt.schedule", "cosine"]),
        ("--collab.decay 0.2", ["collab.decay", "0.2", "collab.schedule", "constant"]),
        ("--fuse.schedule wsd --fuse.warmup 0.6 --fuse.decay 0.5", ["fuse.warmup", "0.6", "fuse.decay", "0.5"]),
        ("--collab.beta2 0.9", ["collab.beta2", "0.9", "collab.model", "mf"]),
        ("--adapt.targets q_proj all-linear", ["adapt.targets", "q_proj", "all-linear"]),
        ("--adapt.targets", ["adapt.targets", "empty", "all-linear"]),
        ("--adapt.method full --adapt.rank 4", ["adapt.rank is 4", "adapt.method is full"]),
        ("--adapt.method full --adapt.targets q_proj", ["adapt.targets", "q_proj", "adapt.method is full"]),
        ("--adapt.dora True --fuse.compile True", ["fuse.compile is True", "adapt.dora is True"]),
        (
            "--llm.attention flash_attention_2",
            ["llm.attention is flash_attention_2", "llm.dtype is float32", "bfloat16"],
        ),
        ("--adapt.method full --fuse.train adapter", ["fuse.train is adapter", "adapt.method is full"]),
        (
            "--align.contrastive rince --align.rince-q 1 --align.temperature 0.01",
            ["rince_q is 1", "temperature 0.01"],
        ),
        ("--align.mask-share 0.2", ["align.mask_share is 0.2", "align.contrastive is info-nce"]),
        ("--align.weight 0", ["align.weight is 0", "align.semantic is trained", "--align.semantic frozen"]),
        (
            "--align.weight 0 --fuse.warm-start False --fuse.tokens semantic item",
            ["align.weight is 0", "align.semantic is trained"],
        ),
        (
            "--align.weight 0 --align.semantic frozen",
            ["align.weight is 0", "fuse.warm_start is True", "--fuse.warm-start False"],
        ),
        ("--align.weight 0 --fuse.tokens user item", ["align.weight is 0", "fuse.warm_start is True"]),
        ("--align.contrastive rlmrec-con", ["align.contrastive is rlmrec-con", "fuse.warm_start is True"]),
        (
            "--align.contrastive rlmrec-con --fuse.warm-start False --align.direction semantic-to-collab",
            ["align.direction is semantic-to-collab", "align.contrastive is rlmrec-con"],
        ),
        ("--align.contrastive darec", ["align.contrastive is darec", "fuse.warm_start is True"]),
        ("--align.centers 3", ["align.centers is 3", "align.contrastive is info-nce"]),
        (
            "--align.contrastive darec --fuse.warm-start False --align.temperature 0.1",
            ["align.temperature is 0.1", "align.contrastive is darec"],
        ),
        (
            "--align.contrastive darec --fuse.warm-start False --align.mask-equal False",
            ["align.mask_equal is False", "align.contrastive is darec"],
        ),
        ("--align.contrastive rlmrec-gen", ["align.contrastive is rlmrec-gen", "collab.model is mf", "lightgcn"]),
        ("--align.contrastive rlmrec-gen --collab sasrec", ["rlmrec-gen", "collab.model is sasrec"]),
        ("--distil.prompt {text}", ["distil.prompt is '{text}'", "no token"]),
        ("--distil.prompt Movie:{text!r}", ["distil.prompt is 'Movie:{text!r}'", "plainly"]),
        ("--fuse.tokens semantic --fuse.semantic frozen", ["fuse.train is tables projections", "fuse.semantic frozen"]),
        (
            "--fuse.train adapter --fuse.tokens user item --fuse.projections separate",
            ["fuse.train is adapter", "separate"],
        ),
        ("--fuse.tokens user item user", ["fuse.tokens", "user item user"]),
        ("--fuse.represent learned", ["fuse.represent is learned", "fuse.tokens is user item semantic"]),
        (
            "--fuse.represent learned --fuse.tokens user item",
            ["fuse.represent is learned", "fuse.train is tables projections"],
        ),
        (
            "--fuse.represent learned --fuse.tokens user --fuse.train adapter",
            ["fuse.represent is learned", "fuse.train is adapter"],
        ),
        *(
            (
                f"--fuse.represent learned --fuse.tokens user item --fuse.train tables --fuse.{setting}",
                [f"fuse.{named}", "fuse.represent is learned"],
            )
            for setting, named in (
                ("warm-start False", "warm_start is False"),
                ("projections separate", "projections is separate"),
                ("experts 2", "experts is 2"),
                ("norm none", "norm is none"),
            )
        ),
        (
            "--fuse.represent learned --fuse.tokens user --fuse.train tables --collab sasrec --fuse.learning-rate 1",
            ["fuse.learning_rate is 1", "fuse.train is tables"],
        ),
        ("--fuse.code dotted", ["fuse.code is dotted", "fuse.represent is collaborative"]),
        (CODES.replace(" user item", " item semantic"), ["fuse.represent is codes", "fuse.tokens is item semantic"]),
        (f"{CODES} --fuse.train tables adapter", ["fuse.represent is codes", "fuse.train is tables adapter"]),
        (f"{CODES} --fuse.train projections", ["fuse.represent is codes", "fuse.train is projections"]),
        (CODES.replace("binary_mf", "mf"), ["fuse.represent is codes", "collab.model is mf", "binary_mf"]),
        (f"{CODES} --collab.dim 20", ["fuse.represent is codes", "collab.dim is 20", "multiple of 8"]),
        (f"{CODES} --fuse.collab-score True", ["fuse.collab_score is True", "fuse.represent is codes"]),
        (f"{CODES} --fuse.norm none", ["fuse.norm is none", "fuse.represent is codes"]),
        (f"{CODES} --fuse.table-learning-rate 1", ["table_learning_rate is 1", "fuse.train is adapter"]),
        (f"{CODES} --adapt.method full", ["fuse.train is adapter", "adapt.method is full"]),
        ("--fuse.train tables tables", ["fuse.train", "tables tables"]),
        ("--fuse.tokens semantic item --fuse.projections separate", ["projections is separate", "semantic item"]),
        ("--fuse.tokens semantic --fuse.experts 2", ["fuse.experts is 2", "fuse.tokens is semantic"]),
        ("--fuse.tokens semantic --fuse.warm-start False", ["fuse.warm_start is False", "fuse.tokens is semantic"]),
        ("--fuse.tokens semantic --fuse.unseen-dropout 0", ["fuse.unseen_dropout is 0", "fuse.tokens is semantic"]),
        (
            "--fuse.train projections --fuse.table-learning-rate 1",
            ["table_learning_rate is 1", "fuse.train is projections"],
        ),
        ("--fuse.train adapter --fuse.table-optimizer sgd", ["table_optimizer is sgd", "fuse.train is adapter"]),
        (
            "--fuse.collab-score True --fuse.represent learned --fuse.tokens user item --fuse.train tables",
            ["fuse.collab_score is True", "fuse.represent is learned"],
        ),
        ("--fuse.collab-score True --fuse.loss sequence", ["fuse.collab_score", "fuse.loss is sequence"]),
        ("--fuse.language-weights 0 1", ["fuse.language_weights is (0.0, 1.0)", "fuse.collab_score is False"]),
        ("--fuse.collab-score True --fuse.language-weights 1 1", ["fuse.language_weights is 1.0 1.0", "each once"]),
        ("--fuse.collab-score True --fuse.language-weights -1 1", ["fuse.language_weights is -1.0 1.0", "from 0 on"]),
        ("--fuse.train tables", ["fuse.train is tables", "fuse.tokens is user item semantic"]),
        ("--align.user-vectors profile", ["align.user_vectors is profile", "align.side is items"]),
        (
            "--adapt.targets q_proj lm_head --llm.dtype bfloat16",
            ["adapt.targets names lm_head", "llm.dtype is bfloat16"],
        ),
        (
            "--align.side users --align.user-vectors profile --align.history 3",
            ["align.history is 3", "user_vectors profile"],
        ),
        ("--align.side users --distil.profile-items 3", ["distil.profile_items is 3", "align.user_vectors liked"]),
        ("--align.side both --align.user-vectors profile --distil.profile {titles}", ["distil.profile is", "titles"]),
        ("--fuse.train adapter --fuse.tokens user --fuse.warm-start False", ["fuse.train", "fuse.warm_start is False"]),
        ("--fuse.train adapter --fuse.tokens user --fuse.experts 2", ["fuse.train is adapter", "fuse.experts is 2"]),
        (
            "--fuse.train tables --fuse.tokens user --fuse.learning-rate 1",
            ["learning_rate is 1", "fuse.train is tables"],
        ),
    ],
)
def test_contradictions_are_refused_naming_both(arguments, named):
    message = refusal(*arguments.split())
    assert all(word in message for word in named), message


def test_without_tokens_the_adapter_alone_is_trained():
    """In a recipe and by flag."""
    check(Config(fuse=Fuse(tokens=(), train=("adapter",))))
    with pytest.raises(
        UserError, match=r"fuse.tokens names none.*fuse.train is tables projections.*--fuse.train adapter"
    ):
        check(Config(fuse=Fuse(tokens=())))
    for flags in ("", "--fuse.train adapter --fuse.warm-start False", "--fuse.train adapter --fuse.collab-score True"):
        assert "fuse.tokens names none" in refusal("--fuse.tokens", *flags.split())
    with pytest.raises(UserError, match=r"fuse.train names nothing"):
        check(Config(fuse=Fuse(train=())))


@pytest.mark.parametrize(
    "arguments",
    [
        "--align.weight 0 --align.semantic frozen --fuse.warm-start False",
        "--align.weight 0 --align.semantic frozen --fuse.tokens semantic",
        "--align.weight 0 --fuse.warm-start False --fuse.tokens user item",
        "--align.weight 0 --fuse.represent learned --fuse.tokens user item --fuse.train tables",
        "--fuse.tokens semantic --fuse.norm none",
        "--fuse.tokens item user --fuse.train projections --fuse.projections separate --fuse.experts 4",
        "--fuse.tokens user item --fuse.train adapter",
        "--fuse.tokens user --fuse.train tables --collab sasrec --fuse.learning-rate 0.001",
        "--fuse.train adapter tables projections --fuse.warm-start False",
        "--fuse.represent learned --fuse.tokens user item --fuse.train tables",
        "--fuse.represent learned --fuse.tokens item --fuse.train tables adapter --fuse.learning-rate 0.001",
        f"{CODES} --fuse.code dotted --collab.dim 64",
    ],
)
def test_choices_of_fuse_that_go_together_are_taken(arguments):
    assert parse(arguments.split()).fuse.tokens


@pytest.mark.parametrize("name", ["tokens", "train"])
def test_the_order_in_which_fuse_names_things_changes_no_fingerprint(name):
    """Nor what the run's name belongs to, nor the saved config."""
    values = {"tokens": ("user", "item", "semantic"), "train": ("tables", "projections", "adapter")}[name]
    others = [] if name == "tokens" else ["--fuse.tokens", "user", "item"]
    for length in (2, 3):
        for some in itertools.combinations(values, length):
            found = [parse([*others, f"--fuse.{name}", *order]) for order in itertools.permutations(some)]
            assert all(config == found[0] for config in found)
            assert getattr(found[0].fuse, name) == some


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
        "--align.block 0",
        "--align.centers 0 --align.contrastive darec --fuse.warm-start False",
        "--align.rince-q 0 --align.contrastive rince",
        "--align.rince-lambda 1.5 --align.contrastive rince",
        "--align.mask-share 1 --align.contrastive rlmrec-gen --collab lightgcn",
        "--align.mask-share 0 --align.contrastive rlmrec-gen --collab lightgcn",
        "--adapt.dropout 1",
        "--adapt.warmup 1.5",
        "--adapt.beta2 1",
        "--pretrain.beta2 -0.1",
        "--adapt.decay 0 --adapt.schedule wsd",
        "--fuse.unseen-dropout 1.0",
        "--fuse.experts 0",
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
    flags += " --adapt.micro-batch 3 --adapt.checkpoint-every 5 --evaluate.batch 3 --align.block 7"
    flags += " --adapt.compile True --fuse.compile True --llm.attention eager"
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
        (["log", "--data", "x", "--data.k-core", "5"], "data.k_core is 5, but data.source is log"),
        (["log", "--data", "x", "--data.history-cap", "60"], "data.history_cap is 60, but data.source is log"),
        (["log", "--data", "x", "--data.split", "0.6", "0.2", "0.2"], "data.split is (0.6, 0.2, 0.2)"),
        (["log", "--data", "x", "--data.bad-rows", "drop"], "data.bad_rows is drop"),
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


def with_collab(align: Any = "uauc", **settings: Any) -> Config:
    """A ranking loss is selected by UAUC, unless said otherwise."""
    usual = {} if settings.get("loss", "bce") == "bce" else {"select_on": "uauc"}
    return Config(collab=Collab(**usual | settings), align=Align(select_on=align))


SEQUENCES = {"model": "sasrec", "train_on": "sequences"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            {"loss": "bpr", "select_on": "auc"},
            ["collab.loss is bpr", "collab.select_on is auc", "--collab.select-on uauc"],
        ),
        ({"loss": "softmax", "align": "auc"}, ["align.select_on is auc", "--align.select-on uauc"]),
        ({"loss": "full-softmax", "select_on": "auc"}, ["collab.loss is full-softmax", "--collab.select-on uauc"]),
        ({"negatives": "popularity"}, ["collab.negatives is popularity", "collab.loss is bce"]),
        ({"loss": "full-softmax", "negatives": "in-batch"}, ["collab.negatives is in-batch", "full-softmax"]),
        ({"negatives_per_row": 2}, ["collab.negatives_per_row is 2", "collab.loss is bce"]),
        (
            {"loss": "bpr", "negatives": "in-batch", "negatives_per_row": 2},
            ["collab.negatives_per_row is 2", "collab.negatives in-batch"],
        ),
        ({"shared_negatives": True}, ["collab.shared_negatives is True", "collab.loss is bce"]),
        ({"loss": "bpr", "negatives": "in-batch", "shared_negatives": True}, ["collab.shared_negatives is True"]),
        ({"loss": "bpr", "log_q": False}, ["collab.log_q is False", "collab.loss is bpr"]),
        ({"loss": "softmax", "plain_score": True}, ["collab.plain_score is True", "collab.temperature is None"]),
        (
            {"plain_score": True, "temperature": 0.2},
            ["collab.plain_score and collab.biases are True", "--collab.biases False"],
        ),
        (
            {"model": "binary_mf", "plain_score": True, "temperature": 0.2},
            ["collab.plain_score is True", "collab.model is binary_mf"],
        ),
        ({"init_from": "a", "init_items": "b"}, ["collab.init_items is b", "collab.init_from a"]),
        ({"model": "sasrec", "dropout": 1.0}, ["collab.dropout is 1", "below 1"]),
        ({"model": "mf", "dropout": 0.1}, ["collab.dropout is 0.1", "collab.model is mf", "doesn't read it"]),
        ({"model": "mf", "history": 5}, ["collab.history is 5", "mf"]),
        ({"model": "svdpp", "layers": 3}, ["collab.layers is 3", "svdpp"]),
        ({"model": "mf", "learning_rate": 0.1}, ["collab.learning_rate is 0.1", "mf"]),
        ({"model": "lightgcn", "heads": 2}, ["collab.heads is 2", "lightgcn"]),
        ({"model": "lightgcn", "user_rows": False}, ["collab.user_rows is False", "lightgcn"]),
        ({"model": "sasrec", "hidden": (8, 8)}, ["collab.hidden is (8, 8)", "sasrec"]),
        ({"model": "din", "layers": 3}, ["collab.layers is 3", "din"]),
        ({"model": "sasrec", "dim": 32, "heads": 3}, ["collab.dim is 32", "collab.heads 3"]),
        ({"model": "din", "loss": "full-softmax"}, ["collab.model is din", "no product", "full-softmax"]),
        ({"model": "din", "loss": "softmax", "negatives": "in-batch"}, ["collab.model is din", "no product"]),
        ({"model": "din", "loss": "bpr", "negatives": "in-batch"}, ["collab.model is din", "no product"]),
        ({"model": "din", "loss": "bpr", "shared_negatives": True}, ["collab.model is din", "no product"]),
        ({"model": "din", "dropout": 0.1, "select_on": "ndcg@10"}, ["collab.model is din", "ndcg@10", "auc or uauc"]),
        ({"model": "din", "select_on": "recall@20"}, ["collab.model is din", "recall@20"]),
        ({"model": "mf", "train_on": "sequences", "loss": "bpr"}, ["train_on is sequences", "collab.model is mf"]),
        (SEQUENCES | {"user_rows": False}, ["train_on is sequences", "collab.loss bce"]),
        (SEQUENCES | {"loss": "bpr"}, ["train_on is sequences", "collab.user_rows True"]),
        (
            SEQUENCES | {"loss": "bpr", "negatives": "in-batch", "user_rows": False},
            ["train_on is sequences", "collab.negatives in-batch"],
        ),
        (
            SEQUENCES | {"loss": "bpr", "shared_negatives": True, "user_rows": False},
            ["train_on is sequences", "collab.shared_negatives True"],
        ),
        *(({"model": "sasrec", name: 0}, [f"collab.{name} is 0"]) for name in ("layers", "heads", "history", "dim")),
        ({"loss": "bpr", "negatives_per_row": 0}, ["collab.negatives_per_row is 0"]),
        ({"model": "din", "hidden": (0,)}, ["collab.hidden"]),
        ({"model": "din", "hidden": (8, -1)}, ["collab.hidden"]),
        ({"model": "fism", "loss": "bpr"}, ["collab.loss is bpr", "collab.model is fism", "trained with bce"]),
        ({"model": "fism", "loss": "full-softmax"}, ["collab.loss is full-softmax", "collab.model is fism"]),
        ({"model": "fism", "temperature": 0.2}, ["collab.temperature is 0.2", "collab.model is fism", "doesn't read"]),
        ({"model": "fism", "biases": False}, ["collab.biases is False", "collab.model is fism", "doesn't read"]),
        ({"model": "fism", "user_rows": False}, ["collab.user_rows is False", "fism"]),
        ({"model": "din", "temperature": 0.2}, ["collab.temperature is 0.2", "collab.model is din", "doesn't read"]),
        ({"model": "mf", "temperature": 0.0}, ["collab.temperature is 0.0"]),
        ({"model": "din", "history": 51}, ["collab.history is 51", "data.history_cap keeps only 50"]),
    ],
)
def test_collaborative_settings_that_contradict_each_other_are_refused_naming_both(settings, named):
    with pytest.raises(UserError) as caught:
        check(with_collab(**settings))
    assert all(word in str(caught.value) for word in named), caught.value


@pytest.mark.parametrize(
    "settings",
    [
        *({"model": name} for name in COLLAB_MODELS),
        {"loss": "bpr", "negatives": "in-batch"},
        {"model": "din", "loss": "softmax", "negatives": "popularity", "negatives_per_row": 3},
        {"model": "lightgcn", "layers": 3, "loss": "full-softmax"},
        {"model": "svdpp", "history": 5, "loss": "bpr", "select_on": "ndcg@10"},
        {"model": "svdpp", "temperature": 0.1, "loss": "softmax"},
        {"model": "fism", "history": 9, "dropout": 0.3, "select_on": "ndcg@10"},
        {"model": "sasrec", "heads": 2, "layers": 1, "dropout": 0.2, "history": 9},
        SEQUENCES | {"loss": "softmax", "user_rows": False},
        SEQUENCES | {"loss": "full-softmax", "user_rows": False},
        {"model": "mf", "biases": False, "global_mean": False, "table_optimizer": "adam"},
    ],
)
def test_collaborative_settings_that_go_together_are_taken(settings):
    check(with_collab(**settings))


def test_collaborative_settings_are_flags():
    flags = "--collab din --collab.loss bpr --collab.negatives popularity --collab.hidden 8 4 --collab.biases False"
    collab = parse(f"{flags} --collab.select-on uauc --align.select-on uauc".split()).collab
    assert (collab.model, collab.loss, collab.negatives, collab.hidden) == ("din", "bpr", "popularity", (8, 4))
    assert not collab.biases and set(COLLAB_MODELS) == {"mf", "svdpp", "lightgcn", "sasrec", "din", "fism", "binary_mf"}


def test_every_setting_of_some_models_is_read_by_one():
    from importlib import import_module

    read = {name for model in COLLAB_MODELS for name in import_module(f"sellarec.collab.models.{model}").Model.reads}
    assert read == set(sellarec.config.MODEL_SETTINGS) <= {f.name for f in dataclasses.fields(Collab)}


def test_the_models_are_the_files_of_their_folder():
    folder = ROOT / "sellarec" / "collab" / "models"
    assert set(COLLAB_MODELS) == {path.stem for path in folder.glob("*.py")} - {"__init__"}


def test_settings_of_alignment_that_go_together_are_taken():
    published = (
        "--align.contrastive rince --align.rince-q 0.5 --align.rince-lambda 1 --align.direction semantic-to-collab"
    )
    assert parse([*published.split(), "--align.mask-equal", "False"]).align.rince_q == 0.5
    users = parse(
        ["--align.side", "users", "--align.history", "5", "--data.history-cap", "20", "--align.semantic", "frozen"]
    )
    assert (users.align.side, users.align.history, users.align.semantic) == ("users", 5, "frozen")
    assert parse(["--align.side", "both", "--collab", "sasrec", "--collab.history", "7"]).align.history == 50
    contrast = ["--align.contrastive", "rlmrec-con"]
    assert parse([*contrast, "--fuse.warm-start", "False"]).align.contrastive == "rlmrec-con"
    assert parse([*contrast, "--fuse.tokens", "semantic"]).fuse.warm_start, "no token is made of a row"
    parts = parse(["--align.contrastive", "darec", "--align.centers", "8", "--fuse.warm-start", "False"])
    assert (parts.align.contrastive, parts.align.centers) == ("darec", 8)
    masked = ["--align.contrastive", "rlmrec-gen", "--align.mask-share", "0.3", "--collab", "lightgcn"]
    assert parse(masked).fuse.warm_start, "it leaves a projection of rows"


EVALUATION = "--artifact a --data d --out o.json"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--ranking all", "--ranking is 'all'"),
        ("--ranking candidates:0", "--ranking is 'candidates:0'"),
        ("--ranking full --cutoffs 5 5", "--cutoffs are (5, 5)"),
        ("--ranking full --cutoffs 0", "--cutoffs are (0,)"),
        ("--cutoffs 50", "--cutoffs are 50, but --ranking is none"),
    ],
)
def test_settings_of_an_evaluation_that_mean_nothing_are_refused(arguments, named):
    with pytest.raises(UserError) as caught:
        parse_evaluation(f"{EVALUATION} {arguments}".split())
    assert named in str(caught.value)


def test_settings_of_an_evaluation_that_go_together_are_taken():
    assert parse_evaluation(f"{EVALUATION} --ranking candidates:9 --cutoffs 50 3".split()).cutoffs == (50, 3)
    assert parse_evaluation(EVALUATION.split()).ranking == "none"


def test_how_tables_are_shared_out_affects_no_result():
    base = result_settings(Config())
    assert result_settings(Config(tables=Tables(sharding="table-wise", placement="uvm"))) == base
    assert result_settings(Config(tables=Tables(dtype="float16"))) != base
