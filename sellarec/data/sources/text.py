"""Text files of published datasets, read as streams: in folders or zips, their values, and the line of what is wrong in them."""

from __future__ import annotations

import csv
import functools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from sellarec.data.files import CHUNK_BYTES, MAX_LINE_BYTES, is_file, names_in, open_file
from sellarec.data.raw import ATTRIBUTES, Dropped
from sellarec.errors import UserError

MAX_ROWS = 100_000
"""Rows of one table."""

SPLIT_BYTES = 64 << 20
"""A plain file is read by one task for every so many bytes of it."""

LATEST_SECONDS = 253_402_300_799
"""The end of the year 9999. What is later is no time in seconds: milliseconds, most likely."""

Encoding = Literal["utf-8", "latin-1"]


@dataclass(frozen=True)
class TextFile:
    """A file, or a member of a zip."""

    path: str
    member: str | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.path} ({self.member})" if self.member else self.path


@dataclass(frozen=True)
class Layout:
    """How a file without quoting holds its values.

    Attributes:
        columns: the names of its columns, where its first line doesn't give them.
    """

    delimiter: str
    columns: tuple[str, ...] | None = None
    encoding: Encoding = "utf-8"


@dataclass(frozen=True)
class Block:
    """Whole lines of a file, in UTF-8 without a byte order mark.

    Attributes:
        first_line: the number of its first line, counted from 1 where the reading started.
    """

    content: bytes
    first_line: int


@dataclass(frozen=True)
class Rows:
    """Rows of a file, each value as the text that stands there.

    Attributes:
        columns: name -> string array without nulls.
        place: number of a record -> its file and line, and its text.
        width: values that a record should have.
        misfits: ascending numbers of the records that have more or fewer; `columns` are without them.
    """

    columns: dict[str, pa.Array]
    place: Callable[[int], tuple[str, str]]
    width: int
    misfits: tuple[int, ...]


def files_at(path: str, looked_for: str) -> dict[str, TextFile]:
    """The files of a folder, or of a zip and the folder at its top, by name.

    Raises:
        UserError: there is no such folder or zip, or it is damaged.
    """
    names = names_in(path)
    if names is not None:
        return {name: TextFile(f"{path.rstrip('/')}/{name}") for name in names}
    if not is_file(path):
        raise UserError(f"No such file or folder: {path}. Looked for {looked_for}.")
    with _damage_told(path), open_file(path) as file, zipfile.ZipFile(file) as archive:
        members = [name for name in archive.namelist() if not name.endswith("/") and name.count("/") <= 1]
    found: dict[str, TextFile] = {}
    for member in members:
        name = member.rsplit("/", 1)[-1]
        if name in found:
            raise UserError(f"{path} holds {name} twice: {found[name].member} and {member}.")
        found[name] = TextFile(path, member)
    return found


def wanted_files(found: dict[str, TextFile], names: Iterable[str], path: str, looked_for: str) -> list[TextFile]:
    """The files of these names.

    Raises:
        UserError: one of them is not there.
    """
    names = list(names)
    absent = [name for name in names if name not in found]
    if absent:
        raise UserError(f"{path} lacks {' and '.join(absent)}. Looked for {looked_for}; found {_listed(found)}.")
    return [found[name] for name in names]


def only_file(path: str, suffix: str, looked_for: str) -> tuple[dict[str, TextFile], str]:
    """The files beside the one that ends in `suffix`, which may be `path` itself, and its name without that end.

    Raises:
        UserError: there is none, or more than one.
    """
    if path.endswith(suffix) and is_file(path):
        start, slash, name = path.rpartition("/")
        folder = start + slash
        names = names_in(folder or ".") or []
        return {other: TextFile(folder + other) for other in names}, name.removesuffix(suffix)
    found = files_at(path, looked_for)
    fitting = sorted(name for name in found if name.endswith(suffix))
    if not fitting:
        raise UserError(f"{path} holds no file NAME{suffix}. Looked for {looked_for}; found {_listed(found)}.")
    if len(fitting) > 1:
        raise UserError(
            f"{path} holds several files NAME{suffix}: {_listed(fitting)}. Give the path of the one to read."
        )
    return found, fitting[0].removesuffix(suffix)


def ranges(file: TextFile) -> list[tuple[int, int | None]]:
    """Ranges of bytes that tasks read apart: those lines that start in them. A zip's member is one range.

    Raises:
        UserError: the file can't be read.
    """
    if file.member:
        return [(0, None)]
    with open_file(file.path) as stream:
        size = stream.size()
    starts = list(range(0, max(size, 1), SPLIT_BYTES))
    return list(zip(starts, [*starts[1:], None], strict=True))


