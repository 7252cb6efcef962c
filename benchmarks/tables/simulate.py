"""What training on tables would take on clusters that nothing here ran on: `python benchmarks/tables/simulate.py`.

A MODEL, NOT A MEASUREMENT. What of it is measured: the bytes that workers send in a step (the formula of docs/collab.md, which
`traffic.py` found right to 0.4 % on 2 to 4 workers). What is assumed: everything else, and all of it is printed: bandwidths
of memory and links as their makers state them, the share of them that is reached, and the latency of a collective. Nothing
of it has been compared with GPUs, with NCCL, or with more than 4 workers.

The case is matrix factorisation or any model whose dense part costs little, row-wise tables, row-wise Adagrad in float32.
A step of b rows on each of W workers, F features a row, D columns, moves on each

    memory    b F (20 D + 128) bytes: rows read and written out; their gradients, the rows and the optimizer's state read and
              written again (a line of 64 bytes each way for the state)
    links     8 b F (W-1)/W of ids, 4 D b F (W-1)/W of vectors and as many of gradients, where no id comes twice in a worker's
              rows (each is sent once, so with real logs it is less: `--distinct`), and 4,096 F (W-1) of lengths of lists; of
              these (G-1)/(W-1) stay within a node of G workers, the rest leave it, and both go on at a time
    latency   7 collectives (as traffic.py counts them), each of latency x (1 + log2 W)
    host      what launching kernels and sorting ids takes on the host, whatever the batch. A published step of 65,536 rows with
              26 features on 8 H100s takes 15 to 24 ms (NVIDIA recsys-examples, dynamicemb's benchmark), of which memory and
              links explain one: so it is this that matters with small batches

and its time is their sum: nothing is taken to overlap. The default data are Amazon Reviews 2023's: 54.5 million users,
48.2 million items, 571.5 million interactions.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from traffic import FEATURES, formula

from sellarec.config import Sparse, Tables
from sellarec.training.plan import GIB, place, worker_bytes
from sellarec.training.table import Table

COLLECTIVES = 7


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What of the machines is assumed; the defaults are an H200's and its makers', in nodes of 8 with 400 Gbit/s a GPU."""

    memory_gb_per_s: float = 4300.0
    """Bandwidth of a GPU's memory, read and written together."""
    memory_share: float = 0.5
    """Share of it that scattered rows reach."""
    memory_gib: float = 131.0
    """Memory of a GPU."""
    node_workers: int = 8
    """GPUs of a node."""
    node_link_gb_per_s: float = 450.0
    """What a GPU sends within its node."""
    link_gb_per_s: float = 50.0
    """What a GPU sends to other nodes."""
    link_share: float = 0.7
    """Share of both that an all-to-all reaches."""
    latency_us: float = 15.0
    """Of a collective between two workers, in microseconds."""
    host_ms: float = 5.0
    """The host's own time of a step, in milliseconds."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Time, bytes and memory of a training step on many GPUs: a model, not a measurement."""

    workers: tuple[int, ...] = (1, 8, 16, 128)
    """Numbers of workers."""
    users: int = 54_500_000
    items: int = 48_200_000
    interactions: int = 571_500_000
    dim: int = 128
    """Columns of a row."""
    batch: int = 65_536
    """Rows of a step on each worker."""
    distinct: float = 1.0
    """Share of the ids of these rows that are distinct: each is sent once. 1 is the most."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """Where the figures and the assumptions go."""
    assume: Assumptions = Assumptions()


def cell(settings: Simulation, workers: int) -> dict[str, Any]:
    """The figures of one number of workers: seconds, bytes and rows/s."""
    assume = settings.assume
    tables = [
        Table("user", settings.users, settings.dim, ("user",)),
        Table("item", settings.items, settings.dim, ("item",)),
    ]
    storage, optimizer = Tables(), Sparse(table_optimizer="rowwise-adagrad")
    held = max(worker_bytes(place(tables, storage, optimizer, workers, "cuda"), storage, optimizer, workers))
    sent = formula("row-wise", FEATURES * settings.batch * settings.distinct, settings.dim, workers)
    within = min(assume.node_workers, workers) - 1
    inside = sent * within / max(workers - 1, 1)
    touched = settings.batch * FEATURES * (20 * settings.dim + 128)
    seconds = {
        "memory": touched / (assume.memory_gb_per_s * 1e9 * assume.memory_share),
        "links": max(inside / assume.node_link_gb_per_s, (sent - inside) / assume.link_gb_per_s)
        / 1e9
        / assume.link_share,
        "latency": COLLECTIVES * assume.latency_us * 1e-6 * (1 + math.log2(workers)) if workers > 1 else 0.0,
        "host": assume.host_ms * 1e-3,
    }
    step = sum(seconds.values())
    return {
        "workers": workers,
        "bytes held": held,
        "fits": held <= assume.memory_gib * GIB,
        "bytes sent": sent,
        "seconds": seconds,
        "rows/s": workers * settings.batch / step,
        "epoch seconds": settings.interactions / (workers * settings.batch / step),
    }


def main() -> None:
    settings = tyro.cli(Simulation, description=__doc__)
    print("A model, not validated beyond the bytes that 2 to 4 workers sent. Assumed:")
    for name, value in asdict(settings.assume).items():
        print(f"    {name:<20} {value:g}")
    cells = [cell(settings, workers) for workers in settings.workers]
    times = ("memory ms", "links ms", "latency ms", "host ms")
    lines = [("workers", "GiB each", "sent MB", *times, "rows/s", "each", "epoch s")]
    for found in cells:
        parts = [f"{1000 * value:.3f}" for value in found["seconds"].values()]
        held = f"{found['bytes held'] / GIB:.2f}" + ("" if found["fits"] else " (no room)")
        lines.append(
            (
                str(found["workers"]), held, f"{found['bytes sent'] / 1e6:.1f}", *parts,
                f"{found['rows/s']:,.0f}", f"{found['rows/s'] / found['workers']:,.0f}", f"{found['epoch seconds']:.1f}",
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    if settings.out is not None:
        record = {"model": "not a measurement", **asdict(settings), "out": None, "cells": cells}
        settings.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
