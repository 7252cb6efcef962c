"""The format CoLLM publishes its splits in: one pandas frame per split, pickled in a zip, or the same as Parquet."""

from __future__ import annotations

import functools
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sellarec.data.files import is_file, names_in, open_file
from sellarec.data.pickles import read_pickled_frame
from sellarec.data.raw import SPLITS, Dropped, Part, Source
from sellarec.data.sources.text import MAX_ROWS, Rows, null_where_empty, without_bad
from sellarec.errors import UserError

COLUMNS = ("uid", "iid", "label", "timestamp", "his", "title", "not_cold")
"""Columns a split must have. `his_title` is read where present (the Parquet form leaves it out); others are not
read."""

MAX_MEMBER_BYTES = 8 * 1024**3
"""A zip member that says it unpacks to more than this is refused (bytes)."""

Result = TypeVar("Result")

_PADDING = 0  # the id that the format puts before each history


@dataclass(frozen=True)
class _Files:
    """Where the splits lie: in one zip, or in one file each."""

    archive: str | None
    splits: dict[str, str]  # the member's name, or the file


def open_collm(path: str, *, noun: str = "movie") -> Source:
    """A dataset in CoLLM's format, with its published split, histories and warm flags.

    `path` is the published zip, a folder holding that zip, or a folder of {train,valid,test}_ood2.pkl or .parquet
    (looked for in this order). Nothing pickled is executed. A split is read as a whole.

    Raises:
        UserError: a path or archive that is missing, damaged or not of this format; when read, the same of a table.
    """
    files = _find(path)
    return Source(
        interactions=tuple(
            Part(_name(files, split), functools.partial(_interactions, files, split)) for split in SPLITS
        ),
        items=(Part(f"the items of {path}", functools.partial(_items, files)),),
        files=(files.archive,) if files.archive else tuple(files.splits.values()),
        noun=noun,
        label_rule="the label as published",
        split_rule="the split as published (one file for each of train, valid and test)",
    )


def _interactions(files: _Files, split: str, dropped: Dropped) -> Iterator[pa.Table]:
    table = _checked(_read(files, split), _name(files, split), dropped)
    history = _history(table)
    warm = pc.not_equal(table["not_cold"], 0)
    for start in range(0, table.num_rows, MAX_ROWS):
        rows = table.slice(start, MAX_ROWS)
        offsets = history.offsets[start : start + len(rows) + 1]
        entries = history.items[offsets[0] : offsets[-1]]
        yield pa.table(
            {
                "user": rows["uid"],
                "item": rows["iid"],
                "label": rows["label"].cast(pa.int8()),
                "timestamp": rows["timestamp"],
                "split": pa.repeat(split, len(rows)),
                "history": pa.ListArray.from_arrays(pa.array(offsets - offsets[0], pa.int32()), pa.array(entries)),
                "warm": warm.slice(start, len(rows)),
            }
        )


def _find(path: str) -> _Files:
    looked_for = "CoLLM's zip, a folder holding it, or a folder of {train,valid,test}_ood2.pkl or .parquet"
    if is_file(path):
        return _in_archive(path)
    names = names_in(path)
    if names is None:
        raise UserError(f"No such file or folder: {path}. Looked for {looked_for}.")
    archives = [name for name in names if name.endswith(".zip")]
    if len(archives) > 1:
        raise UserError(f"{path} holds several zips ({', '.join(archives)}): give the path of the one to read.")
    folder = path.rstrip("/")
    if archives:
        return _in_archive(f"{folder}/{archives[0]}")
    for suffix in ("pkl", "parquet"):
        if all(f"{split}_ood2.{suffix}" in names for split in SPLITS):
            return _Files(None, {split: f"{folder}/{split}_ood2.{suffix}" for split in SPLITS})
    raise UserError(f"{path} holds no data in CoLLM's format. Looked for {looked_for}; found {_listed(names)}.")


def _in_archive(path: str) -> _Files:
    members = _with_archive(path, lambda archive: archive.namelist())
    splits: dict[str, str] = {}
    for split in SPLITS:
        wanted = f"{split}_ood2.pkl"
        found = [member for member in members if member.rsplit("/", 1)[-1] == wanted]
        if len(found) != 1:
            raise UserError(
                f"{path} must hold exactly one {wanted}, but holds {len(found)}; it holds {_listed(members)}."
            )
        splits[split] = found[0]
    return _Files(path, splits)


