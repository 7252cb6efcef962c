"""Prompts: built token by token from segments, so that slots carry their positions and nothing is searched for.

Shapes: b rows, T prompt tokens (left-padded), I items.
"""

from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sellarec.config import Prompt
from sellarec.errors import UserError
from sellarec.language.templates import templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOFT = ("user", "item", "semantic")
"""Slots whose input embeddings are replaced by projected vectors."""

MIN_HISTORY = 3
"""The full template counts as fitting when so many titles of the longest kind do."""


@dataclass(frozen=True)
class Segments:
    """One template in tokens.

    Attributes:
        parts: token ids, or the name of a field, in order. The last part holds what precedes the deciding position,
            the answers' common first tokens included.
        separator: tokens between two titles of a history.
        none: tokens of an empty history.
        yes, no: the two answers' token ids at the first position where they differ.
    """

    parts: tuple[tuple[int, ...] | str, ...]
    separator: tuple[int, ...]
    none: tuple[int, ...]
    yes: int
    no: int

    @property
    def fixed(self) -> int:
        """Tokens beside history and title."""
        return sum(1 if part in SOFT else len(part) for part in self.parts if part not in ("history", "title"))


class SegmentTokenizer:
    """Tokenises pieces of a prompt so that put together they read as one text."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        # A tokenizer that puts a space before its input turns " a" into two spaces and an "a".
        self._adds_space = tokenizer.decode(self._ids(" a")) != tokenizer.decode(self._ids("a")) and len(
            self._ids(" a")
        ) > len(self._ids("a"))
        # What the tokenizer puts before a text; what it may put after one (an end token) would end the prompt.
        whole, alone = tokenizer("a")["input_ids"], self._ids("a")
        self._start = next(tuple(whole[:i]) for i in range(len(whole)) if whole[i : i + len(alone)] == alone)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def opening(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that begins a prompt, with the start token where the tokenizer has one."""
        return (*self._start, *self._ids(text))

    def segment(self, text: str) -> tuple[int, ...]:
        """Token ids of a text in the middle of a prompt: a leading space is not doubled, and none is put where none is."""
        if not self._adds_space:
            return tuple(self._ids(text))
        if text.startswith(" "):
            return tuple(self._ids(text[1:]))
        before = self._ids("\n")
        return tuple(self._ids("\n" + text)[len(before) :])

    def titles(self, titles: list[str]) -> list[list[int]]:
        """Token ids of many titles, each as it reads after a space."""
        prefix = "" if self._adds_space else " "
        if not titles:
            return []
        return self._tokenizer([prefix + title for title in titles], add_special_tokens=False)["input_ids"]


def compile_template(tokenizer: SegmentTokenizer, template: dict[str, Any], kind: str, noun: str) -> Segments:
    """A template (`text` or `fused`) in tokens.

    Raises:
        UserError: the tokenizer doesn't tell the two answers apart.
    """
    texts, slots = [""], []
    for literal, name, _, _ in Formatter().parse(template[kind]):
        texts[-1] += literal
        if name in ("noun", "Noun"):
            texts[-1] += noun if name == "noun" else noun.capitalize()
        elif name is not None:
            # the space before a slot goes with the slot: a title is tokenised with it, a soft token needs none
            texts[-1] = texts[-1].rstrip(" ")
            texts.append("")
            slots.append(name)
    tail = texts.pop()
    yes, no = (tokenizer.segment(tail + answer) for answer in template["answers"])
    common = next((i for i, (a, b) in enumerate(zip(yes, no, strict=False)) if a != b), None)
    if common is None:
        raise UserError(
            f"the tokenizer gives {template['answers']} token ids of which one begins the other: {yes}, {no}"
        )
    parts: list[tuple[int, ...] | str] = [tokenizer.opening(texts[0]), slots[0]]
    for text, slot in zip(texts[1:], slots[1:], strict=True):
        parts += [tokenizer.segment(text), slot]
    parts.append(yes[:common])
    return Segments(
        parts=tuple(part for part in parts if part),
        separator=tokenizer.segment(template["separator"]),
        none=tokenizer.segment(" " + template["none"]),
        yes=yes[common],
        no=no[common],
    )