def range_name(file: TextFile, start: int, end: int | None) -> str:
    """What progress calls a range of a file."""
    if not start and end is None:
        return file.name
    return f"{file.name} from byte {start:,}" + (f" to {end:,}" if end is not None else "")


def blocks(file: TextFile, encoding: Encoding = "utf-8", start: int = 0, end: int | None = None) -> Iterator[Block]:
    """The lines that start at bytes `start` to `end` (not included), some megabytes at a time.

    Raises:
        UserError: the file can't be read, a zip is cut short or damaged, a line is too long, or bytes aren't of the
            encoding (a file in UTF-8 where Latin-1 is expected too), with the line.
    """
    line, begin, buffer = 1, start, b""
    with _damage_told(file.name, lambda: line), _opened(file) as stream:
        if start:
            # The line in which the byte before `start` lies belongs to the range before.
            stream.seek(start - 1)
            while (cut := buffer.find(b"\n") + 1) == 0:
                chunk = stream.read(CHUNK_BYTES)
                if not chunk:
                    return
                begin, buffer = begin + len(buffer), chunk
            begin, buffer = begin - 1 + cut, buffer[cut:]
        while end is None or begin < end:
            chunk = stream.read(CHUNK_BYTES)
            buffer += chunk
            cut = 0
            if end is not None and begin + len(buffer) >= end:
                cut = buffer.find(b"\n", end - 1 - begin) + 1
            cut = cut or (buffer.rfind(b"\n") + 1 if chunk else len(buffer))
            if not cut:
                if not chunk:
                    return
                if len(buffer) > MAX_LINE_BYTES:
                    raise UserError(f"{file.name}, line {line}: no end of the line in {len(buffer):,} bytes.")
                continue
            content, buffer = buffer[:cut], buffer[cut:]
            text = _in_utf8(content, encoding, file, line, start)
            yield Block(text.removeprefix(b"\xef\xbb\xbf") if not begin else text, line)
            begin += cut
            # Arrow and csv end a line at a lone carriage return as well.
            line += content.count(b"\n") + content.count(b"\r") - content.count(b"\r\n")


def rows(
    file: TextFile, layout: Layout, wanted: Sequence[str], start: int = 0, end: int | None = None
) -> Iterator[Rows]:
    """The `wanted` columns of a file without quoting; blank lines are no rows.

    Raises:
        UserError: as `blocks` does; a column is missing or there twice; the file is empty.
    """
    names = layout.columns or header(file, layout)
    _check_columns(file, names, wanted)
    before = functools.cache(lambda: lines_before(file, start))  # known only where a row is bad: it reads the file
    is_empty, has_header = start == 0, layout.columns is None and start == 0
    for block in blocks(file, layout.encoding, start, end):
        content, first_line, is_empty = block.content, block.first_line, False
        if has_header:
            head = re.match(rb"(?:\r\n|\r|\n)*[^\r\n]+(?:\r\n|\r|\n)?", content)
            if not head:
                continue  # blank lines before the header
            content = content[head.end() :]
            first_line += len(head[0].splitlines())
            has_header = False
        if not content.strip(b"\r\n"):
            continue
        columns, misfits = _parsed(content, layout.delimiter, names, wanted)
        place = functools.partial(_place, file, before, first_line, content)
        yield Rows(columns, place, len(names), misfits)
    if is_empty:
        raise UserError(f"{file.name} is empty.")


def whole(file: TextFile) -> bytes:
    """A file in UTF-8 as one, for a format that can't be read in pieces.

    Raises:
        UserError: as `blocks` does; the file is empty.
    """
    with _damage_told(file.name), _opened(file) as stream:
        content = stream.read()
    content = _in_utf8(content, "utf-8", file, 1, 0).removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        raise UserError(f"{file.name} is empty.")
    return content


def header(file: TextFile, layout: Layout) -> tuple[str, ...]:
    """The values of a file's first line that isn't blank.

    Raises:
        UserError: as `blocks` does; the file is empty.
    """
    for block in blocks(file, layout.encoding):
        for line in block.content.splitlines():
            if line:
                return tuple(line.decode().split(layout.delimiter))
    raise UserError(f"{file.name} is empty.")


