"""Memory of sharded tables by the number of workers: `python benchmarks/tables/memory.py --out FILE.json`.

Each case makes one table row-wise over its workers, with row-wise Adagrad, looks ids up and trains some steps on them, all in
processes of one thread. Prints what was planned for the fullest worker, what its resident memory grew by, and lookups/s of
training (the machine's cores are shared by the workers, so this is no scaling).

    python benchmarks/tables/memory.py --rows 4000000 --workers 1 2 3 4 --out FILE.json
    python benchmarks/tables/memory.py --rows 100000000 --dtype float16 --workers 2 --out FILE.json     (needs some 15 GiB)
"""

import argparse
import time
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist
from processes import measure, write

from sellarec.config import Sparse, Tables
from sellarec.training.plan import place, worker_bytes
from sellarec.training.table import Table
from sellarec.training.tables import ShardedTables

OPTIMIZER = Sparse(table_learning_rate=0.1)


def worker(rank: int, workers: int, settings: argparse.Namespace) -> dict:
    storage, process = Tables(dtype=settings.dtype), psutil.Process()
    generator, share = np.random.default_rng(rank), settings.batch // workers

    def train(tables: ShardedTables, rows: int, steps: int) -> None:
        for _ in range(steps):
            ids = torch.from_numpy(generator.integers(0, rows, share))
            found = tables.look_up({"item": ids})["item"]
            (found.square().sum() / settings.batch).backward()

    def make(rows: int) -> ShardedTables:
        tables = [Table("item", rows, settings.dim, ("item",), init_std=0.05)]
        placements = place(tables, storage, OPTIMIZER, workers, "cpu")
        return ShardedTables(placements, storage, OPTIMIZER, dist.group.WORLD, torch.device("cpu"), 0)

    train(make(10_000), 10_000, 3)  # what kernels and process groups take has no part in it
    before, start = process.memory_info().rss, time.perf_counter()
    tables = make(settings.rows)
    made = time.perf_counter() - start
    train(tables, settings.rows, 3)
    dist.barrier()
    start = time.perf_counter()
    train(tables, settings.rows, settings.steps)
    dist.barrier()
    seconds = time.perf_counter() - start
    grown = torch.tensor([process.memory_info().rss - before])
    dist.all_reduce(grown, op=dist.ReduceOp.MAX)
    return {
        "rows": settings.rows,
        "workers": workers,
        "planned bytes": max(worker_bytes(tables.placements, storage, OPTIMIZER, workers)),
        "resident bytes": int(grown),
        "seconds to make": made,
        "lookups/s": settings.steps * settings.batch / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--batch", type=int, default=8192, help="ids of a step, all workers together")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="100,000 rows on one and two workers")
    parser.add_argument("--out", type=Path, required=True)
    settings = parser.parse_args()
    if settings.quick:
        settings.rows, settings.workers, settings.steps = 100_000, [1, 2], 5
    facts = {"dim": settings.dim, "dtype": settings.dtype, "batch": settings.batch, "steps": settings.steps}
    cases = []
    for workers in settings.workers:
        case = measure(worker, workers, settings)
        cases.append(case)
        planned, resident = (case[name] / 2**20 for name in ("planned bytes", "resident bytes"))
        print(
            f"{case['rows']:,} rows, {workers} workers: planned {planned:,.0f} MiB, resident {resident:,.0f} MiB a worker; made "
            f"in {case['seconds to make']:.0f} s; {case['lookups/s']:,.0f} lookups/s",
            flush=True,
        )
        write(settings.out, facts, cases)  # what is measured so far


if __name__ == "__main__":
    main()
