"""A run's recommender as one folder in open formats, which `sellarec.load` reads.

export.json                 what it is, of which run, the base model; written last
README.md                   the model card
config.yaml, results.json   the run's
template.yaml               the prompt template, where it is the user's own
adapter/                    PEFT's format; none where all weights of the base model were tuned
tokenizer/                  the base model's
model/                      the base model: one whose weights stages pretrain or adapt made, or where it was asked for
projection.safetensors      the projections; where stage fuse left them, the aligned one; none where tokens are learned, or codes
collab.safetensors          the collaborative model's dense weights, where it has some
tables/                     rows of users, items and distilled vectors, of those that the soft tokens (or codes) take
catalog/                    a log of users and items alone: manifest.json (the facts), items/, users/
histories/part-N.parquet    user int64 (dense), item list<int64>: the last positives, the most recent one last

catalog/items: item int64, external_id string, title string, seen bool
catalog/users: user int64, external_id string, seen bool
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.numpy import save_file

from sellarec.alignment.align import PROJECTION
from sellarec.artifacts import Place, Store
from sellarec.collab.rows import flat, last, lists
from sellarec.collab.task import WEIGHTS, CollabTask, build_collab
from sellarec.command_line import parse
from sellarec.config import Config, to_yaml
from sellarec.data.files import file_hash
from sellarec.data.log import Log, read_log, write_manifest
from sellarec.errors import UserError
from sellarec.fusion.fuse import made_by, represented, soft_tokens, token_rows
from sellarec.language.llm import (
    ADAPTER,
    LlmSource,
    check_left_adapter,
    find_llm,
    load_tokenizer,
)
from sellarec.language.templates import is_file, template_mark
from sellarec.serving.card import model_card
from sellarec.serving.recommender import CATALOG, EXPORT, FORMAT, HISTORIES, MODEL, TEMPLATE
from sellarec.training.graph import ShardedGraph
from sellarec.training.table import SavedTable, index

NEEDED = ("prepare", "adapt", "fuse", "evaluate")
"""Stages whose artifacts any export is made of."""

USERS_AT_ONCE = 4096
"""Users of a row group of histories: what is read at least to score one."""

ROWS_AT_ONCE = 1 << 20
"""Rows of a file of smoothed tables."""


@dataclass(frozen=True)
class Finished:
    """A finished run: its name, config, and the artifact and manifest of each stage."""

    name: str
    config: Config
    artifacts: dict[str, Place]
    manifests: dict[str, dict[str, Any]]

    def folder(self, stage: str) -> Path:
        return self.artifacts[stage].local()


def read_run(run: str) -> Finished:
    """Open a run's folder, WORKSPACE/runs/NAME.

    Raises:
        UserError: it is none, or lacks stages that an export is made of: naming them.
    """
    place = Place.of(run)
    marks = place.read_json("artifacts.json")
    if marks is None:
        raise UserError(f"{place} is no run's folder (no artifacts.json): give WORKSPACE/runs/NAME of jobs/train.py")
    store = Store(Place(place.uri.rsplit("/", 2)[0]))
    config = parse([str(place.local() / "config.yaml")], program="export.py")
    found = {stage: store.manifest(stage, marks[stage].removeprefix(f"{stage}-")) for stage in marks}
    needed = [*NEEDED, *["pretrain"] * config.pretrains]
    needed += set(made_by(config.fuse).values()) - set(needed)
    missing = [stage for stage in needed if found.get(stage) is None]
    if missing:
        raise UserError(
            f"the run in {place} has no artifact of {', '.join(missing)}: finish it with the jobs/train.py command that began "
            "it, without --stages"
        )
    manifests = {stage: manifest for stage, manifest in found.items() if manifest is not None}
    for stage, mark in manifests["evaluate"]["inputs"].items():
        if marks.get(stage) != f"{stage}-{mark}":
            raise UserError(
                f"the run in {place} was evaluated with {stage}-{mark}, but its {stage} is {marks.get(stage)} now: run stage "
                "evaluate again"
            )
    artifacts = {stage: store.workspace / "artifacts" / marks[stage] for stage in manifests}
    return Finished(place.uri.rpartition("/")[2], config, artifacts, manifests)


def export_run(run: str, out: Path, histories: bool, with_model: bool) -> None:
    """Write the recommender of a finished run into a folder, which is there whole or not at all.

    Args:
        run: the run's folder or URI.
        out: the export's folder, which isn't there yet.
        histories: whether users' last positives are written too.
        with_model: whether the base model is copied where the run took it as it is: one that the run made always is.

    Raises:
        UserError: `out` is there or can't be written, the run isn't finished, its base model isn't found or has changed, or its
            adapter isn't whole, or has changed.
    """
    out = out.expanduser().absolute()
    if out.exists():
        raise UserError(f"{out} is there already: give another folder, or delete it")
    finished = read_run(run)
    source = _base_model(finished)
    template = finished.config.prompt.template
    if template_mark(template) != finished.manifests["fuse"]["templates"]:
        raise UserError(f"prompt template {template} isn't as the run was made with: put it back")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(
            f"{out.parent} can't be written to ({error.strerror}): give another folder with --out"
        ) from error
    try:
        _write(finished, source, unfinished, histories, with_model)
        unfinished.chmod(0o755)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # it is gone where all went well


def _write(finished: Finished, source: LlmSource, out: Path, histories: bool, with_model: bool) -> None:
    config = finished.config
    log = read_log(finished.folder("prepare"))
    is_tuned = config.adapt.method == "full"
    copied = with_model or is_tuned or config.pretrains
    if copied:
        _copy(source.folder(), out / MODEL, [path.name for path in source.folder().iterdir() if _is_of_model(path)])
    load_tokenizer(source.folder()).save_pretrained(out / "tokenizer")
    of = {part: finished.folder(stage) for part, stage in made_by(config.fuse).items()}
    adapter = None
    if not is_tuned:
        stage = made_by(config.fuse)["adapter"]
        adapter = check_left_adapter(of["adapter"] / ADAPTER, finished.manifests[stage]["facts"], stage, source)
        shutil.copytree(of["adapter"] / ADAPTER, out / ADAPTER)
    if "projections" in of:
        _copy(of["projections"], out, [PROJECTION])
    if is_file(config.prompt.template):
        shutil.copyfile(Path(config.prompt.template).expanduser(), out / TEMPLATE)
    if "tables" in of:
        _write_tables(finished, source, log, of["tables"], out)
    _write_catalog(log, out / CATALOG)
    if histories:
        _write_histories(log, out / HISTORIES)
    results = finished.artifacts["evaluate"].read_json("results.json")
    assert results is not None
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    base = {"name": config.llm.model, "revision": source.revision, "identity": source.identity, "copied": copied}
    if copied:
        base["files"] = find_llm(str(out / MODEL), None).identity
    facts = {
        "format": FORMAT,
        "run": finished.name,
        "artifacts": {stage: f"{stage}-{manifest['fingerprint']}" for stage, manifest in finished.manifests.items()},
        "versions": finished.manifests["evaluate"]["versions"],
        "base_model": base if copied else {**base, "name": source.name},
        "adapter": adapter,
        "files": {name: file_hash(str(out / name)) for name in (PROJECTION, WEIGHTS) if (out / name).is_file()},
        "histories": histories,
        "language_weight": finished.manifests["fuse"]["facts"]["language_weight"],
    }
    card = model_card(facts, config, log.facts, results, finished.manifests)
    (out / "README.md").write_text(card, encoding="utf-8")
    (out / EXPORT).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _write_tables(finished: Finished, source: LlmSource, log: Log, rows: Path, out: Path) -> None:
    """The tables, and the collaborative model's dense weights, of an artifact's folder."""
    config = finished.config
    _copy(rows, out, [name for name in (WEIGHTS,) if (rows / name).is_file()])
    settings = token_rows(config.fuse, config.collab, source)
    collab = build_collab(log, settings, rows, represented=represented(config.fuse))
    smoothed = [] if collab.graph is None or not collab.tables else ["user", "item"]
    semantic = ["semantic"] * ("semantic" in soft_tokens(config.fuse))
    names = [name for name in (*(table.name for table in collab.tables), *semantic) if name not in smoothed]
    for name in names:
        shards = SavedTable(rows / "tables", name).facts["shards"]
        _copy(rows / "tables", out / "tables", [f"{name}.json", *(shard["file"] for shard in shards)])
    if smoothed:
        _write_smoothed(collab, out / "tables")


def _base_model(finished: Finished) -> LlmSource:
    """The language model that fuse took: the one that the run was made with, or what adapt left where it tuned all weights.

    Raises:
        UserError: it isn't found, or its files have changed since.
    """
    name = finished.config.llm.model
    if finished.config.adapt.method == "full":
        folder = finished.folder("adapt") / "model"
        return LlmSource(str(folder), None, finished.artifacts["adapt"].uri.rpartition("/")[2])
    if finished.config.pretrains:
        folder = finished.folder("pretrain") / "model"
        return LlmSource(str(folder), None, finished.artifacts["pretrain"].uri.rpartition("/")[2])
    recorded = finished.manifests["fuse"]["llm"]
    if recorded.startswith(f"{name}@"):
        return LlmSource(name, recorded.removeprefix(f"{name}@"), recorded)
    source = find_llm(name, None)
    if source.identity != recorded:
        raise UserError(f"the files in {source.name} aren't those that the run was made with: put that base model back")
    return source


def _is_of_model(path: Path) -> bool:
    return path.suffix in (".json", ".safetensors", ".model", ".txt", ".jinja")


def _copy(source: Path, target: Path, names: Sequence[str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)


def _write_catalog(log: Log, folder: Path) -> None:
    """The log's users and items with their ids and titles, a file at a time."""
    for table, columns in (
        ("users", ["user", "external_id", "seen"]),
        ("items", ["item", "external_id", "title", "seen"]),
    ):
        (folder / table).mkdir(parents=True)
        for path in log.paths(table):
            pq.write_table(pq.read_table(path, columns=columns), folder / table / path.name)
    write_manifest(folder, log.facts)


