"""Training rows a second of sharded tables against plain torch: `python benchmarks/tables/train_speed.py --out FILE.json`.

All sides train matrix factorisation with BCE on the same ids, in the same processes, in turns (A B A B ...):

    ours       sellarec's ShardedTables, row-wise
    plain      nn.Embedding(sparse=True) for users and items; with several workers under DistributedDataParallel, so that each
               holds all rows
    torchrec   TorchRec by itself, in DistributedModelParallel (adagrad only, up to `--most-rows` rows, as all sides are in memory
               at a time): an EmbeddingCollection of both tables, row-wise
    bags       likewise, but an EmbeddingBagCollection, with a table on each worker (table-wise): what TorchRec is fastest with
               here, as long as workers hold whole tables

Ids are uniform, or long-tailed as a log's are (`--ids`): of these a batch has repeats.

With `--optimizer adagrad` all take element-wise Adagrad (ours and TorchRec's fused), and the losses of the first steps are
compared before anything is timed. With `--optimizer adam` plain takes torch.optim.SparseAdam, which steps the looked-up rows
alone ("lazy Adam"). Ours has no such optimizer, so there are two sides, and neither does the same work:

    ours rowwise-adagrad    fused, the looked-up rows alone, one float of state a row instead of 128: what takes its place
    ours adam               dense gradients, all rows at each step (up to `--most-rows` rows)

Of these the losses are compared as far as they must agree: the first of all, and, as Adam's first step leaves rows without
a gradient as they are, adam's second.

Each worker has one thread. Prints, for each number of rows and workers: rows/s of the sides (median of rounds), how many times
as fast ours is as the others (median of the rounds' ratios, with the lowest and highest), the same of CPU time (all workers and
threads), which other work on the machine disturbs less, and the memory that building and training took in a worker (resident
bytes, MiB).
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist
from processes import measure, popularity, write
from torch import Tensor, nn
from torch.nn import functional as F

from sellarec.config import Sparse, Tables
from sellarec.training.kernels import EPSILON
from sellarec.training.plan import place
from sellarec.training.table import Table, initial_rows
from sellarec.training.tables import ShardedTables

NAMES = ("user", "item")
INIT, WARM_UP = 0.05, 3
RATES = {"adagrad": 0.1, "rowwise-adagrad": 0.1, "adam": 0.01}
CHECKED = {"ours": 3, "torchrec": 3, "bags": 3, "ours adam": 2, "ours rowwise-adagrad": 1}
"""Of how many steps a side's losses must be plain's."""

LIMITED = ("ours adam", "torchrec", "bags")
"""Sides that aren't measured on the largest tables."""