def quoted_rows(file: TextFile, wanted: Sequence[str]) -> Iterator[Rows]:
    """The `wanted` columns of a CSV file in UTF-8, with a header and possibly quoted values (that may hold line breaks).

    Raises:
        UserError: as `rows` does; a quoted value has no end, with the line in which it begins.
    """
    taken: list[str] = []  # the lines of the record that is being read

    def lines() -> Iterator[str]:
        for block in blocks(file):
            for line in block.content.splitlines(keepends=True):
                taken.append(line.decode())
                yield taken[-1]

    reader = csv.reader(lines(), strict=True)
    names: tuple[str, ...] | None = None
    records: list[list[str]] = []
    places: list[tuple[str, str]] = []
    number = 1
    try:
        for record in reader:
            content = "".join(taken).rstrip("\r\n")
            first_line, number = number, reader.line_num + 1
            taken.clear()
            if not record:
                continue
            if names is None:
                names = tuple(record)
                _check_columns(file, names, wanted)
                continue
            records.append(record)
            places.append((f"{file.name}, line {first_line}", content))
            if len(records) == MAX_ROWS:
                yield _columns(records, names, wanted, places)
                records, places = [], []
    except csv.Error as error:
        raise UserError(
            f"{file.name}, line {number}: not CSV ({error}). It reads: {''.join(taken)[:200]!r}."
        ) from error
    if names is None:
        raise UserError(f"{file.name} is empty.")
    if records:
        yield _columns(records, names, wanted, places)


def without_bad(rows: Rows, table: pa.Table, checks: Sequence[tuple[pa.Array, str]], dropped: Dropped) -> pa.Table:
    """The rows of `table` (one for each of `rows`) that pass.

    Args:
        checks: per row, whether it is bad, and the reason; a row counts under its first.

    Raises:
        UserError: bad rows are refused, and there is one.
    """
    if not rows.misfits and not any(pc.any(wrong).as_py() for wrong, _ in checks):
        return table
    reason_of = np.full(table.num_rows, -1)
    for number, (wrong, _) in reversed(list(enumerate(checks))):
        reason_of[wrong.to_numpy(zero_copy_only=False).astype(bool)] = number
    records = np.delete(np.arange(table.num_rows + len(rows.misfits)), rows.misfits)
    found = {reason: records[reason_of == number] for number, (_, reason) in enumerate(checks)}
    found[f"it does not have {rows.width} values"] = np.array(rows.misfits, dtype=np.int64)
    # The first bad row first: it is the one that a refusal names.
    for reason, bad in sorted(((r, b) for r, b in found.items() if len(b)), key=lambda pair: pair[1][0]):
        where, content = rows.place(int(bad[0]))
        dropped.bad(where, reason, content, len(bad))
    return table.filter(pa.array(reason_of < 0))


def whole_numbers(texts: pa.Array, name: str) -> tuple[pa.Array, tuple[pa.Array, str]]:
    """The numbers as int64 (0 where wrong), and the check for `without_bad`."""
    reason = f"the {name} is not a whole number (of 64 bits at most)"
    if _plain_digits(texts):
        return texts.cast(pa.int64()), (pa.repeat(False, len(texts)), reason)
    fits = pc.match_substring_regex(texts, r"^-?[0-9]{1,18}\z")
    values = pc.if_else(fits, texts, "0").cast(pa.int64()).to_numpy(zero_copy_only=False).copy()
    wrong = pc.invert(fits).to_numpy(zero_copy_only=False).copy()
    for row in np.flatnonzero(wrong):  # long ones, which may or may not fit
        text = texts[row].as_py()
        if re.fullmatch(r"-?[0-9]{1,100}", text) and -(2**63) <= int(text) < 2**63:
            values[row], wrong[row] = int(text), False
    return pa.array(values), (pa.array(wrong), reason)


