"""Settings that change while a stage trains: `STAGE.changes`, each a text like "3 temperature=0.15 learning_rate=0.002", which
says what holds after the third evaluation on the valid split. Population-based training finds such (arXiv 1711.09846)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sellarec.config import CHANGEABLE, Config, Selection
from sellarec.errors import UserError


@dataclass(frozen=True)
class Window:
    """A part of a training in which no setting changes.

    Attributes:
        first: how many evaluations on the valid split lie before it.
        last: with how many it ends; None: it goes on to the end.
        config: what holds in it, without changes.
        changed: the stage's settings that are set where it begins.
    """

    first: int
    last: int | None
    config: Config
    changed: Mapping[str, float] = field(default_factory=dict)

    def in_words(self) -> str:
        settings = ", ".join(f"{name} {value:g}" for name, value in self.changed.items())
        return f"after evaluation {self.first}: {settings}"


def in_words(evaluations: int, settings: Mapping[str, float]) -> str:
    """A change as a setting takes it: what holds after so many evaluations, by the names of the stage's settings."""
    return " ".join([str(evaluations), *(f"{name}={value!r}" for name, value in settings.items())])


def windows(config: Config, stage: str) -> list[Window]:
    """The parts of a stage's training, in order: one where nothing changes.

    Raises:
        UserError: a change that can't be read, out of order, or of a setting that can't be changed on the way.
    """
    section: Any = getattr(config, stage, None)
    if not isinstance(section, Selection) or not section.changes:
        return [Window(0, None, config)]
    read = [_read(stage, section, text) for text in section.changes]
    starts = [0, *(evaluations for evaluations, _ in read)]
    if sorted(set(starts)) != starts:
        raise UserError(
            f"{stage}.changes is {list(section.changes)}, but each is to begin with a number of evaluations, 1 or more and "
            "more than that of the one before: order them, and name each number once"
        )
    section = dataclasses.replace(section, changes=())
    found = []
    for start, end, (_, settings) in zip(starts, [*starts[1:], None], [(0, {}), *read], strict=True):
        section = dataclasses.replace(section, **settings)
        found.append(Window(start, end, dataclasses.replace(config, **{stage: section}), settings))
    return found


def _read(stage: str, section: Selection, text: str) -> tuple[int, dict[str, float]]:
    """Evaluations, and what holds after them."""
    number, *pairs = text.split() or [""]
    names = [name for name in CHANGEABLE if hasattr(section, name)]
    try:
        evaluations, given = int(number), [pair.partition("=") for pair in pairs]
        settings = {name: float(value) for name, _, value in given}
    except ValueError:
        settings = {}
    if not settings or len(settings) < len(pairs):
        raise UserError(
            f"{stage}.changes has '{text}', but a number of evaluations is needed and what holds after them, each setting once, "
            f"as in '3 {names[0]}=0.001'"
        )
    unknown = [name for name in settings if name not in names]
    if unknown:
        raise UserError(
            f"{stage}.changes has '{text}', but {unknown[0]} can't be changed while {stage} trains: those that can are "
            f"{', '.join(names)}"
        )
    return evaluations, settings
