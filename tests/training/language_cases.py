"""Training stages of the language model as each worker of a test does, without Ray."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from engine_cases import SEED, storage_of, workers_of
from small import save_table, small_log

from sellarec.artifacts import Place
from sellarec.collab.task import build_collab
from sellarec.config import Adapt, Collab, Fuse, Pretrain, Prompt, Tables
from sellarec.data.log import Log
from sellarec.errors import UserError
from sellarec.fusion.fuse import build_fuse
from sellarec.language import llm as llms
from sellarec.language.adapt import TextTask, build_adapt
from sellarec.language.pretrain import build_pretrain
from sellarec.training import dense
from sellarec.training.engine import Engine
from sellarec.training.loop import seed_everything
from sellarec.training.table import Table
from sellarec.training.task import Task
from sellarec.training.workers import together_of_first

BATCH, STEPS = 6, 4
ITEMS = 10
PROMPT = Prompt(template="compact")


@dataclass(frozen=True)
class Case:
    """A stage that is trained for STEPS steps.

    Attributes:
        model: folder of the language model.
        adapter: what stage adapt has saved, for fuse.
        min_block: smaller blocks are gathered with the root (bytes).
        folder: what is exported goes there.
        checkpoint: where the state is saved before step `save_at`, or loaded from before step `start_at`.
    """

    model: Path
    titles: list[str]
    settings: Adapt | Fuse
    storage: str = "float32"
    dtype: str = "float32"
    min_block: int = 0
    adapter: Path | None = None
    folder: Path | None = None
    checkpoint: Path | None = None
    save_at: int | None = None
    start_at: int = 0


def rows_of(step: int) -> pa.Table:
    """The global batch of a step: prompts of different lengths."""
    generator = np.random.default_rng(step)
    histories = [generator.integers(0, ITEMS, size).tolist() for size in generator.integers(0, 5, BATCH)]
    ids = generator.integers(0, ITEMS, (2, BATCH))
    return pa.table(
        {
            "row": np.arange(BATCH) + BATCH * step,
            "user": ids[0],
            "item": ids[1],
            "label": pa.array(generator.integers(0, 2, BATCH), pa.int8()),
            "history": pa.array(histories, pa.list_(pa.int64())),
            "user_seen": np.ones(BATCH, bool),
            "item_seen": np.ones(BATCH, bool),
            "weight": np.ones(BATCH, np.float32),
        }
    )


def rate_at(step: int) -> float:
    return (1.0, 0.5, 2.0, 1.5)[step]


def prepared(task: Task, step: int, rank: int = 0, world_size: int = 1) -> pa.Table:
    rows = task.prepare(rows_of(step), 0, np.full(BATCH, step))
    share = BATCH // world_size
    return rows.slice(rank * share, share)


def redraw(model: torch.nn.Module) -> None:
    """Weights to train from, the same however the frozen ones are stored, of which none is idle (LoRA starts with zeros)."""
    generator = torch.Generator().manual_seed(SEED)
    for name, weight in sorted(model.named_parameters()):
        if weight.requires_grad and not weight.is_meta:  # on worker 0
            drawn = torch.randn(weight.shape, generator=generator)
            weight.data = 1 + 0.1 * drawn if "magnitude" in name else 0.1 * drawn


def adapt_task(case: Case) -> TextTask:
    source = llms.LlmSource(str(case.model), None, "", case.storage)
    task = build_adapt(source, case.titles, PROMPT, "movie", case.settings)
    if case.settings.method == "lora":
        redraw(task.model)
    return task


def fuse_task(case: Case, log: Log) -> Task:
    """With matrix factorisation of as many users as items, whose tables are in the log's folder."""
    torch.manual_seed(SEED)
    source = llms.LlmSource(str(case.model), None, "", case.storage)
    collab = build_collab(log, Collab(dim=4), log.directory)
    width = llms.read_config(case.model).hidden_size
    rows = np.random.default_rng(9).standard_normal((ITEMS, width)).astype(np.float32)
    semantic = Table("semantic", ITEMS, width, ("semantic",), read=lambda low, high: rows[low:high])
    return build_fuse(
        source, case.titles, PROMPT, "movie", case.adapter, collab, semantic, 6, None, None, case.settings, SEED
    )  # fmt: skip


@dataclass(frozen=True)
class Lines:
    """Pre-training further for STEPS steps.

    Attributes:
        model: folder of the language model.
        texts: of which a step's global batch are the next BATCH.
        folder: what is exported goes there.
    """

    model: Path
    texts: list[str]
    settings: Pretrain
    folder: Path | None = None


def lines_of(case: Lines, task: Task, step: int, rank: int = 0, world_size: int = 1) -> pa.Table:
    texts = case.texts[BATCH * step : BATCH * (step + 1)]
    rows = task.prepare(pa.table({"text": texts, "weight": np.ones(BATCH, np.float32)}), 0, np.full(BATCH, step))
    share = BATCH // world_size
    return rows.slice(rank * share, share)


def pretrain(case: Lines) -> dict[str, Any]:
    """The losses, and on worker 0 the weights."""
    workers = workers_of()
    task = together_of_first(partial(build_pretrain, case.model, case.settings), workers)
    dense.MIN_BLOCK_BYTES = 0
    engine = Engine(task, workers, SEED, case.settings, Tables(), "float32")
    losses = [
        engine.step(lines_of(case, task, step, workers.rank, workers.world_size), step, engine.rate(step, STEPS))
        for step in range(STEPS)
    ]
    weights = {name: weight.numpy() for name, weight in dense.trained_weights(task.model).items()}
    engine.export(Place.of(str(case.folder)), storage_of(workers))
    return {"losses": losses, "weights": weights}


