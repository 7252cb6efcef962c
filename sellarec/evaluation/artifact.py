"""Evaluating a trained collaborative model by its artifact, or a recommender by its export: scores of the rows of a split, and
rankings for its users.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sellarec.artifacts import Place
from sellarec.collab.rows import flat, lists
from sellarec.collab.task import build_collab
from sellarec.command_line import parse
from sellarec.config import Config, Evaluation
from sellarec.data.log import FACTS_FILE, Log, first_other_id, read_log
from sellarec.errors import UserError
from sellarec.evaluation.queries import PROTOCOL, write_candidates, write_queries
from sellarec.evaluation.ranking import UserMetrics, ranking_records, user_metrics
from sellarec.evaluation.results import evaluate_scores
from sellarec.serving.recommender import EXPORT, UNKNOWN, Recommender, read_export
from sellarec.training.cluster import Group, check_room, connect, joins_cluster
from sellarec.training.launch import run_workers
from sellarec.training.progress import PROGRESS_SECONDS, Console
from sellarec.training.scoring import Scoring, score_worker
from sellarec.training.stream import Order, counts_in_words, named_counts, row_groups

FULL, NONE = "full", "none"


@dataclass(frozen=True)
class Trained:
    """A trained collaborative model: its artifact's folder, the config it was trained with, its stage, and the fingerprint of the
    prepared log that it was trained on."""

    folder: Path
    config: Config
    stage: str
    log: str


def read_trained(folder: Path) -> Trained:
    """Open an artifact of stage collab or align.

    Raises:
        UserError: the folder holds none.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no finished artifact: its manifest.json can't be read ({error})") from error
    if manifest.get("stage") not in ("collab", "align"):
        raise UserError(
            f"{folder} is of stage {manifest.get('stage')}, but a collaborative model is needed, of collab or align; of a whole "
            "run, evaluate the export that jobs/export.py makes"
        )
    config = parse([str(folder / "config.yaml")], program="evaluate.py")
    return Trained(folder, config, manifest["stage"], manifest["inputs"]["prepare"])


def check_ids(trained: Trained, log: Log, kinds: Sequence[str]) -> None:
    """Refuse a log whose ids mean other users or items than the model's, of which there may be equally many.

    The log that the model was trained on is known by its fingerprint. Another one is compared with it, where it lies beside the
    artifact: it may have been prepared again, or split otherwise, with the same ids.

    Args:
        kinds: of user and item, those that the model has rows of.

    Raises:
        UserError: naming the first id with what both logs mean by it; or there is nothing to compare with.
    """
    given = json.loads((log.directory / FACTS_FILE).read_text(encoding="utf-8")).get("fingerprint")
    if given == trained.log:
        return
    beside = trained.folder.absolute().parent / f"prepare-{trained.log}"
    if not (beside / FACTS_FILE).is_file():
        raise UserError(
            f"{trained.folder} was trained on the log prepare-{trained.log}, but that in {log.directory} is "
            f"{'of no run' if given is None else f'prepare-{given}'}, and there is no {beside} to compare their ids with: "
            "evaluate it on that log, or put that log there"
        )
    origin = read_log(beside)
    for kind in kinds:
        other = first_other_id(log, origin, kind)
        if other is not None:
            number, expected, found = other
            raise UserError(
                f"{kind} {number} of the log in {log.directory} is '{found}', but {trained.folder} was trained on "
                f"{beside}, where it is '{expected}': evaluate it on that, or on a log prepared with --init-from that"
            )


