"""Prompt templates, which are data: YAML files in sellarec/templates, or the user's own."""

import difflib
import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from sellarec.errors import UserError

SOFT = ("user", "item", "semantic")
"""Slots whose input embeddings are replaced by projected vectors."""

ROLES = ("system", "user", "assistant")

AUTO = ("full", "compact")
"""What `prompt.template auto` chooses from: the first where it fits."""

_SLOTS = {"text": ("history", "title"), "fused": ("history", "title", *SOFT)}
"""What each kind of prompt must have a place for, once."""


@dataclass(frozen=True)
class Turn:
    """What one role says; `role` is None for a text without roles."""

    role: str | None
    text: str


@dataclass(frozen=True)
class Template:
    """A prompt's words. `{noun}` and `{Noun}` stand for what an item is called; the slots are `{history}`, `{title}` and SOFT.

    Attributes:
        text: the turns of a prompt without soft tokens (stage adapt).
        fused: of one with them (stage fuse).
        history_title: how a title of the history is written: `{title}`, or `{title!r}` as Python writes a string.
        separator: what stands between two titles of the history, oldest first.
        none: what stands for an empty history.
        answers: what follows the prompt for a positive, for a negative.
    """

    text: tuple[Turn, ...]
    fused: tuple[Turn, ...]
    history_title: str
    separator: str
    none: str
    answers: tuple[str, str]

    def words(self) -> list[str]:
        """The texts of a prompt without soft tokens, and the answers."""
        return [*(turn.text for turn in self.text), *self.answers]


def template_folder() -> Path:
    return Path(str(importlib.resources.files("sellarec") / "templates"))


def built_in_templates() -> list[str]:
    return sorted(path.stem for path in template_folder().glob("*.yaml"))


def is_file(name: str) -> bool:
    """Whether prompt.template names a file, not a built-in template."""
    return name.endswith((".yaml", ".yml"))


def read_templates(name: str) -> dict[str, Template]:
    """What a prompt.template may choose from, by name: of `auto` AUTO in that order, else the one.

    Raises:
        UserError: see `read_template`.
    """
    return {name: read_template(name) for name in (AUTO if name == "auto" else (name,))}


def read_template(name: str) -> Template:
    """A built-in template, or that of a YAML file.

    Raises:
        UserError: no such template; not YAML; a key that is unknown or missing; a slot that is unknown, missing or there twice.
    """
    path = Path(name).expanduser() if is_file(name) else template_folder() / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, built_in_templates(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"there is no prompt template '{name}': {hint}give auto, a .yaml file that exists or one of "
            f"{', '.join(built_in_templates())}"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"prompt template {path} is not readable YAML: {' '.join(str(error).split())}") from error
    return _template(f"prompt template {path}", content)


def _template(where: str, content: Any) -> Template:
    needed = ("text", "fused", "separator", "none", "answers")
    if not isinstance(content, dict):
        raise UserError(f"{where} must hold {', '.join(needed)} by name, not {content!r}")
    for key in content:
        if key not in (*needed, "history_title"):
            raise UserError(
                f"{where}: there is no key '{key}'; a template has {', '.join(needed)} and maybe history_title"
            )
    for key in needed:
        if key not in content:
            raise UserError(f"{where} has no {key}: a template needs {', '.join(needed)}")
    history_title = content.get("history_title", "{title}")
    for key, value in (
        ("separator", content["separator"]),
        ("none", content["none"]),
        ("history_title", history_title),
    ):
        if not isinstance(value, str):
            raise UserError(f"{where}: {key} is {value!r}, but must be a text (in quotes)")
    _check_slots(where, "history_title", history_title, ("title",))
    answers = content["answers"]
    if not (
        isinstance(answers, list)
        and len(answers) == 2
        and all(isinstance(answer, str) and answer.strip() for answer in answers)
        and answers[0] != answers[1]
    ):
        raise UserError(
            f"{where}: answers is {answers!r}, but must be two different texts in quotes, for a positive and for a negative, "
            'as [" Yes.", " No."]'
        )
    turns = {kind: _turns(f"{where}: {kind}", content[kind]) for kind in _SLOTS}
    if (turns["text"][0].role is None) != (turns["fused"][0].role is None):
        raise UserError(
            f"{where}: one of text and fused has roles and the other has none: a model is to answer both alike"
        )
    for kind, slots in _SLOTS.items():
        _check_slots(where, kind, "".join(turn.text for turn in turns[kind]), slots)
    return Template(
        turns["text"], turns["fused"], history_title, content["separator"], content["none"], (answers[0], answers[1])
    )


def _turns(where: str, content: Any) -> tuple[Turn, ...]:
    if isinstance(content, str):
        return (Turn(None, content),)
    if not isinstance(content, list) or not content:
        raise UserError(f"{where} is {content!r}, but must be a text, or a list of turns like '- user: ...'")
    for turn in content:
        if not (isinstance(turn, dict) and len(turn) == 1 and isinstance(next(iter(turn.values())), str)):
            raise UserError(f"{where} has the turn {turn!r}, but a turn is one role and its text, like '- user: ...'")
        (role,) = turn
        if role not in ROLES:
            raise UserError(f"{where} has a turn of '{role}', but the roles are {', '.join(ROLES)}")
    return tuple(Turn(role, text) for turn in content for role, text in turn.items())


def _check_slots(where: str, key: str, text: str, slots: tuple[str, ...]) -> None:
    """Raises UserError unless each of `slots` is in the text once, and nothing else but the noun."""
    words = () if key == "history_title" else ("noun", "Noun")
    found = []
    try:
        for _, name, form, conversion in Formatter().parse(text):
            if name is None:
                continue
            quoted = name == "title" and conversion == "r"
            if name not in (*slots, *words) or form or (conversion and not quoted):
                shown = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
                raise UserError(
                    f"{where}: {key} has a slot {{{shown}}}, but its slots are {', '.join((*slots, *words))} "
                    "(a brace itself is written twice)"
                )
            found.append(name)
    except ValueError as error:
        raise UserError(f"{where}: {key} is no text with slots ({error}); a brace itself is written twice") from error
    for slot in slots:
        if found.count(slot) != 1:
            raise UserError(
                f"{where}: {key} has {found.count(slot) or 'no'} place{'' if found.count(slot) == 0 else 's'} for "
                f"{{{slot}}}, but needs one"
            )
