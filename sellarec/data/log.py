"""The prepared log on disk: Parquet tables of one shape for every dataset, and the facts about them.

    manifest.json                               the facts
    interactions/{train,valid,test}/part-N.parquet
    sequences/part-N.parquet                    one row per user who has rows
    items/part-N.parquet, users/part-N.parquet  2^20 dense ids a file

    interactions: row int64, user int64, item int64, label int8, rating float32?, timestamp int64?, history list<int64>,
        history_length int32, user_seen bool, item_seen bool, warm bool, expected float32?, and an int32? column for each
        categorical feature (`domain` among them), whose values the facts list in the order of their codes
    sequences: user int64, item list<int64>, label list<int8>, rating list<float32?>, timestamp list<int64?>
    items: item int64, external_id string, title string, text string, attributes and links list<(name, value)>?, seen bool
    users: user int64, external_id string, attributes list<(name, value)>?, seen bool

A type with "?" is null where unknown. Users and items are dense ids from 0, which never change: new data extend them. `row`
is the row's id; it counts through train, valid, test. Rows of a split are in time order over its parts, so a reader of a
range of rows or of times opens few of them. `timestamp` is in whole seconds since 1970 (UTC); rows of one second keep the
source's order. `label` is 1 for a positive. `history` is the user's earlier positives, oldest first, the last `history_cap`
of them; `history_length` counts them all. `seen` says whether the train split has the user or item, or that of the log which
this one extends; a row is `warm` where both are, or where the source says so. `text` is all that is known of an item in
words, its title where there is no more; `expected` is the planted probability of a positive in a generated world. `links`
are an item's ids in other catalogs and knowledge graphs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from sellarec.data.raw import ATTRIBUTES, SPLITS
from sellarec.errors import UserError

FACTS_FILE = "manifest.json"

ROW_GROUP_ROWS = 65_536
"""Rows of a Parquet row group: the least that is read at a time."""

INTERACTIONS = pa.schema(
    [
        ("row", pa.int64()),
        ("user", pa.int64()),
        ("item", pa.int64()),
        ("label", pa.int8()),
        ("rating", pa.float32()),
        ("timestamp", pa.int64()),
        ("history", pa.list_(pa.int64())),
        ("history_length", pa.int32()),
        ("user_seen", pa.bool_()),
        ("item_seen", pa.bool_()),
        ("warm", pa.bool_()),
        ("expected", pa.float32()),
    ]
)
"""Columns of every log; those of categorical features follow."""

SEQUENCES = pa.schema(
    [
        ("user", pa.int64()),
        ("item", pa.list_(pa.int64())),
        ("label", pa.list_(pa.int8())),
        ("rating", pa.list_(pa.float32())),
        ("timestamp", pa.list_(pa.int64())),
    ]
)
ITEMS = pa.schema(
    [
        ("item", pa.int64()),
        ("external_id", pa.string()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("attributes", ATTRIBUTES),
        ("links", ATTRIBUTES),
        ("seen", pa.bool_()),
    ]
)
USERS = pa.schema(
    [("user", pa.int64()), ("external_id", pa.string()), ("attributes", ATTRIBUTES), ("seen", pa.bool_())]
)


@dataclass(frozen=True)
class Log:
    """A prepared log in a folder. It holds the facts; tables are read when asked for."""

    directory: Path
    facts: dict[str, Any]

    def paths(self, table: str) -> list[Path]:
        """The Parquet files of a table, in order: interactions/SPLIT, sequences, items or users."""
        return sorted((self.directory / table).glob("part-*.parquet"))

    def split_paths(self, name: str) -> list[Path]:
        """The Parquet files of the split "train", "valid" or "test", in time order."""
        if name not in SPLITS:
            raise ValueError(f"no split {name!r}: there are {', '.join(SPLITS)}")
        return self.paths(f"interactions/{name}")

    def split(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """The rows of a split in time order; all columns of INTERACTIONS, or `columns` of them."""
        return _read(self.split_paths(name), columns)

    def items(self, columns: list[str] | None = None) -> pa.Table:
        """All items, by dense id; all columns of ITEMS, or `columns` of them."""
        return _read(self.paths("items"), columns)

    def users(self, columns: list[str] | None = None) -> pa.Table:
        """All users, by dense id; all columns of USERS, or `columns` of them."""
        return _read(self.paths("users"), columns)


def first_other_id(log: Log, earlier: Log, kind: str) -> tuple[int, str, str | None] | None:
    """The first user or item of an earlier log that another log doesn't have under the same number; None where it has all.

    Returns:
        The number, what the earlier log means by it, and what the other one does (None: it has none of that number).
    """
    number, rest = 0, _external_ids(log, kind)
    held = pa.array([], pa.string())
    for theirs in _external_ids(earlier, kind):
        while len(theirs):
            if not len(held):
                held = next(rest, None)
                if held is None:
                    return number, theirs[0].as_py(), None
            both = min(len(held), len(theirs))
            place = pc.index(pc.not_equal(held[:both], theirs[:both]), True).as_py()
            if place >= 0:
                return number + place, theirs[place].as_py(), held[place].as_py()
            number, held, theirs = number + both, held[both:], theirs[both:]
    return None


def _external_ids(log: Log, kind: str) -> Iterator[pa.Array]:
    for path in log.paths(f"{kind}s"):
        for rows in pq.ParquetFile(path).iter_batches(columns=["external_id"]):
            yield rows.column(0)


def item_counts(log: Log) -> np.ndarray:
    """int64 [2, items]: how many train rows each item has, and how many positive ones.

    Raises:
        UserError: a row has an item that the log's catalog doesn't have.
    """
    counts = np.zeros((2, log.facts["items"]), np.int64)
    for path in log.split_paths("train"):
        for rows in pq.ParquetFile(path).iter_batches(columns=["row", "item", "label"]):
            item, label = rows["item"].to_numpy(), rows["label"].to_numpy()
            bad = np.flatnonzero((item < 0) | (item >= counts.shape[1]))
            if len(bad):
                raise UserError(
                    f"item is {item[bad[0]]} in row {rows['row'][int(bad[0])]} of {path}, but table item has the ids 0 to "
                    f"{counts.shape[1] - 1}: prepare the data again"
                )
            np.add.at(counts[0], item, 1)
            np.add.at(counts[1], item[label == 1], 1)
    return counts


def train_sequences(log: Log, most: int) -> pl.LazyFrame:
    """The train sequences as rows: of each user with two positives in train or more, the last `most` of them.

    `item` is the last one's, `history` has those before it, both of the train split alone; users are in the order of their
    first positives.
    """
    rows = pl.scan_parquet(log.split_paths("train")).filter(pl.col("label") == 1)
    last = rows.group_by("user", maintain_order=True).agg(
        pl.col("row").last(), pl.col("item").tail(most).alias("items")
    )
    return last.filter(pl.col("items").list.len() > 1).select(
        "row",
        "user",
        pl.col("items").list.last().alias("item"),
        pl.lit(1, pl.Int8).alias("label"),
        pl.col("items").list.head(pl.col("items").list.len() - 1).alias("history"),
        pl.lit(True).alias("user_seen"),
        pl.lit(True).alias("item_seen"),
    )


def write_sequences(log: Log, path: Path, most: int) -> None:
    """Write `train_sequences`.

    Raises:
        UserError: there are none.
    """
    found = train_sequences(log, most).collect()
    if not len(found):
        raise UserError(
            "no user has two positives in the train split, so there are no sequences: take collab.train_on rows"
        )
    table = found.to_arrow()
    history = table.schema.get_field_index("history")
    table = table.set_column(history, "history", table["history"].cast(pa.list_(pa.int64())))
    pq.write_table(table, path, row_group_size=ROW_GROUP_ROWS)


HAS_HISTORY = pc.field("history_length") > 0


def write_with_history(log: Log, split: str, path: Path) -> None:
    """Write the rows of a split that have a history, in their order."""
    rows = pyarrow.dataset.dataset([str(part) for part in log.split_paths(split)])
    with pq.ParquetWriter(path, rows.schema) as writer:
        for some in rows.to_batches(filter=HAS_HISTORY, batch_size=ROW_GROUP_ROWS):
            if len(some):
                writer.write_batch(some)


def count_with_history(log: Log, split: str) -> tuple[int, int]:
    """How many rows of a split have a history, and how many of those are positives."""
    rows = pyarrow.dataset.dataset([str(part) for part in log.split_paths(split)])
    return tuple(rows.count_rows(filter=of) for of in (HAS_HISTORY, HAS_HISTORY & (pc.field("label") == 1)))


def write_manifest(directory: Path, facts: dict[str, Any]) -> None:
    """Put the facts beside the tables: without them there is no log."""
    unfinished = directory / f".{FACTS_FILE}"
    unfinished.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(directory / FACTS_FILE)


def read_log(directory: Path) -> Log:
    """Open the prepared log in `directory`.

    Raises:
        UserError: there is no prepared log.
    """
    directory = Path(directory)
    try:
        facts = json.loads((directory / FACTS_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{directory} holds no prepared log: cannot read {FACTS_FILE} ({error.strerror}).") from error
    except ValueError as error:
        raise UserError(f"{directory / FACTS_FILE} is damaged ({error}): prepare the data again.") from error
    return Log(directory, facts.get("facts", facts))


def copy_log(log: Log, folder: Path) -> None:
    """Put a log's tables into another folder, as hard links where the file system has them; its facts are left to the caller."""
    for table in ("interactions", "sequences", "items", "users"):
        shutil.copytree(log.directory / table, folder / table, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy(source, target)


def _read(paths: list[Path], columns: list[str] | None = None) -> pa.Table:
    try:
        return pa.concat_tables([pq.ParquetFile(path).read(columns) for path in paths])
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"Cannot read the prepared log: {error}. Prepare the data again.") from error
