"""How fast rows reach the workers, and what it costs, over the number of workers.

    python benchmarks/data/stream.py [--rows 4000000] [--workers 1 2 3] [--out stream.json]

A log is generated and prepared; workers of Ray Train take all its training rows once and do nothing with them. Measured for
rows as matrix factorisation reads them, with histories (SVD++), with drawn negatives, and as prompts: rows per second from the
second batch to the last, which should not fall with the number of workers.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path

import ray
import ray.train
from prepare_curve import PACKAGES, prepare_generated

from sellarec.artifacts import Place
from sellarec.collab.negatives import Negatives
from sellarec.data.log import Log, item_counts, read_log
from sellarec.language.prompts import Prompts
from sellarec.training.cluster import connect
from sellarec.training.progress import Console
from sellarec.training.stream import Order, Prepare, row_groups, stream

PLAIN = ("row", "user", "item", "label", "user_seen", "item_seen")
HISTORY = (*PLAIN, "history")
BATCH = 4096


def cases(log: Log) -> dict[str, tuple[tuple[str, ...], Prepare | None]]:
    """By name: the columns that are read, and what is done to them."""
    from transformers import AutoTokenizer

    from sellarec.config import Pretrain, Prompt
    from sellarec.language.pretrain import build_decoder

    titles = log.items(["title"])["title"].to_pylist()
    with tempfile.TemporaryDirectory() as folder:
        build_decoder(titles[:20_000], [], Pretrain(), 0, Path(folder))
        prompts = Prompts(
            AutoTokenizer.from_pretrained(folder), titles, Prompt(template="compact"), "item", 256, "text"
        )
    negatives = Negatives("uniform", item_counts(log), 8, seed=0)
    return {
        "plain": (PLAIN, None),
        "histories": (HISTORY, None),
        "8 negatives": (HISTORY, partial(negatives.prepare, keep_history=False)),
        "prompts": (HISTORY, prompts.prepare),
    }


def consume(config: dict) -> None:
    """What a worker does."""
    order, context = config["order"], ray.train.get_context()
    batches = stream(
        order, config["columns"], config["prepare"], context.get_world_rank(), context.get_world_size(), 0,
        order.steps_per_epoch,
    )  # fmt: skip
    next(batches)
    start, rows = time.monotonic(), 0
    for batch in batches:
        rows += len(batch)
    seconds = time.monotonic() - start
    if context.get_world_rank() == 0:
        Path(config["result"]).write_text(json.dumps({"seconds": seconds, "rows": rows * context.get_world_size()}))


def measure(order: Order, columns: tuple[str, ...], prepare: Prepare | None, workers: int, scratch: Path) -> dict:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    result = scratch / "result.json"
    TorchTrainer(
        consume,
        train_loop_config={"order": order, "columns": columns, "prepare": prepare, "result": str(result)},
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="stream", storage_path=str(scratch)),
    ).fit()
    return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        prepare_generated(arguments.rows, scratch / "log")
        ray.shutdown()  # preparation's, which has room for one worker
        connect(max(arguments.workers), Console(), Place.of(folder), device="cpu")
        log = read_log(scratch / "log")
        order = Order(tuple(row_groups([str(path) for path in log.split_paths("train")])), BATCH, seed=0)
        for name, (columns, prepare) in cases(log).items():
            for workers in arguments.workers:
                found = measure(order, columns, prepare, workers, scratch)
                speed = round(found["rows"] / found["seconds"])
                runs.append({"case": name, "workers": workers, "rows": order.rows, "rows_per_second": speed})
                print(f"{name:<12} {workers} workers  {speed:>10,} rows/s", flush=True)
    ray.shutdown()
    if arguments.out:
        facts = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "cores": os.cpu_count(),
            "versions": {name: metadata.version(name) for name in PACKAGES},
            "runs": runs,
        }
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
