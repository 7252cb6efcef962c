"""A task's model and tables on all workers: lookups, steps, scores, rankings, checkpoints, export.

One rule for gradients: the loss is a sum over valid targets divided by their global count, and every engine sums over
workers. Rows of tables are looked up once per step; micro-batches collect gradients in that lookup's output, and one backward
takes them into the tables, after all was found to be finite.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from sellarec.artifacts import Place
from sellarec.config import Backpropagation, Dense, Language, Sparse, Tables
from sellarec.errors import UserError
from sellarec.evaluation.ranking import TopList, UserMetrics, merge, top_k, user_metrics
from sellarec.training import dense
from sellarec.training.exchanges import Waited, counted
from sellarec.training.graph import Kind, ShardedGraph
from sellarec.training.plan import place
from sellarec.training.progress import PROGRESS_SECONDS
from sellarec.training.schedule import learning_rate_factor
from sellarec.training.storage import Storage
from sellarec.training.table import Jagged, index
from sellarec.training.tables import ShardedTables, made
from sellarec.training.task import (
    INITIAL,
    WHOLE,
    WORTH_SHARING,
    Batch,
    CheckedTask,
    MeasuredTask,
    RankingTask,
    SharingTask,
    Task,
    Vectors,
)
from sellarec.training.workers import Workers, together

KINDS: tuple[Kind, ...] = ("user", "item")
"""Tables whose rows a graph smooths, in the order of its rows."""

MEASURED_AT_ONCE = 1024
"""Items, or users, of each worker whose vectors are looked up at once to be measured."""

DENSE_OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}


def _refuse(message: str | None) -> None:
    if message is not None:
        raise UserError(f"{message}: the prepared log is damaged, prepare the data again")


def _is_finite(values: Tensor) -> bool:
    """Whether all values are. A finite sum says so at a fifth of the price; large values may overflow it."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def _part(found: dict[str, Any], rows: slice, parts: Sequence[slice]) -> dict[str, Any]:
    """Some rows of a batch or of its vectors; where there is but one part, all that it has."""
    return found if len(parts) == 1 else {name: value[rows] for name, value in found.items()}


