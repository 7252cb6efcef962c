"""Artifacts: directories that a stage writes whole or not at all, found by the fingerprint of what made them.

The payload is written to its final place and `manifest.json` last: without a manifest there is no artifact. That works on
object stores, where a directory can't be moved. A lease file keeps two writers apart.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow
import pyarrow.fs

from sellarec.errors import StageFailed, UserError

LEASE_SECONDS = 60
"""A lease that its owner hasn't renewed for so long is up for taking."""

LONGEST_PAUSE = 30.0
"""Seconds between two attempts on storage that fails, at most."""

Done = TypeVar("Done")


def in_json(content: Any) -> str:
    """A JSON file's text."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def fingerprint(facts: dict[str, Any]) -> str:
    """16 hexadecimal digits that stand for `facts` (plain JSON data, whatever the order of its keys)."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Place:
    """A directory on any file system that pyarrow knows: a local folder, s3://, gs://."""

    uri: str

    @property
    def _resolved(self) -> tuple[pyarrow.fs.FileSystem, str]:
        return pyarrow.fs.FileSystem.from_uri(self.uri)

    @classmethod
    def of(cls, path_or_uri: str) -> "Place":
        if "://" in path_or_uri:
            return cls(path_or_uri.rstrip("/"))
        return cls(Path(path_or_uri).expanduser().absolute().as_uri())

    def __truediv__(self, name: str) -> "Place":
        return Place(f"{self.uri}/{name}")

    def __str__(self) -> str:
        return str(self.folder) if self.is_local else self.uri

    @property
    def is_local(self) -> bool:
        return self.uri.startswith("file://")

    @property
    def folder(self) -> Path:
        """The local folder. Only for places on a local file system."""
        assert self.is_local, self.uri
        return Path(self._resolved[1])

    def read_json(self, name: str) -> Any | None:
        """The content of a JSON file in this directory; None where there is no such file."""
        filesystem, path = self._resolved
        if filesystem.get_file_info(f"{path}/{name}").type != pyarrow.fs.FileType.File:
            return None
        try:
            with filesystem.open_input_stream(f"{path}/{name}") as stream:
                return json.loads(stream.read())
        except FileNotFoundError:  # deleted between the two calls, as a lease may be
            return None

    def write_text(self, name: str, text: str) -> None:
        """Write one small file; on a local file system a reader sees the old one or the new one, never a part."""
        self.make()
        filesystem, path = self._resolved
        if self.is_local:
            unfinished = f"{path}/.{name}.{uuid.uuid4().hex}"
            try:
                with open(unfinished, "w", encoding="utf-8") as file:
                    file.write(text)
                os.replace(unfinished, f"{path}/{name}")
            except OSError:  # a full disk, say: leave nothing behind
                with contextlib.suppress(OSError):
                    os.unlink(unfinished)
                raise
        else:
            with filesystem.open_output_stream(f"{path}/{name}") as stream:
                stream.write(text.encode())

    def write_json(self, name: str, content: Any) -> None:
        self.write_text(name, in_json(content))

    def delete(self, *names: str) -> None:
        """Delete files or directories in here; what isn't there is passed over."""
        filesystem, path = self._resolved
        for name in names:
            kind = filesystem.get_file_info(f"{path}/{name}").type
            if kind == pyarrow.fs.FileType.File:
                filesystem.delete_file(f"{path}/{name}")
            elif kind == pyarrow.fs.FileType.Directory:
                filesystem.delete_dir(f"{path}/{name}")

    def names(self) -> list[str]:
        """Names of the files and directories in here; none where there is no such directory.

        Raises:
            OSError: it can't be told, as where a file stands in its way.
        """
        filesystem, path = self._resolved
        try:
            return sorted(info.base_name for info in filesystem.get_file_info(pyarrow.fs.FileSelector(path)))
        except FileNotFoundError:
            return []

    def make(self) -> None:
        """Make this directory, where it isn't there yet."""
        filesystem, path = self._resolved
        filesystem.create_dir(path, recursive=True)

    def reach(self) -> None:
        """Raises FileNotFoundError where a directory that has been made is not there: its storage is away, and what is then
        written would make another one in its place. Object stores have no directories that could be missed."""
        if self.is_local and not self.folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "its storage is away", str(self))

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """A local folder whose files are in this place once the block has ended without an error."""
        self.make()
        filesystem, path = self._resolved
        if self.is_local:
            yield self.folder
            return
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            pyarrow.fs.copy_files(folder, path, destination_filesystem=filesystem)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Path]:
        """A local folder with this place's files: itself, or a copy for as long as the block runs."""
        if self.is_local:
            yield self.folder
            return
        filesystem, path = self._resolved
        with tempfile.TemporaryDirectory() as folder:
            pyarrow.fs.copy_files(path, folder, source_filesystem=filesystem)
            yield Path(folder)

    def local(self) -> Path:
        """A local folder with this place's files: itself, or a copy that is downloaded once a process."""
        if self.is_local:
            return self.folder
        if self.uri not in _downloads:
            filesystem, path = self._resolved
            folder = tempfile.mkdtemp(prefix="sellarec-")
            pyarrow.fs.copy_files(path, folder, source_filesystem=filesystem)
            _downloads[self.uri] = Path(folder)
        return _downloads[self.uri]


