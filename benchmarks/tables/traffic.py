"""Bytes on the wire, collectives and CPU time of a training step: `python benchmarks/tables/traffic.py --out FILE.json`.

Each case trains with the training loop's own engine, in gloo processes of one thread; where no model is named it is matrix
factorisation (two tables, BCE):

    row-wise         row-wise Adagrad, rows of both tables over all workers; also with long-tailed ids, of which a batch has
                     repeats, as logs have
    table-wise       row-wise Adagrad, each table on one worker
    adam             adam, row-wise, whose lookups are pooled bags
    lightgcn         the product with the sharded graph, forwards and backwards, of a log of MovieLens-1M's shape; and of a
                     sparse one (five interactions a user), of which a worker needs less than all rows
    lightgcn step    LightGCN's whole training step on the first graph (BCE), row-wise Adagrad, row-wise; also table-wise, and
                     by adam
    din, sasrec      a whole training step of a model with dense weights, of one batch size a worker, with long-tailed ids and
                     histories of MovieLens-1M's catalog: DIN with BCE on labels, SASRec with BPR at all positions

Bytes are those that the kernel counted on the worker's own TCP connections (TCP_INFO: sent without what was sent again, and
received), so headers of TCP are left out and everything that gloo sends is in. Collectives are those that torch's profiler
records in a step. CPU time is user and system time of the worker processes, all threads, over the rows that were trained; the
machine's cores are shared, so no rows/s are given. Batches are of one size for any number of workers, and, in a case of
its own, of one size a worker.

    python benchmarks/tables/traffic.py --quick --out FILE.json     (a minute)
    python benchmarks/tables/traffic.py --cases 'lightgcn step' --out FILE.json
"""

import argparse
import os
import resource
import socket
import statistics
import struct
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from processes import measure, popularity, write
from torch.profiler import ProfilerActivity, profile

from sellarec.collab.model import Sizes, values
from sellarec.collab.models import lightgcn, mf
from sellarec.collab.negatives import Negatives
from sellarec.collab.rows import lists
from sellarec.collab.task import CollabTask, model_class
from sellarec.config import Collab, Tables
from sellarec.training.engine import Engine
from sellarec.training.graph import ShardedGraph
from sellarec.training.tables import LISTS
from sellarec.training.task import Graph
from sellarec.training.workers import Workers

FEATURES = 2

CASES = {
    "row-wise": ("row-wise", "rowwise-adagrad", False, False),
    "row-wise, same batch a worker": ("row-wise", "rowwise-adagrad", True, False),
    "row-wise, long-tailed ids": ("row-wise", "rowwise-adagrad", True, True),
    "table-wise": ("table-wise", "rowwise-adagrad", False, False),
    "adam": ("row-wise", "adam", False, False),
}
"""By name: sharding, optimizer, whether the global batch grows with the workers, whether few ids have most of the rows."""

GRAPHS = {"lightgcn": (6_040, 3_706, 575_281), "lightgcn, sparse graph": (200_000, 100_000, 1_000_000)}
"""Users, items and edges of the graphs whose product is measured. The first: MovieLens-1M's users and items, and its ratings of 4
and more."""

GRAPH_STEPS = {
    "lightgcn step": ("row-wise", "rowwise-adagrad"),
    "lightgcn step, table-wise": ("table-wise", "rowwise-adagrad"),
    "lightgcn step, adam": ("row-wise", "adam"),
}
"""By name: sharding, optimizer."""

USERS, ITEMS, _ = GRAPHS["lightgcn"]

MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "din": (1_024, {"model": "din", "history": 20}),
    "sasrec": (
        128,
        {
            "model": "sasrec", "history": 50, "train_on": "sequences", "loss": "bpr", "negatives_per_row": 1,
            "user_rows": False, "layers": 2, "heads": 1,
        },
    ),
}  # fmt: skip
"""By name: rows of a worker's slice, settings."""

WARM_UP, PROFILED = 3, 2
RECEIVED, SENT, SENT_AGAIN = 128, 200, 208
"""Where Linux's struct tcp_info has the counters of bytes, each of 64 bits."""


def wire_bytes() -> np.ndarray:
    """Bytes that this process's TCP connections have sent and received so far, int64 [2]."""
    total = np.zeros(2, np.int64)
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.type != socket.SOCK_STREAM or connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed meanwhile, as the descriptor of the listing is
            continue
        sent, again, received = (struct.unpack_from("Q", info, place)[0] for place in (SENT, SENT_AGAIN, RECEIVED))
        total += (sent - again, received)
    return total


