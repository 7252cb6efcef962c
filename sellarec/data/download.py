"""Published files over HTTP: resumed where a connection broke, fetched once however many ask, and never a changed file unseen."""

from __future__ import annotations

import functools
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sellarec.errors import UserError
from sellarec.training.progress import PROGRESS_SECONDS

TRIES = 6
"""Tries in a row that bring nothing new before a download is given up."""

BACKOFF_SECONDS = 1.0
"""Wait before the second try; it doubles with each further one."""

TIMEOUT_SECONDS = 60.0
"""Silence of a server after which a connection counts as broken."""

CHUNK_BYTES = 1 << 20

MAX_CHECKSUM_BYTES = 1 << 20
"""A checksum file is read up to here."""


class _Broken(Exception):
    """A connection that failed, or ended too early: worth another try."""


class _Refused(Exception):
    """The server has no such file, or not for us."""


def download(url: str, folder: Path, *, progress: Callable[[str], None], checksum: str | None = None) -> Path:
    """Return the file that `url` names, in `folder`, downloaded unless it is there.

    Until it is whole and checked it is named NAME.part. Its SHA-256 is written into NAME.sha256.json, and from then on the
    file is refused where it is another, be it on the disk or at the server. One process on a file system downloads; others
    wait for it.

    Args:
        progress: called with lines for people to read.
        checksum: what the file must have, as "md5:HEX" or "sha256:HEX"; without it what the publisher gives, if anything
            (see `published_checksum`).

    Raises:
        UserError: an address that doesn't lead to a file, a server that can't be reached, a disk that can't be written, or
            a file with another checksum.
    """
    name = _name(url)
    target, record = folder / name, folder / f"{name}.sha256.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f".{name}.lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            progress(f"{name}: another process downloads it; waiting.")
            held = lock.acquire()
        with held:
            if target.exists():
                _check(target, target, url, record, checksum, progress)
            else:
                part = folder / f"{name}.part"
                _fetch(url, part, progress)
                _check(part, target, url, record, checksum, progress)
                os.replace(part, target)
                _state(part).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"Cannot write {target}: {error.strerror or error}.") from error
    return target


def published_checksum(url: str) -> str | None:
    """Return the checksum in the file that a publisher puts beside `url` (.sha256 or .md5), as "md5:HEX"; None without any.

    Both usual forms are read: "MD5 (NAME) = HEX" and "HEX  NAME".

    Raises:
        UserError: the server can't be reached.
    """
    name = _name(url)
    parts = urllib.parse.urlsplit(url)
    for kind, length in (("sha256", 64), ("md5", 32)):
        beside = urllib.parse.urlunsplit(parts._replace(path=f"{parts.path}.{kind}"))
        try:
            text = _tried(functools.partial(_text, beside), beside)
        except _Refused:
            continue
        for line in text.splitlines():
            found = re.fullmatch(
                rf"(?:\w+ \((?P<a>.*)\) = )?(?P<hex>[0-9a-fA-F]{{{length}}})(?:\s+\*?(?P<b>.*))?", line.strip()
            )
            named = found and (found["a"] or found["b"])
            if found and (not named or Path(named).name == name):
                return f"{kind}:{found['hex'].lower()}"
    return None


def _name(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    name = urllib.parse.unquote(parts.path.rsplit("/", 1)[-1])
    if parts.scheme not in ("http", "https") or not parts.netloc or not re.fullmatch(r"[^/\\\0]+", name) or name in ".":
        raise UserError(f"{url} is no address of a file: give one such as https://host/folder/file.zip.")
    if name == "..":
        raise UserError(f"{url} is no address of a file: it ends in '..'.")
    return name


def _check(
    file: Path, target: Path, url: str, record: Path, checksum: str | None, progress: Callable[[str], None]
) -> None:
    """Refuse a file with another checksum than the given, the recorded or, where none is recorded, the published one."""
    is_new = file != target
    known = json.loads(record.read_text()) if record.exists() else None
    if checksum is None and known is None:
        try:
            checksum = published_checksum(url)
        except UserError as error:
            if is_new:
                raise
            # It was put here by hand, perhaps where there is no network.
            progress(f"{target.name}: taken as it is; whether its publisher gives a checksum is unknown. {error}")
    kind = checksum.split(":", 1)[0] if checksum else "sha256"
    if kind not in ("md5", "sha256"):
        raise UserError(f"The checksum of {url} is '{checksum}': give it as md5:HEX or sha256:HEX.")
    found = {each: _digest(file, each) for each in {kind, "sha256"}}
    if checksum and f"{kind}:{found[kind]}" != checksum.lower():
        _discard(file, is_new)
        raise UserError(
            f"{target.name}, {'as downloaded from' if is_new else 'published at'} {url}, has the {kind} {found[kind]}, "
            f"but should have {checksum.split(':', 1)[1].lower()}. "
            + (
                "Try again; if it stays so, the server's file is damaged."
                if is_new
                else f"Delete {target} to get it again."
            )
        )
    if known and known["sha256"] != found["sha256"]:
        _discard(file, is_new)
        raise UserError(
            f"{target} has changed: its SHA-256 is {found['sha256']}, but was {known['sha256']} when it was first downloaded "
            f"from {known['url']}. "
            + (f"Delete {record} if the new file is the wanted one." if is_new else "Delete it to get it again.")
        )
    if not known:
        facts = {"url": url, "sha256": found["sha256"], "bytes": file.stat().st_size, "published": checksum}
        _write(record, facts)


def _discard(file: Path, is_new: bool) -> None:
    if is_new:
        file.unlink()
        _state(file).unlink(missing_ok=True)


def _digest(file: Path, kind: str) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, kind).hexdigest()


