"""Plan a cluster without one: which worker holds which rows of the embedding tables, what a language model takes of memory and of
hours, and the GPUs that this needs. `--help` lists all."""

import dataclasses
import sys
from typing import TYPE_CHECKING

from sellarec.environment import check_environment
from sellarec.errors import UserError, exit_status

if TYPE_CHECKING:
    from sellarec.config import Config, Planning
    from sellarec.training.table import Table


def main(arguments: list[str]) -> None:
    check_environment()
    from sellarec.command_line import parse, parse_planning  # after the check: these import what it looks for
    from sellarec.config import Sparse

    settings = parse_planning(arguments)
    config = None
    if settings.llm is not None or settings.recipe:
        llm = [] if settings.llm is None else ["--llm", settings.llm]
        config = parse([*settings.recipe, *llm, "--workers", str(settings.workers)])
    if settings.recipe:
        settings = with_tables_of(settings, config)
    from sellarec.training.cluster import room_of_worker
    from sellarec.training.plan import GIB, check_fits, describe, place, worker_bytes

    tables = tables_of(settings, config if settings.recipe else None)
    if settings.llm is not None and "semantic" in config.fuse.tokens:
        tables.append(semantic_table(settings, config))
    optimizer = Sparse(table_optimizer=settings.table_optimizer)
    workers, storage = settings.workers, settings.tables
    placements = place(tables, storage, optimizer, workers, settings.device)
    held = worker_bytes(placements, storage, optimizer, workers)
    lines = [
        ("table", "rows", "columns", "dtype", "where", "rows/worker", "columns/worker", "weights GiB", "state GiB")
    ]
    for line in describe(placements, storage, optimizer, workers):
        where = line["sharding"] if line["worker"] is None else f"worker {line['worker']}"
        weights, state = (f"{line[name] / GIB:.3f}" for name in ("weight bytes", "optimizer bytes"))
        of_rows, of_columns = (f"{line[f'{what} per worker']:,}" for what in ("rows", "columns"))
        size = f"{line['rows']:,}", str(line["columns"]), line["dtype"]
        lines.append((line["table"], *size, where, of_rows, of_columns, weights, state))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))
    fullest = max(range(workers), key=held.__getitem__)
    how = f"{settings.device}, {storage.placement}, {settings.table_optimizer}"
    print(f"{workers} workers ({how}): {sum(held) / GIB:.3f} GiB in all")
    print(f"worker {fullest} holds most: {held[fullest] / GIB:.3f} GiB ({held[fullest]:,} bytes)")
    on_device, in_host = (worker_bytes(placements, storage, optimizer, workers, which) for which in ("device", "host"))
    if storage.placement != "device":
        print(
            f"of each worker at most {max(on_device) / GIB:.3f} GiB ({max(on_device):,} bytes) on its GPU, and "
            f"{max(in_host) / GIB:.3f} GiB ({max(in_host):,} bytes) in its host's memory"
        )
    if settings.llm is not None:
        plan_language_model(settings, config, sum(on_device))
        if settings.memory_per_worker is None:
            return
    room = settings.memory_per_worker
    if room is None and settings.device == "cuda":
        raise UserError(
            "give --memory-per-worker, the GiB that tables may take of each GPU, to check that the plan fits"
        )
    room = room or room_of_worker(workers) / GIB
    check_fits(placements, storage, optimizer, workers, int(room * GIB), "each worker")
    fits = f"fits: each worker has room for {room:.1f} GiB"
    if settings.host_memory_per_worker is not None:
        host = settings.host_memory_per_worker
        check_fits(placements, storage, optimizer, workers, int(host * GIB), "each worker", "host")
        fits += f", and for {host:.1f} GiB in its host's memory"
    elif storage.placement != "device":
        fits += "; its host's memory is not checked without --host-memory-per-worker"
    print(fits)


