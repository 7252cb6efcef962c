"""Training rows a second of sharded tables against plain torch: `python benchmarks/tables/train_speed.py --out FILE.json`.

Both sides train matrix factorisation with BCE on the same uniform ids, in the same processes, in turns (A B A B ...):

    ours    sellarec's ShardedTables, row-wise, fused Adagrad
    plain   nn.Embedding(sparse=True) for users and items, torch.optim.Adagrad; with several workers under
            DistributedDataParallel, so that each holds all rows

It is the same optimizer, and the losses of the first steps are compared before anything is timed. Each worker has one thread.
Prints, for each number of rows and workers: rows/s of both sides (median of rounds), the median of the rounds' ratios with the
lowest and highest, and the memory that building and training took in a worker (resident bytes, MiB).
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist
from processes import measure, write
from torch import Tensor, nn
from torch.nn import functional as F

from sellarec.config import Sparse, Tables
from sellarec.training.plan import place
from sellarec.training.table import Table
from sellarec.training.tables import EPSILON, ShardedTables

RATE, INIT, WARM_UP, CHECKED = 0.1, 0.05, 3, 3


class Ours:
    def __init__(self, rows: int, dim: int) -> None:
        tables = [Table(name, rows // 2, dim, (name,), init_std=INIT) for name in ("user", "item")]
        self._settings = Sparse(table_optimizer="adagrad", table_learning_rate=RATE)
        placements = place(tables, Tables(), self._settings, dist.get_world_size(), "cpu")
        self._tables = ShardedTables(placements, Tables(), self._settings, dist.group.WORLD, torch.device("cpu"), 0)

    def step(self, ids: dict[str, Tensor], labels: Tensor, batch: int) -> Tensor:
        found = self._tables.look_up(ids)
        score = (found["user"] * found["item"]).sum(1)
        loss = F.binary_cross_entropy_with_logits(score, labels, reduction="sum") / batch
        loss.backward()
        return loss.detach()


class Plain:
    """Starts from the rows that ours start from."""

    def __init__(self, rows: int, dim: int) -> None:
        from sellarec.training.table import initial_rows

        self._model = nn.ModuleDict()
        for name in ("user", "item"):
            table = Table(name, rows // 2, dim, (name,), init_std=INIT)
            layer = nn.Embedding(
                rows // 2, dim, sparse=True, _weight=torch.from_numpy(initial_rows(table, 0, 0, rows // 2))
            )
            self._model[name] = nn.parallel.DistributedDataParallel(layer) if dist.get_world_size() > 1 else layer
        self._optimizer = torch.optim.Adagrad(self._model.parameters(), lr=RATE, eps=EPSILON)

    def step(self, ids: dict[str, Tensor], labels: Tensor, batch: int) -> Tensor:
        score = (self._model["user"](ids["user"]) * self._model["item"](ids["item"])).sum(1)
        loss = F.binary_cross_entropy_with_logits(score, labels, reduction="sum") / batch
        self._optimizer.zero_grad(set_to_none=True)
        (loss * dist.get_world_size()).backward()  # DistributedDataParallel takes the mean over workers
        self._optimizer.step()
        return loss.detach()


SIDES = {"ours": Ours, "plain": Plain}


def worker(rank: int, workers: int, settings: argparse.Namespace, rows: int) -> dict:
    process, share = psutil.Process(), settings.batch // workers
    generator = np.random.default_rng(rank)

    def draw() -> tuple[dict[str, Tensor], Tensor]:
        ids = {name: torch.from_numpy(generator.integers(0, rows // 2, share)) for name in ("user", "item")}
        return ids, torch.from_numpy(generator.integers(0, 2, share).astype(np.float32))

    batches = [draw() for _ in range(8)]
    sides, memory, losses = {}, {}, {}
    for name, make in SIDES.items():
        before = process.memory_info().rss
        sides[name] = make(rows, settings.dim)
        losses[name] = []
        for step in range(WARM_UP):
            loss = sides[name].step(*batches[step], settings.batch)
            dist.all_reduce(loss)
            losses[name].append(loss.item())
        memory[name] = (process.memory_info().rss - before) / 2**20
    np.testing.assert_allclose(losses["ours"][:CHECKED], losses["plain"][:CHECKED], rtol=1e-5)
    rounds = []
    for _ in range(settings.rounds):
        speeds = {}
        for name, side in sides.items():
            dist.barrier()
            start = time.perf_counter()
            for step in range(settings.steps):
                side.step(*batches[step % len(batches)], settings.batch)
            dist.barrier()
            speeds[name] = settings.steps * settings.batch / (time.perf_counter() - start)
        rounds.append(speeds)
    ratios = [speeds["ours"] / speeds["plain"] for speeds in rounds]
    return {
        "rows": rows,
        "workers": workers,
        **{f"{name} rows/s": statistics.median(speeds[name] for speeds in rounds) for name in sides},
        "ratio": statistics.median(ratios),
        "lowest ratio": min(ratios),
        "highest ratio": max(ratios),
        **{f"{name} MiB": memory[name] for name in sides},
        "first losses": losses["ours"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[10**4, 10**6, 10**7], help="rows of both tables together"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8192, help="rows of the global batch")
    parser.add_argument("--steps", type=int, default=20, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    settings = parser.parse_args()
    cases = []
    for rows in settings.rows:
        for workers in settings.workers:
            case = measure(worker, workers, settings, rows)
            cases.append(case)
            speeds = ", ".join(
                f"{name} {case[f'{name} rows/s']:,.0f} rows/s ({case[f'{name} MiB']:,.0f} MiB)" for name in SIDES
            )
            spread = f"{case['ratio']:.2f} [{case['lowest ratio']:.2f}, {case['highest ratio']:.2f}]"
            print(f"{rows:,} rows, {workers} workers: {speeds} a worker; ratio {spread}", flush=True)
    facts = {"dim": settings.dim, "batch": settings.batch, "steps": settings.steps, "rounds": settings.rounds}
    write(settings.out, facts, cases)


if __name__ == "__main__":
    main()
