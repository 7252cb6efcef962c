"""Memory of the contrastive loss by the rows of its batch: `python benchmarks/alignment/memory.py --out FILE.json`.

Each case is a process of one thread that takes the loss of a global batch, in both directions, and its gradients: in blocks,
or all pairs at once (a block as large as the batch). Its memory is kept as that of the stage's workers on CPUs. Prints what the
process's resident memory rose by at its peak, and the seconds. 1,024 and 10,240 rows are the batches of SeLLa-Rec's published
recipes.
"""

import argparse
import os
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "tables"))  # benchmarks share their helpers

from processes import measure, write

from sellarec.alignment.contrastive import Views, contrastive_loss
from sellarec.config import Align
from sellarec.training.launch import KEEP_FREED_MEMORY
from sellarec.training.task import Alone


def peak() -> int:
    """Bytes that this process had resident at its peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def worker(rank: int, workers: int, rows: int, width: int, block: int) -> dict:
    def step(rows: int) -> float:
        generator = torch.Generator().manual_seed(0)
        collab, semantic = (torch.randn(rows, width, generator=generator, requires_grad=True) for _ in range(2))
        ids = torch.randint(0, rows, (rows,), generator=generator)
        views = Views(collab, semantic, ids, collab, semantic, ids, torch.ones(rows))
        start = time.perf_counter()
        contrastive_loss(views, Align(block=block), Alone()).mean().backward()
        return time.perf_counter() - start

    step(16)  # what kernels take has no part in it
    before = peak()
    seconds = step(rows)
    return {"rows": rows, "block": block, "peak bytes": peak() - before, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096, 10_240])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--block", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--out", type=Path, required=True)
    settings = parser.parse_args()
    os.environ |= KEEP_FREED_MEMORY  # glibc reads it when a process starts
    cases = []
    for rows in settings.rows:
        for block in sorted({*(b for b in settings.block if b < rows), rows}):
            case = measure(worker, 1, rows, settings.width, block)
            cases.append(case)
            print(
                f"{rows:,} rows, {block:,} at once: {case['peak bytes'] / 2**20:,.0f} MiB, {case['seconds']:.2f} s",
                flush=True,
            )
            write(settings.out, {"width": settings.width}, cases)  # what is measured so far


if __name__ == "__main__":
    main()
