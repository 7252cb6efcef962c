"""Steps on sharded tables, as each worker of a test takes them, and the same on whole tables by plain torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from sellarec.config import Sparse, Tables
from sellarec.errors import UserError
from sellarec.training import table as table_module
from sellarec.training.plan import place
from sellarec.training.table import Jagged, Table, initial_rows
from sellarec.training.tables import ShardedTables

CPU = torch.device("cpu")
SEED = 7
EPSILON = 1e-8


@dataclass(frozen=True)
class Setup:
    """Tables and how they are kept.

    Attributes:
        max_columns: wider tables are cut into pieces.
        seed: of the initial rows.
    """

    tables: tuple[Table, ...]
    optimizer: Sparse
    storage: Tables = field(default_factory=Tables)
    max_columns: int = 1024
    seed: int = SEED


@dataclass(frozen=True)
class Step:
    """What the workers look up in a step, and the learning rate.

    Attributes:
        ids: by worker, by feature: one or several ids a row, or lists of them.
    """

    rate: float
    ids: tuple[dict[str, Any], ...]


def as_ids(ids: Any) -> Tensor | Jagged:
    """Lists of different lengths are given as a tuple of lists."""
    if isinstance(ids, tuple):
        values = torch.tensor([i for found in ids for i in found], dtype=torch.int64)
        return Jagged(values, torch.tensor([len(found) for found in ids]))
    return torch.tensor(ids, dtype=torch.int64)


def flat_ids(ids: Any) -> Tensor:
    found = as_ids(ids)
    return found.values if isinstance(found, Jagged) else found.flatten()


def flat_vectors(vectors: Tensor | Jagged) -> Tensor:
    return vectors.values if isinstance(vectors, Jagged) else vectors.flatten(0, -2)


def factors(step: int, worker: int, feature: str, rows: int, columns: int) -> Tensor:
    generator = np.random.default_rng([step, worker, *feature.encode()])
    return torch.from_numpy(generator.standard_normal((rows, columns)).astype(np.float32))


def loss_of(step: int, worker: int, vectors: dict[str, Tensor]) -> Tensor:
    """Its gradient depends on the rows."""
    total = torch.zeros(())
    for name, found in vectors.items():
        factor = factors(step, worker, name, *found.shape)
        total = total + (factor * found + 0.5 * factor.abs() * found.square()).sum()
    return total


def build(setup: Setup) -> ShardedTables:
    table_module.MAX_COLUMNS = setup.max_columns
    group = dist.group.WORLD
    assert group is not None
    workers = dist.get_world_size(group)
    placements = place(setup.tables, setup.storage, setup.optimizer, workers, "cpu")
    return ShardedTables(placements, setup.storage, setup.optimizer, group, CPU, setup.seed)


def take_steps(tables: ShardedTables, steps: tuple[Step, ...], first: int = 0) -> list[dict[str, np.ndarray]]:
    """As the loop takes them. Gives the vectors that were looked up, by step."""
    rank, looked_up = dist.get_rank(), []
    for number, step in enumerate(steps, first):
        tables.set_learning_rate(step.rate)
        found = tables.look_up({name: as_ids(ids) for name, ids in step.ids[rank].items()})
        vectors = {name: flat_vectors(value) for name, value in found.items()}
        leaves = {name: value.detach().requires_grad_() for name, value in vectors.items()}
        loss_of(number, rank, leaves).backward()
        gradients = [leaf.grad for leaf in leaves.values()]
        torch.autograd.backward(list(vectors.values()), gradients)
        tables.step()
        looked_up.append({name: leaf.detach().numpy() for name, leaf in leaves.items()})
    return looked_up


def local(tables: ShardedTables) -> dict[str, list[tuple[list[int], list[int], np.ndarray]]]:
    """(offsets, size of the whole, values) of all that a checkpoint holds and this worker has of it, by name."""
    state = tables.state()
    found = {
        **state.get("rows", {}),
        **{f"optimizer {name}": value for name, value in state.get("optimizer", {}).items()},
    }
    return {
        name: [
            (list(shard.metadata.shard_offsets), list(sharded.size()), shard.tensor.detach().numpy().copy())
            for shard in sharded.local_shards()
        ]
        for name, sharded in found.items()
    }


def whole(parts: list[dict[str, list]]) -> dict[str, np.ndarray]:
    """Of all workers' `local`: by name the whole array, NaN where nobody has it."""
    out: dict[str, np.ndarray] = {}
    for part in parts:
        for name, shards in part.items():
            for offsets, size, values in shards:
                array = out.setdefault(name, np.full(size, np.nan, values.dtype))
                place = tuple(slice(at, at + n) for at, n in zip(offsets, values.shape, strict=True))
                assert np.isnan(array[place]).all(), f"{name}: two workers hold rows at {offsets}"
                array[place] = values
    return out


def run(setup: Setup, steps: tuple[Step, ...], folder: Path | None = None) -> dict[str, Any]:
    """What a worker finds: vectors of each step, and its part of the state after them; saved as a checkpoint too."""
    tables = build(setup)
    before = local(tables)
    looked_up = take_steps(tables, steps)
    if folder is not None:
        dcp.save({"tables": tables.state()}, checkpoint_id=folder)
    written = []
    if folder is not None:
        dist.barrier()
        (folder / "rows").mkdir(exist_ok=True)
        dist.barrier()
        written = tables.save(folder / "rows")
    return {
        "looked up": looked_up,
        "before": before,
        "after": local(tables),
        "plan": tables.plan(),
        "written": written,
        "steps": int(tables.state().get("steps", -1)),
    }


