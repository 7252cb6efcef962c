"""Both sides of the case launch: stage collab as jobs/train.py runs it, under Ray Train and Ray Data, and without Ray: processes
that run the same engine on the same batches, over gloo. As a script this file is one of these processes.

Both find where the time of their first repetition goes (`parts`); seconds add up to it. Shares of steps' time, and memory at
their end, are with Ray the mean of its workers, without it worker 0's.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import chain
from pathlib import Path
from statistics import fmean
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
    import timed_job

    seed = 0

    def repeat() -> tuple[int, dict]:
        nonlocal seed
        seed += 1
        job, notes = [str(ROOT / "jobs/train.py")], folder / "notes"
        if seed == 1:  # its workers note when they did what
            notes.mkdir()
            job = [str(ROOT / "benchmarks/timed_job.py"), str(notes)]
        start = time.time()
        subprocess.run([sys.executable, *job, *flags(work, folder, seed)], check=True, stdout=sys.stderr)
        end = time.time()
        run = folder / f"workspace/runs/seed-{seed}"
        artifact = json.loads((run / "artifacts.json").read_text())["collab"]
        facts = json.loads((folder / "workspace/artifacts" / artifact / "training.json").read_text())
        ((_, valid),) = facts["evaluations"]
        found = {"losses": facts["first_losses"], "auc": valid["auc"]}
        if seed == 1:
            (worker,) = (noted for noted in timed_job.read(notes).values() if noted[0]["rank"] == 0)
            steps = [note["time"] for note in worker if note["event"] == "step"]
            found["parts"] = parts(start, worker[0]["time"], steps, end) | shown_by_tensorboard(run / "tensorboard")
        return _units(work), found

    return repeat


def parts(start: float, joined: float, steps: Sequence[float], end: float) -> dict[str, float]:
    """Seconds of a repetition, by when it began and ended, worker 0 could work, and each step was taken."""
    return {
        "s until workers run": joined - start,
        "s to the first step's end": steps[0] - joined,
        "s of all other steps": steps[-1] - steps[0],
        "s of valid split, export and end": end - steps[-1],
    }


def shown_by_tensorboard(folder: Path) -> dict[str, float]:
    """What a run's curves of stage collab say of its workers on the average: shares of the time of steps, and memory."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator(str(folder))
    curves.Reload()
    names = {"% waiting for data": "data wait (%)", "% on tables": "tables (%)", "% in exchanges": "all-to-all (%)"}
    shown = {name: fmean(point.value for point in curves.Scalars(f"collab/{curve}")) for name, curve in names.items()}
    return shown | {"GiB of a worker": curves.Scalars("collab/memory GiB")[-1].value}


def without_ray(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    seed = 0

    def repeat() -> tuple[int, dict]:
        nonlocal seed
        seed += 1
        (out := folder / f"plain-{seed}").mkdir()
        about = {"flags": flags(work, folder, seed), "out": str(out), "workers": work["workers"], "start": time.time()}
        given = json.dumps(about)
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, given, str(rank)], stdout=sys.stderr, env={**os.environ, **KEEP_FREED_MEMORY}
            )
            for rank in range(work["workers"])
        ]
        statuses = [process.wait() for process in processes]
        if any(statuses):
            raise RuntimeError("a process of the side without Ray has failed: its message is above")
        found = json.loads((out / "found.json").read_text())
        spent = found.pop("spent")
        found["parts"] = parts(about["start"], spent.pop("joined"), spent.pop("steps"), time.time()) | spent
        return _units(work), found

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
    from sellarec.training.engine import Engine
    from sellarec.training.loop import seed_everything
    from sellarec.training.storage import Storage
    from sellarec.training.stream import Order, prepared, row_groups, slices
    from sellarec.training.workers import Workers

    joined_at = time.time()
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
    losses: list[float] = []
    ends: list[float] = []
    waited, looping = 0.0, time.time()
    for step in range(steps):
        asked = time.time()
        part = next(rows)
        waited += time.time() - asked
        seed_everything(config.seed, "collab", step, rank)
        losses.append(engine.step(part, step, engine.rate(step, steps)))
        ends.append(time.time())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = {"waiting for data": waited, "on tables": engine.table_seconds, "in exchanges": engine.exchanges.seconds}
    _, rows = batches("valid", config.evaluate.batch, None, [*task.columns, "row", "label"], 1)
    scored = engine.score(rows, lambda _: None)
    output = Place.of(given["out"])
    output.make()
    engine.export(output, Storage(joined, "collab", 0.0, print, output))
    if scored is not None:
        labels = log.split("valid", ["label"])["label"].to_numpy().astype(np.int64)
        spent: dict[str, Any] = {"joined": joined_at, "steps": ends}
        spent |= {f"% {what}": 100 * found / (ends[-1] - looping) for what, found in seconds.items()}
        spent["GiB of a worker"] = memory
        found = {"losses": losses[:FIRST], "auc": auc(labels, scored["score"]), "spent": spent}
        Path(given["out"], "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    train(json.loads(sys.argv[1]), int(sys.argv[2]))
