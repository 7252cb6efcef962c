"""A training run that records which rows its workers step on: python record_rows.py FOLDER WORKERS [LEAST]

FOLDER/rows-*.parquet are streamed; FOLDER/seen gets a file per worker process, of lines {time, step, rank, workers, rows,
references}, of which the last is how many objects of Ray's the worker holds. With LEAST there are as many workers, from that many
on, as find room beside what another job holds: the number of CPUs that FOLDER/held says, at any time.
"""

import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import ray
import ray.train
import torch
from torch import Tensor, nn

from sellarec.artifacts import Place
from sellarec.config import Sparse, Steps
from sellarec.training import stream
from sellarec.training.cluster import Group, connect
from sellarec.training.launch import train
from sellarec.training.loop import Training
from sellarec.training.progress import Console
from sellarec.training.stream import Order, row_groups
from sellarec.training.table import Table
from sellarec.training.task import Batch, Peers, Task

BATCH, EPOCHS, SEED = 66, 2, 3
SECONDS_A_STEP = 0.03  # so that a kill finds it in the middle


@dataclass(frozen=True, kw_only=True)
class Recording(Steps, Sparse):
    """The loop's settings of a stage with tables and without selection."""


class Recorder(Task):
    """Learns one number a row, and writes down which rows it gets."""

    columns = ("row",)
    prepare = None
    model = None
    tables = (Table("row", 97, 4, ("row",)),)

    def __init__(self, folder: Path) -> None:
        stream.PIECES_AT_ONCE = 1  # on each worker: an epoch is one piece here, and each has a pipeline of its own
        stream.BLOCK_BYTES = 1 << 12  # so that there are many blocks
        self._file = folder / "seen" / f"{os.getpid()}.jsonl"

    def collate(self, rows: pa.Table, step: int | None) -> Batch:
        context = ray.train.get_context()
        weight = rows["weight"].to_numpy().copy()
        line = {
            "time": time.time(),
            "step": step,
            "rank": context.get_world_rank(),
            "workers": context.get_world_size(),
            "rows": rows["row"].to_numpy()[weight > 0].tolist(),
            "references": len(ray.worker.global_worker.core_worker.get_all_reference_counts()),
        }
        with open(self._file, "a") as file:
            file.write(json.dumps(line) + "\n")
        time.sleep(SECONDS_A_STEP)
        return {"id": torch.from_numpy(rows["row"].to_numpy() % 97), "weight": torch.from_numpy(weight)}

    def lookups(self, batch: Batch) -> dict[str, Tensor]:
        return {"row": batch["id"]}

    def targets(self, batch: Batch) -> Tensor:
        return batch["weight"].sum()

    def loss(self, model: nn.Module | None, batch: Batch, vectors: dict[str, Tensor], peers: Peers) -> Tensor:
        return ((vectors["row"].sum(1) - 1).square() * batch["weight"]).sum()

    def score(self, model: nn.Module | None, batch: Batch, vectors: dict[str, Tensor]) -> Tensor:
        raise TypeError("nothing is scored")

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        raise TypeError("there are no dense weights")

    def facts(self) -> dict:
        return {}


def order_of(folder: Path) -> Order:
    return Order(tuple(row_groups([str(path) for path in sorted(folder.glob("rows-*.parquet"))])), BATCH, SEED)


def hold(folder: Path) -> None:
    """Hold as many CPUs as FOLDER/held says, as another job would, once they come free."""
    from ray.util.placement_group import placement_group, remove_placement_group

    held: list = []
    while True:
        number = int((folder / "held").read_text())
        while len(held) < number:
            held.append(placement_group([{"CPU": 1.0}]))
        while len(held) > number:
            remove_placement_group(held.pop())
        time.sleep(0.1)


def main(folder: Path, workers: int, least: int | None = None) -> None:
    (folder / "seen").mkdir(exist_ok=True)
    console = Console()
    connect(workers, console, Place.of(str(folder)), device="cpu")
    settings = Recording(batch=BATCH, epochs=EPOCHS, checkpoint_every=0.5, table_learning_rate=0.01)
    output = Place.of(str(folder / "output"))
    output.make()
    training = Training("recording", partial(Recorder, folder), settings, SEED, order_of(folder), None, output)
    group = Group(workers, False, workers)
    if least is not None:
        threading.Thread(target=hold, args=(folder,), daemon=True).start()
        time.sleep(2)
        group = Group(workers, False, least, node_timeout=120, grow_every=1)
    train(training, group, console, lambda record: None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