def save_tables(folder: Path) -> Log:
    for number, name in enumerate(("user", "item")):
        save_table(folder / "tables", name, np.random.default_rng(number).standard_normal((ITEMS, 4)), (2,))
    return small_log(folder, ITEMS, ITEMS, np.ones(ITEMS, bool))


def train(case: Case, log: Log | None = None) -> dict[str, Any]:
    """What a worker finds: the losses; whole gradients of each step, as they are clipped, and at last the weights; the
    types of the optimizer's state, the bytes of weights that it has read, and of frozen ones that it holds."""
    dense.MIN_BLOCK_BYTES = case.min_block
    workers = workers_of()
    build = partial(adapt_task, case) if log is None else partial(fuse_task, case, log)
    task = together_of_first(build, workers)
    read = sum(weight.nbytes for weight in task.model.parameters() if not weight.is_meta)
    engine = Engine(task, workers, SEED, case.settings, Tables(), case.dtype)
    gradients: list[dict[str, np.ndarray]] = []
    trained = {name: weight for name, weight in task.model.named_parameters() if weight.requires_grad}
    engine.optimizer.register_step_pre_hook(
        lambda *_: gradients.append({name: weight.grad.full_tensor().numpy() for name, weight in trained.items()})
    )
    if case.start_at:
        engine.load_checkpoint(str(case.checkpoint))
    losses = []
    for step in range(case.start_at, STEPS):
        if step == case.save_at:
            engine.save_checkpoint(str(case.checkpoint))
        torch.manual_seed(step)  # dropout, as the loop seeds it
        losses.append(engine.step(prepared(task, step, workers.rank, workers.world_size), step, rate_at(step)))
    moments = [state for of_weight in engine.optimizer.state.values() for state in of_weight.values()]
    frozen = [weight for weight in task.model.parameters() if not weight.requires_grad]
    found = {
        "losses": losses,
        "gradients": gradients,
        "weights": {name: weight.full_tensor().detach().numpy() for name, weight in trained.items()},
        "moments": {str(moment.dtype) for moment in moments},
        "read_bytes": read,
        "frozen_bytes": sum(weight.to_local().nbytes for weight in frozen),
        "scores": engine.score([prepared(task, 0, workers.rank, workers.world_size)], lambda _: None),
    }
    if case.folder is not None:
        output = Place.of(str(case.folder))
        engine.export(output, storage_of(workers))
        found["checked"] = check(engine, task, output)
        if workers.rank == 0:
            spoil(next(file for file in case.folder.rglob("*.safetensors")))
        dist.barrier(group=workers.control)
        found["spoilt"] = check(engine, task, output)
    return found


def draw_dropout(case: Case, number: int) -> dict[str, np.ndarray]:
    """Of a batch of BATCH times the same row, and so many draws of dropout masks, by which the weights don't move: losses [n],
    and gradients [n, weights]."""
    workers = workers_of()
    task = together_of_first(partial(adapt_task, case), workers)
    engine = Engine(task, workers, SEED, case.settings, Tables(), case.dtype)
    rows, gradients, losses = prepared(task, 0).take([0] * (BATCH // workers.world_size)), [], []
    trained = [weight for weight in task.model.parameters() if weight.requires_grad]
    engine.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(torch.cat([weight.grad.full_tensor().flatten() for weight in trained]).numpy())
    )
    for draw in range(number):
        seed_everything(SEED, "adapt", draw, workers.rank)
        losses.append(engine.step(rows, 0, 0.0))
    return {"losses": np.array(losses), "gradients": np.stack(gradients)}


def check(engine: Engine, task: Task, output: Place) -> str | None:
    """What the check of the export says on this worker."""
    try:
        engine.check_export(prepared(task, 0, engine.workers.rank, engine.workers.world_size), output)
    except UserError as error:
        return str(error)
    return None


def spoil(file: Path) -> None:
    """Change one tensor by a little."""
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    name = min(name for name in weights if "lora_B" in name or ".0." in name)
    save_file(weights | {name: weights[name] * 1.2}, file, metadata={"format": "pt"})


def train_plainly(case: Case) -> dict[str, Any]:
    """The same by plain torch in one process, in float32, on the whole batch at once; stored weights are rounded beforehand."""
    task = adapt_task(Case(case.model, case.titles, case.settings))
    settings, storage = case.settings, getattr(torch, case.storage)
    for weight in task.model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.to(storage).float()
    trained = {name: weight for name, weight in task.model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, settings.beta2)
    )
    task.model.train()
    losses, gradients = [], []
    for step in range(STEPS):
        batch = task.collate(prepared(task, step), step)
        loss = task.loss(task.model, batch, {}, None) / BATCH
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), settings.clip)
        gradients.append({name: weight.grad.numpy().copy() for name, weight in trained.items()})
        optimizer.param_groups[0]["lr"] = settings.learning_rate * rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    task.model.eval()
    with torch.no_grad():
        scores = task.score(task.model, task.collate(prepared(task, 0), None), {}).numpy()
    weights = {name: weight.detach().numpy() for name, weight in trained.items()}
    return {"losses": losses, "gradients": gradients, "weights": weights, "scores": scores}
