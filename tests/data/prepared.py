"""Small sources made of tables, prepared into a folder: what tests of several modules share."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sellarec.data.log import Log, read_log, write_manifest
from sellarec.data.phases import Rules
from sellarec.data.prepare import discard_work, prepare
from sellarec.data.raw import Dropped, Part, Source, part_of_table

TITLES = pa.table({"item": pa.array([], pa.string()), "title": pa.array([], pa.string())})


def rules(**changes) -> Rules:
    usual = {
        "split": "shares",
        "shares": (0.8, 0.1, 0.1),
        "dates": None,
        "positive_rating": 4.0,
        "history_cap": 5,
        "k_core": 0,
        "k_core_once": False,
        "seed": 0,
    }
    return Rules(**usual | changes)


def in_parts(table: pa.Table, parts: int, name: str = "rows") -> tuple[Part, ...]:
    """A table cut into parts, in its order; some are empty where it is short."""
    edges = np.linspace(0, len(table), parts + 1).round().astype(int)
    cut = [table.slice(low, high - low) for low, high in itertools.pairwise(edges)]
    return tuple(part_of_table(f"{name} {number}", piece) for number, piece in enumerate(cut))


def source_of(interactions: pa.Table, items: pa.Table = TITLES, *, parts: int = 1, **fields) -> Source:
    described = items.set_column(0, "item", items["item"].cast(interactions["item"].type))
    usual: dict[str, Any] = {"files": (), "noun": "book", "label_rule": "as drawn"}
    if "split" in interactions.column_names:
        usual["split_rule"] = "as drawn"
    return Source(in_parts(interactions, parts), in_parts(described, parts, "items"), **usual | fields)


def prepare_into(folder: Path, source: Source, made_by: Rules | None = None, **settings) -> Log:
    """Prepare in this process alone."""
    settings = {"hashes": {}, "start_ray": no_ray, "say": print} | settings
    facts = prepare(source, made_by or rules(), folder, **settings)
    write_manifest(folder, facts)
    discard_work(folder)
    return read_log(folder)


def no_ray() -> None:
    pytest.fail("a small log is prepared without Ray")


def read_parts(parts: tuple[Part, ...], dropped: Dropped | None = None) -> pa.Table:
    """All rows of parts that have any."""
    dropped = dropped or Dropped("refuse")
    return pa.concat_tables([table for part in parts for table in part.read(dropped)])


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