def evaluate_artifact(settings: Evaluation) -> list[dict[str, Any]]:
    """Score and rank, an artifact on a worker group of its own, an export in this process; gives the records of results.json.

    Raises:
        UserError: no artifact or log, a model of another log, a ranking that the model can't make.
        StageFailed: the workers failed.
    """
    if (settings.artifact / EXPORT).is_file():
        return _evaluate_export(settings)
    if settings.llm is not None:
        raise UserError(
            f"--llm is {settings.llm}, but {settings.artifact} is no export, of which it would be the base model"
        )
    trained, log, console = read_trained(settings.artifact), read_log(settings.data), Console()
    collab = dataclasses.replace(trained.config.collab, train_on="rows")
    build = partial(build_collab, log, collab, settings.artifact.absolute())
    task = build()
    for table in task.tables:
        if table.read_rows is not None and table.read_rows < table.rows:
            raise UserError(
                f"table {table.name} of {settings.artifact} has {table.read_rows} rows, but the log in {settings.data} has "
                f"{table.rows}: it was trained on another log; evaluate it on that, or train on from it (collab.init_from)"
            )
    check_ids(trained, log, [table.name for table in task.tables if table.name in ("user", "item")])
    if settings.ranking == FULL and not task.network.is_product:
        raise UserError(
            f"{settings.artifact} is a {collab.model}, whose score is no product of a user's and an item's vector, so the whole "
            "catalog can't be ranked with it: take --ranking candidates:100, or none"
        )
    if not joins_cluster():
        check_room(settings.workers)
    beside, work = Place.of(str(settings.out.absolute().parent)), f".{settings.out.name}.work"
    place = beside / work
    name = collab.model if trained.stage == "collab" else f"{collab.model}, aligned"
    cluster = connect(settings.workers, console, beside, device=settings.device)
    storage = trained.config.tables
    if not cluster.gpus:  # CPUs read rows whatever GPUs they were trained on, and hold those in bfloat16 as float32
        held = "float32" if storage.dtype == "bfloat16" else storage.dtype
        storage = dataclasses.replace(storage, placement="device", dtype=held)
    try:
        with place.writing() as folder:
            paths = [str(path) for path in log.split_paths(settings.split)]
            queries, drawn, wanted = None, 0, None
            if settings.ranking == FULL:
                write_queries(log, settings.split, folder / "queries.parquet")
                queries = Order(tuple(row_groups([str(folder / "queries.parquet")])), settings.batch, None)
            elif settings.ranking != NONE:
                drawn = int(settings.ranking.partition(":")[2])
                wanted = write_candidates(log, settings.split, drawn, settings.seed, folder / "candidates.parquet")

            def scored(rows: list[str], where: Place) -> np.ndarray:
                order = Order(tuple(row_groups(rows)), settings.batch, None)
                scoring = Scoring(
                    "evaluate", {name: build}, settings, order, where, storage=storage,
                    queries=queries if where is place else None, cutoffs=settings.cutoffs,
                )  # fmt: skip
                where.make()  # workers take it that storage is away where it is missing
                run_workers(
                    score_worker,
                    {"scoring": scoring},
                    "evaluate",
                    Group(settings.workers, cluster.gpus, settings.workers),
                    console,
                    _ignore,
                    keep_freed_memory=True,
                )
                return pq.read_table(where.local() / "scores.parquet")[name].to_numpy()

            records = _of_rows(log, settings, name, scored(paths, place))
            if settings.ranking == FULL:
                ranked = pq.read_table(place.local() / f"{name}.parquet")
                values = {c: ranked[c].to_numpy() for c in ranked.column_names if c != "user"}
                metrics = UserMetrics(ranked["user"].to_numpy(), values)
                records += _ranking_records(settings, name, metrics, PROTOCOL[settings.split])
            elif wanted is not None:
                file = folder / "candidates.parquet"
                metrics = _of_candidates(file, wanted, scored([str(file)], place / "candidates"), settings.cutoffs)
                records += _ranking_records(settings, name, metrics, _among(drawn))
        return records
    finally:
        import ray

        ray.shutdown()
        beside.delete(work)


def _evaluate_export(settings: Evaluation) -> list[dict[str, Any]]:
    if settings.ranking == FULL:
        raise UserError(
            f"{settings.artifact} is an export, whose language model takes a prompt for each item, so the whole catalog isn't "
            "ranked with it: take --ranking candidates:100, or none"
        )
    if settings.workers not in (1, Evaluation.workers):
        raise UserError(
            f"--workers is {settings.workers}, but {settings.artifact} is an export, which one process scores with: leave it out"
        )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but this process sees no GPU: take --device cpu, or leave it out")
    log, console, name = read_log(settings.data), Console(), "sella-rec"
    recommender = read_export(settings.artifact, settings.llm, None if settings.device == "auto" else settings.device)
    known = _Known(
        users=recommender.users.find(log.users(["external_id"])["external_id"].combine_chunks()),
        items=recommender.items.find(log.items(["external_id"])["external_id"].combine_chunks()),
    )
    for kind, found in (("users", known.users), ("items", known.items)):
        unknown = int((found == UNKNOWN).sum())
        console.line(f"evaluate  {unknown:,} of the log's {len(found):,} {kind} are unknown to the export")
    score = partial(_score_rows, recommender, known, settings.batch, console)
    records = _of_rows(log, settings, name, score(log.split_paths(settings.split)))
    if settings.ranking != NONE:
        drawn = int(settings.ranking.partition(":")[2])
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "candidates.parquet"
            wanted = write_candidates(log, settings.split, drawn, settings.seed, file)
            metrics = _of_candidates(file, wanted, score([file]), settings.cutoffs)
        records += _ranking_records(settings, name, metrics, _among(drawn))
    return records