class Catalog:
    """All titles in tokens, cut to `title_tokens`, one after the other."""

    def __init__(self, tokenizer: SegmentTokenizer, titles: list[str], title_tokens: int) -> None:
        tokens = tokenizer.titles(titles)
        self.shortened = sum(len(title) > title_tokens for title in tokens)
        self.titles = [np.asarray(title[:title_tokens], np.int64) for title in tokens]
        self.longest = max((len(title) for title in self.titles), default=0)


class Prompts:
    """Builds the prompts of rows.

    Raises:
        UserError: not even the compact template fits the model's context.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        titles: list[str],
        settings: Prompt,
        noun: str,
        context: int,
        kind: str,
    ) -> None:
        segmenter = SegmentTokenizer(tokenizer)
        self._catalog = Catalog(segmenter, titles, settings.title_tokens)
        self._limit = min(settings.max_tokens, context)
        self._history = settings.history
        both = {name: compile_template(segmenter, template, kind, noun) for name, template in templates().items()}
        # Both kinds of a template decide alike, so that adapt and fuse use the same one.
        widest = {
            name: max(compile_template(segmenter, template, k, noun).fixed for k in ("text", "fused"))
            for name, template in templates().items()
        }
        title = self._catalog.longest
        self.template = settings.template
        if settings.template == "auto":
            room = self._limit - widest["full"] - title
            self.template = "full" if room >= MIN_HISTORY * (title + 1) else "compact"
        self.segments = both[self.template]
        needed = widest[self.template] + len(self.segments.none)
        if needed + title > self._limit:
            raise UserError(
                f"the {self.template} prompt needs {needed} tokens, and the longest title {title}, but there "
                f"is room for {self._limit} (prompt.max_tokens {settings.max_tokens}, the model's context {context}): "
                f"{'' if self.template == 'compact' else 'take prompt.template compact, '}lower prompt.title_tokens, raise "
                "prompt.max_tokens, or take a model with a longer context"
            )

    def facts(self) -> dict[str, Any]:
        """What a manifest should say: the template, and how many titles are cut to prompt.title_tokens."""
        return {"template": self.template, "titles_cut": self._catalog.shortened}

    def build(self, items: np.ndarray, histories: pa.ListArray) -> dict[str, Tensor]:
        """Prompts of b rows.

        Args:
            items: int64 [b], the candidates.
            histories: b lists of item ids, the most recent last. The longest run of most recent ones that fits is shown.

        Returns:
            tokens int64 [b, T] (0 where padded and in slots), mask bool [b, T], shown int64 [b] (titles of the history),
            and for the slots user, item, semantic their position int64 [b], where the template has them.
        """
        offsets, values = histories.offsets.to_numpy(), histories.values.to_numpy()
        titles = self._catalog.titles
        prompts, positions, shown = [], [], np.zeros(len(items), np.int64)
        for row, item in enumerate(items):
            history = values[offsets[row] : offsets[row + 1]][-self._history :]
            room = self._limit - self.segments.fixed - len(titles[item])
            chosen: list[np.ndarray] = []
            for earlier in history[::-1]:
                title = titles[earlier]
                room -= len(title) + (len(self.segments.separator) if chosen else 0)
                if room < 0:
                    break
                chosen.append(title)
            shown[row] = len(chosen)
            tokens: list[int] = []
            where: list[int] = []
            for part in self.segments.parts:
                if part == "title":
                    tokens.extend(titles[item])
                elif part == "history":
                    if not chosen:
                        tokens.extend(self.segments.none)
                    for number, title in enumerate(reversed(chosen)):
                        if number:
                            tokens.extend(self.segments.separator)
                        tokens.extend(title)
                elif isinstance(part, str):
                    where.append(len(tokens))
                    tokens.append(0)
                else:
                    tokens.extend(part)
            prompts.append(tokens)
            positions.append(where)
        longest = max(len(tokens) for tokens in prompts)
        out = np.zeros((len(items), longest), np.int64)
        mask = np.zeros((len(items), longest), bool)
        for row, tokens in enumerate(prompts):
            out[row, longest - len(tokens) :] = tokens
            mask[row, longest - len(tokens) :] = True
        padding = longest - mask.sum(1)
        slots = [part for part in self.segments.parts if part in SOFT]
        at = np.asarray(positions, np.int64).reshape(len(items), len(slots)) + padding[:, None]
        return {
            "tokens": torch.from_numpy(out),
            "mask": torch.from_numpy(mask),
            "shown": torch.from_numpy(shown),
            **{name: torch.from_numpy(at[:, i].copy()) for i, name in enumerate(slots)},
        }
