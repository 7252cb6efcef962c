"""Plan the embedding tables of a cluster without one: which worker holds what, and the bytes that takes. `--help` lists all."""

import sys

from sellarec.environment import check_environment
from sellarec.errors import UserError, exit_status


def main(arguments: list[str]) -> None:
    check_environment()
    from sellarec.command_line import parse_planning  # after the check: these import what it looks for
    from sellarec.config import Sparse

    settings = parse_planning(arguments)
    from sellarec.training.launch import room_of_worker
    from sellarec.training.plan import GIB, check_fits, describe, place, worker_bytes
    from sellarec.training.table import Table

    tables = [Table(name, getattr(settings, f"{name}s"), settings.dim, (name,)) for name in ("user", "item")]
    optimizer = Sparse(table_optimizer=settings.table_optimizer)
    workers, storage = settings.workers, settings.tables
    placements = place(tables, storage, optimizer, workers, settings.device)
    held = worker_bytes(placements, storage, optimizer, workers)
    lines = [
        ("table", "rows", "columns", "dtype", "where", "rows/worker", "columns/worker", "weights GiB", "state GiB")
    ]
    for line in describe(placements, storage, optimizer, workers):
        where = line["sharding"] if line["worker"] is None else f"worker {line['worker']}"
        weights, state = (f"{line[name] / GIB:.3f}" for name in ("weight bytes", "optimizer bytes"))
        of_rows, of_columns = (f"{line[f'{what} per worker']:,}" for what in ("rows", "columns"))
        size = f"{line['rows']:,}", str(line["columns"]), line["dtype"]
        lines.append((line["table"], *size, where, of_rows, of_columns, weights, state))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))
    fullest = max(range(workers), key=held.__getitem__)
    how = f"{settings.device}, {storage.placement}, {settings.table_optimizer}"
    print(f"{workers} workers ({how}): {sum(held) / GIB:.3f} GiB in all")
    print(f"worker {fullest} holds most: {held[fullest] / GIB:.3f} GiB ({held[fullest]:,} bytes)")
    room = settings.memory_per_worker
    if room is None and settings.device == "cuda":
        raise UserError(
            "give --memory-per-worker, the GiB that tables may take of each GPU, to check that the plan fits"
        )
    room = room or room_of_worker(workers) / GIB
    check_fits(placements, storage, optimizer, workers, int(room * GIB), "each worker")
    print(f"fits: each worker has room for {room:.1f} GiB")


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
