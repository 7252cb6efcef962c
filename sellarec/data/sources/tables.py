"""Any interactions in CSV, TSV, JSON lines or Parquet, read by a mapping of their columns."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from sellarec.data.files import block_end, decoded, is_file, line_blocks, names_in, open_file
from sellarec.data.raw import MAX_SHOWN, SPLITS, Dropped, Part, Source
from sellarec.data.sources.text import (
    MAX_ROWS,
    Rows,
    attributes,
    empty,
    null_where_empty,
    numbers,
    outside,
    without_bad,
)
from sellarec.errors import UserError

Kind = Literal["csv", "tsv", "jsonl", "parquet"]
"""What a file's name ends in; all but Parquet may have .gz after it."""

TimeUnit = Literal["s", "ms", "us", "ns", "iso"]

DELIMITERS = {"csv": ",", "tsv": "\t"}
UNITS = {
    "s": ("seconds", 1),
    "ms": ("milliseconds", 10**3),
    "us": ("microseconds", 10**6),
    "ns": ("nanoseconds", 10**9),
}
YEARS = (1990, 2100)
"""Times are from the start of the first year to the start of the second: others are given in another unit."""

EARLIEST, LATEST = (int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) for year in YEARS)

ROWS_PER_PART = 4_000_000
"""Rows of a Parquet file that one task reads (whole row groups)."""

HEAD_LINES = 1000
"""JSON lines that are searched for a column before it is said to be absent (a line need not have every one)."""


@dataclass(frozen=True)
class Columns:
    """Which column of a file holds what; None where the file doesn't have it.

    Attributes:
        item: an item's id.
        user: a user's id.
        rating: a number.
        timestamp: a time in `time_unit`; columns of Parquet that are times by their type need none.
        label: 0 or 1 (true and false in JSON lines and Parquet).
        split: "train", "valid" or "test".
        domain: the part of the catalog that a row belongs to.
        history: ids of the items that the user liked before, oldest first, separated by spaces.
        title, text: what describes an item: the first that a row gives it.
        features: categorical features of an interaction; of an items file its attributes.
        time_unit: "iso" is a date, or date and time, as in ISO 8601, UTC where it names no other zone.
    """

    item: str
    user: str | None = None
    rating: str | None = None
    timestamp: str | None = None
    label: str | None = None
    split: str | None = None
    domain: str | None = None
    history: str | None = None
    title: str | None = None
    text: str | None = None
    features: tuple[str, ...] = ()
    time_unit: TimeUnit = "s"

    def names(self, fields: Sequence[str]) -> tuple[str, ...]:
        """The file's columns for these fields and `features`, each once."""
        mapped = (getattr(self, field) for field in fields)
        return tuple(dict.fromkeys([name for name in mapped if name is not None] + list(self.features)))


OF_INTERACTIONS = ("user", "item", "rating", "timestamp", "label", "split", "domain", "history")
OF_ITEMS = ("item", "title", "text")


