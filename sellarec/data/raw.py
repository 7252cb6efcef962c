"""What a source of interactions hands to preparation: rows under the source's own ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from sellarec.errors import UserError

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Raw:
    """Interactions and items as a source has them.

    `interactions` has one row per interaction, in the source's order, with the columns
      user, item: the source's ids, int64 or string; no nulls
      label: 0 or 1, any integer type; no nulls
      timestamp: int64 seconds, null where there is none
    and, each only where the source has it,
      rating: float, null where there is none
      split: "train", "valid" or "test"; without this column preparation splits by time
      history: list of item ids, the user's earlier positives, oldest first; without it preparation builds them
      warm: bool; without it a row is warm where user and item both occur in train
      expected: float, the planted probability of a positive
    `items` has the columns external_id (the type of `item`), title and text (strings); it may hold items without
    interactions, and of several rows for one item the first counts. `split_rule` says how a given split was made (None
    where preparation splits by time). `noun` is what one item is called. `sources` maps file names to SHA-256;
    `dropped` maps reasons to counts of rows that the source left out.
    """

    interactions: pa.Table
    items: pa.Table
    noun: str
    label_rule: str
    split_rule: str | None = None
    sources: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, in hex.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}. Check that the file is there and readable.") from error