def of_workers(*values: float) -> np.ndarray:
    """Each worker's values, float64 [W, number]."""
    found = [torch.zeros(len(values), dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(found, torch.tensor(values, dtype=torch.float64))
    return torch.stack(found).numpy()


def cpu_seconds() -> tuple[float, float]:
    """User and system time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime, used.ru_stime


def formula(sharding: str, ids: float, dim: int, workers: int, tables: float = FEATURES) -> float:
    """Bytes a worker sends in a step, the mean over workers (docs/collab.md, for gloo).

    Args:
        ids: distinct ids of all tables that a worker's rows name.
        tables: how many they are.
    """
    others = workers - 1
    lengths = 4 * LISTS * tables * (others / workers if sharding == "table-wise" else others)
    return lengths + (8 + 2 * 4 * dim) * ids * others / workers


def pooled_formula(ids: float, bags: float, dim: int, workers: int) -> float:
    """As `formula`, where rows are taken by pooled bags (adam).

    Args:
        bags: the most distinct ids that a feature has on any worker.
    """
    others = workers - 1
    return 8 * ids * others / workers + (4 + 3 * 4 * dim) * FEATURES * bags * others


def dense_formula(weights: int, workers: int) -> float:
    """Bytes a worker sends in a step for float32 dense weights under FSDP2, which gathers them once; their gradients, which gloo
    sums as a whole, are twice as many bytes."""
    return 3 * 4 * weights * (workers - 1) / workers


def collectives(take_step: Any) -> dict[str, float]:
    """Collectives of a step, by name."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(PROFILED):
            take_step()
    counts = Counter(event.name for event in recorded.events() if event.name.startswith("gloo:"))
    return {name.removeprefix("gloo:"): count / PROFILED for name, count in sorted(counts.items())}


def observed(take_step: Any, settings: argparse.Namespace) -> tuple[dict[str, Any], np.ndarray]:
    """What a step sends and takes; and the CPU seconds of a step, all workers together, in each round."""
    for _ in range(WARM_UP):
        take_step()
    dist.barrier()
    before = wire_bytes()
    rounds = []
    for _ in range(settings.rounds):
        start = cpu_seconds()
        for _ in range(settings.steps):
            take_step()
        rounds.append(of_workers(*np.subtract(cpu_seconds(), start)).sum(0) / settings.steps)
    dist.barrier()
    moved = of_workers(*(wire_bytes() - before)) / (settings.rounds * settings.steps)
    facts = {
        "sent bytes": moved[:, 0].mean(),
        "received bytes": moved[:, 1].mean(),
        "most sent bytes": moved[:, 0].max(),
        "most received bytes": moved[:, 1].max(),
        "collectives": collectives(take_step),
    }
    return facts, np.array(rounds)


def graph_formula(sharding: str, dim: int, layers: int, sent: float, asked: float, workers: int) -> float:
    """Bytes a worker sends in LightGCN's step, the mean over workers (docs/collab.md).

    Args:
        sent: rows that a product with the graph sends.
        asked: distinct users and items that a worker's rows name and others hold.
    """
    products = 2 * layers * 4 * dim * sent
    rows = (8 + 2 * 4 * 2 * dim) * asked  # smoothed beside initial ones, and gradients of both
    share = (USERS + ITEMS) * (workers - 1) / workers**2 if sharding == "table-wise" else 0
    return products + rows + (8 + 2 * 4 * dim) * share


def draw(generator: np.random.Generator, users: int, items: int, rows: int, long_tailed: bool = False) -> pa.Table:
    ids = {
        kind: generator.choice(number, rows, p=popularity(number))
        if long_tailed
        else generator.integers(0, number, rows)
        for kind, number in (("user", users), ("item", items))
    }
    known = np.ones(rows, bool)
    label = generator.integers(0, 2, rows).astype(np.int8)
    weight = np.ones(rows, np.float32)
    return pa.table({**ids, "user_seen": known, "item_seen": known, "label": label, "weight": weight})


def train(
    rank: int, workers: int, settings: argparse.Namespace, task: CollabTask, collab: Collab, sharding: str,
    batches: list[pa.Table],
) -> dict[str, Any]:  # fmt: skip
    """What training takes on these slices in turns."""
    group = dist.new_group()
    engine = Engine(
        task, Workers(rank, workers, torch.device("cpu"), group, dist.new_group()), 0, collab, Tables(sharding=sharding),
        "float32",
    )  # fmt: skip
    taken = 0

    def take_step() -> None:
        nonlocal taken
        engine.step(batches[taken % len(batches)], taken, 1.0)
        taken += 1

    facts, rounds = observed(take_step, settings)
    batch = workers * len(batches[0])
    user, system = np.median(rounds, axis=0) / batch
    total = rounds.sum(1) / batch
    return {
        **facts,
        "CPU microseconds a row": 1e6 * statistics.median(total),
        "lowest, highest": [1e6 * min(total), 1e6 * max(total)],
        "user, system": [1e6 * user, 1e6 * system],
    }


def collab_of(dim: int, optimizer: str, **changes: Any) -> Collab:
    changes |= {"table_optimizer": optimizer, "table_learning_rate": 0.01}
    return Collab(dim=dim, biases=False, global_mean=False, l2=0.0, **changes)


def factorise(rank: int, workers: int, settings: argparse.Namespace, name: str) -> dict[str, Any]:
    sharding, optimizer, grows, long_tailed = CASES[name]
    batch = settings.batch * (workers if grows else 1)
    share, rows = batch // workers, settings.rows // 2
    collab = collab_of(settings.dim, optimizer)
    task = CollabTask(mf.Model(Sizes(rows, rows, 0.5), collab), collab, np.ones(0, bool))
    generator = np.random.default_rng(rank)
    batches = [draw(generator, rows, rows, share, long_tailed) for _ in range(4)]
    distinct = np.array([[len(np.unique(batch[kind])) for kind in ("user", "item")] for batch in batches])
    of_all = of_workers(*distinct.ravel()).reshape(workers, len(batches), FEATURES)
    ids = of_all.sum(2).mean()
    bags = of_all.max((0, 2)).mean()
    by_bags = pooled_formula(ids, bags, settings.dim, workers)
    return {
        "case": name,
        "workers": workers,
        "batch": batch,
        "distinct ids of a row": ids / share,
        "formula bytes": by_bags if optimizer == "adam" else formula(sharding, ids, settings.dim, workers),
        **train(rank, workers, settings, task, collab, sharding, batches),
    }


def step_on_graph(rank: int, workers: int, settings: argparse.Namespace, name: str, path: str) -> dict[str, Any]:
    sharding, optimizer = GRAPH_STEPS[name]
    collab = collab_of(settings.dim, optimizer, model="lightgcn")
    model = lightgcn.Model(Sizes(USERS, ITEMS, 0.5), collab)
    task = CollabTask(model, collab, np.ones(ITEMS, bool), graph=Graph((path,), USERS, ITEMS))
    generator = np.random.default_rng(rank)
    batches = [draw(generator, USERS, ITEMS, settings.batch // workers) for _ in range(4)]
    asked = 0
    for batch in batches:
        for kind, number in (("user", USERS), ("item", ITEMS)):
            owners = np.unique(batch[kind].to_numpy()) // -(-number // workers)
            asked += np.count_nonzero(owners != rank) / len(batches)
    graph = read_graph(workers, path, USERS, ITEMS)
    sent, mean_asked = of_workers(graph.sent, asked).mean(0)
    return {
        "case": name,
        "workers": workers,
        "batch": settings.batch,
        "layers": collab.layers,
        "rows sent by a product": sent,
        "distinct rows of others asked for": mean_asked,
        "formula bytes": graph_formula(sharding, settings.dim, collab.layers, sent, mean_asked, workers),
        **train(rank, workers, settings, task, collab, sharding, batches),
    }


def step_of_model(rank: int, workers: int, settings: argparse.Namespace, name: str) -> dict[str, Any]:
    share, changes = MODELS[name]
    collab = collab_of(settings.dim, "rowwise-adagrad", **changes)
    torch.manual_seed(0)
    counts = np.ones((2, ITEMS), np.int64)
    negatives = Negatives("uniform", counts, 1, 0) if collab.loss != "bce" else None
    model = model_class(name)(Sizes(USERS, ITEMS, 0.5), collab)
    weights = sum(weight.numel() for weight in model.parameters())
    task = CollabTask(model, collab, counts[0] > 0, negatives)
    generator = np.random.default_rng(rank)
    batches = []
    for number in range(4):
        rows = draw(generator, USERS, ITEMS, share, long_tailed=True)
        length = generator.lognormal(np.log(collab.history / 2), 1.0, share).astype(np.int64).clip(1, collab.history)
        read = lists(generator.choice(ITEMS, length.sum(), p=popularity(ITEMS)), length)
        rows = rows.append_column("history", read).append_column("row", pa.array(np.arange(share) + number * share))
        assert task.prepare is not None  # both read histories
        batches.append(task.prepare(rows, 0, np.zeros(share, np.int64)))
    asked = np.zeros(2)
    for rows in batches:
        batch = task.lookups(task.collate(rows, 0))
        of_tables = [[values(batch[name]) for name in table.features if name in batch] for table in task.tables]
        distinct = [len(torch.cat(ids).unique()) for ids in of_tables if ids]
        asked += (sum(distinct) / len(batches), len(distinct) / len(batches))
    ids, tables = of_workers(*asked).mean(0)
    return {
        "case": name,
        "workers": workers,
        "batch": share * workers,
        "dense weights": weights,
        "distinct ids of a step": ids,
        "formula bytes": formula("row-wise", ids, settings.dim, workers, tables) + dense_formula(weights, workers),
        **train(rank, workers, settings, task, collab, "row-wise", batches),
    }


def read_graph(workers: int, path: str, users: int, items: int) -> ShardedGraph:
    return ShardedGraph.read([path], users, items, dist.group.WORLD if workers > 1 else None, torch.device("cpu"))


def smooth(workers: int, settings: argparse.Namespace, name: str, path: str) -> dict:
    users, items, edges = GRAPHS[name]
    graph = read_graph(workers, path, users, items)
    rows = torch.randn(graph.rows, settings.dim, requires_grad=True)

    def take_step() -> None:
        graph.multiply(rows).sum().backward()

    facts, rounds = observed(take_step, settings)
    rows_of = of_workers(graph.sent, graph.received)
    return {
        "case": name,
        "workers": workers,
        "users, items, edges": [users, items, edges],
        "formula bytes": 2 * 4 * settings.dim * rows_of[:, 0].mean(),  # forwards, and as much backwards
        **facts,
        "most rows received": rows_of[:, 1].max(),
        "bound of rows received by all": min(2 * edges, (workers - 1) * (users + items)),
        "rows received by all": rows_of[:, 1].sum(),
        "CPU microseconds an edge": 1e6 * statistics.median(rounds.sum(1)) / edges,
    }


def worker(rank: int, workers: int, settings: argparse.Namespace, paths: dict[str, str]) -> dict:
    cases = []
    for name in settings.cases:
        if name in CASES:
            cases.append(factorise(rank, workers, settings, name))
        elif name in MODELS:
            cases.append(step_of_model(rank, workers, settings, name))
        elif name in GRAPHS:
            cases.append(smooth(workers, settings, name, paths[name]))
        else:
            cases.append(step_on_graph(rank, workers, settings, name, paths["lightgcn"]))
    return {"cases": cases}


def write_edges(path: str, users: int, items: int, edges: int) -> None:
    """Distinct pairs of skewed users and items."""
    generator = np.random.default_rng(0)
    found = np.zeros(0, np.int64)
    while len(found) < edges:
        user = generator.choice(users, edges, p=popularity(users))
        item = generator.choice(items, edges, p=popularity(items))
        found = np.unique(np.concatenate([found, user * items + item]))
    found = generator.permutation(found)[:edges]
    columns = {"row": np.arange(edges), "user": found // items, "item": found % items, "label": np.ones(edges, np.int8)}
    pq.write_table(pa.table(columns), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--rows", type=int, default=200_000, help="rows of both tables together")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument(
        "--batch",
        type=int,
        default=12_288,
        help="rows of the global batch, but of din and sasrec; a multiple of the workers",
    )
    parser.add_argument("--steps", type=int, default=10, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=7)
    names = [*CASES, *GRAPHS, *GRAPH_STEPS, *MODELS]
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--quick", action="store_true", help="one round of few steps with one and two workers")
    parser.add_argument("--out", type=Path, required=True)
    settings = parser.parse_args()
    if settings.quick:
        settings.workers, settings.steps, settings.rounds = [1, 2], 5, 1
    uneven = [workers for workers in settings.workers if settings.batch % workers]
    if uneven:
        parser.error(f"--batch is {settings.batch} and --workers {uneven[0]}: give a multiple of the workers")
    facts = {name: getattr(settings, name) for name in ("rows", "dim", "batch", "steps", "rounds")}
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        asked = {"lightgcn" if name in GRAPH_STEPS else name for name in settings.cases} & set(GRAPHS)
        paths = {name: f"{folder}/{name}.parquet" for name in asked}
        for name, path in paths.items():
            write_edges(path, *GRAPHS[name])
        for workers in settings.workers:
            for case in measure(worker, workers, settings, paths)["cases"]:
                cases.append(case)
                unit = next(key for key in case if key.startswith("CPU"))
                print(
                    f"{case['case']}, {workers} workers: sent {case['sent bytes']:,.0f} bytes a step and worker (formula "
                    f"{case['formula bytes']:,.0f}, most {case['most sent bytes']:,.0f}), received "
                    f"{case['received bytes']:,.0f}; {sum(case['collectives'].values()):.0f} collectives "
                    f"{case['collectives']}; {case[unit]:.3f} {unit}",
                    flush=True,
                )
            write(settings.out, facts, cases)  # what is measured so far


if __name__ == "__main__":
    main()
