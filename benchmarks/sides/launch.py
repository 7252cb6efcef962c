"""Both sides of the case launch: stage collab as jobs/train.py runs it, under Ray Train and Ray Data, and without Ray: processes
that run the same engine on the same batches, over gloo. As a script this file is one of these processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

from sellarec.training.launch import KEEP_FREED_MEMORY

ROOT = Path(__file__).parents[2]
FIRST = 20
"""Losses that are compared: as many as a stage notes of its first steps."""


def inputs(work: dict[str, Any], folder: Path) -> None:
    """A prepared log with long-tailed users and items."""
    sizes = [f"--{name}={work[name]}" for name in ("users", "items", "interactions")]
    command = [sys.executable, str(ROOT / "jobs/generate.py"), *sizes, "--out", str(folder / "generated")]
    subprocess.run(command, check=True, stdout=sys.stderr)


def flags(work: dict[str, Any], folder: Path, seed: int) -> list[str]:
    """Of jobs/train.py; the prepared log stands after the first time."""
    return [
        "log", f"--data={folder / 'generated/log'}", "--stages=prepare,collab", f"--workers={work['workers']}",
        f"--workspace={folder / 'workspace'}", f"--name=seed-{seed}", f"--seed={seed}", f"--collab.dim={work['dim']}",
        f"--collab.batch={work['batch']}", f"--collab.epochs={work['epochs']}", f"--collab.validate-every={work['epochs']}",
        f"--collab.valid-rows={work['interactions']}",  # all
    ]  # fmt: skip


def with_ray(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    seed = 0

    def repeat() -> tuple[int, dict]:
        nonlocal seed
        seed += 1
        command = [sys.executable, str(ROOT / "jobs/train.py"), *flags(work, folder, seed)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        run = folder / f"workspace/runs/seed-{seed}"
        artifact = json.loads((run / "artifacts.json").read_text())["collab"]
        facts = json.loads((folder / "workspace/artifacts" / artifact / "training.json").read_text())
        ((_, valid),) = facts["evaluations"]
        return _units(work), {"losses": facts["first_losses"], "auc": valid["auc"]}

    return repeat


def without_ray(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    seed = 0

    def repeat() -> tuple[int, dict]:
        nonlocal seed
        seed += 1
        (out := folder / f"plain-{seed}").mkdir()
        given = json.dumps({"flags": flags(work, folder, seed), "out": str(out), "workers": work["workers"]})
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, given, str(rank)], stdout=sys.stderr, env={**os.environ, **KEEP_FREED_MEMORY}
            )
            for rank in range(work["workers"])
        ]
        statuses = [process.wait() for process in processes]
        if any(statuses):
            raise RuntimeError("a process of the side without Ray has failed: its message is above")
        return _units(work), json.loads((out / "found.json").read_text())

    return repeat


def _units(work: dict[str, Any]) -> int:
    return work["interactions"] * work["epochs"]


def train(given: dict[str, Any], rank: int) -> None:
    """What one process does: the steps, one evaluation of the valid split, and the export."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from sellarec.artifacts import Place
    from sellarec.collab.task import build_collab
    from sellarec.command_line import parse
    from sellarec.data.log import read_log
    from sellarec.evaluation.metrics import auc
    from sellarec.training.engine import Engine, Workers
    from sellarec.training.loop import seed_everything
    from sellarec.training.storage import Storage
    from sellarec.training.stream import Order, prepared, row_groups, slices

    config, workers = parse(given["flags"]), given["workers"]
    torch.set_num_threads(1)
    store = dist.FileStore(f"{given['out']}/store", workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers, timeout=timedelta(minutes=2))
    joined = Workers(rank, workers, torch.device("cpu"), dist.group.WORLD, dist.group.WORLD)
    log = read_log(Path(config.data.path))
    seed_everything(config.seed, "collab")
    task = build_collab(log, config.collab, None, seed=config.seed)
    engine = Engine(task, joined, config.seed, config.collab, config.tables, "float32")

    def batches(split: str, size: int, seed: int | None, columns: list[str], epochs: int) -> Any:
        order = Order(tuple(row_groups([str(path) for path in log.split_paths(split)])), size, seed)
        steps = epochs * order.steps_per_epoch
        blocks = chain.from_iterable(prepared(order, piece, columns, task.prepare) for piece in order.pieces(0, steps))
        return steps, slices(blocks, order, rank, workers, 0, steps)

    steps, rows = batches("train", config.collab.batch, config.seed, list(task.columns), int(config.collab.epochs))
    losses = []
    for step, part in enumerate(rows):
        seed_everything(config.seed, "collab", step, rank)
        losses.append(engine.step(part, step, engine.rate(step, steps)))
    _, rows = batches("valid", config.evaluate.batch, None, [*task.columns, "row", "label"], 1)
    scored = engine.score(rows, lambda _: None)
    output = Place.of(given["out"])
    output.make()
    engine.export(output, Storage(joined, "collab", 0.0, print, output))
    if scored is not None:
        labels = log.split("valid", ["label"])["label"].to_numpy().astype(np.int64)
        found = {"losses": losses[:FIRST], "auc": auc(labels, scored["score"])}
        Path(given["out"], "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    train(json.loads(sys.argv[1]), int(sys.argv[2]))
