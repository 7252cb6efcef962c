"""Embedding tables as tasks declare them and artifacts hold them, and the lists of ids that are looked up.

Shapes: b rows of one worker's slice, L ids a row, D columns, R rows of a table.
"""

import itertools
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from sellarec.errors import UserError

MAX_COLUMNS = 1024
"""The kernels' column limit (of the oldest supported version): wider tables are cut into pieces of so many columns."""

INIT_BLOCK = 4096
"""Rows that share one random stream, so that initial rows don't depend on how the table is sharded."""

RowReader = Callable[[int, int], np.ndarray]
"""(start, stop) -> float32 rows [stop - start, D] of a whole table."""


@dataclass(frozen=True)
class Jagged:
    """Lists of different lengths, one after the other.

    Attributes:
        values: [n] or [n, D].
        lengths: int64 [b], adding up to n.
    """

    values: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, lists: pa.ChunkedArray) -> "Jagged":
        """A column of lists of numbers."""
        whole = lists.combine_chunks()
        lengths = np.diff(whole.offsets.to_numpy()).astype(np.int64)
        return cls(torch.from_numpy(whole.flatten().to_numpy().copy()), torch.from_numpy(lengths))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: slice) -> "Jagged":
        ends = self.lengths.cumsum(0)
        start, stop = rows.start or 0, len(self) if rows.stop is None else rows.stop
        first = int(ends[start - 1]) if start else 0
        return Jagged(self.values[first : int(ends[stop - 1]) if stop else 0], self.lengths[rows])

    def to(self, device: torch.device, non_blocking: bool = False) -> "Jagged":
        return Jagged(
            self.values.to(device, non_blocking=non_blocking), self.lengths.to(device, non_blocking=non_blocking)
        )

    def sum(self) -> Tensor:
        """[b, D]: the sum of each list's vectors; zeros for an empty one."""
        row = torch.repeat_interleave(torch.arange(len(self), device=self.lengths.device), self.lengths)
        return self.values.new_zeros(len(self), self.values.shape[1]).index_add(0, row, self.values)


def sum_lists(rows: Tensor, lists: Tensor, ends: Tensor) -> Tensor:
    """Sums of rows [m, D] that lists [n], cut at ends [g + 1], name -> [g, D].

    An embedding bag without weights: it adds up each list in order on CPU and on GPU, so it repeats to the bit, which
    cuSPARSE's product and index_add don't do; on CPU it is faster than the product with a sparse matrix too.
    """
    return functional.embedding_bag(lists, rows, ends, mode="sum", include_last_offset=True)


class _Spread(torch.autograd.Function):
    """[m, D] -> [n, D]: the row of each place, whose gradients are added up in their order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, order: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(order, ends)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return sum_lists(gradient.contiguous(), *ctx.saved_tensors), None, None, None


@dataclass(frozen=True)
class Distinct:
    """The distinct ones of n ids.

    Attributes:
        ids: int64 [m], ascending.
        places: int64 [n], which of them each id is.
        order: int64 [n], places of ids that are equal, one distinct id after the other.
        ends: int64 [m + 1], where in `order` each one's begin, and the last one's end.
    """

    ids: Tensor
    places: Tensor
    order: Tensor
    ends: Tensor

    @classmethod
    def of(cls, ids: Tensor) -> "Distinct":
        ordered, order = ids.sort(stable=True)
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        places = torch.empty_like(order)
        places[order] = first.cumsum(0) - 1
        starts = first.nonzero()[:, 0]
        return cls(ordered[starts], places, order, torch.cat([starts, starts.new_tensor([len(ids)])]))

    def spread(self, rows: Tensor) -> Tensor:
        """What belongs to the distinct ids, [m, D], for each of the ids: [n, D]."""
        return _Spread.apply(rows, self.places, self.order, self.ends)


@dataclass(frozen=True)
class Table:
    """One feature's embedding table, as a task declares it."""

    name: str
    rows: int
    dim: int
    features: tuple[str, ...]
    """Names under which ids are looked up in it."""
    init_std: float = 0.0
    read: RowReader | None = None
    """Where the rows start from; None: normal with `init_std`, the same for any number of workers."""
    read_rows: int | None = None
    """How many rows `read` has, the first ones; the others are fresh. None: all."""
    frozen: bool = False
    """Whether its rows stay as they start, whatever the optimizer: they are looked up without a gradient."""

    @property
    def pieces(self) -> list[tuple[str, int, int]]:
        """(name, first column, stop column) of each piece."""
        starts = range(0, self.dim, MAX_COLUMNS)
        return [(f"{self.name}_{k}", start, min(start + MAX_COLUMNS, self.dim)) for k, start in enumerate(starts)]