_downloads: dict[str, Path] = {}


@dataclass(frozen=True)
class Store:
    """All artifacts of a workspace, `WORKSPACE/artifacts/STAGE-FINGERPRINT`."""

    workspace: Place

    @property
    def artifacts(self) -> Place:
        return self.workspace / "artifacts"

    def place(self, stage: str, mark: str) -> Place:
        return self.artifacts / f"{stage}-{mark}"

    def manifest(self, stage: str, mark: str) -> dict[str, Any] | None:
        """The manifest of an artifact that stands; None where there is none."""
        return self.place(stage, mark).read_json("manifest.json")

    def check_writable(self) -> None:
        """Raises UserError where the workspace can't be written to, or its URI is of no known kind."""
        name = f".probe-{uuid.uuid4().hex}"
        try:
            self.workspace.write_text(name, "")
            self.workspace.delete(name)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise UserError(
                f"the workspace {self.workspace} can't be written to ({error}): give another with --workspace"
            ) from error


@contextlib.contextmanager
def lease(place: Place, waiting: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Hold the right to write an artifact. While another process holds it, wait and say so through `waiting`.

    Gives a function that tells whether the lease is still held: a process that stood still for LEASE_SECONDS may
    find that another one has taken it.
    """
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
    told = False

    def is_held() -> bool:
        now = place.read_json("lease.json")
        return now is not None and now["token"] == owner["token"]

    while True:
        held = place.read_json("lease.json")
        if held is None or _is_stale(held):
            place.write_json("lease.json", {**owner, "renewed": time.time()})
            time.sleep(0.1)  # of two that wrote at the same moment, the later one finds itself here
            if is_held():
                break
            continue
        if not told:
            waiting(f"process {held['pid']} on {held['host']} is writing {place}; waiting for it")
            told = True
        time.sleep(1)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(LEASE_SECONDS / 4):
            with contextlib.suppress(OSError):  # a full disk, say: the next renewal is soon enough
                now = place.read_json("lease.json")
                if now is None:  # storage is away, where nothing may be made in its place
                    continue
                if now["token"] != owner["token"]:
                    return
                place.write_json("lease.json", {**owner, "renewed": time.time()})

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield is_held
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):  # storage that is away: what is left of a process that has ended is stale
            if is_held():
                place.delete("lease.json")


def _is_stale(held: dict[str, Any]) -> bool:
    if held["host"] == socket.gethostname() and not _is_alive(held["pid"]):
        return True
    return time.time() - held["renewed"] > LEASE_SECONDS


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def pauses(seconds: float) -> Iterator[float]:
    """Seconds to wait between attempts on storage that fails: 1, 2, 4, ..., at most LONGEST_PAUSE, and `seconds` in all."""
    pause, left = 1.0, seconds
    while left > 0:
        yield min(pause, left)
        left -= pause
        pause = min(2 * pause, LONGEST_PAUSE)


def persist(what: str, act: Callable[[], Done], seconds: float, tell: Callable[[str], None]) -> Done:
    """What `act` gives, which is tried again while storage fails.

    Args:
        what: for messages: what it does, and where.
        seconds: how long it is tried again, all pauses together.

    Raises:
        StageFailed: storage failed for longer.
    """
    for pause in pauses(seconds):
        try:
            return act()
        except OSError as error:
            tell(f"{what} failed ({type(error).__name__}: {error}): tries again in {pause:g} s")
            time.sleep(pause)
    try:
        return act()
    except OSError as error:
        raise StageFailed(
            f"{what} failed, and again for {seconds:g} s (storage_timeout): {type(error).__name__}: {error}; once storage is "
            "back, the same command goes on"
        ) from error


def check_output(file: Path, flag: str) -> None:
    """Before the work whose outcome a file is to take, refuse one that can't be written. Its folder is made.

    Raises:
        UserError: naming the flag and the reason.
    """
    try:
        if file.is_dir():
            raise IsADirectoryError("it is a folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab") if file.exists() else tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise UserError(f"{flag} is '{file}', which can't be written ({error}): give another file") from error


def free_bytes(place: Place) -> int | None:
    """Free bytes of the disk behind a local place; None where there is no such number."""
    if not place.is_local:
        return None
    folder = place.folder
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
