"""The format CoLLM publishes its splits in: one pandas frame per split, pickled in a zip, or the same as Parquet."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sellarec.data.pickles import read_pickled_frame
from sellarec.data.raw import SPLITS, Raw, file_hash
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

    archive: Path | None
    splits: dict[str, str | Path]  # the member's name, or the file


def find_files(path: Path) -> list[Path]:
    """Return the files that `read_collm` would read: the zip, or one file per split.

    Raises:
        UserError: nothing in CoLLM's format lies at `path`.
    """
    files = _find(path)
    return [files.archive] if files.archive else [Path(file) for file in files.splits.values()]


def read_collm(path: Path, *, noun: str = "movie") -> Raw:
    """Read a dataset in CoLLM's format, with its published split, histories and warm flags.

    `path` is the published zip, a folder holding that zip, or a folder of {train,valid,test}_ood2.pkl or .parquet
    (looked for in this order). Nothing pickled is executed.

    Raises:
        UserError: a path, archive, pickle or table that is missing, damaged or not of this format.
    """
    files = _find(path)
    tables = {split: _checked(_read(files, split), _name(files, split)) for split in SPLITS}
    histories = {split: _history(table, _name(files, split)) for split, table in tables.items()}
    rows = [
        pa.table(
            {
                "user": table["uid"],
                "item": table["iid"],
                "label": table["label"],
                "timestamp": table["timestamp"],
                "split": pa.repeat(split, table.num_rows),
                "history": pa.LargeListArray.from_arrays(histories[split].offsets, histories[split].items),
                "warm": pc.not_equal(table["not_cold"], 0),
            }
        )
        for split, table in tables.items()
    ]
    return Raw(
        interactions=pa.concat_tables(rows),
        items=_items(list(tables.values()), list(histories.values())),
        noun=noun,
        label_rule="the label as published",
        split_rule="the split as published (one file for each of train, valid and test)",
        sources={file.name: file_hash(file) for file in find_files(path)},
    )


def _find(path: Path) -> _Files:
    looked_for = "CoLLM's zip, a folder holding it, or a folder of {train,valid,test}_ood2.pkl or .parquet"
    try:
        if path.is_file():
            return _in_archive(path)
        if not path.is_dir():
            raise UserError(f"No such file or folder: {path}. Looked for {looked_for}.")
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}. Looked for {looked_for}.") from error
    archives = [name for name in names if name.endswith(".zip")]
    if len(archives) > 1:
        raise UserError(f"{path} holds several zips ({', '.join(archives)}): give the path of the one to read.")
    if archives:
        return _in_archive(path / archives[0])
    for suffix in ("pkl", "parquet"):
        if all(f"{split}_ood2.{suffix}" in names for split in SPLITS):
            return _Files(None, {split: path / f"{split}_ood2.{suffix}" for split in SPLITS})
    raise UserError(f"{path} holds no data in CoLLM's format. Looked for {looked_for}; found {_listed(names)}.")


def _in_archive(path: Path) -> _Files:
    members = _with_archive(path, lambda archive: archive.namelist())
    splits: dict[str, str | Path] = {}
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


def _with_archive(path: Path, action: Callable[[zipfile.ZipFile], Result]) -> Result:
    try:
        with zipfile.ZipFile(path) as archive:
            return action(archive)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(
            f"{path} is truncated, damaged or no zip ({path.stat().st_size:,} bytes; {error}). Download it again."
        ) from error
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(f"{path} cannot be unpacked: {error}. Give the zip as it was published.") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error


def _name(files: _Files, split: str) -> str:
    return f"{files.archive} ({files.splits[split]})" if files.archive else str(files.splits[split])


def _read(files: _Files, split: str) -> pa.Table:
    name = _name(files, split)
    if files.archive:
        return read_pickled_frame(_with_archive(files.archive, lambda archive: _member(archive, files, split)), name)
    file = Path(files.splits[split])
    if file.suffix == ".parquet":
        try:
            wanted = [column for column in (*COLUMNS, "his_title") if column in pq.read_schema(file).names]
            return pq.read_table(file, columns=wanted)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"Cannot read {file} as Parquet: {error}. Check the download.") from error
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror}.") from error
    return read_pickled_frame(data, name)


def _member(archive: zipfile.ZipFile, files: _Files, split: str) -> bytes:
    info = archive.getinfo(str(files.splits[split]))
    if info.file_size > MAX_MEMBER_BYTES:
        raise UserError(
            f"{_name(files, split)} unpacks to {info.file_size:,} bytes, above the limit of {MAX_MEMBER_BYTES:,}: "
            "give the tables as Parquet."
        )
    return archive.read(info)


def _checked(table: pa.Table, name: str) -> pa.Table:
    """The columns that are used, in their exact types."""
    absent = [column for column in COLUMNS if column not in table.column_names]
    if absent:
        raise UserError(f"{name} lacks the column {', '.join(absent)}; it has {', '.join(table.column_names)}.")
    types = {column: pa.int64() for column in ("uid", "iid", "label", "timestamp", "not_cold")}
    types |= {"his": pa.list_(pa.int64()), "title": pa.string(), "his_title": pa.list_(pa.string())}
    columns = {}
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
        if column not in ("title", "his_title") and values.null_count:
            row = pc.index(pc.is_null(values), True).as_py()
            raise UserError(
                f"{name}: the column {column} has {values.null_count:,} empty values, the first in row {row}."
            )
    wrong = pc.invert(pc.is_in(columns["label"], pa.array([0, 1])))
    if pc.any(wrong).as_py():
        row = pc.index(wrong, True).as_py()
        raise UserError(f"{name}: the label must be 0 or 1, but row {row} has {columns['label'][row].as_py()}.")
    return pa.table(columns)


@dataclass(frozen=True)
class _History:
    """A split's histories without their padding, flat: row r holds entries offsets[r] to offsets[r + 1]."""

    offsets: np.ndarray  # int64 [rows + 1]
    items: np.ndarray  # int64 [entries]
    titles: pa.Array  # string [entries], null where the source has none


def _history(table: pa.Table, name: str) -> _History:
    """The histories of `table`, each without the padding id that leads it."""
    lengths, values = _flat(table["his"])
    if "his_title" in table.column_names:
        title_lengths, titles = _flat(table["his_title"])
        if not np.array_equal(title_lengths, lengths):
            row = int(np.argmax(title_lengths != lengths))
            raise UserError(
                f"{name}: row {row} has a history of {lengths[row]} items, but titles for {title_lengths[row]} of them."
            )
    else:
        titles = pa.nulls(len(values), pa.string())
    if values.null_count:
        entry = pc.index(pc.is_null(values), True).as_py()
        row = int(np.searchsorted(np.cumsum(lengths), entry, side="right"))
        raise UserError(f"{name}: the history of row {row} holds an empty value.")
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


def _items(tables: list[pa.Table], histories: list[_History]) -> pa.Table:
    """Every item of any row or history, with the first title that a row, else a history, gives it ("" without any)."""
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
    title = titles.take(pa.array(described_by[order]))
    return pa.table({"external_id": pa.array(items[order]), "title": title, "text": title})