def open_tables(
    path: str,
    columns: Columns,
    *,
    items: str | None = None,
    item_columns: Columns | None = None,
    noun: str = "item",
    rating_range: tuple[float, float] | None = None,
) -> Source:
    """Interactions in a file, or in a folder of files of one kind: .csv, .tsv, .jsonl (these also with .gz) or .parquet.

    CSV and TSV have a header, and double quotes around values that need them. Ids are strings; only where all files are
    Parquet with whole numbers for ids, they are int64. A folder's files of other names are not read.

    Args:
        items: a file or folder that describes items, by `item_columns`. Without it titles and texts are taken from the
            interactions, where `columns` has them.
        rating_range: lowest and highest rating there can be.

    Raises:
        UserError: a missing or damaged file, files of several kinds, or a mapped column that a file doesn't have.
    """
    if columns.user is None:
        raise UserError("The mapping of the interactions' columns names none for the user.")
    if (items is None) != (item_columns is None):
        raise UserError("An items file and the mapping of its columns belong together: give both or neither.")
    if item_columns is not None:
        others = [field for field in OF_INTERACTIONS if field != "item" and getattr(item_columns, field) is not None]
        if others:
            raise UserError(f"The mapping of the items' columns has {', '.join(others)}, which belong to interactions.")
    item_files = _files(items) if items is not None else []
    files = [file for file in _files(path) if file not in item_files]
    describes = columns.title is not None or columns.text is not None
    read_fields = (*OF_INTERACTIONS, *(OF_ITEMS if describes and item_columns is None else ()))
    schemas = {file: _checked_columns(file, columns.names(read_fields)) for file in files}
    if item_columns is not None:
        schemas |= {file: _checked_columns(file, item_columns.names(OF_ITEMS)) for file in item_files}
    user_type = _id_type([schemas[file].get(columns.user) for file in files])
    item_type = _id_type(
        [schemas[file].get(columns.item) for file in files]
        + [schemas[file].get(item_columns.item) for file in item_files if item_columns is not None]
    )

    def parts(files: list[str], read: functools.partial[Iterator[pa.Table]]) -> tuple[Part, ...]:
        return tuple(Part(name, functools.partial(read, file, groups)) for file in files for name, groups in _cut(file))

    described = (item_files, item_columns) if item_columns is not None else (files if describes else [], columns)
    return Source(
        interactions=parts(
            files,
            functools.partial(
                _read_interactions, columns=columns, id_types=(user_type, item_type), rating_range=rating_range
            ),
        ),
        items=parts(
            described[0],
            functools.partial(
                _read_items, columns=described[1], item_type=item_type, of_interactions=item_columns is None
            ),
        ),
        files=(*files, *item_files),
        noun=noun,
        label_rule=f"the column {columns.label} as it is given" if columns.label else None,
        split_rule=f"the column {columns.split} as it is given" if columns.split else None,
        features=columns.features,
        rating_range=rating_range,
    )


def kind_of(file: str) -> Kind | None:
    """What kind of table a file is by its name; None for others."""
    for kind in ("csv", "tsv", "jsonl", "parquet"):
        if file.endswith(f".{kind}") or (kind != "parquet" and file.endswith(f".{kind}.gz")):
            return kind
    return None


def csv_header(path: str, delimiter: str = ",") -> tuple[str, ...]:
    """The names in a CSV file's first line.

    Raises:
        UserError: the file can't be read or is empty.
    """
    for first, block in line_blocks(path, quotes=True):
        names, _ = _split_header(path, first, block, delimiter)
        if names:
            return names
    raise UserError(f"{path} is empty.")


def csv_rows(
    path: str, wanted: Sequence[str], *, delimiter: str = ",", names: tuple[str, ...] | None = None
) -> Iterator[Rows]:
    """The `wanted` columns of a CSV file in UTF-8, plain or gzipped; blank lines are no rows.

    Args:
        names: the columns of a file without a header.

    Raises:
        UserError: it can't be read, is damaged, empty or not in UTF-8, or lacks a wanted column.
    """
    is_filled = False
    for first, block in line_blocks(path, quotes=True):
        is_filled = True
        if not block.isascii():
            decoded(path, first, block)
        header_lines = 0
        if names is None:
            names, header_lines = _split_header(path, first, block, delimiter)
            if names is None:
                continue
            _refuse_absent(path, wanted, names)
        content = b"\n".join(block.split(b"\n", header_lines)[header_lines:])
        if not content.strip():
            continue
        _refuse_open_quote(path, first, block, delimiter)
        misfits: list[int] = []

        def keep(row: pacsv.InvalidRow, misfits: list[int] = misfits) -> str:
            misfits.append(row.number - 1)
            return "skip"

        try:
            table = pacsv.read_csv(
                pa.BufferReader(content),
                # In one block, so that rows are numbered by their place in it.
                read_options=pacsv.ReadOptions(use_threads=False, column_names=names, block_size=len(content) + 1),
                parse_options=pacsv.ParseOptions(
                    delimiter=delimiter, newlines_in_values=True, invalid_row_handler=keep
                ),
                convert_options=pacsv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()),
                    include_columns=list(wanted),
                    strings_can_be_null=False,
                ),
            )
        except pa.ArrowInvalid as error:
            raise UserError(f"{path}, after line {first - 1:,}: not CSV ({error}).") from error
        texts = {name: table[name].combine_chunks() for name in wanted}
        place = functools.partial(_csv_place, path, first + header_lines, content)
        yield Rows(texts, place, len(names), tuple(misfits))
    if not is_filled:
        raise UserError(f"{path} is empty.")


