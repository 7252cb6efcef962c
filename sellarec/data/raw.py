"""What a source of interactions hands to preparation: parts that tasks read, each giving rows under the source's own ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import pyarrow as pa

from sellarec.errors import UserError

SPLITS = ("train", "valid", "test")

ATTRIBUTES = pa.list_(pa.struct([("name", pa.string()), ("value", pa.string())]))
"""Named values of an item or a user; a name with several values (genres, say) occurs several times."""

MAX_SHOWN = 200
"""Characters of a bad row that a message shows."""


class Dropped:
    """Rows that a source left out, by reason; or, where bad rows are not to be dropped, the refusal of the first.

    Attributes:
        counts: reason -> rows.
    """

    def __init__(self, bad_rows: Literal["refuse", "drop"]) -> None:
        self.counts: Counter[str] = Counter()
        self._bad_rows = bad_rows

    def bad(self, where: str, reason: str, content: str = "", rows: int = 1) -> None:
        """A row that can't be read: `where` names its file and line (or row).

        Args:
            reason: what is wrong, the same words for every such row ("the rating is not a number").
            content: the row as it stands in the file, for the message.

        Raises:
            UserError: bad rows are refused.
        """
        if self._bad_rows == "refuse":
            shown = content if len(content) <= MAX_SHOWN else content[:MAX_SHOWN] + "…"
            raise UserError(
                f"{where}: {reason}." + (f" It reads: {shown!r}." if shown else "")
                + " Mend it, or leave such rows out, counted, with --data.bad-rows drop."
            )  # fmt: skip
        self.counts[reason] += rows

    def leave_out(self, reason: str, rows: int) -> None:
        """Good rows that a rule leaves out (a repeat, a date outside the wanted ones)."""
        if rows:
            self.counts[reason] += rows


@dataclass(frozen=True)
class Part:
    """A piece of a source that one task reads, in bounded memory: a file, or a range of a file's rows.

    Attributes:
        name: what messages and progress call it.
        read: picklable (a module's function in a `functools.partial`); yields tables of at most some 100,000 rows, in the
            source's order.
    """

    name: str
    read: Callable[[Dropped], Iterator[pa.Table]]


@dataclass(frozen=True)
class Source:
    """A dataset as it was published, opened but not read: which files there are, and how they are read.

    Attributes:
        interactions: parts whose tables have one row per interaction, with the columns
            user, item: the source's ids, int64 or string (the same type in all parts); no nulls, no empty strings
          and, each only where the source has it,
            timestamp: int64 seconds since 1970, null where unknown
            rating: float32, null where unknown (such a row is bad where labels are made of ratings), never NaN
            label: int8, 0 or 1, no nulls; without it preparation makes labels from ratings by its rule
            split: string, "train", "valid" or "test"
            history: list of item ids, the user's earlier positives, oldest first; without it preparation builds them
            warm: bool; without it a row is warm where user and item both occur in train
            expected: float32, the planted probability of a positive
            domain: string, the part of the catalog that the row belongs to (an Amazon category)
            and one string column for each name in `features`.
        items: parts whose tables describe items, with the columns item (as above), title (string, null where unknown) and,
            where the source has them, text (string: all that is known of it in words), attributes (ATTRIBUTES) and links
            (ATTRIBUTES: its ids in other catalogs and knowledge graphs, by catalog). They may hold items without
            interactions; of several rows for one item the first counts.
        users: the same with user and attributes.
        files: paths or URIs of what is read; each file's SHA-256 goes into the manifest.
        noun: what one item is called ("movie").
        label_rule: how `label` was made where the source gives it.
        split_rule: how `split` was made where the source gives it.
        features: categorical features of an interaction, beside user and item.
        rows_about: about how many interactions there are, where that is known beforehand; else it is told by the files' sizes.
        rating_range: lowest and highest rating there can be; rows outside are bad.
    """

    interactions: tuple[Part, ...]
    items: tuple[Part, ...]
    files: tuple[str, ...]
    noun: str
    users: tuple[Part, ...] = ()
    label_rule: str | None = None
    split_rule: str | None = None
    features: tuple[str, ...] = ()
    rating_range: tuple[float, float] | None = None
    rows_about: int = 0


def part_of_table(name: str, table: pa.Table, left_out: dict[str, int] | None = None) -> Part:
    """A part whose rows are in memory already, with the rows that were left out when they were made, by reason."""
    return Part(name, partial(_read_table, table, left_out or {}))


def _read_table(table: pa.Table, left_out: dict[str, int], dropped: Dropped) -> Iterator[pa.Table]:
    for reason, rows in left_out.items():
        dropped.leave_out(reason, rows)
    yield table
