"""What a stage is refused for before it starts: tables and models without room, labels and rows that don't fit."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from sellarec.config import EMBEDDED, Language, Selection
from sellarec.errors import UserError
from sellarec.run import Run
from sellarec.training.cluster import free_gpu_memory, room_of_worker


def check_ahead(this: Run, stages: Sequence[str]) -> None:
    """Refuse what stages can't hold before the first of them starts, as far as it is known by the log and the settings. Each
    looks again as it starts, for what is free then, and for a language model that this run builds.

    Raises:
        UserError: as the stage itself would.
    """
    config, room = this.config, room_of(this)
    check_start(this, stages)
    for stage in stages:
        tables = _tables_ahead(this, stage)
        if tables:
            check_tables(this, tables, getattr(config, stage), room)
        if isinstance(getattr(config, stage), Language) and config.llm.model != EMBEDDED:
            _check_model_fits(this, stage, _memory_of_model(this, stage, this.given_llm), room)


def check_start(this: Run, stages: Sequence[str]) -> None:
    """Once the log is there, refuse to train rows of `collab.init_from` on as other users' or items'.

    Raises:
        UserError: the first id, with what both logs mean by it.
    """
    from sellarec.data.log import first_other_id, read_log

    start = this.config.collab.init_from
    if start is None or "collab" not in stages:
        return
    beside = this.log_of_start
    if beside is None:
        this.console.line(
            f"collab    {start} lies without the log that it was trained on, so it isn't compared whether ids still mean the same"
        )
        return
    for kind in [table.name for table in _tables_ahead(this, "collab") if table.name in ("user", "item")]:
        other = first_other_id(this.log(), read_log(beside), kind)
        if other is not None:
            number, theirs, mine = other
            raise UserError(
                f"{kind} {number} was '{theirs}' in {beside}, on which {start} was trained, but is "
                f"{'not there' if mine is None else repr(mine)} in the log of this run: its rows would become others'. Prepare "
                "the data with --init-from that log (jobs/prepare.py), or leave collab.init_from out"
            )


def _tables_ahead(this: Run, stage: str) -> tuple[Any, ...]:
    """The tables that a stage will look up in, by the log and the settings alone; none where it has none, or where they
    (learned tokens) are as wide as a language model that this run has yet to build."""
    from sellarec.collab.task import build_collab
    from sellarec.fusion.fuse import represented, tables_of, token_rows
    from sellarec.language.llm import hidden_width
    from sellarec.training.table import Table

    config, fuse, is_built = this.config, this.config.fuse, this.config.llm.model == EMBEDDED
    learned = fuse.represent == "learned"
    if stage not in ("collab", "align", "fuse") or (stage == "fuse" and learned and is_built):
        return ()
    rows = dataclasses.replace(config.collab, train_on="rows")
    if stage == "collab":
        return tuple(build_collab(this.log(), rows, None).tables)
    width = config.pretrain.hidden if is_built else hidden_width(this.given_llm)
    semantic = Table("semantic", this.log().facts["items"], width, ("semantic",))
    if stage == "align":
        frozen = config.align.semantic == "frozen"
        return (*build_collab(this.log(), rows, None).tables, dataclasses.replace(semantic, frozen=frozen))
    if learned:
        rows = token_rows(fuse, config.collab, this.given_llm)
    collab = build_collab(this.log(), rows, None, represented=represented(fuse))
    return tables_of(collab, semantic if "semantic" in fuse.tokens else None, fuse)


def room_of(this: Run) -> tuple[int, str] | None:
    """Bytes that each worker has for tables or a model, and what has that room; None where that isn't known here, as of a
    cluster's machines without GPUs."""
    assert this.cluster is not None
    if this.gpus():
        return free_gpu_memory(this.cluster.share), "its share of a GPU"
    if this.cluster.local:
        # its workers' own memory was seen to be free before Ray was started
        at_once = this.config.workers * this.cluster.groups
        return room_of_worker(at_once), f"each of {at_once} workers on this machine"
    return None


def check_tables(this: Run, tables: Sequence[Any], settings: Any, room: tuple[int, str] | None) -> None:
    """Raises UserError where the kernels can't do what is asked of the tables, or a worker has no room for its part of them. Rows
    that GPUs read from their host's memory (`tables.placement`) aren't weighed against it."""
    from sellarec.training.plan import check_fits, place

    workers, storage = this.config.least_workers, this.config.tables
    optimizer = None if all(table.frozen for table in tables) else settings
    placements = place(tables, storage, optimizer, workers, "cuda" if this.gpus() else "cpu")
    if room is not None and storage.placement == "device":
        check_fits(placements, storage, optimizer, workers, *room)


def check_model(this: Run, stage: str, source: Any) -> None:
    """Tell what a stage's language model takes of each worker.

    Raises:
        UserError: the worker's GPU, or this machine's memory, has less free.
    """
    from sellarec.language.memory import summary

    found = _memory_of_model(this, stage, source)
    this.console.line(f"{stage:<9} the language model takes about, of each worker, {summary(found)}")
    _check_model_fits(this, stage, found, room_of(this))


def _memory_of_model(this: Run, stage: str, source: Any) -> dict[str, dict[str, int]]:
    """What a stage's language model takes of each worker: `sellarec.language.memory.phases`."""
    from sellarec.language.llm import context_length, read_config
    from sellarec.language.memory import phases, shape_of, use_of

    config = this.config
    shape = shape_of(source, None if stage == "pretrain" or config.adapt.method == "full" else config.adapt)
    use = use_of(stage, config, context_length(read_config(source.name, source.revision)))
    if this.gpus():  # what is saved is loaded again into the host's memory
        use = dataclasses.replace(use, compares=False)
    return phases(shape, use)


def _check_model_fits(this: Run, stage: str, found: dict[str, dict[str, int]], room: tuple[int, str] | None) -> None:
    from sellarec.language.memory import advice_of, check_model_fits

    if room is not None:
        check_model_fits(found, *room, advice_of(stage, this.config))


def check_labels(this: Run, stages: Sequence[str]) -> None:
    """Raises UserError where a stage can't be trained, or selected, for want of rows of one label."""
    facts = this.log().facts
    for stage in stages:
        settings = getattr(this.config, stage, None)
        if not isinstance(settings, Selection) or settings.select_on not in ("auc", "uauc"):
            continue
        for split in ("train", "valid"):
            count, positives = facts["rows"][split], facts["positives"][split]
            if positives in (0, count):
                raise UserError(
                    f"{positives} of the {count} rows of the {split} split are positives ({facts['label_rule']}): stage {stage} "
                    f"takes both labels to train and to select by {settings.select_on}; mend the label rule or the split, or "
                    "rank: --stages prepare,collab --collab.loss softmax --collab.select-on ndcg@10"
                )
