"""Rows of a Parquet log, shuffled, in batches of tensors, with nothing done to them."""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sides.log_file import COLUMNS, LOG


def inputs(work: dict[str, Any], folder: Path) -> None:
    generator, number = np.random.default_rng(0), work["rows"]
    columns = {name: generator.integers(0, 1_000_000, number) for name in ("user", "item")}
    table = pa.table({**columns, "label": generator.integers(0, 2, number).astype(np.int8)})
    pq.write_table(table, folder / LOG, row_group_size=1 << 16)


def found(batches: Any) -> tuple[int, dict]:
    """How many rows, and sums over them, which are the same in any order."""
    rows, sums = 0, torch.zeros(len(COLUMNS), dtype=torch.int64)
    for batch in batches:
        rows += len(batch[0])
        sums += torch.stack([column.sum() for column in batch])
    return rows, {"rows": rows, "sums": sums.tolist()}


def ours(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    """What reading tasks and a worker do, in one process and without Ray: windows of row groups, shuffled, cut into batches."""
    from sellarec.training.stream import Order, prepared, row_groups, slices

    pa.set_cpu_count(work["readers"])
    order, epochs = Order(tuple(row_groups([str(folder / LOG)])), work["batch"], seed=0), 0

    def repeat() -> tuple[int, dict]:
        nonlocal epochs
        first, last = (epoch * order.steps_per_epoch for epoch in (epochs, epochs + 1))
        epochs += 1
        blocks = chain.from_iterable(prepared(order, piece, COLUMNS, None) for piece in order.pieces(first, last))

        def batches() -> Iterator[list[torch.Tensor]]:
            for rows in slices(blocks, order, 0, 1, first, last):
                counts = int(rows["weight"].to_numpy().sum())  # what follows is padding
                yield [torch.from_numpy(rows[name].to_numpy()[:counts].copy()) for name in COLUMNS]

        return found(batches())

    return repeat


class Rows(torch.utils.data.Dataset):
    """A log in memory, a row at a time: what a DataLoader is usually given."""

    def __init__(self, path: Path) -> None:
        table = pq.read_table(path)
        self._columns = [table[name].to_numpy() for name in COLUMNS]

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, row: int) -> tuple[int, ...]:
        return tuple(column[row].item() for column in self._columns)


def data_loader(work: dict[str, Any], folder: Path, workers: int = 0) -> Callable[[], tuple[int, dict]]:
    loader = torch.utils.data.DataLoader(
        Rows(folder / LOG), batch_size=work["batch"], shuffle=True, num_workers=workers
    )  # fmt: skip
    return lambda: found(loader)


def data_loader_processes(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    return data_loader(work, folder, work["loader_workers"])


def data_loader_batched(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    """A log in memory as tensors, and a sampler that asks for whole batches: the quickest that a DataLoader does."""
    table = pq.read_table(folder / LOG)
    columns = [torch.from_numpy(table[name].to_numpy().copy()) for name in COLUMNS]

    class Batches(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(columns[0])

        def __getitem__(self, rows: list[int]) -> list[torch.Tensor]:
            chosen = torch.tensor(rows)
            return [column[chosen] for column in columns]

    data = Batches()
    sampler = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(data), work["batch"], drop_last=False)
    loader = torch.utils.data.DataLoader(data, sampler=sampler, batch_size=None)
    return lambda: found(loader)
