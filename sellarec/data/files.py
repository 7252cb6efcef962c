"""Files of a source, by path or URI (s3://, gs://, file://), plain or gzipped, read as streams."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.fs

from sellarec.errors import UserError

CHUNK_BYTES = 4 << 20

BLOCK_BYTES = 4 << 20
"""Unpacked bytes of a text file that are read at a time."""

PIECE_BYTES = 512 << 10

MAX_LINE_BYTES = 64 << 20
"""A line longer than this is refused: the file is no text, or a quote in it is never closed."""


def filesystem_of(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system that a path or URI lies on, and the path in it.

    Raises:
        UserError: no such kind of URI.
    """
    if "://" not in path:
        return pyarrow.fs.LocalFileSystem(), str(Path(path).expanduser().absolute())
    try:
        return pyarrow.fs.FileSystem.from_uri(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path} can't be opened: {error}. Give a path, or a URI such as s3://bucket/folder."
        ) from error


def names_in(folder: str) -> list[str] | None:
    """Names of what lies in a folder, sorted; None where it is no folder.

    Raises:
        UserError: it can't be read.
    """
    filesystem, path = filesystem_of(folder)
    try:
        if filesystem.get_file_info(path).type != pyarrow.fs.FileType.Directory:
            return None
        return sorted(info.base_name for info in filesystem.get_file_info(pyarrow.fs.FileSelector(path)))
    except OSError as error:
        raise UserError(f"Cannot read {folder}: {error}.") from error


def is_file(path: str) -> bool:
    filesystem, inner = filesystem_of(path)
    return filesystem.get_file_info(inner).type == pyarrow.fs.FileType.File


def file_size(path: str) -> int:
    """Bytes of a file."""
    filesystem, inner = filesystem_of(path)
    return filesystem.get_file_info(inner).size


def open_file(path: str) -> pa.NativeFile:
    """A file for reading bytes, seekable.

    Raises:
        UserError: it is not there, or can't be read.
    """
    filesystem, inner = filesystem_of(path)
    try:
        return filesystem.open_input_file(inner)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error}. Check that the file is there and readable.") from error


def file_hash(path: str) -> str:
    """Return the SHA-256 of a file, in hex.

    Raises:
        UserError: the file cannot be read.
    """
    found = hashlib.sha256()
    with open_file(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


def line_blocks(path: str, stream: IO[bytes] | None = None, *, quotes: bool = False) -> Iterator[tuple[int, bytes]]:
    """Whole lines of a text file, some MiB at a time: the number of the first, counted from 1, and their bytes.

    A name that ends in .gz is unpacked on the way. A byte order mark is left out. Reading and unpacking run ahead of what
    the caller does with a block.

    Args:
        stream: read this instead (a member of a zip, say); `path` names it in messages.
        quotes: a block never ends inside double quotes, which may hold line ends (CSV).

    Raises:
        UserError: it can't be read, the gzip is cut short or damaged, or a line has no end within `MAX_LINE_BYTES`.
    """
    blocks = _blocks(path, stream, quotes)
    reader = ThreadPoolExecutor(1)
    try:
        coming = reader.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = reader.submit(next, blocks, None)
            yield block
    finally:
        # Without waiting: the garbage collector can close an abandoned iterator within any call, one that starts a thread
        # included, and that holds the very lock that joining a thread takes.
        reader.shutdown(wait=False)


def _blocks(path: str, stream: IO[bytes] | None, quotes: bool) -> Iterator[tuple[int, bytes]]:
    number = 1
    held: list[bytes] = []
    try:
        with stream if stream is not None else open_file(path) as source:
            file = pa.PythonFile(source, "r") if stream is not None else source
            raw = pa.CompressedInputStream(file, "gzip") if path.endswith(".gz") else file
            is_first, size, enough = True, 0, BLOCK_BYTES
            # Small pieces: where one can't be unpacked, those before it still tell the line.
            while piece := raw.read(PIECE_BYTES):
                held.append(piece.removeprefix(b"\xef\xbb\xbf") if is_first else piece)
                is_first = False
                size += len(piece)
                if size < enough:
                    continue
                block = b"".join(held)
                end = block_end(block, quotes)
                if not end and size > MAX_LINE_BYTES:
                    raise UserError(
                        f"{path}, line {number:,}: no end of the {'row' if quotes else 'line'} within "
                        f"{MAX_LINE_BYTES >> 20} MiB. Is it a text file{', with every quote closed' if quotes else ''}?"
                    )
                if end:
                    yield number, block[:end]
                    number += block.count(b"\n", 0, end)
                held, size = [block[end:]], size - end
                enough = BLOCK_BYTES if end else 2 * size
            if block := b"".join(held):
                yield number, block
    except (EOFError, OSError, zlib.error, zipfile.BadZipFile, pa.ArrowInvalid) as error:
        line = number - 1 + sum(piece.count(b"\n") for piece in held)
        if path.endswith(".gz") or stream is not None:
            raise UserError(f"{path} is cut short or damaged after line {line:,} ({error}): get it again.") from error
        raise UserError(f"Cannot read {path} after line {line:,}: {error}.") from error


def block_end(held: bytes, quotes: bool) -> int:
    """The end of the last line, or 0 where there is none; with `quotes`, of the last before which all quotes are closed."""
    end = held.rfind(b"\n") + 1
    is_open = quotes and held.count(b'"', 0, end) % 2 == 1
    while end and is_open:
        before = held.rfind(b"\n", 0, end - 1) + 1
        is_open ^= held.count(b'"', before, end) % 2 == 1
        end = before
    return end


def file_hashes(paths: Sequence[str]) -> dict[str, str]:
    """SHA-256 of files by their names below the folder that holds them all, wherever that lies.

    Raises:
        UserError: a file cannot be read.
    """
    # cut at a slash in the next line; commonpath would take a URI's two slashes for one
    common = os.path.commonprefix(list(paths))  # noqa: RUF071
    folder = common[: common.rfind("/") + 1]
    return {path.removeprefix(folder): file_hash(path) for path in paths}


def lines(path: str, encoding: str = "utf-8", stream: IO[bytes] | None = None) -> Iterator[tuple[int, str]]:
    """The lines of a text file, counted from 1, without their ends; a name that ends in .gz is unpacked on the way.

    Args:
        stream: read this instead (a member of a zip, say); `path` names it in messages.

    Raises:
        UserError: it can't be read, the gzip is cut short or damaged, or bytes are not of the encoding, with the line.
    """
    for first, block in line_blocks(path, stream):
        yield from enumerate(
            decoded(path, first, block, encoding).replace("\r\n", "\n").removesuffix("\n").split("\n"), first
        )


def decoded(path: str, first: int, block: bytes, encoding: str = "utf-8") -> str:
    """The text of a block of `line_blocks`, whose first line is number `first`.

    Raises:
        UserError: bytes are not of the encoding, with the line.
    """
    try:
        return block.decode(encoding)
    except UnicodeDecodeError as error:
        line = first + block.count(b"\n", 0, error.start)
        wrong = block[error.start : error.end]
        raise UserError(f"{path}, line {line:,}: not {encoding} ({error.reason}: {wrong!r}).") from error
