"""Prompts: put together from segments in tokens, so that slots carry their positions and nothing is searched for.

They are built in the tasks that read rows, which load neither torch nor transformers. Shapes: b rows, H titles of a history.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sellarec.errors import UserError
from sellarec.language.templates import fused_text, templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sellarec.config import Prompt

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


def compile_template(
    tokenizer: SegmentTokenizer, template: dict[str, Any], kind: str, noun: str, soft: Sequence[str] = SOFT
) -> Segments:
    """A template (`text` or `fused`) in tokens.

    Args:
        soft: of a `fused` one, the soft tokens that are injected.

    Raises:
        UserError: the tokenizer doesn't tell the two answers apart.
    """
    texts, slots = [""], []
    whole = template[kind] if kind == "text" else fused_text(template, soft)
    for literal, name, _, _ in Formatter().parse(whole):
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
    """All titles in tokens, cut to `title_tokens`.

    Attributes:
        tokens: int32, all titles one after the other.
        starts, lengths: int64 [items]: where each title lies.
        shortened: titles that were cut.
    """

    def __init__(self, tokenizer: SegmentTokenizer, titles: list[str], title_tokens: int) -> None:
        whole = tokenizer.titles(titles)
        self.shortened = sum(len(title) > title_tokens for title in whole)
        self.lengths = np.array([min(len(title), title_tokens) for title in whole], np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.tokens = np.array([token for title in whole for token in title[:title_tokens]], np.int32)

    @property
    def longest(self) -> int:
        return int(self.lengths.max(initial=0))


class Prompts:
    """Builds the prompts of rows.

    Args:
        kind: `text`, or `fused` with the soft tokens `soft`.

    Raises:
        UserError: not even the compact template fits the model's context.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        titles: list[str],
        settings: "Prompt",
        noun: str,
        context: int,
        kind: str,
        soft: Sequence[str] = SOFT,
    ) -> None:
        segmenter = SegmentTokenizer(tokenizer)
        catalog = Catalog(segmenter, titles, settings.title_tokens)
        self._limit = min(settings.max_tokens, context)
        self._history = settings.history
        both = {name: compile_template(segmenter, template, kind, noun, soft) for name, template in templates().items()}
        # Both kinds of a template, whatever the soft tokens, decide alike, so that adapt and fuse use the same one.
        widest = {
            name: max(compile_template(segmenter, template, k, noun).fixed for k in ("text", "fused"))
            for name, template in templates().items()
        }
        title = catalog.longest
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
        self._titles_cut = catalog.shortened
        # one array of all tokens that a prompt may be made of: those of the template, then the titles
        constants = [(0,) if isinstance(part, str) else part for part in self.segments.parts]
        constants += [self.segments.separator, self.segments.none]
        lengths = [len(tokens) for tokens in constants]
        places = [(sum(lengths[:number]), length) for number, length in enumerate(lengths)]
        *self._places, self._separator, self._none = places
        template_tokens = np.array([token for tokens in constants for token in tokens], np.int32)
        self._tokens = np.concatenate([template_tokens, catalog.tokens])
        self._title_starts, self._title_lengths = len(template_tokens) + catalog.starts, catalog.lengths

    def facts(self) -> dict[str, Any]:
        """What a manifest should say: the template, and how many titles are cut to prompt.title_tokens."""
        return {"template": self.template, "titles_cut": self._titles_cut}

    def build(self, items: np.ndarray, histories: pa.ListArray) -> pa.Table:
        """Prompts of b rows.

        Args:
            items: int64 [b], the candidates.
            histories: b lists of item ids, the most recent last. The longest run of most recent ones that fits is shown.

        Returns:
            tokens list<int32> (0 in slots), shown int64 (titles of the history), and for the slots user, item and semantic,
            where the template has them, `{slot}_position` int64: where it stands, counted from the prompt's first token.
        """
        history, chosen = self._fitting(items, histories)
        shown = chosen.sum(1)
        # each row's prompt as a sequence of pieces: where they start in the array of tokens, and how long they are
        pieces: list[tuple[np.ndarray | int, np.ndarray | int]] = []
        slots: dict[str, int] = {}
        for part, place in zip(self.segments.parts, self._places, strict=True):
            if part == "title":
                pieces.append((self._title_starts[items], self._title_lengths[items]))
            elif part == "history":
                pieces.append((self._none[0], np.where(shown == 0, self._none[1], 0)))
                for k in reversed(range(chosen.shape[1])):
                    if k + 1 < chosen.shape[1]:
                        pieces.append((self._separator[0], np.where(chosen[:, k + 1], self._separator[1], 0)))
                    title_lengths = np.where(chosen[:, k], self._title_lengths[history[:, k]], 0)
                    pieces.append((self._title_starts[history[:, k]], title_lengths))
            else:
                if isinstance(part, str):
                    slots[part] = len(pieces)
                pieces.append(place)
        starts, lengths = (
            np.stack([np.broadcast_to(column, len(items)) for column in columns], axis=1)
            for columns in zip(*pieces, strict=True)
        )
        before = np.cumsum(lengths, axis=1) - lengths
        tokens = self._tokens[_ranges(starts.reshape(-1), lengths.reshape(-1))]
        offsets = np.concatenate([[0], np.cumsum(lengths.sum(1))]).astype(np.int32)
        return pa.table(
            {
                "tokens": pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens)),
                "shown": shown,
                **{f"{name}_position": before[:, at] for name, at in slots.items()},
            }
        )

    def _fitting(self, items: np.ndarray, histories: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
        """The most recent items of each history, most recent first, int64 [b, H], and which of them fit, bool [b, H]."""
        offsets, values = histories.offsets.to_numpy(), histories.values.to_numpy()
        recent = np.arange(min(self._history, int(np.diff(offsets).max(initial=0))))
        valid = recent < np.diff(offsets)[:, None]
        history = np.zeros(valid.shape, np.int64)
        history[valid] = values[(offsets[1:, None] - 1 - recent)[valid]]
        room = self._limit - self.segments.fixed - self._title_lengths[items]
        cost = self._title_lengths[history] + len(self.segments.separator) * (recent > 0)
        return history, valid & (np.cumsum(cost, axis=1) <= room[:, None])

    def prepare(self, rows: pa.Table, epoch: int, step: np.ndarray, keep_history: bool = False) -> pa.Table:
        """The rows with their prompts' tokens and slots; see `build`."""
        built = self.build(rows["item"].to_numpy(), rows["history"].combine_chunks()).drop_columns(["shown"])
        for name in built.column_names:
            rows = rows.append_column(name, built[name])
        return rows if keep_history else rows.drop_columns(["history"])


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., start + length - 1 of each pair, one after the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
