"""The prepared log on disk: Parquet tables of one shape for every dataset, and the facts about them.

A folder holds log.json (the facts), interactions/{train,valid,test}.parquet, items.parquet and users.parquet.

    interactions: row int64, user int64, item int64, label int8, rating float32?, timestamp int64?, history list<int64>,
        history_length int32, user_seen bool, item_seen bool, warm bool, expected float32?
    items: item int64, external_id string, title string, text string
    users: user int64, external_id string

A type with "?" is null where unknown. Users and items are dense ids from 0. `row` counts through train, valid, test; a
split's rows are in time order. `history` is the user's earlier positives, oldest first, the last `history_cap` of them;
`history_length` counts them all. `user_seen` and `item_seen` say whether they occur in train; `expected` is the planted
probability of a positive in a generated world.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sellarec.data.prepare import ROWS_PER_CHUNK, Prepared
from sellarec.data.raw import SPLITS
from sellarec.errors import UserError

FACTS_FILE = "log.json"

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
ITEMS = pa.schema([("item", pa.int64()), ("external_id", pa.string()), ("title", pa.string()), ("text", pa.string())])
USERS = pa.schema([("user", pa.int64()), ("external_id", pa.string())])


@dataclass(frozen=True)
class Log:
    """A prepared log in a folder. It holds the facts; tables are read when asked for."""

    directory: Path
    facts: dict[str, Any]

    def split_path(self, name: str) -> Path:
        """The Parquet file of the split "train", "valid" or "test"."""
        if name not in SPLITS:
            raise ValueError(f"no split {name!r}: there are {', '.join(SPLITS)}")
        return self.directory / "interactions" / f"{name}.parquet"

    def split(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """The rows of a split in time order; all columns of INTERACTIONS, or `columns` of them."""
        return _read(self.split_path(name), columns)

    def items(self) -> pa.Table:
        """All items, by dense id; columns of ITEMS."""
        return _read(self.directory / "items.parquet")

    def users(self) -> pa.Table:
        """All users, by dense id; columns of USERS."""
        return _read(self.directory / "users.parquet")


def write_log(prepared: Prepared, directory: Path) -> Log:
    """Write `prepared` into `directory` (made where absent), the facts last, and return the log.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    directory = Path(directory)
    (directory / "interactions").mkdir(parents=True, exist_ok=True)
    log = Log(directory, prepared.facts)
    for name, table in prepared.interactions.items():
        _write(table, INTERACTIONS, log.split_path(name))
    _write(prepared.items, ITEMS, directory / "items.parquet")
    _write(prepared.users, USERS, directory / "users.parquet")
    (directory / FACTS_FILE).write_text(json.dumps(prepared.facts, indent=2) + "\n", encoding="utf-8")
    return log


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
    return Log(directory, facts)


def _write(table: pa.Table, schema: pa.Schema, path: Path) -> None:
    # Cast, so that a table of another shape fails here and not in a reader.
    pq.write_table(table.cast(schema), path, row_group_size=ROWS_PER_CHUNK)


def _read(path: Path, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.ParquetFile(path).read(columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"Cannot read {path} of the prepared log: {error}. Prepare the data again.") from error