@dataclass(frozen=True)
class _Known:
    """What the dense ids of a log are in an export: int64 [users] and [items], UNKNOWN where it has none."""

    users: np.ndarray
    items: np.ndarray


def _score_rows(
    recommender: Recommender, known: _Known, batch: int, console: Console, paths: Sequence[Path]
) -> np.ndarray:
    """float32 [rows]: scores of the rows of some files of the log, with the histories that the rows have."""
    total, done, told = sum(pq.read_metadata(path).num_rows for path in paths), 0, time.monotonic()
    found, counts = [np.zeros(0, np.float32)], np.zeros(3, np.int64)
    for path in paths:
        for rows in pq.ParquetFile(path).iter_batches(batch, columns=["user", "item", "history"]):
            table = pa.Table.from_batches([rows])
            values, lengths = flat(table["history"])
            users, items = known.users[table["user"].to_numpy()], known.items[table["item"].to_numpy()]
            scores, left_out = recommender.score_rows(users, items, lists(known.items[values], lengths))
            found.append(scores)
            counts += (len(left_out), (left_out > 0).sum(), left_out.sum())
            done += len(rows)
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                console.line(f"evaluate  {done:,}/{total:,} rows scored")
    if counts[1]:
        console.line(f"evaluate  histories cut to fit: {counts_in_words({'sella-rec': named_counts(counts)})}")
    return np.concatenate(found)


def _ignore(record: dict[str, Any]) -> None:
    pass


def _of_rows(log: Log, settings: Evaluation, name: str, scores: np.ndarray) -> list[dict[str, Any]]:
    """AUC and UAUC on the split's rows; nothing where they are of one label."""
    facts = log.facts
    if facts["positives"][settings.split] in (0, facts["rows"][settings.split]):
        return []
    return evaluate_scores(
        log.split(settings.split), {name: scores}, pairs=[], split=settings.split, seed=settings.seed, protocol="pointwise",
        replicates=settings.replicates,
    )  # fmt: skip


def _ranking_records(settings: Evaluation, name: str, metrics: UserMetrics, protocol: str) -> list[dict[str, Any]]:
    return ranking_records(
        {name: metrics}, split=settings.split, seed=settings.seed, replicates=settings.replicates, protocol=protocol
    )


def _among(drawn: int) -> str:
    return f"ranking of the relevant items among {drawn} drawn uniformly"


def _of_candidates(path: Path, wanted: pa.Table, scores: np.ndarray, cutoffs: tuple[int, ...]) -> UserMetrics:
    """Metrics of each user's candidates by their scores; of equal ones the smaller item first."""
    rows = pq.read_table(path, columns=["user", "item"])
    user, item = rows["user"].to_numpy(), rows["item"].to_numpy()
    order = np.lexsort((item, -scores, user))
    user, item = user[order], item[order]
    starts = np.flatnonzero(np.concatenate([[True], user[1:] != user[:-1]]))
    rank = np.arange(len(user)) - np.repeat(starts, np.diff(starts, append=len(user)))
    best = np.full((len(starts), max(cutoffs)), -1, np.int64)
    kept = rank < max(cutoffs)
    best[np.searchsorted(user[starts], user[kept]), rank[kept]] = item[kept]
    relevant = wanted["relevant"].combine_chunks()
    lengths = np.diff(relevant.offsets.to_numpy())
    return user_metrics(user[starts], best, (relevant.flatten().to_numpy(), lengths), cutoffs)
