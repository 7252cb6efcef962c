"""Checkpoints as each worker of a test writes and reads them, without Ray.

python checkpoint_cases.py FOLDER writes large ones until it is killed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engine_cases
import numpy as np
import torch
import torch.distributed as dist
from engine_cases import SEED, workers_of

from sellarec.artifacts import Place
from sellarec.config import Collab, Sparse, Tables
from sellarec.errors import StageFailed, UserError
from sellarec.training.checkpoints import Checkpoints
from sellarec.training.engine import Engine
from sellarec.training.storage import Storage
from sellarec.training.table import Table
from sellarec.training.workers import Workers

ROWS, DIM = 203, 8


class Rows:
    """A task of one table without anything else."""

    columns, prepare, model, whole, blocks, graph = (), None, None, (), (), None

    def __init__(self, rows: int) -> None:
        self.tables = (Table("row", rows, DIM, ("row",), init_std=1.0),)

    def lookups(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"row": batch["row"]}


def engine_of(workers: Workers, rows: int = ROWS, seed: int = SEED) -> Engine:
    settings: Sparse = Collab(table_optimizer="rowwise-adagrad")
    return Engine(Rows(rows), workers, seed, settings, Tables(), "float32")  # type: ignore[arg-type]


def checkpoints_of(workers: Workers, folder: Path, told: list[str], seconds: float = 0) -> Checkpoints:
    return Checkpoints(
        Place.of(str(folder)), Storage(workers, "test", seconds, told.append, Place.of(str(folder.parent)))
    )


def held(engine: Engine, workers: Workers, rows: int = ROWS) -> np.ndarray:
    """All rows of the table."""
    with torch.no_grad():
        found = engine.tables.look_up({"row": torch.arange(rows)})["row"]
    return found.numpy()


def save(folder: Path, positions: Sequence[tuple[int, int]], seconds: float = 0) -> dict[str, Any]:
    """Save a checkpoint for each (step, best step), of rows that are those of seed `step`."""
    workers, told = workers_of(), []
    checkpoints = checkpoints_of(workers, folder, told, seconds)
    checkpoints.newest()
    failed = None
    try:
        for step, best in positions:
            checkpoints.save(engine_of(workers, seed=step), {"step": step, "best_step": best})
    except StageFailed as error:
        failed = str(error)
    return {"told": told, "failed": failed}


def load(folder: Path, seconds: float = 0) -> dict[str, Any]:
    """What is found and loaded, and whether the rows are those that were saved."""
    workers, told = workers_of(), []
    checkpoints = checkpoints_of(workers, folder, told, seconds)
    try:
        found = checkpoints.newest()
    except StageFailed as error:
        return {"failed": str(error), "told": told}
    if found is None:
        return {"position": None, "told": told}
    engine = engine_of(workers, seed=SEED)
    checkpoints.load(engine, found["step"])
    expected = held(engine_of(workers, seed=found["step"]), workers)
    return {"position": found, "told": told, "same": bool((held(engine, workers) == expected).all())}


def load_as_another(folder: Path, saved: engine_cases.Run, loaded: engine_cases.Run) -> str:
    """What a worker is told that loads the checkpoint of one model into another."""
    workers = workers_of()
    checkpoints = checkpoints_of(workers, folder, [])
    one, other = (engine_cases.engine_of(run, engine_cases.task_of(run), workers) for run in (saved, loaded))
    checkpoints.save(one, {"step": 1, "best_step": 0})
    before = one.shapes, other.shapes
    try:
        checkpoints.load(other, 1)
    except UserError as error:
        return str(error)
    return f"loaded: {before}"


def newest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    told: list[str] = []
    return checkpoints_of(workers_of(), folder, told).newest(), told


def export(folder: Path, seconds: float) -> dict[str, Any]:
    workers, told = workers_of(), []
    engine = engine_of(workers)
    engine.export(Place.of(str(folder)), Storage(workers, "test", seconds, told.append, Place.of(str(folder.parent))))
    return {"told": told, "rows": held(engine, workers)}


if __name__ == "__main__":
    where = Path(sys.argv[1])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    alone = engine_cases.workers_of()
    writer = checkpoints_of(alone, where, [])
    for step in range(1, 1000):
        writer.save(engine_of(alone, 2_000_000, seed=step), {"step": step, "best_step": 0})
        print(step, flush=True)
