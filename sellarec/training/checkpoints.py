"""Checkpoints that count once they are whole.

`step-N/` holds the files of Torch Distributed Checkpoint. Last of all `checkpoint.json` is written, with the position of the run
and with bytes and checksum of each file: a folder without it was cut off while it was written. Nothing is loaded before it was
compared with it.
"""

import zlib
from functools import partial
from pathlib import Path
from typing import Any

from sellarec.artifacts import Place
from sellarec.errors import StageFailed, UserError
from sellarec.training.engine import Engine
from sellarec.training.storage import Storage

RECORD = "checkpoint.json"
"""Of a checkpoint: {"position": where the run stands, "shapes": {table or weight: shape}, "files": {name: [bytes, CRC-32]}}."""

READ_AT_ONCE = 1 << 20
"""Bytes of a file that are read at once to be summed up."""


class Checkpoints:
    """The checkpoints of a stage. All workers call its methods alike."""

    def __init__(self, place: Place, storage: Storage) -> None:
        self._place, self._storage, self._workers = place, storage, storage.workers
        self._newest: list[dict[str, Any]] = []
        """Positions of the newest checkpoint and of the one before it."""

    def save(self, engine: Engine, position: dict[str, Any]) -> None:
        """Write a checkpoint, and delete those before it that nothing goes back to.

        Kept are the newest and the one before it, which is gone back to where the newest turns out damaged, and of both the
        best state that they name. Those of later steps, which were passed over, stay until the training has come past them.

        Args:
            position: where the run stands, as JSON takes it, with `step` and `best_step` (0: none so far).
        """
        name = _name(position["step"])
        what = f"writing the checkpoint of step {position['step']} to {self._place / name}"
        self._storage.first(what, partial(self._place.delete, name))  # what an earlier attempt has left
        # each worker for itself: in what follows they wait for each other, so none may be missing
        self._storage.attempt(what, (self._place / name).make)
        parts = self._storage.attempt(what, partial(self._write, engine, self._place / name))
        files = {file: found for part in parts for file, found in part.items()}
        record = {"position": position, "shapes": engine.shapes, "files": files}
        self._storage.first(what, partial((self._place / name).write_json, RECORD, record))
        self._newest = [*self._newest[-1:], position]
        kept = {_name(step) for held in self._newest for step in (held["step"], held["best_step"])}
        self._storage.first(f"deleting old checkpoints in {self._place}", partial(self._delete, position["step"], kept))

    def _delete(self, before: int, kept: set[str]) -> None:
        names = [_name(step) for step in self._steps() if step < before]
        self._place.delete(*(name for name in names if name not in kept))

    def _write(self, engine: Engine, place: Place) -> dict[str, tuple[int, int]]:
        """Of the files that this worker has written, bytes and checksum by name."""
        rank = self._workers.rank
        with place.writing() as folder:
            engine.save_checkpoint(str(folder))
            own = [*folder.glob(f"__{rank}_*"), *([folder / ".metadata"] if rank == 0 else [])]
            return {path.name: (path.stat().st_size, _checksum(path)) for path in own}

    def newest(self) -> dict[str, Any] | None:
        """The position of the newest checkpoint that is whole, as is the best state that it names; None where none was finished.

        Raises:
            StageFailed: checkpoints were finished, but all of them are damaged.
        """
        what = f"reading the checkpoints in {self._place}"
        damaged = False
        checked: dict[int, tuple[dict[str, Any] | None, str | None]] = {}

        def check(step: int) -> tuple[dict[str, Any] | None, str | None]:
            if step not in checked:
                found = self._storage.attempt(what, partial(self._check, step))
                checked[step] = found[0][0], next((why for _, why in found if why is not None), None)
            return checked[step]

        for step in reversed(self._storage.first(what, self._steps)):
            position, why = check(step)
            if position is None:
                self._storage.tell_once(
                    f"the checkpoint of step {step} was cut off while it was written: it is left out"
                )
                continue
            if why is None and position["best_step"] not in (0, step):
                best, why = check(position["best_step"])
                if best is None:
                    why = "it is missing"
                why = why and f"its best state, of step {position['best_step']}: {why}"
            if why is None:
                self._newest = [position]
                return position
            damaged = True
            self._storage.tell_once(f"the checkpoint of step {step} is damaged ({why}): it is left out")
        if damaged:
            raise StageFailed(
                f"stage {self._storage.stage}: no checkpoint in {self._place} is whole: bring their files back, or delete the "
                "folder to begin the stage again"
            )
        return None

    def _check(self, step: int) -> tuple[dict[str, Any] | None, str | None]:
        """The position of a checkpoint (None: it was not finished), and what is wrong with this worker's share of its files."""
        place = self._place / _name(step)
        try:
            record = place.read_json(RECORD)
        except ValueError:  # of a file that is cut off
            record = None
        if record is None:
            return None, None
        mine = sorted(record["files"].items())[self._workers.rank :: self._workers.world_size]
        with place.reading() as folder:
            return record["position"], next(
                (why for file, found in mine if (why := _damage(folder / file, *found))), None
            )

    def load(self, engine: Engine, step: int) -> None:
        """Take over the state of a checkpoint that is whole.

        Raises:
            UserError: on all workers: its tables or weights are others than the engine's.
        """
        place = self._place / _name(step)
        what = f"reading the checkpoint of step {step} in {place}"
        record = self._storage.first(what, partial(place.read_json, RECORD))
        assert record is not None  # of one that is whole
        there, here = record["shapes"], engine.shapes
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                raise UserError(
                    f"the checkpoint {place} is of another model: {name} has {_shape(there.get(name))} there and "
                    f"{_shape(here.get(name))} here. Bring back the one that stood here, or delete {self._place} to begin the "
                    "stage again"
                )

        def load() -> None:
            with place.reading() as folder:
                engine.load_checkpoint(str(folder))

        self._storage.attempt(what, load)

    def _steps(self) -> list[int]:
        return [int(name.removeprefix("step-")) for name in self._place.names() if name.startswith("step-")]


def _name(step: int) -> str:
    return f"step-{step:09d}"


def _shape(found: list[int] | None) -> str:
    return "no place" if found is None else f"shape {tuple(found)}"


def _damage(path: Path, size: int, checksum: int) -> str | None:
    """What of a file is not as it was written; None: nothing."""
    if not path.exists():
        return f"{path.name} is missing"
    if path.stat().st_size != size:
        return f"{path.name} has {path.stat().st_size:,} bytes instead of {size:,}"
    return None if _checksum(path) == checksum else f"{path.name} has other content than was written"


def _checksum(path: Path) -> int:
    found = 0
    with open(path, "rb") as file:
        while part := file.read(READ_AT_ONCE):
            found = zlib.crc32(part, found)
    return found
