"""Prompt templates, which are data: YAML files in sellarec/templates, or the user's own."""

import dataclasses
import difflib
import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from sellarec.artifacts import fingerprint
from sellarec.errors import UserError

SOFT = ("user", "item", "semantic")
"""Slots whose input embeddings are replaced by projected vectors."""

ROLES = ("system", "user", "assistant")

AUTO = ("full", "compact")
"""What `prompt.template auto` chooses from: the first where it fits."""


Pieces = tuple[Mapping[str, str], ...]
"""A text in pieces, of each the texts by the soft tokens that they speak of ("" of none): of those whose tokens are all
injected, the one of most tokens stands."""


@dataclass(frozen=True)
class Turn:
    """What one role says; `role` is None for a text without roles."""

    role: str | None
    text: str


@dataclass(frozen=True)
class Template:
    """A prompt's words. `{noun}` and `{Noun}` stand for what an item is called; the slots are `{history}`, `{title}` and SOFT.

    Attributes:
        where: the template's file, for messages.
        text: by turn, role and pieces of a prompt without soft tokens (stage adapt).
        fused: of one with them (stage fuse).
        history_title: how a title of the history is written: `{title}`, or `{title!r}` as Python writes a string.
        separator: what stands between two titles of the history, oldest first.
        none: what stands for an empty history.
        answers: what follows the prompt for a positive, for a negative.
    """

    where: str
    text: tuple[tuple[str | None, Pieces], ...]
    fused: tuple[tuple[str | None, Pieces], ...]
    history_title: str
    separator: str
    none: str
    answers: tuple[str, str]

    def turns(self, kind: str, soft: Sequence[str] = SOFT) -> tuple[Turn, ...]:
        """The turns of a prompt, `text` or `fused`, into which the tokens `soft` are injected (of `text` none).

        Raises:
            UserError: it speaks of another soft token, or not of each of these.
        """
        soft = [] if kind == "text" else [name for name in SOFT if name in soft]
        turns = []
        for role, pieces in self.text if kind == "text" else self.fused:
            text = ""
            for piece in pieces:
                fitting = [tokens for tokens in piece if set(tokens.split()) <= set(soft)]
                text += piece[max(fitting, key=lambda tokens: len(tokens.split()))] if fitting else ""
            turns.append(Turn(role, text))
        key = f"{kind} with the tokens {' '.join(soft)}" if soft else kind
        _check_slots(self.where, key, "".join(turn.text for turn in turns), ("history", "title", *soft))
        return tuple(turns)

    def words(self) -> list[str]:
        """The texts of a prompt without soft tokens, and the answers."""
        return [*(turn.text for turn in self.turns("text")), *self.answers]


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


def template_mark(name: str) -> str:
    """Fingerprint of what the templates say that prompt.template chooses from, wherever they lie."""
    return fingerprint(
        {
            "file" if is_file(each) else each: dataclasses.asdict(dataclasses.replace(template, where=""))
            for each, template in read_templates(name).items()
        }
    )


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
    text, fused = (_turns(f"{where}: {kind}", content[kind]) for kind in ("text", "fused"))
    if (text[0][0] is None) != (fused[0][0] is None):
        raise UserError(
            f"{where}: one of text and fused has roles and the other has none: a model is to answer both alike"
        )
    template = Template(
        where, text, fused, history_title, content["separator"], content["none"], (answers[0], answers[1])
    )
    for kind in ("text", "fused"):
        template.turns(kind)
    return template


def _turns(where: str, content: Any) -> tuple[tuple[str | None, Pieces], ...]:
    if isinstance(content, str) or (isinstance(content, list) and any(isinstance(piece, str) for piece in content)):
        return ((None, _pieces(where, content)),)
    if not isinstance(content, list) or not content:
        raise UserError(f"{where} is {content!r}, but must be a text, or a list of turns like '- user: ...'")
    turns = []
    for turn in content:
        if not (isinstance(turn, dict) and len(turn) == 1):
            raise UserError(f"{where} has the turn {turn!r}, but a turn is one role and its text, like '- user: ...'")
        ((role, said),) = turn.items()
        if role not in ROLES:
            raise UserError(f"{where} has a turn of '{role}', but the roles are {', '.join(ROLES)}")
        turns.append((role, _pieces(where, said)))
    return tuple(turns)


def _pieces(where: str, content: Any) -> Pieces:
    pieces = [{"": piece} if isinstance(piece, str) else piece for piece in _as_list(content)]
    for piece in pieces:
        if not (isinstance(piece, dict) and piece and all(isinstance(text, str) for text in piece.values())):
            raise UserError(
                f"{where} has the piece {piece!r}, but a text's pieces are texts, or texts by the soft tokens that they speak "
                "of, like '- item semantic: ...'"
            )
        unknown = [name for tokens in piece for name in str(tokens).split() if name not in SOFT]
        if unknown:
            raise UserError(f"{where} has a piece for '{unknown[0]}', but the soft tokens are {', '.join(SOFT)}")
    return tuple(pieces)


def _as_list(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [content]


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