def json_rows(path: str, wanted: Sequence[str], dropped: Dropped) -> Iterator[Rows]:
    """The `wanted` fields of JSON lines, plain or gzipped, as text ("" where absent or null); blank lines are no rows.

    A line that is no JSON object is a bad row.

    Raises:
        UserError: it can't be read, is damaged, empty or not in UTF-8, or a bad row is refused.
    """
    is_filled = False
    schema = dict.fromkeys(wanted, pl.String)
    for first, block in line_blocks(path):
        is_filled = True
        lines: list[tuple[int, bytes]] | None = None
        try:
            frame = _parsed(block, schema)
        except pl.exceptions.PolarsError:
            frame, lines = _readable(path, _numbered(first, block), schema, dropped)
        if not frame.height:
            continue
        texts = {name: frame[name].fill_null("").to_arrow().cast(pa.string()) for name in wanted}
        yield Rows(texts, functools.partial(_json_place, path, first, block, lines), len(wanted), ())
    if not is_filled:
        raise UserError(f"{path} is empty.")


def parquet_rows(path: str, wanted: Sequence[str], groups: Sequence[int] | None = None) -> Iterator[Rows]:
    """The `wanted` columns of row groups of a Parquet file as text ("" where null); times as seconds since 1970.

    Raises:
        UserError: it can't be read or is damaged.
    """
    try:
        with open_file(path) as stream, pq.ParquetFile(stream) as file:
            chosen = list(range(file.num_row_groups)) if groups is None else list(groups)
            row = sum(file.metadata.row_group(group).num_rows for group in range(min(chosen, default=0)))
            for batch in file.iter_batches(MAX_ROWS, row_groups=chosen, columns=list(wanted)):
                texts = {name: _as_text(batch.column(name)) for name in wanted}
                yield Rows(texts, functools.partial(_parquet_place, path, row, texts), len(wanted), ())
                row += batch.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"Cannot read {path} as Parquet: {error}. Get it again.") from error


def interactions(
    blocks: Iterable[Rows],
    columns: Columns,
    dropped: Dropped,
    *,
    id_types: tuple[pa.DataType, pa.DataType] = (pa.string(), pa.string()),
    is_complete: bool = False,
    rating_range: tuple[float, float] | None = None,
    period: tuple[int, int] | None = None,
) -> Iterator[pa.Table]:
    """Rows of a file as a source's interactions (`Source.interactions`).

    Args:
        id_types: of users and of items.
        is_complete: a row without rating or timestamp is bad.
        rating_range: lowest and highest rating; others are bad.
        period: rows from the first time on and before the second (seconds since 1970) stay, others are left out, counted.

    Raises:
        UserError: bad rows are refused, and there is one; or a file is damaged.
    """
    assert columns.user is not None
    for rows in blocks:
        texts = rows.columns
        made = {}
        checks = []
        for field, name, id_type in (("user", columns.user, id_types[0]), ("item", columns.item, id_types[1])):
            checks.append(empty(texts[name], name))
            # Of whole numbers only the empty text can't be cast, and it is bad.
            blank = pc.equal(texts[name], "")
            made[field] = texts[name] if id_type == pa.string() else pc.if_else(blank, "0", texts[name]).cast(id_type)
        if columns.rating is not None:
            # without labels they are made of ratings
            may_lack = columns.label is not None and not is_complete
            rating, check = numbers(texts[columns.rating], columns.rating, may_lack=may_lack)
            checks.append(check)
            if rating_range is not None:
                checks.append(outside(rating, *rating_range, columns.rating))
            made["rating"] = rating.cast(pa.float32(), safe=False)
        if columns.timestamp is not None:
            made["timestamp"], found = _seconds(texts[columns.timestamp], columns.timestamp, columns.time_unit)
            checks += found
            if is_complete:
                checks.append(empty(texts[columns.timestamp], columns.timestamp))
        if columns.label is not None:
            made["label"], check = _label(texts[columns.label], columns.label)
            checks.append(check)
        if columns.split is not None:
            made["split"] = texts[columns.split]
            known = pc.is_in(made["split"], pa.array(SPLITS))
            checks.append((pc.invert(known), f"the {columns.split} is not train, valid or test"))
        if columns.history is not None:
            made["history"] = _history(texts[columns.history], id_types[1])
        if columns.domain is not None:
            made["domain"] = null_where_empty(texts[columns.domain])
        made |= {name: null_where_empty(texts[name]) for name in columns.features}
        table = without_bad(rows, pa.table(made), checks, dropped)
        if period is not None:
            inside = pc.and_(
                pc.greater_equal(table["timestamp"], period[0]), pc.less(table["timestamp"], period[1])
            ).fill_null(False)
            kept = table.filter(inside)
            dropped.leave_out(f"not {_day(period[0])} or later and before {_day(period[1])}", len(table) - len(kept))
            table = kept
        if table.num_rows:
            yield table