def numbers(texts: pa.Array, name: str, *, may_lack: bool = False) -> tuple[pa.Array, tuple[pa.Array, str]]:
    """The numbers as float64 (null where wrong), and the check for `without_bad`; NaN and what float32 can't hold are wrong.

    Args:
        may_lack: an empty text is not wrong, but null.
    """
    coded = texts.dictionary_encode()  # ratings and times have few distinct values, or at worst as many as there are
    fits = pc.match_substring_regex(coded.dictionary, r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?\z")
    # Arrow reads no leading plus.
    plain = pc.replace_substring_regex(coded.dictionary, r"^\+", "")
    values = pc.if_else(fits, plain, None).cast(pa.float64())
    held = pc.less_equal(pc.abs(values), float(np.finfo(np.float32).max)).fill_null(False)
    values = pc.if_else(held, values, None)
    wrong = pc.invert(held)
    if may_lack:
        wrong = pc.and_(wrong, pc.not_equal(coded.dictionary, ""))
    return values.take(coded.indices), (wrong.take(coded.indices), f"the {name} is not a number")


def seconds(values: pa.Array, name: str) -> tuple[pa.Array, tuple[pa.Array, str]]:
    """Numbers as int64 seconds since 1970, and the check for `without_bad` that they are in seconds."""
    wrong = pc.or_(pc.greater(values, LATEST_SECONDS), pc.less(values, -LATEST_SECONDS)).fill_null(False)
    return (
        pc.if_else(wrong, None, values).cast(pa.int64(), safe=False),
        (wrong, f"the {name} is not in seconds since 1970 (it would lie after the year 9999)"),
    )


def outside(values: pa.Array, low: float, high: float, name: str) -> tuple[pa.Array, str]:
    """The check for `without_bad` that values lie between two, both included."""
    wrong = pc.or_(pc.less(values, low), pc.greater(values, high)).fill_null(False)
    return wrong, f"the {name} is not between {low:g} and {high:g}"


def empty(texts: pa.Array, name: str) -> tuple[pa.Array, str]:
    """The check for `without_bad` that texts hold more than white space."""
    return pc.equal(pc.utf8_trim_whitespace(texts), ""), f"the {name} is empty"


def null_where_empty(texts: pa.Array) -> pa.Array:
    return pc.if_else(empty(texts, "")[0], None, texts)


def attributes(columns: Sequence[tuple[str, pa.Array]], count: int) -> pa.Array:
    """The named values of `count` rows (ATTRIBUTES), in the columns' order; empty and null values are left out.

    Args:
        columns: a name, and per row a string or a list of strings.
    """
    owners: list[np.ndarray] = []
    names: list[str] = []
    texts: list[pa.Array] = []
    for name, column in columns:
        if pa.types.is_list(column.type):
            owner, values = pc.list_parent_indices(column), pc.list_flatten(column)
        else:
            owner, values = pa.array(np.arange(count)), column
        filled = pc.not_equal(values, "").fill_null(False)
        owners.append(owner.filter(filled).to_numpy(zero_copy_only=False).astype(np.int64))
        texts.append(values.filter(filled).cast(pa.string()))
        names.append(name)
    if not owners:
        return pa.ListArray.from_arrays(pa.array(np.zeros(count + 1, np.int32)), _pairs([], []), type=ATTRIBUTES)
    owner_of = np.concatenate(owners)
    order = np.argsort(owner_of, kind="stable")
    name_of = np.repeat(np.arange(len(names)), [len(found) for found in owners])[order]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner_of, minlength=count))]).astype(np.int32)
    pairs = _pairs(pa.array(names).take(pa.array(name_of)), pa.concat_arrays(texts).take(pa.array(order)))
    return pa.ListArray.from_arrays(pa.array(offsets), pairs, type=ATTRIBUTES)


def sliced(table: pa.Table) -> Iterator[pa.Table]:
    """The table in pieces of MAX_ROWS rows; none where it is empty."""
    for start in range(0, table.num_rows, MAX_ROWS):
        yield table.slice(start, MAX_ROWS)


def _pairs(names: Any, values: Any) -> pa.Array:
    fields = [pa.array(names, pa.string()), pa.array(values, pa.string())]
    return pa.StructArray.from_arrays(fields, fields=list(ATTRIBUTES.value_type))


def _listed(names: Iterable[str], limit: int = 20) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more


@contextmanager
def _damage_told(name: str, line: Callable[[], int] | None = None) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, pa.ArrowInvalid) as error:
        # Arrow's files say ArrowInvalid where zipfile seeks to before their start.
        after = f" after line {line() - 1:,}" if line else ""
        raise UserError(f"{name} is cut short, damaged or no zip{after} ({error}): get it again.") from error
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(f"{name} can't be unpacked: {error}. Give the zip as it was published.") from error
    except OSError as error:
        raise UserError(f"Cannot read {name}: {error}.") from error


@contextmanager
def _opened(file: TextFile) -> Iterator[IO[bytes]]:
    with open_file(file.path) as stream:
        if not file.member:
            yield stream
            return
        with zipfile.ZipFile(stream) as archive, archive.open(file.member) as member:
            yield member


