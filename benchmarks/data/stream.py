"""How fast rows reach the workers, over their number, beside Ray Data as it comes.

    python benchmarks/data/stream.py --out FILE.json [--rows 4000000] [--workers 1 2 3] [--rounds 3] [--cases plain ...]

A log is generated and prepared; workers of Ray Train take all its training rows once and do nothing with them. Measured for
rows as matrix factorisation reads them, with histories (SVD++), with drawn negatives, and as prompts: rows per second, of all
workers together, from their second batch to the last, which should not fall with the number of workers.

`Ray Data` takes the first two kinds of rows as Ray's guide has it: `read_parquet` given to the trainer, of whose shards each
worker takes batches, shuffled in a buffer as large as our windows. Ours is the same order on any number of workers, from any
step; Ray Data's is another each time. Sides take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import machine
import ray
import ray.train
from prepare_curve import PACKAGES, prepare_generated

from sellarec.artifacts import Place
from sellarec.collab.negatives import Negatives
from sellarec.collab.rows import Rows
from sellarec.data.log import Log, item_counts, read_log
from sellarec.language.prompts import Prompts
from sellarec.training.cluster import connect
from sellarec.training.progress import Console
from sellarec.training.stream import WINDOW_ROWS, Order, Prepare, row_groups, stream

PLAIN = ("row", "user", "item", "label", "user_seen", "item_seen")
HISTORY = (*PLAIN, "history")
BATCH = 4096
CASES = ("plain", "histories", "8 negatives", "prompts")


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
    drawn = Rows(0, log.items(["seen"])["seen"].to_numpy(), negatives=negatives).prepare
    return dict(zip(CASES, ((PLAIN, None), (HISTORY, None), (HISTORY, drawn), (HISTORY, prompts.prepare)), strict=True))


def consume(config: dict) -> None:
    """What a worker does."""
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    if config["side"] == "ours":
        order = config["order"]
        batches = stream(order, config["columns"], config["prepare"], rank, workers, 0, order.steps_per_epoch)
        counts: Iterator[int] = (int(batch["weight"].to_numpy().sum()) for batch in batches)
    else:
        shard = ray.train.get_dataset_shard("train").iter_batches(
            batch_size=BATCH // workers, batch_format="pyarrow", local_shuffle_buffer_size=WINDOW_ROWS // workers
        )
        counts = (len(batch) for batch in shard)
    first = next(counts)
    start = time.monotonic()
    rows = sum(counts)
    found = {"seconds": time.monotonic() - start, "timed": rows, "rows": first + rows}
    (Path(config["folder"]) / f"{rank}.json").write_text(json.dumps(found))


def measure(
    side: str, log: Log, columns: tuple[str, ...], prepare: Prepare | None, workers: int, scratch: Path
) -> float:
    """Rows per second of all workers."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    paths = [str(path) for path in log.split_paths("train")]
    order = Order(tuple(row_groups(paths)), BATCH, seed=0)
    datasets: dict[str, Any] = (
        {"train": ray.data.read_parquet(paths).select_columns(list(columns))} if side != "ours" else {}
    )
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        TorchTrainer(
            consume,
            train_loop_config={"side": side, "order": order, "columns": columns, "prepare": prepare, "folder": folder},
            scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(name="stream", storage_path=folder),
            datasets=datasets,
        ).fit()
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(workers)]
    seen = sum(of["rows"] for of in found)
    # Ray Data gives each worker as many rows, so it leaves out fewer of them than there are workers
    if not order.rows - workers < seen <= order.rows:
        raise SystemExit(f"{side}: workers saw {seen} rows of {order.rows}")
    return sum(of["timed"] for of in found) / max(of["seconds"] for of in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--quick", action="store_true", help="no figures: 20,000 rows, 1 and 2 workers, one round")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.workers, arguments.rounds = 20_000, [1, 2], 1
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        prepare_generated(arguments.rows, scratch / "log")
        ray.shutdown()  # preparation's, which has room for one worker
        connect(max(arguments.workers), Console(), Place.of(folder), device="cpu")
        log = read_log(scratch / "log")
        of_log = cases(log)
        for name in arguments.cases:
            columns, prepare = of_log[name]
            sides = ("ours", "Ray Data") if prepare is None else ("ours",)
            for workers in arguments.workers:
                speeds: dict[str, list[float]] = {side: [] for side in sides}
                for _ in range(arguments.rounds):
                    for side in sides:
                        speeds[side].append(measure(side, log, columns, prepare, workers, scratch))
                for side, found in speeds.items():
                    runs.append({"case": name, "workers": workers, "side": side, "rows/s": [round(of) for of in found]})
                    print(
                        f"{name:<12} {workers} workers  {side:<9} {statistics.median(found):>10,.0f} rows/s", flush=True
                    )
    ray.shutdown()
    work = {"rows": arguments.rows, "batch": BATCH, "rounds": arguments.rounds}
    arguments.out.write_text(json.dumps({**work, **machine.facts(PACKAGES), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