def described_items(
    blocks: Iterable[Rows], columns: Columns, dropped: Dropped, item_type: pa.DataType, *, has_attributes: bool
) -> Iterator[pa.Table]:
    """Rows of a file as a source's items (`Source.items`); of the rows of one block that have one item, the first.

    Raises:
        UserError: bad rows are refused, and there is one; or a file is damaged.
    """
    for rows in blocks:
        texts = rows.columns
        made = {"item": texts[columns.item]}
        made["title"] = (
            null_where_empty(texts[columns.title]) if columns.title else pa.nulls(len(made["item"]), pa.string())
        )
        if columns.text is not None:
            made["text"] = null_where_empty(texts[columns.text])
        if has_attributes and columns.features:
            made["attributes"] = attributes([(name, texts[name]) for name in columns.features], len(made["item"]))
        table = without_bad(rows, pa.table(made), [empty(made["item"], columns.item)], dropped)
        if table.num_rows:
            indices = table["item"].combine_chunks().dictionary_encode().indices
            _, first = np.unique(indices.to_numpy(), return_index=True)
            table = table.take(pa.array(np.sort(first)))
            yield table.set_column(0, "item", table["item"].cast(item_type))


def _read_interactions(
    file: str,
    groups: tuple[int, ...] | None,
    dropped: Dropped,
    *,
    columns: Columns,
    id_types: tuple[pa.DataType, pa.DataType],
    rating_range: tuple[float, float] | None,
) -> Iterator[pa.Table]:
    if kind_of(file) == "parquet" and columns.timestamp and _is_time(_parquet_types(file)[columns.timestamp]):
        columns = dataclasses.replace(columns, time_unit="s")
    rows = _rows(file, groups, columns.names(OF_INTERACTIONS), dropped)
    return interactions(rows, columns, dropped, id_types=id_types, rating_range=rating_range)


def _read_items(
    file: str,
    groups: tuple[int, ...] | None,
    dropped: Dropped,
    *,
    columns: Columns,
    item_type: pa.DataType,
    of_interactions: bool,
) -> Iterator[pa.Table]:
    if of_interactions:
        columns = dataclasses.replace(columns, features=())
        dropped = Dropped("drop")  # bad rows are counted, or refused, where the interactions are read
    rows = _rows(file, groups, columns.names(OF_ITEMS), dropped)
    return described_items(rows, columns, dropped, item_type, has_attributes=not of_interactions)


def _rows(file: str, groups: tuple[int, ...] | None, wanted: tuple[str, ...], dropped: Dropped) -> Iterator[Rows]:
    kind = kind_of(file)
    if kind == "parquet":
        return parquet_rows(file, wanted, groups)
    if kind == "jsonl":
        return json_rows(file, wanted, dropped)
    return csv_rows(file, wanted, delimiter=DELIMITERS[str(kind)])


