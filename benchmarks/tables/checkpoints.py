"""Seconds to write a checkpoint of sharded tables and to restore it: `python benchmarks/tables/checkpoints.py --out FILE.json`.

Two tables, row-wise over gloo processes of one thread, with row-wise Adagrad: rows and the optimizer's state are written by
the training loop's own `Checkpoints`, by 1 and 2 workers, and restored in new processes, on as many and on 1. Rows before
restoring are others; after it rows and state have to be those that were written, bit for bit.

    write    the files, synced to the disk, their checksums, the record, and deleting what nothing goes back to
    check    reading every file and comparing its checksum: what comes before anything is loaded
    load     reading what the worker's own rows lie in

Each is what all workers together took. Before a checkpoint is checked its files are dropped from the page cache, so they come
from the disk, and are loaded from the cache then, as in a stage that goes on. MB are 10^6 bytes. The folder decides the speed:
`--folder` names one on the storage that matters (three checkpoints at most lie there).

    python benchmarks/tables/checkpoints.py --quick --out FILE.json     (half a minute)
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from processes import measure, write
from side import resident
from torch import Tensor

from sellarec.artifacts import Place
from sellarec.collab.model import Sizes
from sellarec.collab.models.mf import Model
from sellarec.collab.task import CollabTask
from sellarec.config import Collab, Tables
from sellarec.training.checkpoints import Checkpoints
from sellarec.training.engine import Engine
from sellarec.training.storage import Storage
from sellarec.training.table import Table, initial_rows
from sellarec.training.workers import Workers

WRITTEN, OTHERS = 0, 1
"""Seeds of the rows that are written, and of those that are there before they are restored."""

BLOCK_ROWS = 1 << 20
"""Rows that are compared at once."""


def build(
    rank: int, workers: int, settings: argparse.Namespace, rows: int, seed: int, folder: str
) -> tuple[Engine, Checkpoints]:
    """Tables of a matrix factorisation, and their checkpoints in a folder."""
    collab = Collab(dim=settings.dim, biases=False, global_mean=False, l2=0.0, table_optimizer="rowwise-adagrad")
    task = CollabTask(Model(Sizes(rows // 2, rows // 2, 0.5), collab), collab, np.ones(0, bool))
    group = Workers(rank, workers, torch.device("cpu"), dist.new_group(), dist.new_group())
    engine = Engine(task, group, seed, collab, Tables(), "float32")
    place = Place.of(folder)
    return engine, Checkpoints(place, Storage(group, "benchmark", 0.0, print, place))


def states(engine: Engine) -> Iterator[tuple[Table, int, Tensor, Tensor]]:
    """Of each table what this worker holds: the first row's id, rows [R, D], and the optimizer's state [R]."""
    assert engine.tables is not None
    state = engine.tables.state()
    for table in engine.task.tables:
        ((name, _, _),) = table.pieces
        (rows,), (sums,) = state["rows"][name].local_shards(), state["optimizer"][f"{name}.momentum1"].local_shards()
        yield table, rows.metadata.shard_offsets[0], rows.tensor.detach(), sums.tensor.detach().view(-1)


def blocks(first: int, rows: Tensor) -> Iterator[tuple[slice, range]]:
    """Pieces of a worker's rows, and their ids."""
    for start in range(0, len(rows), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(rows))
        yield slice(start, stop), range(first + start, first + stop)


def mark(engine: Engine) -> None:
    """Have the optimizer's state tell the row that it belongs to."""
    for _, first, rows, sums in states(engine):
        for piece, ids in blocks(first, rows):
            sums[piece] = torch.arange(ids.start, ids.stop, dtype=sums.dtype)


def check(engine: Engine) -> None:
    """Refuse rows or state that aren't what was written.

    Raises:
        SystemExit: the first table of which something isn't.
    """
    for table, first, rows, sums in states(engine):
        for piece, ids in blocks(first, rows):
            expected = initial_rows(table, WRITTEN, ids.start, ids.stop)
            same = np.array_equal(rows[piece].numpy(), expected)
            if not same or not torch.equal(sums[piece], torch.arange(ids.start, ids.stop, dtype=sums.dtype)):
                raise SystemExit(
                    f"table {table.name}: rows {ids.start} to {ids.stop} aren't restored as they were written"
                )


