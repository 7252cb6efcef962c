"""Files of a source, by path or URI (s3://, gs://, file://), plain or gzipped, read as streams."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.fs

from sellarec.errors import UserError

CHUNK_BYTES = 4 << 20


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
        raise UserError(f"{path} can't be opened: {error}. Give a path, or a URI such as s3://bucket/folder.") from error


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


def lines(path: str, encoding: str = "utf-8", stream: IO[bytes] | None = None) -> Iterator[tuple[int, str]]:
    """The lines of a text file, counted from 1, without their ends; a name that ends in .gz is unpacked on the way.

    Args:
        stream: read this instead (a member of a zip, say); `path` names it in messages.

    Raises:
        UserError: it can't be read, the gzip is cut short or damaged, or bytes are not of the encoding, with the line.
    """
    import gzip

    source = stream if stream is not None else open_file(path)
    number = 0
    try:
        with source:
            raw = gzip.GzipFile(fileobj=source) if path.endswith(".gz") else source
            for line in io.BufferedReader(raw, CHUNK_BYTES) if raw is not source else source:  # type: ignore[arg-type]
                number += 1
                text = line.decode(encoding)
                if number == 1:
                    text = text.removeprefix("\ufeff")
                yield number, text.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not {encoding} ({error.reason}: {error.object[error.start:error.end]!r}).") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is cut short or damaged after line {number:,} ({error}): get it again.") from error
    except OSError as error:
        raise UserError(f"Cannot read {path} after line {number:,}: {error}.") from error
