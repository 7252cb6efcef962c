"""Prompts: put together from segments in tokens, so that slots carry their positions and nothing is searched for.

They are built in the tasks that read rows, which load neither torch nor transformers. Shapes: b rows, H titles of a history.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sellarec.errors import UserError
from sellarec.language.templates import SOFT, Template, Turn, read_templates
from sellarec.ranges import ranges
from sellarec.training.stream import LEFT_OUT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sellarec.config import Prompt

MIN_HISTORY = 3
"""The full template counts as fitting when so many titles of the longest kind do."""

OF_CANDIDATE = ("title", "item", "semantic")
"""Parts of a prompt that the item to judge fills."""


@dataclass(frozen=True)
class Written:
    """How a title stands in a prompt: its pattern, and whether a space precedes it, which is tokenised with it."""

    pattern: str
    spaced: bool


CODE_BITS = 8
"""Bits of a code that are written, and tokenised, together."""

CODES = {"binary": (" {:08b}", "{:08b}"), "dotted": (" {}", ".{}")}
"""By `fuse.code` how the first bits of a code are written, and how those are that follow."""

CODED = ("user", "item")
"""Slots that may hold a code."""

NO_CODE = -1
"""Stands in the place of a group of bits where there is no code to be written."""


@dataclass(frozen=True)
class Coded:
    """That the slots of users and items hold codes, which are text.

    Attributes:
        form: of CODES.
        groups: G, groups of CODE_BITS bits of a code.
    """

    form: str
    groups: int


@dataclass(frozen=True)
class Segments:
    """One template in tokens.

    Attributes:
        parts: token ids, or the name of a field, in order. The last part holds what precedes the deciding position,
            the answers' common first tokens included.
        title: how the title to judge is written.
        first, others: how the history's first title is, and those behind a separator.
        separator: tokens between two titles of a history.
        none: tokens of an empty history.
        answers: for a positive, for a negative: the answer's token ids from the deciding position on, the first at which the
            two differ, with what ends the turn where the model's chat template wraps it.
    """

    parts: tuple[tuple[int, ...] | str, ...]
    title: Written
    first: Written
    others: Written
    separator: tuple[int, ...]
    none: tuple[int, ...]
    answers: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def yes(self) -> int:
        return self.answers[0][0]

    @property
    def no(self) -> int:
        return self.answers[1][0]

    @property
    def deciding(self) -> tuple[int, int]:
        return self.yes, self.no

    @property
    def fixed(self) -> int:
        """Tokens beside history and title, of each slot one."""
        return sum(1 if part in SOFT else len(part) for part in self.parts if part not in ("history", "title"))


SPACES = (" ", "\u2581", "\u0120")
"""What a space is in tokens: itself, as SentencePiece writes it, as byte-level BPE does."""


class SegmentTokenizer:
    """Tokenises pieces of a prompt so that put together they read as one text."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        # A tokenizer that puts a space before its input turns " a" into two spaces and an "a"; one that doesn't may have no token
        # for a space and an "a", but then none of "a" begins with a space.
        first = tokenizer.convert_ids_to_tokens(self._ids("a"))[0]
        self._adds_space = len(self._ids(" a")) > len(self._ids("a")) and first[0] in SPACES
        # What the tokenizer puts before a text; what it may put after one (an end token) would end the prompt.
        whole, alone = tokenizer("a")["input_ids"], self._ids("a")
        self._start = next(tuple(whole[:i]) for i in range(len(whole)) if whole[i : i + len(alone)] == alone)

    def wraps(self, chat: str, turns: tuple[Turn, ...]) -> bool:
        """Whether the model's chat template wraps the turns, by prompt.chat.

        Raises:
            UserError: it is to, but the tokenizer has none.
        """
        if chat == "model" and self._tokenizer.chat_template is None:
            raise UserError(
                "prompt.chat is model, but the language model's tokenizer has no chat template: take prompt.chat plain, or a "
                "model that was tuned for chats"
            )
        roles = any(turn.role is not None for turn in turns)
        return chat == "model" or (chat == "auto" and roles and self._tokenizer.chat_template is not None)

    def wrapped(self, turns: list[dict[str, str]]) -> str:
        """Turns (role, content) as the model's chat template puts them into one text.

        Raises:
            UserError: the chat template doesn't take them, as where it has no role `system`.
        """
        from jinja2 import TemplateError

        try:
            template = _NO_CLOCK + self._tokenizer.get_chat_template()
            return str(self._tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False))
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise UserError(
                f"the language model's chat template doesn't take turns of {roles} ({error}): take prompt.chat plain, or a "
                "prompt template with other roles"
            ) from error

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def opening(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that begins a prompt, with the start token where the tokenizer has one."""
        return (*self._start, *self._ids(text))

    def openings(self, texts: list[str]) -> list[list[int]]:
        """The same of many texts."""
        return [
            [*self._start, *ids] for ids in self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        ]

    def segment(self, text: str) -> tuple[int, ...]:
        """Token ids of a text in the middle of a prompt: a leading space is not doubled, and none is put where none is."""
        if not self._adds_space:
            return tuple(self._ids(text))
        if text.startswith(" "):
            return tuple(self._ids(text[1:]))
        before = self._ids("\n")
        return tuple(self._ids("\n" + text)[len(before) :])

    def titles(self, titles: list[str], written: Written) -> tuple[list[list[int]], list[int]]:
        """Token ids of many titles as they are written, and how many of each belong to what the pattern puts behind it."""
        texts = [written.pattern.format(title=title) for title in titles]
        if not texts:
            return [], []
        before = " " if written.spaced else "\n" if self._adds_space else ""
        skip = 0 if written.spaced else len(self._ids(before)) if before else 0
        if written.spaced and self._adds_space:
            before = ""
        found = self._tokenizer([before + text for text in texts], add_special_tokens=False)["input_ids"]
        behind = written.pattern.partition("}")[2]
        ends = [text[-1] + behind if "!r" in written.pattern else behind for text in texts]
        lengths = {end: len(self.segment(end)) if end else 0 for end in set(ends)}
        return [ids[skip:] for ids in found], [lengths[end] for end in ends]


def compile_template(
    segmenter: SegmentTokenizer,
    template: Template,
    kind: str,
    noun: str,
    chat: str,
    soft: Sequence[str] = SOFT,
    coded: Sequence[str] = (),
) -> Segments:
    """A template (`text` or `fused`) in tokens.

    Args:
        chat: prompt.chat.
        soft: of `fused`, the soft tokens that are injected.
        coded: those of them that are codes, before each of which is a space.

    Raises:
        UserError: the tokenizer doesn't tell the two answers apart, or can't wrap the turns.
    """
    turns = template.turns(kind, soft)
    wraps = segmenter.wraps(chat, turns)
    marked = [Turn(turn.role, _marked(turn.text, noun)) for turn in turns]
    if wraps:
        said = [{"role": turn.role or "user", "content": turn.text} for turn in marked]
        if said[-1]["role"] != "assistant":
            said.append({"role": "assistant", "content": ""})
        said[-1]["content"] += _MARKS["answer"]
        whole = segmenter.wrapped(said)
    else:
        whole = "\n".join(turn.text for turn in marked) + ("\n" if marked[-1].role not in (None, "assistant") else "")
        whole += _MARKS["answer"]
    texts, names = _taken_apart(whole)
    if sorted(names) != sorted([*_slots(turns), "answer"]) or names[-1] != "answer":
        raise UserError(
            f"the language model's chat template makes {', '.join(names)} of a prompt's {', '.join(_slots(turns))}: take "
            "prompt.chat plain"
        )
    end, tail = texts.pop().rstrip(), texts.pop()
    names.pop()
    spaced = {}
    for at, name in enumerate(names):
        if name not in SOFT or name in coded:
            # the space before a title or a code is tokenised with it
            spaced[name] = texts[at].endswith(" ")
            texts[at] = texts[at].removesuffix(" ")
    answers = [answer.lstrip() if wraps else answer for answer in template.answers]
    yes, no = (segmenter.segment(tail + answer + end) for answer in answers)
    common = next((i for i, (a, b) in enumerate(zip(yes, no, strict=False)) if a != b), None)
    bare = [segmenter.segment(tail + answer) for answer in answers]
    if common is None or common >= min(map(len, bare)):
        raise UserError(f"the tokenizer gives {answers} token ids of which one begins the other: {bare[0]}, {bare[1]}")
    begin = segmenter.segment if wraps else segmenter.opening
    parts: list[tuple[int, ...] | str] = [begin(texts[0]), names[0]]
    for text, name in zip(texts[1:], names[1:], strict=True):
        parts += [segmenter.segment(text), name]
    parts.append(yes[:common])
    conversions = {name: conversion for turn in turns for _, name, _, conversion in Formatter().parse(turn.text)}
    title = "{title!r}" if conversions["title"] else "{title}"
    separator = template.separator
    return Segments(
        parts=tuple(part for part in parts if part),
        title=Written(title, spaced["title"]),
        first=Written(template.history_title, spaced["history"]),
        others=Written(template.history_title, separator.endswith(" ")),
        separator=segmenter.segment(separator.removesuffix(" ")),
        none=segmenter.segment((" " if spaced["history"] else "") + template.none) if template.none else (),
        answers=(yes[common:], no[common:]),
    )


_MARKS = {name: chr(0xE000 + number) for number, name in enumerate(("history", "title", *SOFT, "answer"))}
"""What slots are while turns are put together: characters that no text has (Unicode's private use area)."""


_NO_CLOCK = "{%- macro strftime_now(form) -%}26 Jul 2024{%- endmacro -%}"
"""Before a chat template: some write today's date, by which prompts would differ from one day to the next."""


def _marked(text: str, noun: str) -> str:
    """A turn's text with the noun, and marks in place of slots."""
    found = ""
    for literal, name, _, _ in Formatter().parse(text):
        found += literal
        if name is not None:
            found += {"noun": noun, "Noun": noun.capitalize()}.get(name) or _MARKS[name]
    return found


def _slots(turns: tuple[Turn, ...]) -> list[str]:
    names = [name for turn in turns for _, name, _, _ in Formatter().parse(turn.text) if name is not None]
    return [name for name in names if name in _MARKS]


def _taken_apart(whole: str) -> tuple[list[str], list[str]]:
    """The texts between marks, and the names of the marks between them."""
    names = {mark: name for name, mark in _MARKS.items()}
    pieces = re.split(f"([{''.join(names)}])", whole)
    return pieces[::2], [names[mark] for mark in pieces[1::2]]


class Catalog:
    """All titles in tokens, as a prompt writes them, cut to `title_tokens`.

    Attributes:
        tokens: int32, all titles one after the other.
        starts, lengths: int64 [items]: where each title lies.
        shortened: titles that were cut. What the pattern puts behind a title, as a closing quote, is kept.
    """

    def __init__(self, segmenter: SegmentTokenizer, titles: list[str], title_tokens: int, written: Written) -> None:
        whole, behind = segmenter.titles(titles, written)
        shortened = [len(title) > title_tokens + end for title, end in zip(whole, behind, strict=True)]
        self.shortened = sum(shortened)
        cut = [
            [*title[:title_tokens], *title[len(title) - end :]] if short else title
            for title, end, short in zip(whole, behind, shortened, strict=True)
        ]
        self.lengths = np.array([len(title) for title in cut], np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.tokens = np.array([token for title in cut for token in title], np.int32)

    @property
    def longest(self) -> int:
        return int(self.lengths.max(initial=0))


class Prompts:
    """Builds the prompts of rows.

    Args:
        titles: of all items, by id.
        context: the model's, in tokens.
        kind: `text`, or `fused` with the soft tokens `soft`.
        answers: whether the context must hold an answer behind the prompt too.
        coded: how the slots of users and items are filled with codes; None where they are left for soft tokens.

    Raises:
        UserError: not even the compact template fits the model's context; a template that can't be read or wrapped; the
            tokenizer doesn't tell codes apart.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        titles: list[str],
        settings: "Prompt",
        noun: str,
        context: int,
        kind: str,
        answers: bool = False,
        soft: Sequence[str] = SOFT,
        coded: Coded | None = None,
    ) -> None:
        segmenter = SegmentTokenizer(tokenizer)
        self._coded = () if coded is None or kind == "text" else tuple(name for name in CODED if name in soft)
        templates = read_templates(settings.template)
        choice = {
            name: {k: compile_template(segmenter, template, k, noun, settings.chat) for k in ("text", "fused")}
            for name, template in templates.items()
        }
        self._limit = min(settings.max_tokens, context)
        self._history = settings.history
        # Both kinds of a template, with all soft tokens, decide alike, so that adapt and fuse use the same one.
        widest = {name: max(segments.fixed for segments in kinds.values()) for name, kinds in choice.items()}
        catalogs: dict[Written, Catalog] = {}

        def add_catalogs(segments: Segments) -> None:
            for written in (segments.title, segments.first, segments.others):
                if written not in catalogs:
                    catalogs[written] = Catalog(segmenter, titles, settings.title_tokens, written)

        for kinds in choice.values():
            add_catalogs(kinds[kind])
        longest = {name: catalogs[kinds[kind].title].longest for name, kinds in choice.items()}
        self.template = next(iter(choice))
        if settings.template == "auto":
            room = self._limit - widest["full"] - longest["full"]
            self.template = "full" if room >= MIN_HISTORY * (longest["full"] + 1) else "compact"
        self.segments = compile_template(
            segmenter, templates[self.template], kind, noun, settings.chat, soft, self._coded
        )
        # a template may be worded otherwise for some of the soft tokens than for all of them
        add_catalogs(self.segments)
        if answers:
            self._limit = min(self._limit, context - max(map(len, self.segments.answers)))
        groups: list[list[tuple[int, ...]]] = []
        needed = max(widest[self.template], self.segments.fixed) + len(self.segments.none)
        title, advice = max(longest[self.template], catalogs[self.segments.title].longest), ""
        if coded is not None and self._coded:
            groups = _code_tokens(segmenter, coded)
            # instead of one for the slot
            needed += len(self._coded) * (sum(max(map(len, group)) for group in groups) - 1)
            advice = "take fuse.code dotted, " if coded.form == "binary" else ""
        if needed + title > self._limit:
            advice += "" if self.template == "compact" else "take prompt.template compact, "
            raise UserError(
                f"the {self.template} prompt needs {needed} tokens, and the longest title {title}, but there "
                f"is room for {self._limit} (prompt.max_tokens {settings.max_tokens}, the model's context {context}): "
                f"{advice}lower prompt.title_tokens, raise prompt.max_tokens, or take a model with a longer context"
            )
        # one array of all tokens that a prompt may be made of: those of the template, then the titles
        constants = [(0,) if isinstance(part, str) else part for part in self.segments.parts]
        constants += [self.segments.separator, self.segments.none, *self.segments.answers]
        lengths = [len(tokens) for tokens in constants]
        places = [(sum(lengths[:number]), length) for number, length in enumerate(lengths)]
        *self._places, self._separator, self._none, self._yes, self._no = places
        pieces = [np.array([token for tokens in constants for token in tokens], np.int32)]
        shown: dict[Written, tuple[np.ndarray, np.ndarray]] = {}
        for written in (self.segments.title, self.segments.first, self.segments.others):
            if written not in shown:
                found = catalogs[written]
                shown[written] = (sum(map(len, pieces)) + found.starts, found.lengths)
                pieces.append(found.tokens)
        self._title, self._first, self._others = (
            shown[written] for written in (self.segments.title, self.segments.first, self.segments.others)
        )
        # of each group of a code's bits, where the tokens of its values lie, and how many they are
        self._groups: list[tuple[np.ndarray, np.ndarray]] = []
        for group in groups:
            of_values = np.array([len(tokens) for tokens in group])
            self._groups.append((sum(map(len, pieces)) + np.cumsum(of_values) - of_values, of_values))
            pieces.append(np.array([token for tokens in group for token in tokens], np.int32))
        self._tokens = np.concatenate(pieces)
        self._titles_cut = catalogs[self.segments.title].shortened

    def facts(self) -> dict[str, Any]:
        """What a manifest should say: the template, and how many titles are cut to prompt.title_tokens."""
        return {"template": self.template, "titles_cut": self._titles_cut}

    def build(
        self,
        items: np.ndarray,
        histories: pa.ListArray,
        labels: np.ndarray | None = None,
        codes: Mapping[str, np.ndarray] = {},
    ) -> pa.Table:
        """Prompts of b rows.

        Args:
            items: int64 [b], the candidates.
            histories: b lists of item ids, the most recent last. The longest run of most recent ones that fits is shown.
            labels: [b]: the prompts go on with the answer of these labels; None ends them at the deciding position.
            codes: by slot that is filled with codes int64 [b, G], the values of their groups of bits; NO_CODE throughout leaves
                the slot empty.

        Returns:
            tokens list<int32> (0 in slots), shown int64 (titles of the history), titles_left_out int64 (those of the last
            prompt.history that don't fit), answer int64 (tokens of the answer, from the deciding position on; left out without
            labels), prefix_tokens int64 (tokens before the first part that the candidate fills), and for the slots user, item
            and semantic, where the template has them and no codes fill them, `{slot}_position` int64: where it stands, counted
            from the prompt's first token.
        """
        written = {slot: self._written(codes[slot]) for slot in self._coded}
        of_codes = sum((lengths for found in written.values() for _, lengths in found), np.zeros(len(items), np.int64))
        history, asked, chosen = self._fitting(items, histories, of_codes)
        shown = chosen.sum(1)
        # each row's prompt as a sequence of pieces: where they start in the array of tokens, and how long they are
        pieces: list[tuple[np.ndarray | int, np.ndarray | int]] = []
        slots: dict[str, int] = {}
        candidate = []
        for part, place in zip(self.segments.parts, self._places, strict=True):
            if part in OF_CANDIDATE:
                candidate.append(len(pieces))
            if part == "title":
                starts, lengths = self._title
                pieces.append((starts[items], lengths[items]))
            elif part == "history":
                pieces.append((self._none[0], np.where(shown == 0, self._none[1], 0)))
                for k in reversed(range(chosen.shape[1])):
                    if k + 1 < chosen.shape[1]:
                        pieces.append((self._separator[0], np.where(chosen[:, k + 1], self._separator[1], 0)))
                    # the oldest that is shown stands behind no separator
                    opens = ~chosen[:, k + 1] if k + 1 < chosen.shape[1] else True
                    title_starts, title_lengths = (
                        np.where(opens, first[history[:, k]], other[history[:, k]])
                        for first, other in zip(self._first, self._others, strict=True)
                    )
                    pieces.append((title_starts, np.where(chosen[:, k], title_lengths, 0)))
            elif part in written:
                pieces += written[part]
            else:
                if isinstance(part, str):
                    slots[part] = len(pieces)
                pieces.append(place)
        if labels is not None:
            (yes, yes_length), (no, no_length) = self._yes, self._no
            pieces.append((np.where(labels > 0, yes, no), np.where(labels > 0, yes_length, no_length)))
        starts, lengths = (
            np.stack([np.broadcast_to(column, len(items)) for column in columns], axis=1)
            for columns in zip(*pieces, strict=True)
        )
        before = np.cumsum(lengths, axis=1) - lengths
        tokens = self._tokens[ranges(starts.reshape(-1), lengths.reshape(-1))]
        offsets = np.concatenate([[0], np.cumsum(lengths.sum(1))]).astype(np.int32)
        return pa.table(
            {
                "tokens": pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens)),
                "shown": shown,
                LEFT_OUT: asked - shown,
                **({} if labels is None else {"answer": lengths[:, -1]}),
                "prefix_tokens": before[:, candidate[0]],
                **{f"{name}_position": before[:, at] for name, at in slots.items()},
            }
        )

    def _written(self, codes: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each group of the codes' bits, int64 [b, G], where its tokens start, and how many they are."""
        groups = zip(codes.T, self._groups, strict=True)
        return [
            (starts[values], np.where(values == NO_CODE, 0, lengths[values])) for values, (starts, lengths) in groups
        ]

    def _fitting(
        self, items: np.ndarray, histories: pa.ListArray, of_codes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The most recent items of each history, most recent first, int64 [b, H], how many they are, int64 [b], and which of them
        fit beside the tokens of codes, int64 [b]: bool [b, H]."""
        offsets, values = histories.offsets.to_numpy(), histories.values.to_numpy()
        recent = np.arange(min(self._history, int(np.diff(offsets).max(initial=0))))
        valid = recent < np.diff(offsets)[:, None]
        history = np.zeros(valid.shape, np.int64)
        history[valid] = values[(offsets[1:, None] - 1 - recent)[valid]]
        fixed = self.segments.fixed - len(self._coded)
        room = self._limit - fixed - of_codes - self._title[1][items]
        behind = self._others[1][history] + len(self.segments.separator)
        cost = np.cumsum(behind, axis=1) - behind + self._first[1][history]
        return history, valid.sum(1), np.logical_and.accumulate(valid & (cost <= room[:, None]), axis=1)

    def prepare(
        self,
        rows: pa.Table,
        epoch: int,
        step: np.ndarray,
        keep_history: bool = False,
        answers: bool = False,
        codes: Mapping[str, np.ndarray] = {},
    ) -> pa.Table:
        """The rows with their prompts' tokens and slots, with `answers` those of their labels' answers too; see `build`."""
        labels = rows["label"].to_numpy() if answers else None
        built = self.build(rows["item"].to_numpy(), rows["history"].combine_chunks(), labels, codes)
        built = built.drop_columns(["shown"])
        for name in built.column_names:
            rows = rows.append_column(name, built[name])
        return rows if keep_history else rows.drop_columns(["history"])


def _code_tokens(segmenter: SegmentTokenizer, coded: Coded) -> list[list[tuple[int, ...]]]:
    """Of each group of a code's bits the tokens of each value that it may have.

    Raises:
        UserError: two values have the same tokens, as where the tokenizer has none for digits.
    """
    first, others = (
        [segmenter.segment(pattern.format(value)) for value in range(1 << CODE_BITS)] for pattern in CODES[coded.form]
    )
    for found in (first, others):
        if len(set(found)) < len(found):
            raise UserError(
                f"the tokenizer doesn't tell codes apart: of the {len(found)} values of {CODE_BITS} bits only {len(set(found))} "
                f"differ in their tokens, written {coded.form} (fuse.code); take another language model, or soft tokens"
            )
    return [first, *[others] * (coded.groups - 1)]
