"""What a stage is refused for before it starts: tables and models without room, labels and rows that don't fit."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sellarec.config import DENSE_TABLE_OPTIMIZERS, EMBEDDED, SAMPLED, Language, Selection
from sellarec.data.log import count_with_history
from sellarec.errors import UserError
from sellarec.preflight import free_memory
from sellarec.run import Run
from sellarec.training.cluster import free_gpu_memory, room_of_worker

FLOAT_BYTES = 4
"""Of a number of a vector or of its gradient, however rows are stored."""


def check_ahead(this: Run, stages: Sequence[str]) -> None:
    """Refuse what stages can't hold before the first of them starts, as far as it is known by the log and the settings. Each
    looks again as it starts, for what is free then, and for a language model that this run builds.

    Raises:
        UserError: as the stage itself would.
    """
    config, room = this.config, room_of(this)
    check_start(this, stages)
    is_given = config.llm.model != EMBEDDED
    # a decoder that is yet to be built has no tokenizer: stage pretrain looks
    if {"pretrain", "adapt", "fuse"} & set(stages) and (is_given or "pretrain" not in stages):
        check_prompts(this, (this.given_llm if is_given else this.llm()).folder(weights=False))
    _check_adapters(this, stages)
    _check_vectors(this, stages)
    for stage in stages:
        tables = _tables_ahead(this, stage)
        held = check_tables(this, tables, getattr(config, stage), room) if tables else 0
        _check_batch(this, stage, tables, held, room)
        if isinstance(getattr(config, stage), Language) and is_given:
            _check_model_fits(this, stage, _memory_of_model(this, stage, this.given_llm, held), room)


def _check_adapters(this: Run, stages: Sequence[str]) -> None:
    """Refuse an adapter that stands, and that one of the stages will load, where it isn't whole, or another one than was left."""
    from sellarec.language.llm import ADAPTER, check_left_adapter

    readers = {"adapt": {"distil", "fuse", "evaluate"}}
    if "adapter" in this.config.fuse.train:
        readers["fuse"] = {"evaluate"}
    for stage, by in readers.items():
        if this.config.adapt.method == "lora" and by & set(stages) and stage not in stages:
            folder = this.artifact(stage).local() / ADAPTER
            check_left_adapter(folder, this.manifest(stage)["facts"], stage, this.llm())


def _check_vectors(this: Run, stages: Sequence[str]) -> None:
    """Refuse distilled vectors that stand, and that stage align will read, where they aren't whole, or others than were left."""
    from sellarec.language.distil import SavedVectors, read_profiles

    if "align" in stages and "distil" not in stages:
        folder, mark = this.artifact("distil").local(), this.marks["distil"]
        SavedVectors(folder, mark)
        if this.config.reads_profiles:
            read_profiles(folder, mark)


def check_prompts(this: Run, folder: Path) -> None:
    """Refuse a language model for whose context the prompts of stage fuse, which are the longest, are too long.

    Args:
        folder: with its config and tokenizer.

    Raises:
        UserError: as `sellarec.language.prompts.Prompts`.
    """
    from sellarec.fusion.codes import coded_as
    from sellarec.language.llm import context_length, load_tokenizer, read_config
    from sellarec.language.prompts import Prompts

    log, config = this.log(), this.config
    titles = log.items(["title"])["title"].to_pylist()
    answers = {config.adapt.loss, config.fuse.loss} != {"answer"}
    tokenizer, context = load_tokenizer(folder), context_length(read_config(folder))
    Prompts(
        tokenizer, titles, config.prompt, log.facts["noun"], context, "fused" if config.fuse.tokens else "text", answers=answers,
        soft=config.fuse.tokens, coded=coded_as(config.fuse, config.collab.dim),
    )  # fmt: skip


def check_start(this: Run, stages: Sequence[str]) -> None:
    """Once the log is there, refuse to train rows of `collab.init_from` on as other users' or items', or without it rows that the
    log takes for trained.

    Raises:
        UserError: the first id, with what both logs mean by it; how many rows nothing would train.
    """
    from sellarec.data.log import first_other_id, read_log

    start = this.config.collab.init_from
    if start is None and {"collab", "align"} & set(stages):
        _check_untrained(this)
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