def _files(path: str) -> list[str]:
    """The file `path`, or the tables of that folder."""
    looked_for = "a file, or a folder of files, whose names end in .csv, .tsv, .jsonl (these also with .gz) or .parquet"
    names = names_in(path)
    if names is None:
        if not is_file(path):
            raise UserError(f"No such file or folder: {path}. Looked for {looked_for}.")
        if kind_of(path) is None:
            raise UserError(f"What kind of table is {path}? Looked for {looked_for}.")
        return [path]
    kinds: dict[str, list[str]] = {}
    for name in names:
        kind = None if name.startswith((".", "_")) else kind_of(name)
        if kind:
            kinds.setdefault(kind, []).append(name)
    if not kinds:
        raise UserError(f"{path} holds no tables. Looked for {looked_for}; found {', '.join(names[:20]) or 'nothing'}.")
    if len(kinds) > 1:
        examples = ", ".join(f"{found[0]} ({len(found)} .{kind})" for kind, found in kinds.items())
        raise UserError(f"{path} holds tables of several kinds: {examples}. Keep one kind in a folder.")
    return [f"{path.rstrip('/')}/{name}" for found in kinds.values() for name in found]


def _checked_columns(file: str, wanted: tuple[str, ...]) -> dict[str, pa.DataType]:
    """The types of a Parquet file's columns (empty for other kinds), once all wanted ones are there."""
    kind = kind_of(file)
    if kind == "parquet":
        types = _parquet_types(file)
        _refuse_absent(file, wanted, tuple(types))
        for name in wanted:
            if not (_is_time(types[name]) or _is_single(types[name])):
                raise UserError(f"{file}: the column {name} is {types[name]}, but must hold one value a row.")
        return types
    if kind == "jsonl":
        _refuse_absent(file, wanted, _fields(file))
    else:
        _refuse_absent(file, wanted, csv_header(file, DELIMITERS[str(kind)]))
    return {}


def _refuse_absent(file: str, wanted: Sequence[str], names: tuple[str, ...]) -> None:
    twice = [name for name in wanted if names.count(name) > 1]
    if twice:
        raise UserError(f"{file} has the column {twice[0]} twice; found {', '.join(names)}.")
    absent = [name for name in wanted if name not in names]
    if absent:
        plain = {name.casefold(): name for name in names}
        near = [plain[match] for name in absent for match in difflib.get_close_matches(name.casefold(), plain, 3)]
        hint = f" Is it {' or '.join(dict.fromkeys(near))}?" if near else ""
        raise UserError(f"{file} lacks the column {', '.join(absent)}; found {', '.join(names)}.{hint}")


def _fields(file: str) -> tuple[str, ...]:
    """The names of the fields in the first JSON lines, as far as they can be read."""
    names: dict[str, None] = {}
    for first, block in itertools.islice(line_blocks(file), 1):
        for _, line in _numbered(first, block)[:HEAD_LINES]:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue  # reading tells
            if isinstance(value, dict):
                names |= dict.fromkeys(value)
    return tuple(names)


def _parquet_types(file: str) -> dict[str, pa.DataType]:
    try:
        with open_file(file) as stream:
            schema = pq.read_schema(stream)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"Cannot read {file} as Parquet: {error}. Get it again.") from error
    return dict(zip(schema.names, schema.types, strict=True))


def _id_type(types: Sequence[pa.DataType | None]) -> pa.DataType:
    def fits(found: pa.DataType | None) -> bool:
        return found is not None and pa.types.is_integer(found) and found != pa.uint64()

    return pa.int64() if all(fits(found) for found in types) else pa.string()


def _is_time(found: pa.DataType) -> bool:
    return pa.types.is_timestamp(found) or pa.types.is_date(found)


def _is_single(found: pa.DataType) -> bool:
    value = found.value_type if pa.types.is_dictionary(found) else found
    checks = ("is_string", "is_large_string", "is_string_view", "is_integer", "is_floating", "is_boolean", "is_null")
    return any(getattr(pa.types, check)(value) for check in checks)


def _cut(file: str) -> list[tuple[str, tuple[int, ...] | None]]:
    """The parts of a file: their names, and their row groups where it is Parquet."""
    if kind_of(file) != "parquet":
        return [(file, None)]
    with open_file(file) as stream:
        metadata = pq.read_metadata(stream)
    parts: list[list[int]] = [[]]
    held = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if parts[-1] and held + rows > ROWS_PER_PART:
            parts.append([])
            held = 0
        parts[-1].append(group)
        held += rows
    if len(parts) == 1:
        return [(file, tuple(parts[0]))]
    return [(f"{file}, row groups {groups[0]} to {groups[-1]}", tuple(groups)) for groups in parts]