class Ours:
    def __init__(self, optimizer: str, rows: int, dim: int) -> None:
        tables = [Table(name, rows // 2, dim, (name,), init_std=INIT) for name in NAMES]
        self._settings = Sparse(table_optimizer=optimizer, table_learning_rate=RATES[optimizer])
        placements = place(tables, Tables(), self._settings, dist.get_world_size(), "cpu")
        self._tables = ShardedTables(placements, Tables(), self._settings, dist.group.WORLD, torch.device("cpu"), 0)

    def step(self, ids: dict[str, Tensor], labels: Tensor, batch: int) -> Tensor:
        found = self._tables.look_up(ids)
        score = (found["user"] * found["item"]).sum(1)
        loss = F.binary_cross_entropy_with_logits(score, labels, reduction="sum") / batch
        loss.backward()
        self._tables.step()
        return loss.detach()


class Plain:
    """Starts from the rows that ours start from."""

    def __init__(self, optimizer: str, rows: int, dim: int) -> None:
        self._model = nn.ModuleDict()
        for name in NAMES:
            table = Table(name, rows // 2, dim, (name,), init_std=INIT)
            layer = nn.Embedding(
                rows // 2, dim, sparse=True, _weight=torch.from_numpy(initial_rows(table, 0, 0, rows // 2))
            )
            self._model[name] = nn.parallel.DistributedDataParallel(layer) if dist.get_world_size() > 1 else layer
        make = torch.optim.Adagrad if optimizer == "adagrad" else torch.optim.SparseAdam
        self._optimizer = make(list(self._model.parameters()), lr=RATES[optimizer], eps=EPSILON)

    def step(self, ids: dict[str, Tensor], labels: Tensor, batch: int) -> Tensor:
        score = (self._model["user"](ids["user"]) * self._model["item"](ids["item"])).sum(1)
        loss = F.binary_cross_entropy_with_logits(score, labels, reduction="sum") / batch
        self._optimizer.zero_grad(set_to_none=True)
        (loss * dist.get_world_size()).backward()  # DistributedDataParallel takes the mean over workers
        self._optimizer.step()
        return loss.detach()


class TorchRec:
    """Starts from the rows that ours start from."""

    def __init__(self, bags: bool, rows: int, dim: int) -> None:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
        from torchrec.distributed import DistributedModelParallel, comm_ops
        from torchrec.distributed.embedding import EmbeddingCollectionSharder
        from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
        from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
        from torchrec.distributed.types import ShardingEnv, ShardingPlan

        class Rows(EmbeddingCollectionSharder):
            def sharding_types(self, compute_device_type: str) -> list[str]:
                return ["row_wise"]  # which TorchRec's own leaves out on CPUs

        class Holder(nn.Module):
            def __init__(self, collection: nn.Module) -> None:
                super().__init__()
                self.rows = collection

        fused = {"optimizer": EmbOptimType.EXACT_ADAGRAD, "learning_rate": RATES["adagrad"], "eps": EPSILON}
        comm_ops.set_gradient_division(False)
        self._bags, workers, meta = bags, dist.get_world_size(), torch.device("meta")
        settings = [
            {"num_embeddings": rows // 2, "embedding_dim": dim, "name": name, "feature_names": [name]} for name in NAMES
        ]
        collection: nn.Module
        if bags:
            sharder = EmbeddingBagCollectionSharder(fused_params=fused)
            collection = EmbeddingBagCollection(device=meta, tables=[EmbeddingBagConfig(**of) for of in settings])
            owners = {name: place % workers for place, name in enumerate(NAMES)}
            shardings = {name: table_wise(rank=owners[name], compute_kernel="fused") for name in NAMES}
        else:
            sharder = Rows(fused_params=fused)
            collection = EmbeddingCollection(device=meta, tables=[EmbeddingConfig(**of) for of in settings])
            shardings = {name: row_wise(compute_kernel="fused") for name in NAMES}
        plan = construct_module_sharding_plan(
            collection, shardings, sharder=sharder, local_size=workers, world_size=workers, device_type="cpu"
        )
        self._model = DistributedModelParallel(
            Holder(collection), env=ShardingEnv.from_process_group(dist.group.WORLD), device=torch.device("cpu"),
            plan=ShardingPlan({"rows": plan}), sharders=[sharder],
        )  # fmt: skip
        state, part = self._model.state_dict(), "embedding_bags" if bags else "embeddings"
        for name in NAMES:
            table = Table(name, rows // 2, dim, (name,), init_std=INIT)
            for shard in state[f"rows.{part}.{name}.weight"].local_shards():
                first = shard.metadata.shard_offsets[0]
                shard.tensor.copy_(torch.from_numpy(initial_rows(table, 0, first, first + len(shard.tensor))))

    def step(self, ids: dict[str, Tensor], labels: Tensor, batch: int) -> Tensor:
        from torchrec import KeyedJaggedTensor

        lengths = torch.ones(len(ids) * len(labels), dtype=torch.int32)
        found = self._model.module.rows(
            KeyedJaggedTensor(list(ids), torch.cat(list(ids.values())), lengths=lengths)
        ).wait()
        user, item = (found[name] if self._bags else found[name].values() for name in NAMES)
        loss = F.binary_cross_entropy_with_logits((user * item).sum(1), labels, reduction="sum") / batch
        loss.backward()
        return loss.detach()


SIDES = {
    "adagrad": {
        "ours": partial(Ours, "adagrad"),
        "plain": partial(Plain, "adagrad"),
        "torchrec": partial(TorchRec, False),
        "bags": partial(TorchRec, True),
    },
    "adam": {
        "ours rowwise-adagrad": partial(Ours, "rowwise-adagrad"),
        "ours adam": partial(Ours, "adam"),
        "plain": partial(Plain, "adam"),
    },
}


def worker(rank: int, workers: int, settings: argparse.Namespace, rows: int) -> dict:
    process, share = psutil.Process(), settings.batch // workers
    generator = np.random.default_rng(rank)
    weights = popularity(rows // 2) if settings.ids == "long-tailed" else None

    def draw() -> tuple[dict[str, Tensor], Tensor]:
        drawn = {
            name: generator.integers(0, rows // 2, share)
            if weights is None
            else generator.choice(rows // 2, share, p=weights)
            for name in NAMES
        }
        ids = {name: torch.from_numpy(values) for name, values in drawn.items()}
        return ids, torch.from_numpy(generator.integers(0, 2, share).astype(np.float32))

    batches = [draw() for _ in range(8)]
    sides, memory, losses = {}, {}, {}
    for name, make in SIDES[settings.optimizer].items():
        if name in LIMITED and rows > settings.most_rows:
            continue
        before = process.memory_info().rss
        sides[name] = make(rows, settings.dim)
        losses[name] = []
        for step in range(WARM_UP):
            loss = sides[name].step(*batches[step], settings.batch)
            dist.all_reduce(loss)
            losses[name].append(loss.item())
        memory[name] = (process.memory_info().rss - before) / 2**20
    for name, number in CHECKED.items():
        if name in sides:
            np.testing.assert_allclose(losses[name][:number], losses["plain"][:number], rtol=1e-5)
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(settings.rounds):
        for name, side in sides.items():
            dist.barrier()
            start, cpu = time.perf_counter(), time.process_time()
            for step in range(settings.steps):
                side.step(*batches[step % len(batches)], settings.batch)
            used = torch.tensor(time.process_time() - cpu, dtype=torch.float64)
            dist.all_reduce(used)
            rounds[name].append((time.perf_counter() - start, used.item()))
    case: dict = {"rows": rows, "workers": workers}
    trained = settings.steps * settings.batch
    for name, taken in rounds.items():
        case[f"{name} rows/s"] = statistics.median(trained / seconds for seconds, _ in taken)
        case[f"{name} CPU microseconds a row"] = 1e6 * statistics.median(cpu for _, cpu in taken) / trained
        case[f"{name} MiB"] = memory[name]
    ours = [name for name in rounds if name.startswith("ours")]
    case["times as fast"] = {
        f"{name} / {other}": {
            what: [function(ratios[:, clock]) for function in (np.median, np.min, np.max)]
            for clock, what in enumerate(("speed", "per CPU second"))
        }
        for name in ours
        for other in rounds
        if other not in ours
        for ratios in [np.array(rounds[other]) / np.array(rounds[name])]
    }
    return case | {"first losses": losses}


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
    parser.add_argument(
        "--optimizer", choices=list(SIDES), default="adagrad", help="of the plain side; ours: see above"
    )
    parser.add_argument("--ids", choices=["uniform", "long-tailed"], default="uniform")
    parser.add_argument("--most-rows", type=int, default=10**6, help=f"for which {' and '.join(LIMITED)} are measured")
    parser.add_argument("--quick", action="store_true", help="10^4 rows and three short rounds")
    parser.add_argument("--out", type=Path, required=True)
    settings = parser.parse_args()
    if settings.quick:
        settings.rows, settings.steps, settings.rounds = [10**4], 5, 3
    facts = {
        "optimizer": settings.optimizer,
        "ids": settings.ids,
        "dim": settings.dim,
        "batch": settings.batch,
        "steps": settings.steps,
        "rounds": settings.rounds,
    }
    cases = []
    for rows in settings.rows:
        for workers in settings.workers:
            case = measure(worker, workers, settings, rows)
            cases.append(case)
            speeds = ", ".join(
                f"{name} {case[f'{name} rows/s']:,.0f} rows/s ({case[f'{name} MiB']:,.0f} MiB)"
                for name in SIDES[settings.optimizer]
                if f"{name} MiB" in case
            )
            ratios = "; ".join(
                f"{name} {', '.join(f'{what} {value:.2f} [{low:.2f}, {high:.2f}]' for what, (value, low, high) in of.items())}"
                for name, of in case["times as fast"].items()
            )
            print(f"{rows:,} rows, {workers} workers: {speeds} a worker; {ratios}", flush=True)
            write(settings.out, facts, cases)  # what is measured so far


if __name__ == "__main__":
    main()