def resume(setup: Setup, folder: Path, steps: tuple[Step, ...], first: int) -> dict[str, Any]:
    """Load what any number of workers has saved, and take further steps."""
    tables = build(setup)
    state = {"tables": tables.state()}
    dcp.load(state, checkpoint_id=folder)
    tables.load_state(state["tables"])
    loaded = local(tables)
    looked_up = take_steps(tables, steps, first)
    return {"loaded": loaded, "looked up": looked_up, "after": local(tables)}


def out_of_range(setup: Setup, ids: tuple[dict[str, Any], ...], rows: np.ndarray | None) -> str | None:
    return build(setup).out_of_range({name: as_ids(found) for name, found in ids[dist.get_rank()].items()}, rows)


def refusal(setup: Setup) -> str | None:
    """Of making the tables; None where they are made."""
    try:
        build(setup)
    except UserError as error:
        return str(error)
    return None


class Plain:
    """Whole tables, as parameters of torch."""

    def __init__(self, setup: Setup, dtype: torch.dtype = torch.float32) -> None:
        self.setup = setup
        self.rows = {
            t.name: torch.from_numpy(initial_rows(t, setup.seed, 0, t.rows)).to(dtype).requires_grad_()
            for t in setup.tables
        }
        if setup.storage.dtype == "float16":
            for rows in self.rows.values():
                rows.data = rows.data.half().to(dtype)
        self.table_of = {feature: table.name for table in setup.tables for feature in table.features}
        self.optimizers = {t.name: plain_optimizer(setup, t, self.rows[t.name]) for t in setup.tables}

    def take(self, steps: tuple[Step, ...], workers: int, first: int = 0) -> Iterator[list[dict[str, np.ndarray]]]:
        """Gives what each worker looks up, by step."""
        for number, step in enumerate(steps, first):
            total, looked_up = torch.zeros(()), []
            touched: dict[str, set[int]] = {name: set() for name in self.rows}
            for worker in range(workers):
                vectors = {}
                for feature, ids in step.ids[worker].items():
                    asked = flat_ids(ids)
                    vectors[feature] = self.rows[self.table_of[feature]][asked]
                    touched[self.table_of[feature]] |= set(asked.tolist())
                total = total + loss_of(number, worker, vectors)
                looked_up.append({name: found.detach().numpy() for name, found in vectors.items()})
            for rows in self.rows.values():
                rows.grad = torch.zeros_like(rows)
            total.backward()
            for name, optimizer in self.optimizers.items():
                optimizer.step(step.rate, sorted(touched[name]))
                if self.setup.storage.dtype == "float16":
                    self.rows[name].data = self.rows[name].data.half().to(self.rows[name].dtype)
            yield looked_up

    def state(self) -> dict[str, np.ndarray]:
        """By piece, as checkpoints name them."""
        return {
            name: self.rows[table.name].detach().numpy()[:, start:stop]
            for table in self.setup.tables
            for name, start, stop in cut(table, self.setup.max_columns)
        }


def cut(table: Table, most: int) -> list[tuple[str, int, int]]:
    return [
        (f"{table.name}_{k}", start, min(start + most, table.dim)) for k, start in enumerate(range(0, table.dim, most))
    ]


class Torch:
    """An optimizer of torch. A row without a gradient moves only if it does there."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, rate: float, touched: list[int]) -> None:
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()


class RowwiseAdagrad:
    """One accumulator a row, of the mean square of its gradient; decay is added to the gradient of rows looked up."""

    def __init__(self, rows: Tensor, pieces: list[slice], decay: float) -> None:
        self.rows, self.pieces, self.decay = rows, pieces, decay
        self.sums = [torch.zeros(len(rows), dtype=rows.dtype) for _ in pieces]

    @torch.no_grad()
    def step(self, rate: float, touched: list[int]) -> None:
        assert self.rows.grad is not None
        for sums, columns in zip(self.sums, self.pieces, strict=True):
            gradient = self.rows.grad[touched, columns] + self.decay * self.rows[touched, columns]
            sums[touched] += gradient.square().mean(1)
            self.rows[touched, columns] -= rate * gradient / (sums[touched].sqrt() + EPSILON)[:, None]


def plain_optimizer(setup: Setup, table: Table, rows: Tensor) -> Any:
    settings = setup.optimizer
    decay = settings.table_weight_decay
    if settings.table_optimizer == "rowwise-adagrad":
        return RowwiseAdagrad(rows, [slice(start, stop) for _, start, stop in cut(table, setup.max_columns)], decay)
    if settings.table_optimizer == "adam":
        return Torch(torch.optim.Adam([rows], weight_decay=decay))
    if settings.table_optimizer == "adamw":
        return Torch(torch.optim.AdamW([rows], weight_decay=decay))
    assert not decay
    if settings.table_optimizer == "adagrad":
        return Torch(torch.optim.Adagrad([rows], eps=EPSILON))
    return Torch(torch.optim.SGD([rows]))