def _write_histories(log: Log, folder: Path) -> None:
    """Each user's last positives of all splits, as many as a row's history has at most."""
    folder.mkdir()
    schema = pa.schema([("user", pa.int64()), ("item", pa.list_(pa.int64()))])
    for path in log.paths("sequences"):
        with pq.ParquetWriter(folder / path.name, schema) as writer:
            for users in pq.ParquetFile(path).iter_batches(USERS_AT_ONCE, columns=["user", "item", "label"]):
                table = pa.Table.from_batches([users])
                values, lengths = flat(table["item"])
                positive = flat(table["label"])[0] == 1
                row = np.repeat(np.arange(len(lengths)), lengths)
                kept = last(
                    values[positive], np.bincount(row[positive], minlength=len(lengths)), log.facts["history_cap"]
                )
                found = pa.table({"user": table["user"], "item": lists(*kept)}, schema)
                writer.write_table(found.filter(pc.greater(pc.list_value_length(found["item"]), 0)))


def _write_smoothed(collab: CollabTask, folder: Path) -> None:
    """The rows of users and items, smoothed over the graph of train positives as the engine smooths them to score.

    All of them are in memory at once, with the graph: what a single worker would take.
    """
    graph = collab.graph
    assert graph is not None
    tables = [next(table for table in collab.tables if table.name == name) for name in ("user", "item")]
    whole = []
    for table in tables:
        assert table.read is not None
        whole.append(torch.from_numpy(table.read(0, table.rows)))
    sharded = ShardedGraph.read(graph.paths, graph.users, graph.items, None, torch.device("cpu"))
    with torch.no_grad():
        smoothed = collab.propagate(torch.cat(whole), sharded.multiply)
    folder.mkdir(parents=True, exist_ok=True)
    for table, rows in zip(tables, smoothed.split([table.rows for table in tables]), strict=True):
        written = []
        for start in range(0, table.rows, ROWS_AT_ONCE):
            part = rows[start : start + ROWS_AT_ONCE].contiguous().numpy()
            name = f"{table.name}-{start:012d}-{0:06d}.safetensors"
            save_file({"rows": part}, folder / name)
            extent = {"start": start, "rows": len(part), "column": 0, "columns": table.dim}
            written.append({"table": table.name, "file": name, **extent})
        (folder / f"{table.name}.json").write_text(json.dumps(index(table, written)))
