"""Embedding tables sharded by rows over all workers (TorchRec), with an optimizer fused into the backward pass.

Shapes: b rows of one worker's slice, L ids a row, D columns, R rows of a table, W workers.
"""

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

MAX_COLUMNS = 1024
"""The kernels' column limit (of the oldest supported version): wider tables are cut into pieces of so many columns."""

INIT_BLOCK = 4096
"""Rows that share one random stream, so that initial rows don't depend on how the table is sharded."""

RowReader = Callable[[int, int], np.ndarray]
"""(start, stop) -> float32 rows [stop - start, D] of a whole table."""


@dataclass(frozen=True)
class Jagged:
    """Lists of different lengths, one after the other: what TorchRec's KeyedJaggedTensor is made of.

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

    @property
    def pieces(self) -> list[tuple[str, int, int]]:
        """(name, first column, stop column) of each piece."""
        starts = range(0, self.dim, MAX_COLUMNS)
        return [(f"{self.name}_{k}", start, min(start + MAX_COLUMNS, self.dim)) for k, start in enumerate(starts)]


def initial_rows(table: Table, seed: int, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of a fresh table, float32 [stop - start, D]: a function of (seed, table, row) alone."""
    if table.read is not None:
        return table.read(start, stop)
    rows = np.empty((stop - start, table.dim), np.float32)
    for block in range(start // INIT_BLOCK, -(-stop // INIT_BLOCK)):
        first = block * INIT_BLOCK
        generator = np.random.default_rng([seed, zlib.crc32(table.name.encode()), block])
        normal = generator.standard_normal((INIT_BLOCK, table.dim), np.float32)
        low, high = max(start, first), min(stop, first + INIT_BLOCK)
        rows[low - start : high - start] = normal[low - first : high - first] * table.init_std
    return rows


class ShardedTables:
    """Tables sharded row-wise over a process group; ids in, vectors out, gradients summed over workers.

    The optimizer is row-wise Adagrad, fused: `backward` of a lookup's output updates the rows. Gradients are summed, not
    averaged, over workers, so with a loss divided by the global count any number of workers takes the same step.
    """

    def __init__(
        self, tables: Sequence[Table], learning_rate: float, group: dist.ProcessGroup, device: torch.device, seed: int
    ) -> None:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from torchrec import EmbeddingCollection, EmbeddingConfig
        from torchrec.distributed import DistributedModelParallel, comm_ops
        from torchrec.distributed.embedding import EmbeddingCollectionSharder
        from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
        from torchrec.distributed.types import ShardingEnv, ShardingPlan

        comm_ops.set_gradient_division(False)
        self.tables = list(tables)
        self.device = device
        self.world_size = dist.get_world_size(group)
        sharder = EmbeddingCollectionSharder(
            fused_params={
                "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
                "learning_rate": learning_rate,
                "eps": 1e-8,
            }
        )
        # TorchRec wants one width a collection, so tables are grouped by the widths of their pieces.
        self._names: dict[str, str] = {}
        holder, plans = nn.Module(), {}
        by_width: dict[int, list[Any]] = {}
        for table in self.tables:
            for name, start, stop in table.pieces:
                config = EmbeddingConfig(
                    name=name,
                    embedding_dim=stop - start,
                    num_embeddings=table.rows,
                    feature_names=[f"{feature}:{name}" for feature in table.features],
                    init_fn=_leave_as_is,
                )
                by_width.setdefault(stop - start, []).append(config)
                self._names[name] = f"width_{stop - start}"
        for width, configs in by_width.items():
            collection = EmbeddingCollection(device=torch.device("meta"), tables=configs)
            setattr(holder, f"width_{width}", collection)
            plans[f"width_{width}"] = construct_module_sharding_plan(
                collection,
                {config.name: row_wise(compute_kernel="fused") for config in configs},
                sharder=sharder,
                local_size=_local_size(self.world_size, device),
                world_size=self.world_size,
                device_type=device.type,
            )
        self._keys = {
            f"width_{width}": [name for config in configs for name in config.feature_names]
            for width, configs in by_width.items()
        }
        self.module = DistributedModelParallel(
            holder,
            env=ShardingEnv.from_process_group(group),
            device=device,
            plan=ShardingPlan(plans),
            sharders=[sharder],
            init_data_parallel=False,
        )
        self._collections = {name: getattr(self.module.module, name) for name in self._keys}
        for table in self.tables:
            for (_, first, stop), (offset, rows) in self._local_pieces(table):
                rows.copy_(torch.from_numpy(initial_rows(table, seed, offset, offset + len(rows))[:, first:stop]))

    def _local_pieces(self, table: Table) -> list[tuple[tuple[str, int, int], tuple[int, Tensor]]]:
        weights = self.module.state_dict()
        out = []
        for piece in table.pieces:
            for shard in weights[f"{self._names[piece[0]]}.embeddings.{piece[0]}.weight"].local_shards():
                out.append((piece, (shard.metadata.shard_offsets[0], shard.tensor.detach())))
        return out

    def look_up(self, ids: Mapping[str, Tensor | Jagged]) -> dict[str, Tensor | Jagged]:
        """int64 ids [b], [b, L] or jagged by feature (all features, equal b) -> float32 vectors [b, D], [b, L, D] or jagged."""
        from torchrec import KeyedJaggedTensor

        jagged = {name: _as_jagged(feature) for name, feature in ids.items()}
        found = {}
        for name, keys in self._keys.items():
            features = [jagged[key.partition(":")[0]] for key in keys]
            keyed = KeyedJaggedTensor(
                keys,
                torch.cat([feature.values for feature in features]),
                lengths=torch.cat([feature.lengths for feature in features]).int(),
            )
            found.update(self._collections[name](keyed).wait())
        out: dict[str, Tensor | Jagged] = {}
        for table in self.tables:
            for feature in table.features:
                vectors = [found[f"{feature}:{name}"].values() for name, _, _ in table.pieces]
                whole = vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=1)
                asked = ids[feature]
                if isinstance(asked, Jagged):
                    out[feature] = Jagged(whole, asked.lengths)
                else:
                    out[feature] = whole.reshape(*asked.shape, table.dim)
        return out

    def set_learning_rate(self, learning_rate: float) -> None:
        """The learning rate of updates by lookups that follow (the kernels read it in the forward pass)."""
        for collection in self._collections.values():
            for group in collection.fused_optimizer.param_groups:
                group["lr"] = learning_rate
            collection.fused_optimizer.zero_grad()  # hands the rate on to the kernels; there are no gradients to zero

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs, sharded: rows and the optimizer's state."""
        return {"rows": self.module.state_dict(), "optimizer": self.module.fused_optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["rows"])
        self.module.fused_optimizer.load_state_dict(state["optimizer"])

    def save(self, folder: Path) -> list[dict[str, Any]]:
        """Write this worker's rows as safetensors into `folder`.

        Returns:
            What was written, for `index`: table, file, start and rows of each file.
        """
        written = []
        for table in self.tables:
            by_offset: dict[int, list[Tensor]] = {}
            for _, (offset, rows) in self._local_pieces(table):
                by_offset.setdefault(offset, []).append(rows.cpu())
            for offset, parts in by_offset.items():
                if len(parts[0]):
                    name = f"{table.name}-{offset:012d}.safetensors"
                    save_file({"rows": torch.cat(parts, dim=1).contiguous()}, folder / name)
                    written.append({"table": table.name, "file": name, "start": offset, "rows": len(parts[0])})
        return written

    def plan(self) -> list[dict[str, Any]]:
        """One line a table: rows, columns, and what each worker holds of it."""
        lines = []
        for table in self.tables:
            rows_each = -(-table.rows // self.world_size)
            lines.append(
                {
                    "table": table.name,
                    "rows": table.rows,
                    "columns": table.dim,
                    "sharding": "row-wise",
                    "rows per worker": rows_each,
                    # row-wise Adagrad keeps one float32 a row and piece beside the row itself
                    "MiB per worker": round(rows_each * 4 * (table.dim + len(table.pieces)) / 2**20, 3),
                }
            )
        return lines


def _as_jagged(ids: Tensor | Jagged) -> Jagged:
    if isinstance(ids, Jagged):
        return ids
    return Jagged(ids.reshape(-1), ids.new_full((len(ids),), math.prod(ids.shape[1:])))


def _local_size(world_size: int, device: torch.device) -> int:
    """Workers of one node, as TorchRec's plan wants to know."""
    return min(world_size, torch.cuda.device_count()) if device.type == "cuda" else world_size


def _leave_as_is(weight: Tensor) -> Tensor:
    return weight


def index(table: Table, written: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of NAME.json beside a table's files: rows, columns, and which rows lie where.

    Raises:
        RuntimeError: the files don't cover the table exactly.
    """
    shards = sorted((part for part in written if part["table"] == table.name), key=lambda part: part["start"])
    end = 0
    for part in shards:
        if part["start"] != end:
            raise RuntimeError(f"table {table.name}: its files leave a gap or overlap at row {end}")
        end += part["rows"]
    if end != table.rows:
        raise RuntimeError(f"table {table.name}: its files hold {end} rows, but it has {table.rows}")
    return {"rows": table.rows, "columns": table.dim, "shards": shards}


@dataclass(frozen=True)
class SavedTable:
    """A table in an artifact: `read(start, stop)` gives rows without loading the rest."""

    folder: Path
    name: str

    @property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.folder / f"{self.name}.json").read_text())

    def read(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start, D]."""
        facts = self.facts
        rows = np.empty((stop - start, facts["columns"]), np.float32)
        for shard in facts["shards"]:
            low, high = max(start, shard["start"]), min(stop, shard["start"] + shard["rows"])
            if low < high:
                with safe_open(self.folder / shard["file"], "np") as file:
                    part = file.get_slice("rows")[low - shard["start"] : high - shard["start"]]
                rows[low - start : high - start] = part
        return rows