class Engine:
    """A task's model and tables on all workers, with their optimizers."""

    def __init__(self, task: Task, workers: Workers, seed: int, settings: Any, storage: Tables, dtype: str) -> None:
        self.task, self.workers = task, workers
        self.settings = settings
        self.dtype: torch.dtype = getattr(torch, dtype)
        # micro-batches are for language models, whose layers are `blocks`; others would only be slowed down by them
        self.micro_batch = settings.micro_batch if isinstance(settings, Language) and task.blocks else None
        # beside trained tables, frozen ones are kept apart: optimizers would take their rows with those of the others
        self.tables, self.frozen_tables = None, None
        self.trains_tables = isinstance(settings, Sparse) and any(not table.frozen for table in task.tables)
        apart = [table for table in task.tables if table.frozen] if self.trains_tables else []
        self._frozen_features = {name for table in apart for name in table.features}
        if task.tables:
            optimizer = settings if self.trains_tables else None
            placements = place(task.tables, storage, optimizer, workers.world_size, workers.device.type)

            def make(frozen: bool) -> ShardedTables | None:
                group = [placement for placement in placements if (placement.table in apart) is frozen]
                of = None if frozen else optimizer
                return ShardedTables(group, storage, of, workers.tables, workers.device, seed) if group else None

            # rows that are read may be refused on one worker alone
            self.tables, self.frozen_tables = (together(partial(make, frozen), workers) for frozen in (False, True))
        self._graph = None
        if task.graph is not None:
            group = workers.tables if workers.world_size > 1 else None
            of = (task.graph.paths, task.graph.users, task.graph.items, group, workers.device)
            # a worker may find the files unreadable alone
            self._graph = together(partial(ShardedGraph.read, *of), workers)
        self._smoothed: Tensor | None = None
        self.table_seconds = 0.0
        """What steps have spent on tables so far: lookups, the exchange of their vectors and gradients, waiting for other workers
        in it, and the update of rows. On GPUs only what the host waits."""
        self.exchanges = Waited()
        """Of it the exchanges; none where there is one worker."""
        self.optimizer = None
        if task.model is not None:
            if isinstance(settings, Backpropagation) and settings.compile:
                dense.compile_blocks(task.blocks)
            if isinstance(settings, Backpropagation) and settings.checkpoint_activations:
                dense.checkpoint_activations(task.blocks)
            dense.shard(task.model, task.blocks, workers.device, self.dtype)
            task.model.train(isinstance(settings, Dense))
            if isinstance(settings, Dense) and dense.trainable(task.model):
                self.optimizer = DENSE_OPTIMIZERS[settings.optimizer](
                    dense.trainable(task.model),
                    lr=settings.learning_rate,
                    betas=(0.9, settings.beta2),
                    weight_decay=settings.weight_decay,
                    fused=True,  # one kernel for all parameters: a fifth of a small model's step otherwise
                )

    @property
    def optimizers(self) -> dict[str, dict[str, Any]]:
        """The optimizers that step, of the dense weights and of this worker's rows: what they were made with, by name."""
        found: dict[str, dict[str, Any]] = {}
        if self.tables is not None and self.trains_tables:
            found["tables"] = self.tables.optimizer
        if self.optimizer is not None:
            found["dense"] = {
                "optimizer": type(self.optimizer).__name__,
                **made(self.optimizer),
                "largest gradient norm": self.settings.clip,
            }
        return found

    def rate(self, step: int, steps: int) -> float:
        """What the learning rates are multiplied by at a step."""
        return learning_rate_factor(self.settings, step, steps) if isinstance(self.settings, Dense) else 1.0

    def _look_up(self, batch: Batch, step: int | None = None) -> Vectors:
        """The vectors of a batch's ids; of `whole` features the worker's share too, whose ids are added to the batch.

        Args:
            step: which training step they are for; None: they are scored with.
        """
        ids = self.task.lookups(batch)
        frozen = {name: asked for name, asked in ids.items() if name in self._frozen_features}
        vectors = self._look_up_trained(batch, {name: asked for name, asked in ids.items() if name not in frozen}, step)
        if self.frozen_tables is not None and frozen:
            with torch.no_grad():
                vectors |= self.frozen_tables.look_up(frozen)
        return vectors

    def _look_up_trained(self, batch: Batch, ids: Batch, step: int | None) -> Vectors:
        task, tables = self.task, self.tables
        if tables is None:
            return {}
        whole = task.whole if torch.is_grad_enabled() else ()
        shares = {WHOLE + name: tables.share(name) for name in whole}
        batch |= shares
        if self._graph is None:
            return tables.look_up(ids, shares)
        vectors: Vectors = {}
        if self._smoothed is None and not self.trains_tables:  # they stay as they are
            with torch.no_grad():
                self._smoothed = self._smooth()
        rows = self._smoothed if self._smoothed is not None else self._smooth(step)
        columns = rows.shape[1] // 2
        asked: list[tuple[Kind, str, Any]] = []
        for kind in KINDS:
            (table,) = (table for table in task.tables if table.name == kind)
            for feature in table.features:
                if feature in shares:
                    start = 0 if kind == "user" else self._graph.rows - len(batch[feature])
                    vectors[feature] = rows[start : start + len(batch[feature]), :columns]
                elif feature in ids:
                    asked.append((kind, feature, ids.pop(feature)))
        # one exchange for all, and in the backward pass one gradient as large as the tables
        wanted = [(kind, of.values if isinstance(of, Jagged) else of) for kind, _, of in asked]
        for (_, feature, of), found in zip(asked, self._graph.fetch(rows, wanted), strict=True):
            for name, part in ((feature, found[..., :columns]), (INITIAL + feature, found[..., columns:])):
                vectors[name] = Jagged(part, of.lengths) if isinstance(of, Jagged) else part
        return vectors | (tables.look_up(ids) if ids else {})

    def _agree(self, batch: Batch, rows: pa.Table, count: float = 0.0) -> float:
        """The sum of all workers' counts. On all workers a UserError where one has an id that its table doesn't have.

        Args:
            rows: what the batch was made of.
        """
        ids = self.task.lookups(batch)
        row = rows["row"].to_numpy() if "row" in rows.column_names else None
        found = (tables.out_of_range(ids, row) for tables in (self.tables, self.frozen_tables) if tables is not None)
        wrong = next((message for message in found if message is not None), None)
        total, refused = self.workers.sum(count, float(wrong is not None))
        if refused:
            together(partial(_refuse, wrong), self.workers)
        return total

    def _smooth(self, step: int | None = None) -> Tensor:
        """The worker's share of users and items, smoothed over the graph (at a training step without what the task masks), and
        beside that as they lie in the tables."""
        assert self.tables is not None and self._graph is not None and self.task.graph is not None
        shares: dict[str, Tensor] = {kind: self.tables.share(kind) for kind in KINDS}
        found = self.tables.look_up({}, shares)
        rows = shown = torch.cat([found[kind] for kind in KINDS])
        if step is not None:
            nodes = torch.cat([shares["user"], self.task.graph.users + shares["item"]])
            shown = self.task.mask(rows, nodes, step)
        return torch.cat([self.task.propagate(shown, self._graph.multiply), rows], dim=1)

    @contextlib.contextmanager
    def _scoring(self) -> Iterator[None]:
        """Without dropout; rows that a graph smooths are smoothed once for all slices."""
        model = self.task.model
        training = model is not None and model.training
        if model is not None:
            model.eval()
        if self._graph is not None and self._smoothed is None:
            self._smoothed = self._smooth()
        yield
        if self.trains_tables:
            self._smoothed = None
        if model is not None:
            model.train(training)

    def _to_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.workers.device, non_blocking=True) for name, value in batch.items()}

    def _parts(self, rows: int) -> list[slice]:
        size = self.micro_batch or rows
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    def _by_length(self, rows: pa.Table) -> pa.Table:
        """Prompts by their length, so that those of a micro-batch are alike long and little is padded."""
        if self.micro_batch is None or "tokens" not in rows.column_names:
            return rows
        return rows.take(np.argsort(pc.list_value_length(rows["tokens"]).to_numpy(), kind="stable"))

    def _to_score(self, rows: pa.Table) -> pa.Table:
        """Rows in the order that micro-batches are cut in. Those that begin alike share it where all workers' rows together are
        worth it: to share takes another number of passes through layers that the workers hold together."""
        rows = self._by_length(rows)
        if self.micro_batch is None or not isinstance(self.task, SharingTask):
            return rows
        arranged, shared, alone = self.task.share(rows, self.micro_batch)
        shared_by_all, alone_of_all = self.workers.sum(shared, alone)
        return arranged if shared_by_all <= WORTH_SHARING * alone_of_all else rows

    def step(self, rows: pa.Table, step: int, rate: float) -> float:
        """One optimizer step on this worker's slice; `rate` multiplies the learning rates.

        Returns:
            The global mean loss.

        Raises:
            FloatingPointError: the loss or a gradient is not finite; no weight has been changed. On all workers alike.
        """
        task, workers = self.task, self.workers
        rows = self._by_length(rows)
        batch = self._to_device(task.collate(rows, step))
        count = self._agree(batch, rows, task.targets(batch).item())
        if self.tables is not None and self.trains_tables:
            self.tables.set_learning_rate(self.settings.table_learning_rate * rate)
        with self._on_tables():
            vectors = self._look_up(batch, step)
        trained = {name: value for name, value in vectors.items() if name not in self._frozen_features}
        found = {name: value.values if isinstance(value, Jagged) else value for name, value in trained.items()}
        leaves = {name: value.detach().requires_grad_(self.trains_tables) for name, value in found.items()}
        given = vectors | {
            name: Jagged(leaves[name], value.lengths) if isinstance(value, Jagged) else leaves[name]
            for name, value in trained.items()
        }
        parts = self._parts(len(batch["weight"]))
        total = 0.0
        for number, part in enumerate(parts):
            if task.model is not None:
                task.model.set_requires_gradient_sync(number == len(parts) - 1)
            loss = task.loss(task.model, _part(batch, part, parts), _part(given, part, parts), workers)
            loss = loss / max(count, 1.0)
            loss.backward()
            total += loss.item()
        gradients = {
            name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            for name, leaf in leaves.items()
            if leaf.requires_grad
        }
        finite = all(_is_finite(gradient) for gradient in gradients.values())
        if self.optimizer is not None:
            norm = torch.nn.utils.clip_grad_norm_(dense.trainable(task.model), self.settings.clip)
            finite = finite and bool(torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        mean, bad = workers.sum(total, 0.0 if finite else 1.0)
        if bad or not math.isfinite(mean):
            what = "loss" if not math.isfinite(mean) else "gradient"
            raise FloatingPointError(f"the {what} is not finite (mean loss {mean})")
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * rate
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.tables is not None and self.trains_tables:
            with self._on_tables():
                torch.autograd.backward(list(found.values()), list(gradients.values()))
                self.tables.step()
        return mean

    @contextlib.contextmanager
    def _on_tables(self) -> Iterator[None]:
        """Count the time as spent on tables, and of it the exchanges."""
        start = time.perf_counter()
        alone = self.workers.world_size == 1
        with contextlib.nullcontext() if alone else counted(self.workers.tables, self.exchanges):
            yield
        self.table_seconds += time.perf_counter() - start

    @torch.no_grad()
    def score(self, slices: Iterable[pa.Table], report: Callable[[int], None]) -> dict[str, np.ndarray] | None:
        """Scores of all workers' rows: `row` int64 and `score` float32, padding left out, sorted by row.

        All workers call it with equally many slices; worker 0 gets the whole, the others None.

        Args:
            report: is told every PROGRESS_SECONDS how many slices are done.
        """
        task = self.task
        found = []
        told = time.monotonic()
        with self._scoring():
            for number, rows in enumerate(slices):
                if time.monotonic() - told > PROGRESS_SECONDS:
                    told = time.monotonic()
                    report(number)
                rows = self._to_score(rows)
                batch = self._to_device(task.collate(rows, None))
                self._agree(batch, rows)
                vectors = self._look_up(batch)
                parts = self._parts(len(batch["weight"]))
                scores = [
                    task.score(task.model, _part(batch, part, parts), _part(vectors, part, parts)) for part in parts
                ]
                valid = rows["weight"].to_numpy() > 0
                found.append((rows["row"].to_numpy()[valid], torch.cat(scores).float().cpu().numpy()[valid]))
        gathered = self.workers.collect(found)
        if gathered is None:
            return None
        row = np.concatenate([row for part in gathered for row, _ in part])
        score = np.concatenate([score for part in gathered for _, score in part])
        order = np.argsort(row)
        return {"row": row[order], "score": score[order]}

    @torch.no_grad()
    def rank(self, batches: Iterable[pa.Table], k: int, report: Callable[[int], None]) -> np.ndarray | None:
        """Each query's k best items of the whole catalog but for its `excluded` ones; int64 [queries, k] on worker 0, elsewhere
        None.

        The workers share out a batch's queries to make the users' vectors, gather those, and rank each its share of the
        catalog for all of them; the lists are merged. So no worker holds more of the catalog than its share.

        Args:
            batches: whole global batches of `sellarec.evaluation.queries`, the same on all workers.
        """
        task, workers, tables = self.task, self.workers, self.tables
        assert isinstance(task, RankingTask) and tables is not None
        found = []
        told = time.monotonic()
        with self._scoring():
            ids = tables.share("item")
            if self._smoothed is not None:
                rows = self._smoothed[len(self._smoothed) - len(ids) :, : self._smoothed.shape[1] // 2]
            else:
                rows = tables.look_up({}, {"item": ids})["item"]
            rows = task.catalog(ids, rows)
            first = int(ids[0]) if len(ids) else 0
            for number, batch_rows in enumerate(batches):
                if time.monotonic() - told > PROGRESS_SECONDS:
                    told = time.monotonic()
                    report(number)
                valid = int((batch_rows["weight"].to_numpy() > 0).sum())
                share = -(-len(batch_rows) // workers.world_size)
                places = np.arange(workers.rank * share, (workers.rank + 1) * share) % len(batch_rows)
                own = batch_rows.take(places)
                batch = self._to_device(task.collate(own, None))
                self._agree(batch, own)
                users = workers.gather(task.users(task.model, batch, self._look_up(batch)))[:valid]
                excluded = Jagged.of(batch_rows["excluded"].slice(0, valid)).to(workers.device)
                best = top_k(users, rows, first, k, (excluded.values, excluded.lengths), scores_of=task.products)
                parts = zip(
                    *(workers.gather(part.to(users.device)).chunk(workers.world_size) for part in best), strict=True
                )
                best = reduce(partial(merge, k=k), (TopList(*part) for part in parts))
                found.append(best.items.cpu().numpy())
        return np.concatenate(found) if workers.rank == 0 else None

    @torch.no_grad()
    def measure(self) -> dict[str, Any] | None:
        """What the task measures of some items and users, on worker 0; elsewhere None. All workers call it, in a stage that
        trains."""
        task, workers = self.task, self.workers
        assert isinstance(task, MeasuredTask) and task.model is not None
        items: dict[str, list[Tensor]] = {}
        users: list[tuple[Tensor, ...]] = []
        with self._scoring():
            for some in torch.from_numpy(task.measured).split(MEASURED_AT_ONCE * workers.world_size):
                own = workers.share_of(len(some))
                batch = self._to_device(dict.fromkeys(task.measured_features, some[own]))
                for name, vectors in self._look_up(batch).items():
                    gathered = workers.gather(vectors)[: len(some)]
                    if workers.rank == 0:
                        items.setdefault(name, []).append(gathered)
            if task.measured_rows is not None:
                for start in range(0, len(task.measured_rows), MEASURED_AT_ONCE * workers.world_size):
                    rows = task.measured_rows.slice(start, MEASURED_AT_ONCE * workers.world_size)
                    own_rows = rows.take(workers.share_of(len(rows)).numpy())
                    batch = self._to_device(task.collate_measured(own_rows))
                    self._agree(batch, own_rows)
                    views = task.views_of_users(task.model, batch, self._look_up(batch))
                    both = tuple(workers.gather(view)[: len(rows)] for view in views)
                    if workers.rank == 0:
                        users.append(both)
        weights = dense.trained_weights(task.model)
        if workers.rank > 0:
            return None
        vectors = {name: torch.cat(parts) for name, parts in items.items()}
        of_users = [torch.cat(parts) for parts in zip(*users, strict=True)] if users else None
        return task.measure(weights, vectors, of_users)

    def plan(self) -> list[dict[str, Any]]:
        """One line a table: where it lies, and the bytes of the worker that holds most of it."""
        return [line for tables in (self.tables, self.frozen_tables) if tables is not None for line in tables.plan()]

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds: of the tables those that are trained, as frozen ones are read again."""
        state: dict[str, Any] = {}
        if self.tables is not None and self.trains_tables:
            state["tables"] = self.tables.state()
        if self.optimizer is not None:
            model, optimizer = get_state_dict(
                self.task.model, self.optimizer, options=StateDictOptions(ignore_frozen_params=True)
            )
            state |= {"model": model, "optimizer": optimizer}
        return state

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Of what a checkpoint holds, the shape of each table that is trained and of each weight; by any number of workers."""
        tables = self.tables.tables if self.tables is not None and self.trains_tables else ()
        found = {f"table {table.name}": [table.rows, table.dim] for table in tables}
        if self.optimizer is not None:
            assert self.task.model is not None
            trained = self.task.model.named_parameters()
            found |= {f"weight {name}": list(weight.shape) for name, weight in trained if weight.requires_grad}
        return found

    def save_checkpoint(self, folder: str) -> None:
        dcp.save(self._state(), checkpoint_id=folder, process_group=self.workers.control)

    def load_checkpoint(self, folder: str) -> None:
        state = self._state()
        dcp.load(state, checkpoint_id=folder, process_group=self.workers.control)
        if self.tables is not None and self.trains_tables:
            self.tables.load_state(state["tables"])
        if self.optimizer is not None:
            set_state_dict(
                self.task.model,
                self.optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
                options=StateDictOptions(ignore_frozen_params=True, strict=False),
            )
            for group in self.optimizer.param_groups:  # may have changed since; learning rates are set at each step
                group["weight_decay"] = self.settings.weight_decay

    def export(self, output: Place, storage: Storage) -> None:
        """Write the trained state in open formats: sharded safetensors for tables, what the task says for the rest.

        Raises:
            StageFailed: on all workers: `storage` failed for too long.
        """
        weights = dense.trained_weights(self.task.model) if self.optimizer is not None else {}
        what = f"writing the artifact {output}"

        def write() -> list[dict[str, Any]]:
            written: list[dict[str, Any]] = []
            for tables in (self.tables, self.frozen_tables) if self.trains_tables else ():
                if tables is not None:
                    with (output / "tables").writing() as folder:
                        written += tables.save(folder)
            if self.workers.rank == 0 and self.optimizer is not None:
                with output.writing() as folder:
                    self.task.save(folder, weights)
            return written

        storage.first(what, partial(output.delete, "tables"))
        parts = [part for of_worker in storage.attempt(what, write) for part in of_worker]

        def write_index() -> None:
            for table in self.task.tables if self.trains_tables else ():
                (output / "tables").write_json(f"{table.name}.json", index(table, parts))

        storage.first(what, write_index)

    @torch.no_grad()
    def check_export(self, rows: pa.Table, output: Place) -> None:
        """Have worker 0 load what `export` has written, as other programs do, and compare it with the trained model.

        Args:
            rows: some prepared rows of this worker's.

        Raises:
            UserError: on worker 0: the two don't agree.
        """
        task = self.task
        assert isinstance(task, CheckedTask) and task.model is not None
        with self._scoring():
            batch = self._to_device(task.collate(rows, None))
            folder = output.local() if self.workers.rank == 0 else None
            task.check_saved(task.model, batch, folder, self.dtype, dense.trained_weights(task.model))


def rank_queries(
    engine: Engine, batches: Sequence[pa.Table], cutoffs: Sequence[int], report: Callable[[int], None]
) -> UserMetrics | None:
    """Metrics of ranking the whole catalog for queries, on worker 0; elsewhere None. All workers call it."""
    best = engine.rank(batches, max(cutoffs), report)
    if best is None:
        return None
    rows = pa.concat_tables(batch.select(["user", "relevant", "weight"]) for batch in batches)
    rows = rows.filter(pc.greater(rows["weight"], 0))
    relevant = Jagged.of(rows["relevant"])
    return user_metrics(rows["user"].to_numpy(), best, (relevant.values.numpy(), relevant.lengths.numpy()), cutoffs)