def initial_rows(table: Table, seed: int, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) that a table starts from, float32 [stop - start, D]: fresh ones are a function of (seed, table, row).

    Raises:
        UserError: a row that was read is not finite.
    """
    rows = np.empty((stop - start, table.dim), np.float32)
    known = (
        0 if table.read is None else max(start, min(stop, table.rows if table.read_rows is None else table.read_rows))
    )
    if table.read is not None and known > start:
        rows[: known - start] = table.read(start, known)
        bad = np.flatnonzero(~np.isfinite(rows[: known - start]).all(1))
        if len(bad):
            raise UserError(
                f"table {table.name}: row {start + bad[0]} of those that it starts from holds a value that is not finite "
                f"(NaN or infinite), as do {len(bad) - 1} of the {known - start} rows read with it: mend or retrain its source"
            )
    fresh = max(start, known)
    for block in range(fresh // INIT_BLOCK, -(-stop // INIT_BLOCK)):
        first = block * INIT_BLOCK
        generator = np.random.default_rng([seed, zlib.crc32(table.name.encode()), block])
        normal = generator.standard_normal((INIT_BLOCK, table.dim), np.float32)
        low, high = max(fresh, first), min(stop, first + INIT_BLOCK)
        rows[low - start : high - start] = normal[low - first : high - first] * table.init_std
    return rows


def index(table: Table, written: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of NAME.json beside a table's files: rows, columns, and which rows and columns lie where.

    Raises:
        RuntimeError: the files don't cover the table exactly.
    """
    shards = [part for part in written if part["table"] == table.name]
    shards.sort(key=lambda part: (part["start"], part["column"]))
    end = 0
    for start, beside in itertools.groupby(shards, key=lambda part: part["start"]):
        parts = list(beside)
        if start != end:
            raise RuntimeError(f"table {table.name}: its files leave a gap or overlap at row {end}")
        column = 0
        for part in parts:
            if (part["column"], part["rows"]) != (column, parts[0]["rows"]):
                raise RuntimeError(
                    f"table {table.name}: its files leave a gap or overlap at row {end}, column {column}"
                )
            column += part["columns"]
        if column != table.dim:
            raise RuntimeError(
                f"table {table.name}: its files hold {column} columns from row {end} on, but it has {table.dim}"
            )
        end += parts[0]["rows"]
    if end != table.rows:
        raise RuntimeError(f"table {table.name}: its files hold {end} rows, but it has {table.rows}")
    return {"rows": table.rows, "columns": table.dim, "shards": shards}


COPY_AGAIN = "copy the artifact again from where it is whole, or delete its folder and run its stage again"
"""What to do about a damaged table."""


@dataclass(frozen=True)
class SavedTable:
    """A table in an artifact: `read` and `rows` give rows without loading the rest."""

    folder: Path
    name: str

    @property
    def facts(self) -> dict[str, Any]:
        """As of `index`.

        Raises:
            FileNotFoundError: the folder has no such table.
            UserError: the file is cut off or damaged.
        """
        path = self.folder / f"{self.name}.json"
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} can't be read ({error}): {COPY_AGAIN}") from error

    def read(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start, D].

        Raises:
            UserError: a file of the table is not there, is cut off or damaged.
        """
        facts = self.facts
        rows = np.empty((stop - start, facts["columns"]), np.float32)
        for shard in facts["shards"]:
            low, high = max(start, shard["start"]), min(stop, shard["start"] + shard["rows"])
            if low < high:
                path = self.folder / shard["file"]
                try:
                    with safe_open(path, "np") as file:
                        part = file.get_slice("rows")[low - shard["start"] : high - shard["start"]]
                except (FileNotFoundError, SafetensorError) as error:
                    raise UserError(
                        f"table {self.name}: its rows {low} to {high - 1} can't be read from {path} ({error}): {COPY_AGAIN}"
                    ) from error
                columns = slice(shard["column"], shard["column"] + shard["columns"])
                rows[low - start : high - start, columns] = part
        return rows

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """float32 [n, D]: the rows of int64 ids [n], in any order, without loading the rest.

        Raises:
            UserError: an id that the table doesn't have, or as `read`.
        """
        count = self.facts["rows"]
        bad = np.flatnonzero((ids < 0) | (ids >= count))
        if len(bad):
            where = f"id {ids[bad[0]]} (number {bad[0]})"
            raise UserError(f"{where} is none of table {self.name}, which has the ids 0 to {count - 1}")
        asked, place = np.unique(ids, return_inverse=True)
        # runs of ids that lie together are read at once
        runs = np.split(asked, np.flatnonzero(np.diff(asked) > 1) + 1) if len(asked) else []
        found = [self.read(int(run[0]), int(run[-1]) + 1) for run in runs]
        return np.concatenate([*found, np.zeros((0, self.facts["columns"]), np.float32)])[place]


def saved_rows(table: Table, folder: Path) -> Table:
    """The table with the rows that lie in a folder of tables. What it has beyond them gets fresh rows.

    Raises:
        UserError: the folder holds no such table, one of another width, or one of more rows.
    """
    saved = SavedTable(folder, table.name)
    try:
        facts = saved.facts
    except FileNotFoundError as error:
        names = ", ".join(sorted(path.stem for path in folder.glob("*.json"))) or "none"
        raise UserError(f"{folder} holds no table {table.name} (tables: {names}): it is of another model") from error
    if facts["columns"] != table.dim:
        raise UserError(
            f"table {table.name} in {folder} is {facts['columns']} wide, but {table.dim} is asked for: give the width that it has"
        )
    if facts["rows"] > table.rows:
        raise UserError(
            f"table {table.name} in {folder} has {facts['rows']} rows, but the log has only {table.rows}: it belongs to another "
            "log; prepare the new log with --init-from the old one"
        )
    return replace(table, read=saved.read, read_rows=facts["rows"])
