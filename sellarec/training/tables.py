"""Embedding tables sharded over all workers (TorchRec), with their optimizer.

Shapes: b rows of one worker's slice, L ids a row, D columns, R rows of a table, W workers.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from sellarec.config import DENSE_TABLE_OPTIMIZERS, Dense, Sparse, Tables
from sellarec.errors import UserError
from sellarec.training import kernels
from sellarec.training.plan import KERNELS, Placement, describe
from sellarec.training.table import Distinct, Jagged, Table, initial_rows

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's states of a weight, as torch names them."""

FILE_ROWS = 1 << 20
"""Rows of an exported file at most."""

FILE_BYTES = 1 << 28
"""Bytes of one at most, about: what 2^20 rows of 64 float32 are."""

BLOCK_BYTES = 1 << 25
"""What is read or drawn at once of the rows that a table starts from: no table is ever whole in memory twice, and workers keep
what they have freed (`launch.KEEP_FREED_MEMORY`)."""

LISTS = 1024
"""Into so many lists a table's ids are cut where they are looked up as lists: kernels share out lists over their threads, and
workers tell each other the lists' lengths."""


class ShardedTables:
    """Tables sharded over a process group; ids in, vectors out, gradients summed over workers.

    Gradients are summed, not averaged, over workers, so with a loss divided by the global count any number of workers takes
    the same step. The optimizer is fused: `backward` of a lookup's output updates the rows that were looked up. Adam is not
    among the fused kernels of CPUs, and on GPUs it leaves rows without a gradient as they are; so it is torch's own, on
    dense gradients of each worker's rows, which `step` takes: the step of `torch.optim.Adam` or `AdamW` on the unsharded table.

    Args:
        optimizer: None where the rows are only looked up.

    Raises:
        UserError: on a worker that meets them: a row that a table starts from can't be read, is not finite, or too large for the
            type that rows are stored in.
    """

    def __init__(
        self,
        placements: Sequence[Placement],
        storage: Tables,
        optimizer: Sparse | None,
        group: dist.ProcessGroup,
        device: torch.device,
        seed: int,
    ) -> None:
        from torchrec.distributed import DistributedModelParallel, comm_ops
        from torchrec.distributed.sharding_plan import construct_module_sharding_plan
        from torchrec.distributed.types import ShardingEnv, ShardingPlan

        comm_ops.set_gradient_division(False)
        self.placements, self.device = list(placements), device
        self.tables = [placement.table for placement in placements]
        self._storage, self._settings, self._group = storage, optimizer, group
        self.world_size, self._rank = dist.get_world_size(group), dist.get_rank(group)
        self._dense = optimizer is not None and optimizer.table_optimizer in DENSE_TABLE_OPTIMIZERS
        # Bags of one id are the only right kernels for dense gradients, and the only ones by which workers may hold different
        # numbers of columns. Among W workers that share rows they take W times the bytes, as each sends what it has of every
        # bag; there rows are exchanged, and on CPUs each worker takes its own by bags. Their fused weight decay isn't that of
        # whole rows.
        decays = optimizer is not None and optimizer.table_weight_decay > 0
        by_columns = any(placement.sharding == "column-wise" for placement in placements)
        self._bags = self._dense or by_columns or (self.world_size == 1 and not decays)
        sharder = kernels.sharder(self._bags, {} if self._dense else kernels.fused(optimizer, storage))
        kernel = "dense" if self._dense else KERNELS[storage.placement]
        # TorchRec wants one width a collection, so tables are grouped by the widths of their pieces.
        by_width: dict[int, list[tuple[str, Placement]]] = {}
        for placement in placements:
            for name, start, stop in placement.table.pieces:
                by_width.setdefault(stop - start, []).append((name, placement))
        holder, plans = nn.Module(), {}
        for width, pieces in by_width.items():
            keys = {name: self._keys_of(placement.table, name) for name, placement in pieces}
            collection = kernels.collection(self._bags, width, pieces, keys, storage)
            setattr(holder, f"width_{width}", collection)
            plans[f"width_{width}"] = construct_module_sharding_plan(
                collection,
                {name: kernels.sharding(placement, width, self.world_size, kernel) for name, placement in pieces},
                sharder=sharder,
                local_size=_local_size(self.world_size, device),
                world_size=self.world_size,
                device_type=device.type,
            )
        self._keys = {
            f"width_{width}": [key for name, placement in pieces for key in self._keys_of(placement.table, name)]
            for width, pieces in by_width.items()
        }
        self._widths = {name: f"width_{width}" for width, pieces in by_width.items() for name, _ in pieces}
        self.module = DistributedModelParallel(
            holder,
            env=ShardingEnv.from_process_group(group),
            device=device,
            plan=ShardingPlan(plans),
            sharders=[sharder],
            init_data_parallel=False,
        )
        self._collections = {name: getattr(self.module.module, name) for name in self._keys}
        if not self._bags and not decays and device.type == "cpu":
            for collection in self._collections.values():
                kernels.take_rows_by_bags(collection)
        for table in self.tables:
            size = _rows_of(BLOCK_BYTES, 4 * table.dim)
            for row, column, rows in self._local_parts(table):
                for start in range(0, len(rows), size):
                    block = rows[start : start + size]
                    fresh = initial_rows(table, seed, row + start, row + start + len(block))
                    values = torch.from_numpy(fresh[:, column : column + block.shape[1]])
                    block.copy_(values)
                    if block.dtype != values.dtype:  # in their own type rows were seen to be finite
                        _check_stored(table, row + start, values, block)
        self._steps = 0
        self._adam = None
        if optimizer is not None and self._dense:
            owned = [weight for weight in self.module.parameters() if weight.numel()]
            decay = optimizer.table_weight_decay
            if owned:
                kind = torch.optim.Adam if optimizer.table_optimizer == "adam" else torch.optim.AdamW
                betas = (0.9, optimizer.beta2 if isinstance(optimizer, Dense) else 0.999)
                self._adam = kind(owned, lr=optimizer.table_learning_rate, betas=betas, weight_decay=decay, fused=True)
        self.optimizer = {} if optimizer is None else self._made()

    def _made(self) -> dict[str, Any]:
        """What this worker's rows are stepped by, and what it was made with; empty where the worker holds none."""
        if self._adam is not None:
            return {"optimizer": f"{type(self._adam).__name__} (dense gradients, all rows)", **made(self._adam)}
        lookups = [lookup for collection in self._collections.values() for lookup in collection._lookups]
        updating = [module for lookup in lookups for module in lookup.modules() if hasattr(module, "optimizer_args")]
        if not updating:
            return {}
        arguments = updating[0].optimizer_args
        return {
            "optimizer": f"{kernels.FUSED[updating[0].optimizer.name]} (fused)",
            "learning rate": float(f"{updating[0].get_learning_rate():.7g}"),  # which it has in float32
            "weight decay": arguments.weight_decay,
        }

    def _sharded(self) -> dict[str, Any]:
        """TorchRec's ShardedTensor of each piece's weights, by the piece's name."""
        weights = self.module.state_dict()
        parts = "embedding_bags" if self._bags else "embeddings"
        return {name: weights[f"{width}.{parts}.{name}.weight"] for name, width in self._widths.items()}

    def _local_parts(self, table: Table) -> list[tuple[int, int, Tensor]]:
        """(first row, first column, values) of what this worker holds of each piece of a table."""
        sharded, parts = self._sharded(), []
        for name, first, _ in table.pieces:
            for shard in sharded[name].local_shards():
                row, column = shard.metadata.shard_offsets
                parts.append((row, first + column, shard.tensor.detach()))
        return parts

    def share(self, name: str) -> Tensor:
        """int64: the ids of this worker's block of a table's rows, ceil(R / W) of them or, at the end, fewer."""
        (rows,) = (table.rows for table in self.tables if table.name == name)
        block = -(-rows // self.world_size)
        return torch.arange(min(self._rank * block, rows), min((self._rank + 1) * block, rows), device=self.device)

    def out_of_range(self, ids: Mapping[str, Tensor | Jagged], rows: np.ndarray | None = None) -> str | None:
        """The first id that its table doesn't have, in words; None where all are there.

        Args:
            rows: int64 [b], the rows' ids in the log, by which the row is named; None: by its place in the slice.
        """
        for table in self.tables:
            for feature in set(table.features) & set(ids):
                found = _as_jagged(ids[feature])
                bad = (found.values < 0) | (found.values >= table.rows)
                if bool(bad.any()):
                    place = int(bad.nonzero()[0])
                    row = int((found.lengths.cumsum(0) <= place).sum())
                    where = f"place {row} of its slice" if rows is None else f"row {rows[row]}"
                    return (
                        f"{feature} is {int(found.values[place])} in {where} (worker {self._rank}), but table {table.name} has "
                        f"the ids 0 to {table.rows - 1}"
                    )
        return None

    def look_up(
        self, ids: Mapping[str, Tensor | Jagged], shares: Mapping[str, Tensor] = {}
    ) -> dict[str, Tensor | Jagged]:
        """int64 ids [b], [b, L] or jagged by feature -> float32 vectors [b, D], [b, L, D] or jagged.

        Features that aren't asked for are left out; all workers ask for the same ones.

        Args:
            shares: features that are asked for this worker's `share` of their table, int64 [n]. Where dense gradients are
                taken and the worker holds those very rows, they are its weights themselves.
        """
        weights = self._own_weights(shares)
        asked_for = {**ids, **shares}
        values = {
            name: feature.values if isinstance(feature, Jagged) else feature.reshape(-1)
            for name, feature in asked_for.items()
            if name not in weights
        }
        found = self._look_up_once(values, shares) if self.world_size > 1 else self._look_up_keys(values)
        out: dict[str, Tensor | Jagged] = {}
        for table in self.tables:
            for feature in table.features:
                if feature not in asked_for:
                    continue
                vectors = weights.get(feature) or [found[f"{feature}:{name}"] for name, _, _ in table.pieces]
                whole = vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=1)
                asked = asked_for[feature]
                if isinstance(asked, Jagged):
                    out[feature] = Jagged(whole, asked.lengths)
                else:
                    out[feature] = whole.reshape(*asked.shape, table.dim)
        return out

    def _keys_of(self, table: Table, piece: str) -> list[str]:
        """Under what TorchRec looks up ids in a piece of a table: of each feature, or of all together (`_look_up_once`)."""
        return [f"{name}:{piece}" for name in (table.features if self.world_size == 1 else (table.name,))]

    def _look_up_once(self, ids: Mapping[str, Tensor], shares: Collection[str]) -> dict[str, Tensor]:
        """As `_look_up_keys`; whatever features of a table ask for an id, and however often, its row is sent to this worker once,
        and so is the sum of its gradients from here. Shares have no repeats and are asked for as they are."""
        asked, distinct, whole = {}, {}, {}
        for table in self.tables:
            asked[table.name] = {name: ids[name] for name in table.features if name in ids and name not in shares}
            whole[table.name] = [name for name in table.features if name in ids and name in shares]
            if asked[table.name]:
                distinct[table.name] = Distinct.of(torch.cat(list(asked[table.name].values())))
        wanted = {
            table.name: torch.cat([*(ids[name] for name in whole[table.name]), *of_table])
            for table in self.tables
            for of_table in [[distinct[table.name].ids] if asked[table.name] else []]
            if whole[table.name] or of_table
        }
        rows = self._look_up_keys(wanted)
        found: dict[str, Tensor] = {}
        for table in self.tables:
            lengths = {name: len(ids[name]) for name in whole[table.name]}
            for piece, _, _ in table.pieces if table.name in wanted else ():
                of_piece = rows[f"{table.name}:{piece}"]
                *of_shares, others = of_piece.split([*lengths.values(), len(of_piece) - sum(lengths.values())])
                found |= {f"{name}:{piece}": part for name, part in zip(lengths, of_shares, strict=True)}
                if asked[table.name]:
                    parts = distinct[table.name].spread(others).split([len(of) for of in asked[table.name].values()])
                    found |= {f"{name}:{piece}": part for name, part in zip(asked[table.name], parts, strict=True)}
        return found

    def _look_up_keys(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """int64 ids [n] by key without the piece -> float32 [n, columns of the piece] by key."""
        if not ids:
            return {}
        return self._look_up_bags(ids) if self._bags else self._look_up_rows(ids)

    def _own_weights(self, features: Collection[str]) -> dict[str, list[Tensor]]:
        """The worker's weights of each piece of these features' tables, where they take dense gradients and are its share."""
        if not self._dense or not features:
            return {}
        weights = {name.split(".")[-2]: weight for name, weight in self.module.named_parameters()}
        return {
            feature: [weights[name].view(-1, stop - start) for name, start, stop in placement.table.pieces]
            for placement in self.placements
            if placement.sharding == "row-wise" or self.world_size == 1
            for feature in set(placement.table.features) & set(features)
        }

    def _asked(self, ids: Collection[str]) -> list[tuple[str, list[str]]]:
        """The collections, with their keys, of which some feature is asked for: the others would send bags of nothing."""
        return [
            (width, keys) for width, keys in self._keys.items() if any(key.partition(":")[0] in ids for key in keys)
        ]

    def _look_up_rows(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As LISTS lists a key: equally many on all workers, whatever they ask for."""
        from torchrec import KeyedJaggedTensor

        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        lists = torch.arange(LISTS, device=self.device)
        found: dict[str, Tensor] = {}
        for width, keys in self._asked(ids):
            values = [ids.get(key.partition(":")[0], none) for key in keys]
            counts = torch.tensor([len(value) for value in values], device=self.device)[:, None]
            lengths = counts // LISTS + (lists < counts % LISTS)
            keyed = KeyedJaggedTensor(keys, torch.cat(values), lengths=lengths.flatten().int())
            found |= {key: vectors.values() for key, vectors in self._collections[width](keyed).wait().items()}
        return found

    def _look_up_bags(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By bags of one id, equally many of every key and on all workers."""
        from torchrec import KeyedJaggedTensor

        # at least one: the kernels don't take none
        bags = max(1, *(len(values) for values in ids.values()))
        if self.world_size > 1:
            most = torch.tensor(bags, device=self.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._group)
            bags = int(most)
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        found: dict[str, Tensor] = {}
        for width, keys in self._asked(ids):
            values = [ids.get(key.partition(":")[0], none) for key in keys]
            counts = [len(value) for value in values]
            lengths = torch.arange(bags, device=self.device) < torch.tensor(counts, device=self.device)[:, None]
            keyed = KeyedJaggedTensor(keys, torch.cat(values), lengths=lengths.flatten().int())
            pooled = self._collections[width](keyed).wait().to_dict()
            found |= {key: pooled[key][:count] for key, count in zip(keys, counts, strict=True)}
        return found

    def step(self) -> None:
        """What the optimizer has left to do after the backward pass: nothing where it is fused."""
        self._steps += 1
        if self._adam is not None:
            for weight in self._adam.param_groups[0]["params"]:
                if weight.grad is None:  # of a table that no feature was asked for of, which moves on all the same
                    weight.grad = torch.zeros_like(weight)
            self._adam.step()
            self._adam.zero_grad(set_to_none=True)

    def set_learning_rate(self, learning_rate: float) -> None:
        """The learning rate of updates by lookups that follow (the kernels read it in the forward pass)."""
        if self._adam is not None:
            self._adam.param_groups[0]["lr"] = learning_rate
        if self._dense:
            return
        for collection in self._collections.values():
            for group in collection.fused_optimizer.param_groups:
                group["lr"] = learning_rate
            collection.fused_optimizer.zero_grad()  # hands the rate on to the kernels; there are no gradients to zero

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs, sharded, in tensors that loading writes into; any other number of workers loads it."""
        # What a worker has no part of is left out: a sharded tensor without local shards, or an empty dict, makes Torch
        # Distributed Checkpoint take the checkpoint for one of torch 2.3, in which the dense optimizer's settings lie elsewhere.
        state: dict[str, Any] = {}
        rows = {name: sharded for name, sharded in self._sharded().items() if sharded.local_shards()}
        if rows:
            state["rows"] = rows
        if self._dense:
            optimizer = self._moments()
            state["steps"] = torch.tensor(self._steps)
        else:
            optimizer = {
                name: value
                for found in self.module.fused_optimizer.state_dict()["state"].values()
                for name, value in found.items()
            }
        if optimizer:
            state["optimizer"] = optimizer
        return state

    def _moments(self) -> dict[str, Any]:
        """Adam's moments as sharded tensors, like the weights that they belong to."""
        from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

        moments: dict[str, Any] = {}
        if self._adam is None:  # this worker holds no rows
            return moments
        weights = {name.split(".")[-2]: weight for name, weight in self.module.named_parameters()}
        for name, sharded in self._sharded().items():
            if sharded.local_shards():
                state = self._adam.state[weights[name]]
                if not state:  # before the first step
                    weight = weights[name]
                    state["step"] = torch.zeros((), device=weight.device)
                    state |= {moment: torch.zeros_like(weight) for moment in MOMENTS}
                for moment in MOMENTS:
                    local = [
                        Shard(state[moment].view(shard.tensor.shape), shard.metadata)
                        for shard in sharded.local_shards()
                    ]
                    moments[f"{name}.{moment}"] = ShardedTensor._init_from_local_shards_and_global_metadata(
                        local, sharded_tensor_metadata=sharded.metadata(), process_group=sharded._process_group
                    )
        return moments

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what was read into the tensors of `state()`: rows and moments lie there already."""
        if self._dense:
            self._steps = int(state["steps"])
        for collection in self._collections.values():
            for kernel in (module for lookup in collection._lookups for module in lookup.modules()):
                if hasattr(kernel, "reset_cache_states"):  # a GPU's cache of rows (uvm-caching) holds those from before
                    kernel.reset_cache_states()
        for found in self._adam.state.values() if self._adam is not None else ():
            found["step"].fill_(self._steps)

    def save(self, folder: Path) -> list[dict[str, Any]]:
        """Write what this worker holds as safetensors into `folder`, a file at a time (FILE_ROWS, FILE_BYTES): beside the rows as
        many bytes are held as one file has, twice.

        Returns:
            What was written, for `index`: table, file, first row and column of each file, and how many it has of both.
        """
        written = []
        for table in self.tables:
            ranges: list[tuple[int, int, list[Tensor]]] = []  # neighbouring columns go into one file
            end = None
            for row, column, part in self._local_parts(table):
                if end != column:
                    ranges.append((row, column, []))
                ranges[-1][2].append(part)
                end = column + part.shape[1]
            for row, column, parts in ranges:
                size = _rows_of(FILE_BYTES, sum(part.shape[1] * part.element_size() for part in parts))
                for start in range(0, len(parts[0]), size):
                    block = torch.cat([part[start : start + size].cpu() for part in parts], dim=1)
                    name = f"{table.name}-{row + start:012d}-{column:06d}.safetensors"
                    save_file({"rows": block.contiguous()}, folder / name)
                    written.append(
                        {
                            "table": table.name,
                            "file": name,
                            "start": row + start,
                            "rows": len(block),
                            "column": column,
                            "columns": block.shape[1],
                        }
                    )
        return written

    def plan(self) -> list[dict[str, Any]]:
        """One line a table: where it lies, and the bytes of the worker that holds most of it."""
        return describe(self.placements, self._storage, self._settings, self.world_size)


def _rows_of(most: int, row_bytes: int) -> int:
    """Rows that are taken at once: of so many bytes each, as many as `most` bytes are, at most FILE_ROWS and at least one."""
    return max(1, min(FILE_ROWS, most // row_bytes))


def _check_stored(table: Table, first: int, values: Tensor, block: Tensor) -> None:
    """Raises UserError where finite values have become infinite in the type of the block that they were copied to.

    Args:
        first: row of the table that the block begins with.
    """
    if all(math.isfinite(extreme) for extreme in block.aminmax()):  # without a copy of the block, as `isfinite` makes
        return
    row, column = (~block.isfinite()).nonzero()[0].tolist()
    kind = str(block.dtype).removeprefix("torch.")
    raise UserError(
        f"table {table.name}: row {first + row} of those that it starts from holds {float(values[row, column]):g}, but "
        f"tables.dtype is {kind}, which holds {torch.finfo(block.dtype).max:g} at most: scale its source down, or take "
        "tables.dtype float32"
    )


def made(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an Adam or AdamW was made with."""
    given = optimizer.defaults
    return {"learning rate": given["lr"], "weight decay": given["weight_decay"], "betas": given["betas"]}


def _as_jagged(ids: Tensor | Jagged) -> Jagged:
    if isinstance(ids, Jagged):
        return ids
    return Jagged(ids.reshape(-1), ids.new_full((len(ids),), math.prod(ids.shape[1:])))


def _local_size(world_size: int, device: torch.device) -> int:
    """Workers of one node, as TorchRec's plan wants to know."""
    return min(world_size, torch.cuda.device_count()) if device.type == "cuda" else world_size