def _check_untrained(this: Run) -> None:
    """Refuse a log that goes on from another one, where rows start afresh: users and items that the other one's train rows alone
    had would count as trained, with rows that no step has reached."""
    extends = this.log().facts.get("extends")
    if extends is None:
        return
    config = this.config.collab
    given = {"user": config.init_users, "item": config.init_items}
    kinds = [t.name for t in _tables_ahead(this, "collab") if t.name in given and given[t.name] is None]
    alone = {kind: extends.get(f"{kind}s seen there alone", 0) for kind in kinds}
    if any(alone.values()):
        found = " and ".join(f"{count:,} of its {kind}s" for kind, count in alone.items())
        raise UserError(
            f"the log goes on from {extends['log']}, but {found} have no train row here, and so rows that nothing would train: "
            "name the model that was trained on that log in collab.init_from, or prepare the data without --init-from"
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
    if stage == "evaluate":  # one model at a time
        found = [_tables_ahead(this, each) for each in ("collab", "fuse")]
        largest = max(found, key=lambda tables: sum(table.rows * table.dim for table in tables))
        return tuple(dataclasses.replace(table, frozen=True) for table in largest)
    if stage not in ("collab", "align", "fuse") or (stage == "fuse" and learned and is_built):
        return ()
    rows = dataclasses.replace(config.collab, train_on="rows")
    if stage == "collab":
        return tuple(build_collab(this.log(), rows, None).tables)
    width = config.pretrain.hidden if is_built else hidden_width(this.given_llm)
    semantic = Table("semantic", this.log().facts["items"], width, ("semantic",))
    if stage == "align":
        distilled = [semantic]
        if config.reads_profiles:
            distilled.append(Table("profile", this.log().facts["users"], width, ("profile",)))
        frozen = config.align.semantic == "frozen"
        tables = (dataclasses.replace(table, frozen=frozen) for table in distilled)
        return (*build_collab(this.log(), rows, None).tables, *tables)
    if learned:
        rows = token_rows(fuse, config.collab, this.given_llm)
    collab = build_collab(this.log(), rows, None, represented=represented(fuse))
    return tables_of(collab, semantic if "semantic" in fuse.tokens else None, fuse)


def room_of(this: Run) -> tuple[int, str] | None:
    """Bytes that each worker has for tables and a model, and what has that room. Of a cluster's machines without GPUs it is the
    one with the least, where Ray, which looks at CPUs alone, places as many workers as find some there. None where no machines
    are known."""
    assert this.cluster is not None
    at_once = this.config.least_workers * this.cluster.groups  # whose shards are the largest
    if this.gpus():
        return free_gpu_memory(this.cluster.share), "its share of a GPU"
    if this.cluster.local:
        return _room_here(at_once)
    rooms = []
    for machine in this.cluster.machines:
        there = min(at_once, machine.places)
        if there:
            rooms.append((room_of_worker(there, machine.memory), f"each of {there} workers on {machine.name}"))
    return min(rooms, default=None)


def _room_here(workers: int) -> tuple[int, str]:
    """As `room_of`, of this machine's memory: its workers' own was seen to be free before Ray was started."""
    return room_of_worker(workers), f"each of {workers} workers on this machine"


def check_tables(this: Run, tables: Sequence[Any], settings: Any, room: tuple[int, str] | None) -> int:
    """Bytes of the tables on the device of the worker that holds most of them there. Rows that GPUs read from their host's
    memory (`tables.placement`) are compared with what that has free, where it is this machine.

    Raises:
        UserError: the kernels can't do what is asked of the tables, or a worker has no room for its part of them.
    """
    from sellarec.training.plan import check_fits, place, worker_bytes

    workers, storage = this.config.least_workers, this.config.tables
    optimizer = None if all(table.frozen for table in tables) else settings
    placements = place(tables, storage, optimizer, workers, "cuda" if this.gpus() else "cpu")
    if room is not None:
        check_fits(placements, storage, optimizer, workers, *room)
    assert this.cluster is not None
    # how many workers find GPUs on each machine of a cluster isn't known
    if storage.placement != "device" and this.cluster.local:
        host = _room_here(workers * this.cluster.groups)
        check_fits(placements, storage, optimizer, workers, *host, "host")
    return max(worker_bytes(placements, storage, optimizer, workers, "device"))


def _check_batch(this: Run, stage: str, tables: Sequence[Any], held: int, room: tuple[int, str] | None) -> None:
    """Refuse a batch of collab or align whose rows' vectors, with their gradients, have no room beside the tables, with what a
    model takes of the worker's whole share of rows. It is what a batch takes at least: histories, scores and layers of
    networks are not counted.

    Args:
        held: bytes of the tables on a worker.
    """
    if stage not in ("collab", "align") or room is None:
        return
    import torch

    from sellarec.alignment.contrastive import compares_with_all
    from sellarec.training.plan import GIB

    settings, collab, workers = getattr(this.config, stage), this.config.collab, this.config.least_workers
    own, (has, whose) = -(-settings.batch // workers), room
    width = {table.name: table.dim for table in tables}
    negatives = collab.negatives_per_row if collab.loss in SAMPLED and collab.negatives != "in-batch" else 0
    of_shares = FLOAT_BYTES * _numbers_of_shares(this, stage, tables)
    if held + of_shares > has:
        raise UserError(
            f"{stage} takes {of_shares / GIB:.2f} GiB of each of {workers} workers at least for its share of the "
            f"rows (collab.model {collab.model}, collab.loss {collab.loss}), beside {held / GIB:.2f} GiB of tables, but {whose} "
            f"has room for {has / GIB:.2f} GiB: take more workers, or lower collab.dim"
        )
    numbers = 2 * own * (width.get("user", 0) + width["item"] * (1 + negatives))
    if stage == "align":
        looked_up = (settings.side != "users") + ("profile" in width)  # what users liked may be nothing
        numbers += (1 if settings.semantic == "frozen" else 2) * own * width["semantic"] * looked_up
        # a view of all workers' rows is gathered, in the space that both are compared in; darec compares otherwise
        space = {"rlmrec-con": width["item"], "darec": 0}.get(settings.contrastive, width["semantic"])
        gathered = sum(compares_with_all(settings, torch.float32)) * (2 if settings.side == "both" else 1)
        numbers += gathered * settings.batch * space
    taken = held + of_shares + FLOAT_BYTES * numbers
    and_shares = f" and {of_shares / GIB:.2f} GiB for the share of the rows" if of_shares else ""
    or_negatives = ", or collab.negatives_per_row" if negatives else ""
    if taken > has:
        raise UserError(
            f"{stage}.batch is {settings.batch}: its vectors and their gradients take {FLOAT_BYTES * numbers / GIB:.2f} GiB of "
            f"each of {workers} workers at least, beside {held / GIB:.2f} GiB of tables{and_shares}, but {whose} has room for "
            f"{has / GIB:.2f} GiB: lower {stage}.batch{or_negatives}, or take more workers"
        )


def _numbers_of_shares(this: Run, stage: str, tables: Sequence[Any]) -> int:
    """How many numbers a step holds at least for a worker's share of all rows: of rows that a graph smooths what they are
    smoothed from, the sum of layers, and both beside each other; of a catalog that is looked up whole the vectors and their
    gradients (with dense gradients they may be the table itself, so they aren't counted)."""
    from sellarec.collab.task import model_class

    collab, workers = this.config.collab, this.config.least_workers
    model, numbers = model_class(collab.model), 0
    share = {table.name: -(-table.rows // workers) * table.dim for table in tables}
    if model.uses_graph:
        numbers += 4 * (share["user"] + share["item"])
    is_dense = getattr(this.config, stage).table_optimizer in DENSE_TABLE_OPTIMIZERS
    if (collab.loss == "full-softmax" or model.reads_catalog) and not is_dense:
        numbers += 2 * share["item"]
    return numbers


def check_model(this: Run, stage: str, source: Any, tables: int = 0) -> None:
    """Tell what a stage's language model takes of each worker, with the stage's tables.

    Args:
        tables: bytes that a worker holds of them.

    Raises:
        UserError: the worker's GPU, or this machine's memory, has less free.
    """
    from sellarec.language.memory import summary

    found = _memory_of_model(this, stage, source, tables)
    what = "the language model and the tables take" if tables else "the language model takes"
    this.console.line(f"{stage:<9} {what} about, of each worker, {summary(found)}")
    _check_model_fits(this, stage, found, room_of(this))


def _memory_of_model(this: Run, stage: str, source: Any, tables: int) -> dict[str, dict[str, int]]:
    """What a stage's language model takes of each worker, with the tables: `sellarec.language.memory.phases`.

    Raises:
        UserError: on GPUs of this machine: its own memory can't take the models that workers read.
    """
    from sellarec.language.llm import context_length, read_config
    from sellarec.language.memory import check_loading_fits, phases, shape_of, use_of

    config, cluster = this.config, this.cluster
    assert cluster is not None
    shape = shape_of(source, None if stage == "pretrain" or config.adapt.method == "full" else config.adapt)
    use = use_of(stage, config, context_length(read_config(source.name, source.revision)))
    if this.gpus() and cluster.local:
        readers = cluster.groups * (1 if use.sharded else config.least_workers)
        check_loading_fits(shape, use, readers, free_memory()[0])
    beside = [min(use.workers, machine.places) for machine in cluster.machines if machine.places]
    use = dataclasses.replace(use, tables=tables, on_gpu=this.gpus(), beside=min(beside, default=None))
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
        collab = this.config.collab
        if stage in ("collab", "align") and collab.loss != "bce" and facts["positives"]["train"] == 0:
            raise UserError(
                f"none of the {facts['rows']['train']} rows of the train split is a positive ({facts['label_rule']}): stage "
                f"{stage} ranks positives (collab.loss {collab.loss}), so it has nothing to learn from; mend the label rule or "
                "the split"
            )
        if not isinstance(settings, Selection) or settings.select_on not in ("auc", "uauc"):
            continue
        left_out = isinstance(settings, Language) and this.config.prompt.with_history
        for split in ("train", "valid"):
            count, positives = facts["rows"][split], facts["positives"][split]
            if left_out:
                count, positives = count_with_history(this.log(), split)
            if positives in (0, count):
                which, mend = (" with a history", "leave out prompt.with_history, ") if left_out else ("", "")
                raise UserError(
                    f"{positives} of the {count} rows{which} of the {split} split are positives "
                    f"({facts['label_rule']}): stage {stage} takes both labels to train and to select by {settings.select_on}; "
                    f"{mend}mend the label rule or the split, or rank: --stages prepare,collab --collab.loss softmax "
                    "--collab.select-on ndcg@10"
                )