def tables_of(settings: "Planning", config: "Config | None") -> list["Table"]:
    """Those of the recipes' collaborative model; a table of users and one of items where there are no recipes."""
    from sellarec.collab.model import Sizes
    from sellarec.collab.task import model_class
    from sellarec.training.table import Table

    if config is None:
        return [Table(name, getattr(settings, f"{name}s"), settings.dim, (name,)) for name in ("user", "item")]
    sizes = Sizes(settings.users, settings.items, positive_rate=0.5)  # which no table depends on
    return list(model_class(config.collab.model)(sizes, config.collab).tables)


def with_tables_of(settings: "Planning", config: "Config") -> "Planning":
    """The plan with the width and the optimizer of the recipes' tables.

    Raises:
        UserError: others are given.
    """
    theirs = {"dim": config.collab.dim, "table_optimizer": config.collab.table_optimizer}
    for name, value in theirs.items():
        given = getattr(settings, name)
        if given not in (type(settings).__dataclass_fields__[name].default, value):
            raise UserError(f"{name} is {given}, but the recipes have {value}: leave --{name.replace('_', '-')} out")
    return dataclasses.replace(settings, **theirs)


def semantic_table(settings: "Planning", config: "Config") -> "Table":
    """The distilled vectors, as wide as the language model, which fuse holds beside users and items."""
    from sellarec.language.llm import LlmSource, hidden_width
    from sellarec.training.table import Table

    frozen = "tables" not in config.fuse.train or config.fuse.semantic == "frozen"
    width = hidden_width(LlmSource(str(settings.llm), None, ""))
    return Table("semantic", settings.items, width, ("semantic",), frozen=frozen)


def plan_language_model(settings: "Planning", config: "Config", tables: int) -> None:
    """Print what a language model takes of each worker, what it computes, and which GPUs that needs.

    Args:
        config: the settings of the stages that run it.
        tables: bytes of all embedding tables on the workers' devices.
    """
    from sellarec.language import cost
    from sellarec.language.llm import LlmSource, context_length, read_config
    from sellarec.language.memory import phases, shape_of, summary, use_of

    name = str(settings.llm)
    shape = shape_of(LlmSource(name, None, ""), None if config.adapt.method == "full" else config.adapt)
    context = context_length(read_config(name))
    rows = cost.known_rows(config, None)
    if settings.rows is not None:
        train, valid, test = (round(settings.rows * part / config.data.split[0]) for part in config.data.split)
        rows = {"train": train, "valid": valid, "test": test, "users": settings.users, "items": settings.items}
    if rows is None:
        raise UserError("give --rows, the rows of the train split: the recipes name no dataset whose counts are known")
    stages = [stage for stage in cost.STAGES if stage != "pretrain" or config.pretrains]
    found = cost.costs(config, shape, context, rows, stages)
    print(
        f"\n{name}: {shape.weights:,} weights, {shape.layers} layers of width {shape.hidden:,}; {shape.adapter:,} weights of the "
        "adapter"
    )
    on_gpu = settings.device == "cuda" or settings.gpu is not None
    for stage in stages:
        use = dataclasses.replace(use_of(stage, config, context), on_gpu=on_gpu)
        print(f"{stage:<9} takes of each of {settings.workers} workers {summary(phases(shape, use))}")
    for line in cost.in_words(found):
        print(line)
    for gpu in [settings.gpu] if settings.gpu else cost.GPUS:
        workers = cost.fewest_workers(config, shape, context, stages, tables, cost.GPUS[gpu])
        if workers is None:
            print(
                f"{gpu} ({cost.GPUS[gpu].memory} GiB): fits on no number of them: lower micro_batch or prompt.max_tokens, or set "
                "checkpoint_activations and llm.storage bfloat16"
            )
            continue
        print(
            f"{gpu} ({cost.GPUS[gpu].memory} GiB): fits from {workers} on; "
            + cost.hours_in_words(found, [gpu], max(workers, settings.workers), settings.mfu)[0]
        )
    for line in cost.assumptions(settings.mfu):
        print(line)


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