def _in_utf8(content: bytes, encoding: Encoding, file: TextFile, line: int, start: int) -> bytes:
    if content.isascii():
        return content
    try:
        content.decode("utf-8")
        is_utf8, at, detail = True, _first_beyond_ascii(content), ""
    except UnicodeDecodeError as error:
        is_utf8, at, detail = False, error.start, error.reason
    if is_utf8 == (encoding == "utf-8"):
        return content if is_utf8 else content.decode(encoding).encode()
    number = lines_before(file, start) + line + content.count(b"\n", 0, at)
    shown = content[content.rfind(b"\n", 0, at) + 1 :].split(b"\n", 1)[0][:200]
    if is_utf8:
        raise UserError(
            f"{file.name}, line {number}: in UTF-8, but the file was published in Latin-1: {shown!r}. "
            "Get it as published, so that no letter is read wrong."
        )
    raise UserError(f"{file.name}, line {number}: not in UTF-8 ({detail}): {shown!r}. Get it as published.")


def _first_beyond_ascii(content: bytes) -> int:
    found = re.search(rb"[\x80-\xff]", content)
    return found.start() if found else 0


def lines_before(file: TextFile, start: int) -> int:
    """The lines before the first one that starts at byte `start` or later."""
    if not start:
        return 0
    count, left, last = 0, start, b""
    with open_file(file.path) as stream:
        while left and (chunk := stream.read(min(CHUNK_BYTES, left))):
            count, left = count + chunk.count(b"\n"), left - len(chunk)
            last = chunk
    return count + (not last.endswith(b"\n"))


def _check_columns(file: TextFile, names: Sequence[str], wanted: Sequence[str]) -> None:
    absent = [name for name in wanted if name not in names]
    if absent:
        raise UserError(f"{file.name} lacks the column {', '.join(absent)}; its first line has {', '.join(names)}.")
    twice = [name for name in wanted if names.count(name) > 1]
    if twice:
        raise UserError(f"{file.name} has the column {twice[0]} twice; its first line has {', '.join(names)}.")


def _parsed(
    content: bytes, delimiter: str, names: Sequence[str], wanted: Sequence[str]
) -> tuple[dict[str, pa.Array], tuple[int, ...]]:
    if len(delimiter) > 1:
        # Arrow wants one character: one that no title holds.
        single = next((chr(code) for code in (31, 30, 29, 28) if bytes([code]) not in content), "\x1f")
        content, delimiter = content.replace(delimiter.encode(), single.encode()), single
    misfits: list[int] = []

    def keep(row: pacsv.InvalidRow) -> str:
        misfits.append(row.number - 1)
        return "skip"

    table = pacsv.read_csv(
        pa.BufferReader(content),
        # In one block: the rows' numbers are those of this content.
        read_options=pacsv.ReadOptions(use_threads=False, column_names=names, block_size=len(content) + 1),
        parse_options=pacsv.ParseOptions(delimiter=delimiter, quote_char=False, invalid_row_handler=keep),
        convert_options=pacsv.ConvertOptions(
            column_types={name: pa.string() for name in names}, include_columns=list(wanted), strings_can_be_null=False
        ),
    )
    return {name: _one_chunk(table[name]) for name in wanted}, tuple(misfits)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays([pa.array([], column.type), *column.chunks])


def _place(file: TextFile, before: Callable[[], int], first_line: int, content: bytes, record: int) -> tuple[str, str]:
    count = -1
    for number, line in enumerate(content.splitlines(), before() + first_line):
        count += bool(line)
        if line and count == record:
            return f"{file.name}, line {number}", line.decode()
    raise AssertionError(f"record {record} is not in this block")


def _columns(
    records: list[list[str]], names: tuple[str, ...], wanted: Sequence[str], places: list[tuple[str, str]]
) -> Rows:
    misfits = tuple(number for number, record in enumerate(records) if len(record) != len(names))
    fitting = [record for record in records if len(record) == len(names)]
    at = {name: names.index(name) for name in wanted}
    columns = {name: pa.array([record[at[name]] for record in fitting], pa.string()) for name in wanted}
    return Rows(columns, places.__getitem__, len(names), misfits)


def _plain_digits(texts: pa.Array) -> bool:
    return bool(
        len(texts) == 0
        or (pc.all(pc.ascii_is_decimal(texts)).as_py() and pc.max(pc.binary_length(texts)).as_py() <= 18)
    )
