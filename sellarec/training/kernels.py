"""How TorchRec looks up, shards and trains a worker's tables: its collections, their plan, and the optimizers of its kernels."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sellarec.config import Sparse, Tables
from sellarec.training.plan import CACHED_SHARE, Placement, column_share

FUSED = {"EXACT_SGD": "SGD", "EXACT_ADAGRAD": "Adagrad", "EXACT_ROWWISE_ADAGRAD": "row-wise Adagrad"}
"""Optimizers of the kernels, as fbgemm names them and as they are known."""

EPSILON = 1e-8
"""Added to the root of Adagrad's sums of squares, which start from 0."""

MOST_BAGS = 1.5
"""Bags that are made for an id, at most, where rows are taken by bags of one id."""


def fused(settings: Sparse | None, storage: Tables) -> dict[str, Any]:
    """How kernels update rows in the backward pass; without settings rows are only looked up."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode

    found: dict[str, Any] = {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.0}
    if settings is not None:
        kinds = {
            "sgd": EmbOptimType.EXACT_SGD,
            "adagrad": EmbOptimType.EXACT_ADAGRAD,
            "rowwise-adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        }
        found = {"optimizer": kinds[settings.table_optimizer], "learning_rate": settings.table_learning_rate}
        if settings.table_optimizer != "sgd":
            found["eps"] = EPSILON
        if settings.table_weight_decay:
            found |= {"weight_decay": settings.table_weight_decay, "weight_decay_mode": WeightDecayMode.L2}
    if storage.placement == "uvm-caching":
        found["cache_load_factor"] = CACHED_SHARE
    return found


def sharder(bags: bool, settings: dict[str, Any]) -> Any:
    """A sharder of bags, or of rows, with settings as `fused` makes them; on CPUs TorchRec's own leave out that they shard by
    rows."""
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

    class Bags(EmbeddingBagCollectionSharder):
        def sharding_types(self, compute_device_type: str) -> list[str]:
            return ["row_wise", "table_wise", "column_wise"]

    class Rows(EmbeddingCollectionSharder):
        def sharding_types(self, compute_device_type: str) -> list[str]:
            return ["row_wise", "table_wise"]

    return (Bags if bags else Rows)(fused_params=settings)


def sharding(placement: Placement, width: int, workers: int, kernel: str) -> Any:
    """TorchRec's sharding of a piece so wide."""
    from torchrec.distributed.sharding_plan import column_wise, row_wise, table_wise

    if placement.sharding == "row-wise" and workers > 1:
        return row_wise(compute_kernel=kernel)
    if placement.sharding == "column-wise":
        shares = [len(column_share(range(width), worker, workers)) for worker in range(workers)]
        # only of those that hold any: TorchRec takes no empty ones
        return column_wise(size_per_rank=[columns for columns in shares if columns], compute_kernel=kernel)
    # one worker's rows are a whole table: ids need no sorting by the workers that hold them
    return table_wise(rank=placement.worker or 0, compute_kernel=kernel)


def collection(
    bags: bool, width: int, pieces: Sequence[tuple[str, Placement]], keys: Mapping[str, list[str]], storage: Tables
) -> nn.Module:
    """The pieces of one width, not yet sharded; `keys`: under which ids are looked up in each."""
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, PoolingType
    from torchrec.modules.embedding_configs import DataType

    types = {"float32": DataType.FP32, "float16": DataType.FP16, "bfloat16": DataType.BF16}
    settings = [
        {
            "name": name,
            "embedding_dim": width,
            "num_embeddings": placement.table.rows,
            "feature_names": keys[name],
            "data_type": types[storage.dtype],
            "init_fn": _leave_as_is,
        }
        for name, placement in pieces
    ]
    if bags:
        of_bags = [EmbeddingBagConfig(pooling=PoolingType.SUM, **found) for found in settings]
        return EmbeddingBagCollection(device=torch.device("meta"), tables=of_bags)
    return EmbeddingCollection(device=torch.device("meta"), tables=[EmbeddingConfig(**found) for found in settings])


def take_rows_by_bags(collection: Any) -> None:
    """Have the CPU kernels of a sharded collection take rows as bags of one id where they are to be trained: the backward pass of
    bags is faster than that of rows.

    A kernel gets n_1 to n_F ids of F features, and gives float32 [n_1 + ... + n_F, D] as it did. It makes as many bags of each
    feature, so where they differ much (users, and the items of histories) it takes rows as rows.
    """
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import PoolingMode
    from torchrec import KeyedJaggedTensor
    from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding

    def look_up(kernel: Any, features: KeyedJaggedTensor) -> Tensor:
        counts = features.length_per_key()
        bags = max(1, *counts)  # it doesn't take none
        pays = torch.is_grad_enabled() and bags * len(counts) <= MOST_BAGS * max(1, sum(counts))
        kernel.pooling_mode = PoolingMode.SUM if pays else PoolingMode.NONE
        if not pays:
            return kernel(features.values().long(), features.offsets().long())
        places = torch.arange(bags)
        starts = itertools.accumulate(counts, initial=0)
        offsets = [start + places.clamp(max=count) for start, count in zip(starts, counts, strict=False)]
        values = features.values().long()
        pooled = kernel(values, torch.cat([*offsets, torch.tensor([len(values)])]))
        return _FirstBags.apply(pooled.view(bags, len(counts), -1), counts)

    for lookup in collection._lookups:
        for found in lookup.modules():
            if isinstance(found, BatchedFusedEmbedding):
                found.forward = partial(look_up, found.emb_module)


class _FirstBags(torch.autograd.Function):
    """float32 [bags, F, D] -> [n_1 + ... + n_F, D]: the first n_f bags of each feature, one feature after the other.

    Each slice's gradient would otherwise be made as large as all bags.
    """

    @staticmethod
    def forward(ctx: Any, bags: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.shape, ctx.counts = bags.shape, counts
        return torch.cat([rows[:count] for rows, count in zip(bags.unbind(1), counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        of_bags = gradient.new_empty(ctx.shape)
        for rows, part, count in zip(of_bags.unbind(1), gradient.split(ctx.counts), ctx.counts, strict=True):
            rows[:count] = part
            rows[count:] = 0
        return of_bags, None


def _leave_as_is(weight: Tensor) -> Tensor:
    return weight