def seconds_of(act: Callable[[], Any]) -> float:
    """What `act` takes until all workers are done with it."""
    dist.barrier()
    start = time.perf_counter()
    act()
    dist.barrier()
    return time.perf_counter() - start


def drop_from_cache(folder: Path) -> None:
    """Have the kernel forget what it holds in memory of the files below a folder; without effect where that is all there is."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_above(before: int) -> int:
    """Bytes that the fullest worker had resident at its peak, above what it had before."""
    most = torch.tensor(resident("VmHWM") - before)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def count_anew() -> int:
    """Resident bytes now, from which on the kernel counts the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def save(rank: int, workers: int, settings: argparse.Namespace, rows: int, folder: str) -> dict:
    engine, checkpoints = build(rank, workers, settings, rows, WRITTEN, folder)
    mark(engine)
    before = count_anew()
    positions = [{"step": step, "best_step": 0} for step in range(1, settings.rounds + 1)]
    seconds = [seconds_of(partial(checkpoints.save, engine, position)) for position in positions]
    newest = max(Path(folder).iterdir())
    size = sum(path.stat().st_size for path in newest.iterdir())
    return {"bytes": size, "write seconds": seconds, "write bytes above": peak_above(before)}


def restore(rank: int, workers: int, settings: argparse.Namespace, rows: int, folder: str) -> dict:
    engine, checkpoints = build(rank, workers, settings, rows, OTHERS, folder)
    before, checked, loaded = count_anew(), [], []
    for _ in range(settings.rounds):
        drop_from_cache(Path(folder))
        checked.append(seconds_of(checkpoints.newest))
        loaded.append(seconds_of(partial(checkpoints.load, engine, settings.rounds)))
    above = peak_above(before)
    check(engine)
    return {"check seconds": checked, "load seconds": loaded, "restore bytes above": above}


def case_of(rows: int, workers: int, restored: int, found: dict) -> dict:
    """Medians, lowest and highest; MB/s of writing, and of checking and loading together."""
    both = [sum(taken) for taken in zip(found["check seconds"], found["load seconds"], strict=True)]
    case = {"rows": rows, "workers": workers, "restored on": restored, **found, "restore seconds": both}
    for what in ("write", "restore"):
        taken = case[f"{what} seconds"]
        case[f"{what} MB/s"] = found["bytes"] / 1e6 / statistics.median(taken)
        case[f"{what} lowest, highest seconds"] = [min(taken), max(taken)]
    return case


COLUMNS = ("rows", "workers", "restored on", "MB", "write s", "MB/s", "check s", "load s", "restore MB/s", "MiB above")


def line(case: dict) -> str:
    """Below COLUMNS."""
    write_s, check_s, load_s = (statistics.median(case[f"{name} seconds"]) for name in ("write", "check", "load"))
    values = (
        f"{case['rows']:,}", case["workers"], case["restored on"], f"{case['bytes'] / 1e6:,.1f}", f"{write_s:.2f}",
        f"{case['write MB/s']:,.0f}", f"{check_s:.2f}", f"{load_s:.2f}", f"{case['restore MB/s']:,.0f}",
        f"{max(case['write bytes above'], case['restore bytes above']) / 2**20:,.0f}",
    )  # fmt: skip
    return in_columns(values)


def in_columns(values: Sequence[Any]) -> str:
    return "  ".join(f"{value:>12}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7], help="rows of both tables together"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints are written (default: the system's for temporary files)"
    )
    parser.add_argument("--quick", action="store_true", help="10^4 rows, two rounds")
    parser.add_argument("--out", type=Path, required=True)
    settings = parser.parse_args()
    if settings.quick:
        settings.rows, settings.rounds = [10**4], 2
    facts = {"dim": settings.dim, "rounds": settings.rounds, "folder": str(settings.folder or tempfile.gettempdir())}
    cases = []
    print(in_columns(COLUMNS), flush=True)
    for rows in settings.rows:
        for workers in settings.workers:
            with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
                written = measure(save, workers, settings, rows, folder)
                for restored in sorted({workers, 1}, reverse=True):
                    found = measure(restore, restored, settings, rows, folder)
                    cases.append(case_of(rows, workers, restored, written | found))
                    print(line(cases[-1]), flush=True)
                    write(settings.out, facts, cases)  # what is measured so far


if __name__ == "__main__":
    main()
