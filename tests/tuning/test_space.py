"""Search spaces: what is read, what is refused, what is drawn."""

import random
import re
import textwrap
from pathlib import Path

import pytest
import yaml

from sellarec.artifacts import Place, Store
from sellarec.checks import check
from sellarec.command_line import parse_sweep
from sellarec.config import Config, leaves
from sellarec.errors import UserError
from sellarec.pipeline import marks_of
from sellarec.run import Run
from sellarec.training.progress import Console
from sellarec.tuning.space import KINDS, Domain, check_space, read_space, samples, space_folder, with_settings

BUILT_IN = sorted(path.stem for path in space_folder().glob("*.yaml"))


def space_of(folder: Path, content: object) -> list[Domain]:
    path = folder / "space.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return read_space(str(path))


def checked(
    folder: Path, space: list[Domain], stage: str = "align", base: Config | None = None, **settings: object
) -> list[str]:
    """The stages that a space's trials read, on a config (the demo's)."""
    config = with_settings(base or Config(name="test"), settings)
    this = Run(config, Store(Place.of(str(folder / "w"))), Console())

    def marks(trial: Config) -> dict[str, str]:
        this.config = trial
        return marks_of(this, stage)

    return check_space(space, config, stage, marks)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_spaces_belong_to_the_stage_that_they_are_named_after(name: str, tmp_path: Path) -> None:
    read = checked(tmp_path, read_space(name), name)
    assert read[0] == "prepare" and name not in read


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_spaces_hold_the_defaults_that_their_trials_are_compared_with(name: str) -> None:
    defaults = {setting: value for setting, value, _ in leaves(Config())}
    for domain in read_space(name):
        default, values = defaults[domain.name], domain.values
        assert default in values if domain.kind == "choice" else values[0] <= default <= values[1], domain.name