def _write(file: Path, facts: dict[str, Any]) -> None:
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(facts, indent=2) + "\n")
    os.replace(new, file)


def _state(part: Path) -> Path:
    """Beside a part: what tells whether the server's file is still the one it is a part of."""
    return part.with_name(f"{part.name}.json")


def _fetch(url: str, part: Path, progress: Callable[[str], None]) -> None:
    furthest = part.stat().st_size if part.exists() else 0

    def get() -> bool:
        """Whether the file is whole; else more of it has come than ever before."""
        nonlocal furthest
        try:
            _continue(url, part, progress)
        except _Broken:
            size = part.stat().st_size if part.exists() else 0
            if size <= furthest:
                raise
            furthest = size
            return False
        return True

    while True:
        try:
            if _tried(get, url):
                return
        except _Refused as error:
            raise UserError(f"{url} can't be downloaded: the server answers {error}. Check the address.") from error


def _tried(action: Callable[[], Any], url: str) -> Any:
    """The action's result, tried again with growing waits while connections break."""
    for number in range(TRIES):
        if number:
            time.sleep(BACKOFF_SECONDS * 2 ** (number - 1))
        try:
            return action()
        except _Broken as error:
            last = error
    raise UserError(
        f"{url} can't be downloaded: {last} ({TRIES} tries). What has come is kept; run again to go on with it."
    ) from last


def _opened(url: str, headers: dict[str, str]) -> Any:
    """The server's answer.

    Raises:
        _Refused: it has no such file, or not for us.
        _Broken: it can't be reached, or is at fault.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "sellarec", "Accept-Encoding": "identity"} | headers)
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            return error
        with error:
            words = f"{error.code} {error.reason}"
            if error.code in (408, 425, 429) or error.code >= 500:
                raise _Broken(f"the server answers {words}") from error
            raise _Refused(words) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(str(getattr(error, "reason", None) or error or type(error).__name__)) from error


def _read(answer: Any, size: int) -> bytes:
    try:
        return answer.read(size)
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(f"the connection broke ({error or type(error).__name__})") from error


def _text(url: str) -> str:
    with _opened(url, {}) as answer:
        return _read(answer, MAX_CHECKSUM_BYTES).decode("utf-8", "replace")


def _continue(url: str, part: Path, progress: Callable[[str], None]) -> None:
    """Get the rest of a part, or all where nothing says that the server's file is still the same, or it gives no ranges."""
    state = json.loads(_state(part).read_text()) if part.exists() and _state(part).exists() else None
    start = part.stat().st_size if state and state["url"] == url and state["validator"] else 0
    headers = {"Range": f"bytes={start}-", "If-Range": state["validator"]} if state and start else {}
    with _opened(url, headers) as answer:
        if answer.status == 416:
            if answer.headers.get("Content-Range") == f"bytes */{start}" and start:
                return
            part.unlink()
            raise _Broken("the server refuses to go on where the download broke off")
        length = answer.headers.get("Content-Length")
        is_rest = answer.status == 206
        if is_rest:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
            if not found or int(found[1]) != start:
                part.unlink()
                raise _Broken("the server goes on at another place than where the download broke off")
        else:
            start = 0
            tag = answer.headers.get("ETag", "")
            validator = tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified")
            _write(_state(part), {"url": url, "validator": validator})
        total = start + int(length) if length and length.isdigit() else None
        with part.open("ab" if is_rest else "wb") as file:
            size = _copy(
                answer, file, start, total, lambda line: progress(f"{part.name.removesuffix('.part')}: {line}")
            )
            file.flush()
            os.fsync(file.fileno())
    if total is not None and size != total:
        raise _Broken(f"the connection ended after {size:,} of {total:,} bytes")


def _copy(answer: Any, file: Any, start: int, total: int | None, progress: Callable[[str], None]) -> int:
    """Write what comes to the file; return its size."""
    size, began = start, time.monotonic()
    told = began
    of = f" of {total / 1e6:,.1f}" if total is not None else ""
    if start:
        progress(f"going on at {start / 1e6:,.1f}{of} MB")
    while chunk := _read(answer, CHUNK_BYTES):
        file.write(chunk)
        size += len(chunk)
        now = time.monotonic()
        if now - told >= PROGRESS_SECONDS:
            told = now
            progress(f"{size / 1e6:,.1f}{of} MB, {(size - start) / 1e6 / (now - began):,.1f} MB/s")
    seconds = max(time.monotonic() - began, 1e-3)
    progress(f"{size / 1e6:,.1f}{of} MB, {(size - start) / 1e6 / seconds:,.1f} MB/s on average")
    return size
