"""The search space of a sweep: which settings are drawn, and from what.

A space is a YAML file of `SETTING: {KIND: ...}`, with a dotted name of a setting and one of the kinds

    choice: [VALUE, VALUE, ...]      one of these
    uniform: [LOW, HIGH]             a number between the two
    loguniform: [LOW, HIGH]          a number between the two whose logarithm is uniform
    randint: [LOW, HIGH]             a whole number between the two, both included

Drawn numbers are rounded to DIGITS significant digits, so that they can be read and written down.
"""

import dataclasses
import difflib
import importlib.resources
import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from sellarec.checks import check
from sellarec.command_line import typed
from sellarec.config import CHANGEABLE, Config, leaves
from sellarec.errors import UserError

VALUE = "value"
"""What trials are compared by, in what they report: the best so far of the sweep's metric on the valid split."""

EVALUATION = "evaluation"
"""How many evaluations a trial has behind it, in what it reports."""

DIGITS = 4

KINDS = ("choice", "uniform", "loguniform", "randint")

CORNERS = 256
"""Combinations of lowest and highest values, or of all choices, that are checked: all where there are no more."""

DRAWS = 64
"""Draws that are checked beside them."""


@dataclass(frozen=True)
class Domain:
    """What a setting is drawn from.

    Attributes:
        name: dotted name of the setting.
        kind: one of KINDS.
        values: the choices, as the setting takes them; else the lowest and the highest value.
    """

    name: str
    kind: str
    values: tuple[Any, ...]

    @property
    def labels(self) -> tuple[Any, ...]:
        """The choices as plain values: several values of one choice are joined by spaces."""
        return tuple(" ".join(map(str, value)) if isinstance(value, tuple) else value for value in self.values)

    def may_change_in(self, stage: str) -> bool:
        """Whether the setting is one of a stage's that may change while it trains."""
        section, _, name = self.name.rpartition(".")
        return section == stage and name in CHANGEABLE and all(isinstance(value, float) for value in self.values)

    def label(self, value: Any) -> Any:
        """Of a value what is drawn, of which `value` makes it: a plain number or text."""
        return self.labels[self.values.index(value)] if self.kind == "choice" else value

    def value(self, drawn: Any) -> Any:
        """The setting of what was drawn: of a label its choice, of a number the rounded one."""
        if self.kind == "choice":
            return self.values[self.labels.index(drawn)]
        if self.kind == "randint":
            return int(drawn)
        return min(max(float(f"{drawn:.{DIGITS}g}"), self.values[0]), self.values[1])

    def draw(self, random: random.Random) -> Any:
        """A value of the setting."""
        low, high = self.values[0], self.values[-1]
        if self.kind == "choice":
            return random.choice(self.values)
        if self.kind == "randint":
            return random.randint(low, high)
        if self.kind == "uniform":
            return self.value(random.uniform(low, high))
        return self.value(math.exp(random.uniform(math.log(low), math.log(high))))


def space_folder() -> Path:
    return Path(str(importlib.resources.files("sellarec") / "spaces"))


def read_space(space: str) -> list[Domain]:
    """The domains of a search space, from a built-in name or a YAML file.

    Raises:
        UserError: no such space, not YAML, empty, a name that is no setting, or values that the setting can't take.
    """
    path = Path(space) if space.endswith((".yaml", ".yml")) else space_folder() / f"{space}.yaml"
    if not path.is_file():
        built_in = ", ".join(sorted(file.stem for file in space_folder().glob("*.yaml")))
        raise UserError(f"there is no search space '{space}': give a .yaml file that exists or one of {built_in}")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"search space {path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(
            f"search space {path} holds {'nothing' if not content else repr(content)}: settings are needed, like "
            "'align.temperature: {loguniform: [0.05, 1.0]}'"
        )
    return [_domain(path, str(name), given) for name, given in content.items()]


