"""Steps of matrix factorisation with the logistic loss: the training loop's engine, raw TorchRec, and plain torch."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from sides.engine import engine_of, steps_of
from torch import Tensor, nn
from torch.nn import functional as F

from sellarec.collab.model import Sizes
from sellarec.collab.models.mf import Model
from sellarec.collab.task import CollabTask
from sellarec.config import Collab
from sellarec.training.kernels import EPSILON
from sellarec.training.table import Table, initial_rows

INIT, RATE = 0.05, 0.1


def draw(work: dict[str, Any]) -> dict[str, np.ndarray]:
    """Rows of all steps of a repetition, uniform."""
    generator, number = np.random.default_rng(0), work["batch"] * work["steps"]
    ids = {kind: generator.integers(0, work["rows"] // 2, number) for kind in ("user", "item")}
    return {**ids, "label": generator.integers(0, 2, number).astype(np.int8)}


def ours(work: dict[str, Any], folder: Path, optimizer: str = "rowwise-adagrad") -> Callable[[], tuple[int, dict]]:
    settings = Collab(
        dim=work["dim"], biases=False, global_mean=False, l2=0.0, init_std=INIT, batch=work["batch"],
        table_optimizer=optimizer, table_learning_rate=RATE,
    )  # fmt: skip
    size, number = work["rows"] // 2, work["batch"] * work["steps"]
    task = CollabTask(Model(Sizes(size, size, 0.5), settings), settings, np.ones(0, bool))
    engine = engine_of(task, settings)
    known = np.ones(number, bool)
    rows = pa.table({**draw(work), "user_seen": known, "item_seen": known, "weight": np.ones(number, np.float32)})
    batches = [rows.slice(step * work["batch"], work["batch"]) for step in range(work["steps"])]
    return steps_of(engine, batches, number)


def ours_adagrad(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    return ours(work, folder, "adagrad")


class Plain(nn.Module):
    """Starts from the rows that ours start from."""

    def __init__(self, work: dict[str, Any], sparse: bool) -> None:
        super().__init__()
        size = work["rows"] // 2
        for name in ("user", "item"):
            rows = initial_rows(Table(name, size, work["dim"], (name,), init_std=INIT), 0, 0, size)
            layer = nn.Embedding(size, work["dim"], sparse=sparse, _weight=torch.from_numpy(rows))
            self.add_module(name, layer)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.user(user) * self.item(item)).sum(1)


def plain(
    work: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[], Iterator[list[Tensor]]],
) -> Callable[[], tuple[int, dict]]:
    def repeat() -> tuple[int, dict]:
        losses = []
        for user, item, label in batches():
            loss = F.binary_cross_entropy_with_logits(model(user, item), label.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return work["batch"] * work["steps"], {"first loss": losses[0], "losses": losses}

    return repeat


def sparse_adagrad(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    """The best that plain torch has: sparse gradients, and an optimizer that steps the looked-up rows alone."""
    model = Plain(work, sparse=True)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=RATE, eps=EPSILON)
    columns = [torch.from_numpy(column) for column in draw(work).values()]
    return plain(
        work, model, optimizer, lambda: zip(*(column.split(work["batch"]) for column in columns), strict=True)
    )  # fmt: skip


def dense_adam(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    """As CoLLM's code trains its matrix factorisation: a DataLoader that takes rows one by one, and Adam over all rows of the
    tables, with weight decay."""
    model = Plain(work, sparse=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
    columns = [torch.from_numpy(column) for column in draw(work).values()]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*columns), batch_size=work["batch"])
    return plain(work, model, optimizer, lambda: iter(loader))


class RawTorchRec(nn.Module):
    """Both tables as an EmbeddingBagCollection in DistributedModelParallel, each whole on the one worker, in bags of one id."""

    def __init__(self, work: dict[str, Any]) -> None:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
        from torchrec.distributed import DistributedModelParallel
        from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
        from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
        from torchrec.distributed.types import ShardingEnv, ShardingPlan

        super().__init__()
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        size, cpu = work["rows"] // 2, torch.device("cpu")
        configs = [
            EmbeddingBagConfig(name=name, embedding_dim=work["dim"], num_embeddings=size, feature_names=[name])
            for name in ("user", "item")
        ]
        collection = EmbeddingBagCollection(device=torch.device("meta"), tables=configs)
        sharder = EmbeddingBagCollectionSharder(
            {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": RATE, "eps": EPSILON}
        )
        shardings = {config.name: table_wise(rank=0, compute_kernel="fused") for config in configs}
        # without the planner, which has one worker to choose from
        plan = construct_module_sharding_plan(
            collection, shardings, sharder=sharder, local_size=1, world_size=1, device_type="cpu"
        )
        self.tables = DistributedModelParallel(
            collection, ShardingEnv.from_process_group(dist.group.WORLD), cpu, ShardingPlan({"": plan}), [sharder]
        )
        for name, sharded in self.tables.state_dict().items():
            table = Table(name.split(".")[-2], size, work["dim"], (), init_std=INIT)
            (shard,) = sharded.local_shards()
            shard.tensor.copy_(torch.from_numpy(initial_rows(table, 0, 0, size)))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        from torchrec import KeyedJaggedTensor

        lengths = torch.ones(2 * len(user), dtype=torch.int32)
        found = self.tables(KeyedJaggedTensor(["user", "item"], torch.cat([user, item]), lengths=lengths))
        return (found["user"] * found["item"]).sum(1)


def raw_torchrec(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    """TorchRec as its own examples have it: row-wise Adagrad in the backward pass, to which the optimizer has nothing to add."""
    model = RawTorchRec(work)
    columns = [torch.from_numpy(column) for column in draw(work).values()]
    return plain(
        work,
        model,
        model.tables.fused_optimizer,
        lambda: zip(*(column.split(work["batch"]) for column in columns), strict=True),
    )
