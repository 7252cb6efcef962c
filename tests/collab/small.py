"""A small log and what stands for the training loop: looked-up vectors of a batch, and workers that exchange tensors."""

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import save_file
from torch import Tensor

from sellarec.collab.task import CollabTask, build_collab
from sellarec.config import Collab
from sellarec.data.log import INTERACTIONS, Log
from sellarec.training.table import Jagged, Table, initial_rows
from sellarec.training.task import INITIAL, WHOLE

USERS, ITEMS, RATE = 5, 7, 0.7
SEEN = np.array([True, True, True, True, False, True, True])
COUNTS = np.array([[3, 2, 1, 1, 0, 1, 2], [2, 1, 1, 1, 0, 1, 1]])
HISTORIES = [[6, 1, 2], [], [3]]


def small_log(folder: Path, users: int = USERS, items: int = ITEMS, seen: np.ndarray = SEEN) -> Log:
    """A log of which only the items' `seen` and the facts are there."""
    (folder / "items").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"seen": seen}), folder / "items" / "part-0.parquet")
    facts = {"users": users, "items": items, "positives": {"train": round(1000 * RATE)}, "rows": {"train": 1000}}
    return Log(folder, facts)


def write_train(folder: Path, *parts: list[tuple[int, int, int, list[int]]], group: int = 1 << 16) -> Log:
    """A log with the train rows (user, item, label, history) of some files, in their order."""
    row = 0
    (folder / "interactions" / "train").mkdir(parents=True)
    for number, part in enumerate(parts):
        user, item, label, history = zip(*part, strict=True) if part else ((), (), (), ())
        columns: dict[str, Any] = {
            "row": np.arange(row, row + len(part)), "user": user, "item": item, "label": label, "history": list(history),
            "user_seen": [True] * len(part), "item_seen": [True] * len(part),
        }  # fmt: skip
        row += len(part)
        schema = pa.schema([INTERACTIONS.field(name) for name in columns])
        path = folder / "interactions" / "train" / f"part-{number}.parquet"
        pq.write_table(pa.table(columns, schema), path, row_group_size=group)
    lines = [line for part in parts for line in part]
    users, items = (1 + max(ids, default=0) for ids in ([line[0] for line in lines], [line[1] for line in lines]))
    return Log(folder, {"users": users, "items": items})


def make(folder: Path, start: Path | None = None, given: Mapping[str, Path] = {}, **settings: Any) -> CollabTask:
    """The task of a model for the small log; `settings` are those of `collab`, and negatives are drawn where it takes them."""
    log = small_log(folder)
    collab = Collab(**{"dim": 4, "l2": 0.1, "negatives_per_row": 3} | settings)
    np.save(folder / "counts.npy", COUNTS)
    torch.manual_seed(4)
    return build_collab(log, collab, start, folder / "counts.npy", seed=2, given=given)


def some_rows(**changes: Any) -> pa.Table:
    columns = {
        "row": [10, 11, 12],
        "user": [0, 4, 2],
        "item": [6, 1, 1],
        "label": pa.array([1, 0, 1], pa.int8()),
        "history": pa.array(HISTORIES, pa.list_(pa.int64())),
        "user_seen": [True, True, False],
        "item_seen": [True, False, True],
        "weight": pa.array([1, 1, 1], pa.float32()),
    }
    return pa.table(columns | changes)


def prepared(task: Any, rows: pa.Table, step: int | None = 0) -> pa.Table:
    """Rows as the stream prepares them to be trained on, or (step None) scored."""
    prepare = task.prepare if step is not None else task.prepare_to_score
    return prepare(rows, 0, np.full(len(rows), step or 0)) if prepare else rows


def batch_of(task: Any, rows: pa.Table, step: int | None = 0) -> dict[str, Any]:
    return task.collate(prepared(task, rows, step), step)


def table_rows(table: Table, seed: int = 3) -> Tensor:
    """A table's rows: what it reads, or random ones."""
    if table.read is not None:
        return torch.from_numpy(initial_rows(table, seed, 0, table.rows))
    return torch.randn(table.rows, table.dim, generator=torch.Generator().manual_seed(seed + len(table.name)))


def vectors_of(task: Any, batch: dict[str, Any], seed: int = 3, workers: int = 1, rank: int = 0) -> dict[str, Any]:
    """Vectors of a batch's ids as the loop looks them up, leaves of a graph; a worker's share of whole tables too."""
    found: dict[str, Any] = {}
    ids = task.lookups(batch)
    for table in task.tables:
        rows = table_rows(table, seed)
        for feature in table.features:
            smooth = task.graph is not None and table.name in ("user", "item")
            if feature in ids:
                asked = ids[feature]
                jagged = isinstance(asked, Jagged)
                leaf = rows[asked.values if jagged else asked].clone().requires_grad_()
                found[feature] = Jagged(leaf, asked.lengths) if jagged else leaf
                if smooth:
                    at_first = leaf.detach().clone().requires_grad_()
                    found[INITIAL + feature] = Jagged(at_first, asked.lengths) if jagged else at_first
            elif feature.startswith(WHOLE) and feature.removeprefix(WHOLE) in task.whole and torch.is_grad_enabled():
                block = -(-table.rows // workers)
                batch[feature] = torch.arange(table.rows)[rank * block : (rank + 1) * block]
                found[feature] = rows[batch[feature]].clone().requires_grad_()
    return found


def represent(task: CollabTask, batch: dict[str, Any], vectors: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """User and item as fusion takes them."""
    return task.network.represent_user(batch, vectors), task.network.represent_item(batch, vectors)


def leaves(vectors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: found.values if isinstance(found, Jagged) else found for name, found in vectors.items()}


def save_table(folder: Path, name: str, rows: np.ndarray, cuts: tuple[int, ...] = ()) -> None:
    """Rows as `ShardedTables.save` and `index` write them, in as many files as the cuts make."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for start, stop in zip((0, *cuts), (*cuts, len(rows)), strict=True):
        file = f"{name}-{start:012d}.safetensors"
        save_file({"rows": np.ascontiguousarray(rows[start:stop])}, folder / file)
        columns = {"column": 0, "columns": rows.shape[1]}
        shards.append({"table": name, "file": file, "start": start, "rows": stop - start, **columns})
    facts = {"rows": len(rows), "columns": rows.shape[1], "shards": shards}
    (folder / f"{name}.json").write_text(json.dumps(facts))


class Peer:
    """`Peers` of one of several workers, which are threads that build one autograd graph together."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self._slots, self._barrier = rank, slots, barrier

    def _all(self, value: Tensor) -> list[Tensor]:
        self._slots[self.rank] = value
        self._barrier.wait(30)
        found = list(self._slots)
        self._barrier.wait(30)
        assert len({part.shape for part in found}) == 1, "all workers give the same shape"
        return found

    def gather(self, rows: Tensor) -> Tensor:
        return torch.cat(self._all(rows))

    def own(self, rows: Tensor) -> Tensor:
        return rows.tensor_split(len(self._slots))[self.rank]

    def add(self, values: Tensor) -> Tensor:
        return torch.stack(self._all(values)).sum(0)

    def largest(self, values: Tensor) -> Tensor:
        return torch.stack(self._all(values.detach())).amax(0)


def together(workers: int, work: Callable[[Peer], Tensor]) -> list[Tensor]:
    """What each of several workers gives, which run at once."""
    slots, out = [None] * workers, [torch.zeros(())] * workers
    barrier, errors = threading.Barrier(workers), []

    def run(rank: int) -> None:
        try:
            out[rank] = work(Peer(rank, slots, barrier))
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return out