def _domain(path: Path, name: str, given: Any) -> Domain:
    types = {known: f.type for known, _, f in leaves(Config())}
    if name not in types:
        near = difflib.get_close_matches(name, types, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "`jobs/tune.py --help` lists every setting"
        raise UserError(f"search space {path}: there is no setting '{name}'; {hint}")
    if not (isinstance(given, dict) and len(given) == 1 and set(given) <= set(KINDS)):
        raise UserError(f"search space {path}: {name} is {given!r}, but one of {', '.join(KINDS)} is needed")
    ((kind, values),) = given.items()
    if not isinstance(values, list) or len(values) < 2:
        raise UserError(
            f"search space {path}: {name} has {kind} {values!r}, but a list of "
            f"{'two values or more' if kind == 'choice' else 'a lowest and a highest value'} is needed; a single value is a flag"
        )
    if kind == "choice":
        domain = Domain(name, kind, tuple(typed(name, value) for value in values))
        if len(set(domain.labels)) < len(values):
            raise UserError(f"search space {path}: {name} has choice {values}: name each once")
        return domain
    number = int if kind == "randint" else float
    if len(values) != 2 or not all(type(value) in (int, number) and math.isfinite(value) for value in values):
        what = "whole numbers" if number is int else "numbers"
        raise UserError(
            f"search space {path}: {name} has {kind} {values}, but two {what}, the lowest first, are needed"
        )
    if number not in (types[name], *get_args(types[name])):
        instead = "choice, uniform or loguniform" if number is int else "choice or randint"
        raise UserError(
            f"search space {path}: {name} has {kind}, but takes no {'whole number' if number is int else 'fraction'}: take "
            f"{instead}"
        )
    low, high = number(values[0]), number(values[1])
    if low >= high:
        raise UserError(
            f"search space {path}: {name} has {kind} [{low}, {high}]: the lower bound must be below the upper one"
        )
    if kind == "loguniform" and low <= 0:
        raise UserError(f"search space {path}: {name} has loguniform [{low}, {high}]: both must be above 0")
    return Domain(name, kind, (low, high))


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """A config with other values of some settings, by dotted name."""

    def replaced(section: Any, path: list[str], value: Any) -> Any:
        name, *rest = path
        return dataclasses.replace(section, **{name: replaced(getattr(section, name), rest, value) if rest else value})

    for name, value in settings.items():
        config = replaced(config, name.split("."), value)
    return config


def samples(space: list[Domain], seed: int) -> list[dict[str, Any]]:
    """Settings by which a space is checked: combinations of its extremes, and draws, the same ones for a seed."""
    source = random.Random(seed)
    if math.prod(len(domain.values) for domain in space) <= CORNERS:
        corners = [list(values) for values in itertools.product(*(domain.values for domain in space))]
    else:
        corners = [[source.choice(domain.values) for domain in space] for _ in range(CORNERS)]
        # each extreme of each setting at least once
        for place, domain in enumerate(space):
            for value in domain.values:
                corners.append([other.draw(source) for other in space])
                corners[-1][place] = value
    drawn = [[domain.draw(source) for domain in space] for _ in range(DRAWS)]
    return [dict(zip((domain.name for domain in space), values, strict=True)) for values in [*corners, *drawn]]


def check_space(
    space: list[Domain], config: Config, stage: str, marks_of: Callable[[Config], Mapping[str, str]]
) -> list[str]:
    """Refuse a space of which some values can't be trained with, or don't belong to the stage.

    Args:
        stage: the stage whose trials are compared.
        marks_of: the fingerprints of the stage and of all that it reads, by stage.

    Returns:
        The stages that any trial reads, directly or through another one.

    Raises:
        UserError: a value, or a combination of some, that `check` refuses; a setting that changes nothing that the stage makes,
            or that changes what a stage before it makes.
    """
    found = samples(space, config.seed)
    for settings in found:
        try:
            check(with_settings(config, settings))
        except UserError as error:
            shown = ", ".join(f"{name} {value}" for name, value in settings.items())
            raise UserError(
                f"the search space holds {shown}, which no trial can be trained with: {error}; narrow the space so that all "
                "of it can"
            ) from error
    before: dict[str, str] = {}
    for domain in space:
        marks = []
        for value in domain.values:
            marks.append(marks_of(with_settings(config, {**found[0], domain.name: value})))
            for name, mark in marks[-1].items():
                if name != stage and before.setdefault(name, mark) != mark:
                    raise UserError(
                        f"the search space draws {domain.name}, which changes what stage {name} makes: that runs once, before "
                        f"the trials of {stage}; leave it out, or sweep --stage {name}"
                    )
        if len({each[stage] for each in marks}) < len(marks):
            raise UserError(
                f"the search space draws {domain.name}, which changes nothing that stage {stage} makes: leave it out"
            )
    return list(before)