def test_the_space_that_the_documentation_shows_is_one_of_the_sweep_that_it_shows(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text()
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)]
    command, shown = blocks[0], next(block for block in blocks if block.startswith("align."))
    sweep = parse_sweep(command.partition("tune.py ")[2].split())
    space = space_of(tmp_path, shown)
    assert {domain.kind for domain in space} == set(KINDS)
    assert checked(tmp_path, space, sweep.stage, sweep.base())[0] == "prepare"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["nothing"]),
        ("[1, 2]", ["[1, 2]"]),
        ("a: [", ["not readable YAML"]),
        ({"align.temprature": {"uniform": [0, 1]}}, ["align.temprature", "did you mean align.temperature"]),
        ({"align.weight": [0.1, 0.2]}, ["align.weight", "choice, uniform, loguniform, randint"]),
        ({"align.weight": {"normal": [0, 1]}}, ["normal"]),
        ({"align.weight": {"uniform": [0, 1], "choice": [1, 2]}}, ["align.weight"]),
        ({"align.weight": {"choice": []}}, ["align.weight", "two values"]),
        ({"align.weight": {"choice": [0.3]}}, ["a single value is a flag"]),
        ({"align.weight": {"choice": [1, 1.0]}}, ["name each once"]),
        ({"align.weight": {"choice": [0.3, "much"]}}, ["align.weight", "much"]),
        ({"align.weight": {"uniform": [0.5, 0.1]}}, ["[0.5, 0.1]", "below the upper"]),
        ({"align.weight": {"uniform": [0.5, 0.5]}}, ["below the upper"]),
        ({"align.weight": {"uniform": [0.1, 0.2, 0.3]}}, ["two numbers"]),
        ({"align.weight": {"uniform": [0.1, "x"]}}, ["two numbers"]),
        ({"align.weight": {"uniform": [0.1, float("inf")]}}, ["two numbers"]),
        ({"align.weight": {"loguniform": [0.0, 1.0]}}, ["above 0"]),
        ({"align.weight": {"randint": [1, 3]}}, ["align.weight", "takes no whole number", "uniform"]),
        ({"align.hidden": {"uniform": [1, 3]}}, ["align.hidden", "takes no fraction", "randint"]),
        ({"align.hidden": {"randint": [1.5, 3]}}, ["whole numbers"]),
    ],
)
def test_spaces_that_are_refused_when_they_are_read(content: object, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        space_of(tmp_path, content)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_a_space_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no search space 'none'.*align"):
        read_space("none")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"align.temperature": {"uniform": [-1, 1]}}, ["align.temperature", "at least"]),
        ({"collab.dim": {"randint": [8, 64]}}, ["collab.dim", "multiple of 4"]),
        # contradictory together: one of the two contrastive losses doesn't read rince_q
        (
            {"align.contrastive": {"choice": ["info-nce", "rince"]}, "align.rince_q": {"uniform": [0.1, 0.5]}},
            ["align.rince_q", "info-nce", "narrow the space"],
        ),
        ({"collab.dim": {"choice": [16, 32]}}, ["collab.dim", "stage collab", "--stage collab"]),
        ({"data.history_cap": {"choice": [20, 30]}}, ["data.history_cap", "stage prepare"]),
        ({"fuse.learning_rate": {"uniform": [0.1, 0.2]}}, ["fuse.learning_rate", "changes nothing that stage align"]),
        ({"workers": {"choice": [1, 2]}}, ["workers", "changes nothing"]),
        ({"seed": {"choice": [1, 2]}}, ["seed", "changes what stage"]),
    ],
)
def test_spaces_that_are_refused_for_the_stage(content: dict, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        checked(tmp_path, space_of(tmp_path, content))
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_what_an_earlier_stage_does_not_read_is_the_stages_own(tmp_path: Path) -> None:
    space = space_of(tmp_path, {"collab.dim": {"choice": [16, 32]}})
    assert "collab" not in checked(tmp_path, space, **{"align.init": "scratch"})
    both = space_of(tmp_path, {"align.init": {"choice": ["scratch", "collab"]}})
    assert "collab" in checked(tmp_path, both)


def test_choices_are_as_the_setting_takes_them(tmp_path: Path) -> None:
    content = {
        "fuse.tokens": {"choice": [["user", "item"], ["semantic"]]},
        "align.epochs": {"choice": [1, 2]},
        "align.max_steps": {"choice": [None, 10]},
        "fuse.warm_start": {"choice": [True, False]},
    }
    found = {domain.name: domain for domain in space_of(tmp_path, content)}
    assert found["fuse.tokens"].values == (("user", "item"), ("semantic",))
    assert found["fuse.tokens"].value("user item") == ("user", "item")
    # an int would make another fingerprint than the recipe that is read back
    assert [type(value) for value in found["align.epochs"].values] == [float, float]
    assert found["align.max_steps"].values == (None, 10)
    assert found["fuse.warm_start"].value(False) is False


@pytest.mark.parametrize(("kind", "low", "high"), [("uniform", 0.1, 0.7), ("loguniform", 1e-5, 1.0), ("randint", 1, 3)])
def test_draws_lie_within_the_bounds_and_reach_both_ends(kind: str, low: float, high: float) -> None:
    domain, source = Domain("x", kind, (low, high)), random.Random(0)
    drawn = [domain.draw(source) for _ in range(500)]
    assert all(low <= value <= high for value in drawn)
    if kind == "randint":
        assert set(drawn) == {1, 2, 3}
    else:
        assert all(float(f"{value:.4g}") == value for value in drawn)
    if kind == "loguniform":
        assert 0.3 < sum(value < 10**-2.5 for value in drawn) / len(drawn) < 0.7


def test_a_rounded_number_stays_within_the_bounds() -> None:
    assert Domain("x", "uniform", (0.123456, 1.0)).value(0.12346) >= 0.123456


def test_samples_hold_each_extreme_and_are_the_same_again() -> None:
    space = [Domain(f"s{number}", "choice", tuple(range(10))) for number in range(4)]
    found = samples(space, 1)
    assert found == samples(space, 1)
    assert all({settings[domain.name] for settings in found} == set(range(10)) for domain in space)
    # where there are few combinations, all of them
    few = samples([Domain("a", "uniform", (0.0, 1.0)), Domain("b", "choice", (1, 2))], 1)
    assert all({"a": a, "b": b} in few for a in (0.0, 1.0) for b in (1, 2))


def test_settings_are_laid_over_a_config() -> None:
    config = with_settings(Config(), {"align.temperature": 0.7, "data.world.users": 9, "seed": 3})
    assert (config.align.temperature, config.data.world.users, config.seed) == (0.7, 9, 3)
    assert config.align.weight == Config().align.weight
    check(config)