def _listed(names: list[str], limit: int = 20) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _with_archive(path: str, action: Callable[[zipfile.ZipFile], Result]) -> Result:
    with open_file(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return action(archive)
        except (zipfile.BadZipFile, zlib.error, EOFError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{path} is truncated, damaged or no zip ({file.size():,} bytes; {error}). Download it again."
            ) from error
        except (RuntimeError, NotImplementedError) as error:
            raise UserError(f"{path} cannot be unpacked: {error}. Give the zip as it was published.") from error
        except OSError as error:
            raise UserError(f"Cannot read {path}: {error}.") from error


def _name(files: _Files, split: str) -> str:
    return f"{files.archive} ({files.splits[split]})" if files.archive else files.splits[split]


def _read(files: _Files, split: str) -> pa.Table:
    name = _name(files, split)
    if files.archive:
        return read_pickled_frame(_with_archive(files.archive, lambda archive: _member(archive, files, split)), name)
    with open_file(name) as file:
        try:
            if not name.endswith(".parquet"):
                return read_pickled_frame(file.read(), name)
            present = pq.ParquetFile(file).schema_arrow.names
            return pq.read_table(file, columns=[column for column in (*COLUMNS, "his_title") if column in present])
        except pa.ArrowInvalid as error:
            raise UserError(f"Cannot read {name} as Parquet: {error}. Check the download.") from error
        except OSError as error:
            raise UserError(f"Cannot read {name}: {error}. Check the download.") from error


def _member(archive: zipfile.ZipFile, files: _Files, split: str) -> bytes:
    info = archive.getinfo(files.splits[split])
    if info.file_size > MAX_MEMBER_BYTES:
        raise UserError(
            f"{_name(files, split)} unpacks to {info.file_size:,} bytes, above the limit of {MAX_MEMBER_BYTES:,}: "
            "give the tables as Parquet."
        )
    return archive.read(info)


def _checked(table: pa.Table, name: str, dropped: Dropped) -> pa.Table:
    """The columns that are used, in their exact types, without bad rows."""
    absent = [column for column in COLUMNS if column not in table.column_names]
    if absent:
        raise UserError(f"{name} lacks the column {', '.join(absent)}; it has {', '.join(table.column_names)}.")
    types = {column: pa.int64() for column in ("uid", "iid", "label", "timestamp", "not_cold")}
    types |= {"his": pa.list_(pa.int64()), "title": pa.string(), "his_title": pa.list_(pa.string())}
    columns = {}
    checks = []
    for column, wanted in types.items():
        if column not in table.column_names:
            continue
        values = table[column]
        try:
            columns[column] = values.cast(wanted)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(
                f"{name}: the column {column} is {values.type}, which is not {wanted} ({error})."
            ) from error
        if column not in ("title", "his_title"):
            checks.append((pc.is_null(values), f"the {column} is empty"))
    history = columns["his"].combine_chunks()
    holed = pc.list_parent_indices(history).filter(pc.is_null(pc.list_flatten(history)))
    checks.append((pc.is_in(pa.array(np.arange(len(history))), holed), "the history holds an empty value"))
    checks.append((pc.invert(pc.is_in(columns["label"], pa.array([0, 1]))), "the label must be 0 or 1"))
    if "his_title" in columns:
        lengths = [pc.list_value_length(columns[column]).fill_null(0) for column in ("his", "his_title")]
        checks.append((pc.not_equal(*lengths), "the history has not as many titles as items"))
    shown = [
        column for column in ("uid", "iid", "label", "timestamp", "not_cold", "his", "his_title") if column in columns
    ]

    def place(row: int) -> tuple[str, str]:
        return f"{name}, row {row}", ", ".join(f"{column} {columns[column][row].as_py()}" for column in shown)

    return without_bad(Rows({}, place, len(columns), ()), pa.table(columns), checks, dropped)


@dataclass(frozen=True)
class _History:
    """A split's histories without their padding, flat: row r holds entries offsets[r] to offsets[r + 1]."""

    offsets: np.ndarray  # int64 [rows + 1]
    items: np.ndarray  # int64 [entries]
    titles: pa.Array  # string [entries], null where the source has none


def _history(table: pa.Table) -> _History:
    """The histories of `table`, each without the padding id that leads it."""
    lengths, values = _flat(table["his"])
    titles = _flat(table["his_title"])[1] if "his_title" in table.column_names else pa.nulls(len(values), pa.string())
    items = values.to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths)
    starts = (ends - lengths)[lengths > 0]
    keep = np.ones(len(items), dtype=bool)
    keep[starts[items[starts] == _PADDING]] = False
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    offsets = kept_before[np.concatenate([[0], ends])]
    return _History(offsets, items[keep], titles.filter(pa.array(keep)))


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Lengths (int64) and flat values of a list column."""
    lengths = pc.list_value_length(column).to_numpy().astype(np.int64)
    return lengths, pc.list_flatten(column).combine_chunks()


def _items(files: _Files, dropped: Dropped) -> Iterator[pa.Table]:
    """Every item of any row or history, with the first title that a row, else a history, gives it (null without any)."""
    # Bad rows are counted, or refused, where the interactions are read.
    tables = [_checked(_read(files, split), _name(files, split), Dropped("drop")) for split in SPLITS]
    histories = [_history(table) for table in tables]
    every = np.concatenate([table["iid"].to_numpy() for table in tables] + [history.items for history in histories])
    titles = pa.chunked_array(
        [chunk for table in tables for chunk in table["title"].chunks] + [history.titles for history in histories],
        pa.string(),
    ).fill_null("")
    items, first, item_of = np.unique(every, return_index=True, return_inverse=True)
    titled_last_to_first = np.flatnonzero(pc.not_equal(titles, "").to_numpy())[::-1]
    described_by = first.copy()
    described_by[item_of[titled_last_to_first]] = titled_last_to_first  # of equal indices, numpy keeps the last
    order = np.argsort(first)
    title = titles.take(pa.array(described_by[order])).combine_chunks()
    yield pa.table({"item": pa.array(items[order]), "title": null_where_empty(title)})