def _as_text(column: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_time(column.type):
        column = pc.floor_temporal(column.cast(pa.timestamp("us"), safe=False), unit="second").cast(pa.int64())
        column = pc.divide(column, 10**6)
    return column.cast(pa.string()).fill_null("")


def _split_header(path: str, first: int, block: bytes, delimiter: str) -> tuple[tuple[str, ...] | None, int]:
    """The names in the first line that isn't blank, and the lines up to its end; None where all are blank."""
    for count, line in enumerate(block.split(b"\n"), 1):
        if line.strip():
            text = decoded(path, first + count - 1, line).rstrip("\r")
            return tuple(next(csv.reader([text], delimiter=delimiter))), count
    return None, 0


def _refuse_open_quote(path: str, first: int, block: bytes, delimiter: str) -> None:
    """Arrow would take for one value all that follows a quote that is never closed; only the last block can have one."""
    if block.count(b'"') % 2:
        start = block_end(block, quotes=True)
        line = block[start:].split(b"\n", 1)[0]
        if re.search(rf'(^|{delimiter})"'.encode(), line):
            number = first + block.count(b"\n", 0, start)
            raise UserError(f"{path}, line {number}: a quote is never closed. It reads: {line[:MAX_SHOWN]!r}.")


def _csv_place(path: str, first: int, content: bytes, record: int) -> tuple[str, str]:
    """Where a record that isn't blank begins, and how it reads."""
    count, number, held = -1, first, b""
    for line in content.split(b"\n"):
        held = held + b"\n" + line if held else line
        if held.count(b'"') % 2 == 0:
            count += bool(held.strip(b"\r"))
            if count == record:
                return f"{path}, line {number}", held.rstrip(b"\r").decode()
            number, held = number + held.count(b"\n") + 1, b""
    # Only where quotes stand in the middle of values, which Arrow takes as they are.
    return f"{path}, row {record + 1} after line {first - 1}", ""


def _json_place(
    path: str, first: int, block: bytes, lines: list[tuple[int, bytes]] | None, record: int
) -> tuple[str, str]:
    number, line = (lines if lines is not None else _numbered(first, block))[record]
    return f"{path}, line {number}", line.decode().strip()


def _parquet_place(path: str, before: int, texts: dict[str, pa.Array], record: int) -> tuple[str, str]:
    shown = ", ".join(f"{name}={column[record].as_py()}" for name, column in texts.items())
    return f"{path}, row {before + record + 1}", shown


def _numbered(first: int, block: bytes) -> list[tuple[int, bytes]]:
    """The lines of a block that aren't blank, with their numbers."""
    return [(number, line) for number, line in enumerate(block.split(b"\n"), first) if line.strip()]


def _parsed(block: bytes, schema: dict[str, type[pl.String]]) -> pl.DataFrame:
    frame = pl.read_ndjson(block, schema=schema)
    # Polars takes half of a character, as "\ud83d" alone, for NUL.
    if frame.select(pl.any_horizontal(pl.all().str.contains("\0", literal=True)).any()).item():
        raise pl.exceptions.ComputeError("half of a character")
    return frame


def _readable(
    path: str, lines: list[tuple[int, bytes]], schema: dict[str, type[pl.String]], dropped: Dropped
) -> tuple[pl.DataFrame, list[tuple[int, bytes]]]:
    """The lines that can be read, found by halving: few bad ones among many cost little."""
    try:
        if len(lines) > 1:
            return _parsed(b"\n".join(line for _, line in lines), schema), lines
    except pl.exceptions.PolarsError:
        pass
    if len(lines) > 1:
        half = len(lines) // 2
        first = _readable(path, lines[:half], schema, dropped)
        second = _readable(path, lines[half:], schema, dropped)
        return first[0].vstack(second[0]), first[1] + second[1]
    nothing = pl.DataFrame(schema=schema)
    if not lines:
        return nothing, []
    number, line = lines[0]
    text = decoded(path, number, line)
    where = f"{path}, line {number}"
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        dropped.bad(where, "the line is not a whole JSON object", text)
        return nothing, []
    try:
        # Other fields may hold what no JSON has, as NaN: they are not read.
        values = {name: [_json_text(found.get(name))] for name in schema}
        return pl.DataFrame(values, schema=schema), lines
    except UnicodeEncodeError:
        dropped.bad(where, "a value has half of a character (a lone surrogate)", text)
        return nothing, []


def _json_text(value: object) -> str | None:
    """A value's text as Polars gives it."""
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _seconds(texts: pa.Array, name: str, unit: TimeUnit) -> tuple[pa.Array, list[tuple[pa.Array, str]]]:
    """Times as int64 seconds since 1970 (null where empty or wrong), and the checks for `without_bad`."""
    blank = pc.equal(texts, "")
    if unit == "iso":
        times, fits = _from_iso(texts)
        scale, wrong_text = 1, f"the {name} is not a date and time as in ISO 8601"
    else:
        whole, fits = texts, pc.ascii_is_decimal(texts)
        if not pc.all(fits).as_py() or pc.max(pc.binary_length(texts)).as_py() > 18:
            whole = pc.replace_substring_regex(texts, r"\.[0-9]*$", "")
            fits = pc.match_substring_regex(whole, r"^-?[0-9]{1,18}\z|^-?[0-8][0-9]{18}\z")
            whole = pc.if_else(fits, whole, None)
        times = whole.cast(pa.int64())
        scale, wrong_text = UNITS[unit][1], f"the {name} is not a number"
    is_outside = pc.or_(pc.less(times, EARLIEST * scale), pc.greater_equal(times, LATEST * scale)).fill_null(False)
    reason = f"the {name} is outside {YEARS[0]} to {YEARS[1]}"
    if unit != "iso":
        reason += f" as {UNITS[unit][0]}"
        row = pc.index(is_outside, True).as_py()
        if row >= 0:
            value = times[row].as_py()
            fitting = [words for words, other in UNITS.values() if EARLIEST * other <= value < LATEST * other]
            reason += f": {fitting[0]}?" if fitting else ""
        times = pc.divide(times, scale)
    wrong = pc.and_(pc.invert(fits), pc.invert(blank))
    return pc.if_else(is_outside, None, times), [(wrong, wrong_text), (is_outside, reason)]


def _from_iso(texts: pa.Array) -> tuple[pa.Array, pa.Array]:
    coded = texts.dictionary_encode()
    seconds: list[int | None] = []
    for text in coded.dictionary.to_pylist():
        try:
            time = datetime.fromisoformat(text)
            seconds.append(int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() // 1))
        except ValueError:
            seconds.append(None)
    times = pa.array(seconds, pa.int64()).take(coded.indices)
    return times, pc.is_valid(times)


def _label(texts: pa.Array, name: str) -> tuple[pa.Array, tuple[pa.Array, str]]:
    plain = pc.replace_substring_regex(texts, r"\.0+$", "")
    is_one = pc.is_in(plain, pa.array(["1", "true"]))
    wrong = pc.invert(pc.or_(is_one, pc.is_in(plain, pa.array(["0", "false"]))))
    return is_one.cast(pa.int8()), (wrong, f"the {name} is not 0 or 1")


def _history(texts: pa.Array, item_type: pa.DataType) -> pa.Array:
    found = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(texts))
    flat = pc.list_flatten(found)
    filled = pc.not_equal(flat, "")  # an empty text is split into one empty text
    kept = np.concatenate([[0], np.cumsum(filled.to_numpy(zero_copy_only=False))])
    offsets = kept[found.offsets.to_numpy() - found.offsets[0].as_py()].astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), flat.filter(filled).cast(item_type))


def _day(seconds: int) -> str:
    time = datetime.fromtimestamp(seconds, UTC)
    return f"{time:%Y-%m-%d}" if seconds % 86_400 == 0 else f"{time:%Y-%m-%d %H:%M:%S}"
