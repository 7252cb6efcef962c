"""Training and ranking against RecBole 1.2.1: `python benchmarks/collab/recbole.py --environment DIR --out FILE.json`.

Both sides get the same file of generated interactions in the shape of MovieLens-1M (6,040 users, 3,706 items, 1,000,209 rows,
long-tailed, nothing to be learned), of which each user's last two rows are left out. Each side is one process of one thread;
they take turns (A B C A B C ...), and one that waits takes no time of the others'. Both have the variables by which glibc keeps
freed memory, as this package's workers have them: without, ranking costs either side page faults.

    mf, adam              ours: BPR with one drawn negative, adam, whose dense gradients are RecBole's optimizer too
    mf, rowwise-adagrad   ours: the same with the default optimizer
    mf, recbole           RecBole's BPR, 64 columns, 2,048 rows a batch
    lightgcn, ours        BPR with one drawn negative, 2 layers, adam
    lightgcn, recbole     RecBole's LightGCN: 2 layers, 64 columns, 2,048 rows a batch, no weight on its norms
    sasrec, ours          full softmax over the catalog, 2 layers, 2 heads, the targets of a user's last 51 items in one
                          sequence, so that a batch has about 1,850 targets; the feed-forward layers are 64 wide
    sasrec, recbole       RecBole's SASRec with its defaults: cross entropy over the catalog, 2 layers, 2 heads, feed-forward
                          layers 256 wide, the last 50 items; each target is a row, whose whole prefix is encoded again
    sasrec, recbole 64    the same, feed-forward layers 64 wide as ours

Ours is the training loop's own engine, in its own process and without Ray: reading the prepared log, drawing negatives and
the step are all timed, as RecBole's data loader, sampler and step are. A target is a trained row (mf) or a next item
(sasrec). "Per CPU second" counts the process's own time, which other work on the machine disturbs less. Ranking is of the
whole catalog but for the user's train items, for the 6,040 users of the valid split, metrics included.

RecBole lives in an environment of its own, which is made in DIR where there is none (pip as configured, some 3 GB).

    python benchmarks/collab/recbole.py --quick --environment DIR --out FILE.json       (2 minutes, once DIR is made)
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path += [
    str(Path(__file__).parents[1]),
    str(Path(__file__).parents[1] / "tables"),
]  # benchmarks share their helpers

from environments import make_environment
from processes import measure_alone, popularity, write

from sellarec.training.launch import KEEP_FREED_MEMORY

PINS = (
    "recbole==1.2.1", "torch==2.13.0", "numpy==1.26.4", "scipy==1.11.4", "pandas==2.1.4", "setuptools==80.10.2"
)  # fmt: skip
"""RecBole 1.2.1 uses names that later numpy, scipy and pandas don't have. What it trains here needs no patch."""

USERS, ITEMS, ROWS, LEAST = 6_040, 3_706, 1_000_209, 20
"""MovieLens-1M; each user has 20 rows or more."""

DIM, HISTORY, BATCH, K = 64, 50, 2048, 10
SEQUENCES = BATCH // HISTORY
QUERIES = 512

OURS = {
    "mf, adam": {"model": "mf", "loss": "bpr", "table_optimizer": "adam"},
    "mf, rowwise-adagrad": {"model": "mf", "loss": "bpr", "table_optimizer": "rowwise-adagrad"},
    "lightgcn, ours": {"model": "lightgcn", "loss": "bpr", "layers": 2, "table_optimizer": "adam"},
    "sasrec, ours": {
        "model": "sasrec", "loss": "full-softmax", "train_on": "sequences", "user_rows": False, "layers": 2, "heads": 2,
        "dropout": 0.5, "history": HISTORY, "table_optimizer": "adam", "optimizer": "adam", "batch": SEQUENCES,
    },
}  # fmt: skip
SETTINGS = {
    "dim": DIM, "biases": False, "global_mean": False, "l2": 0.0, "negatives_per_row": 1, "batch": BATCH,
    "table_learning_rate": 0.001,
}  # fmt: skip

RECBOLE = {
    "mf, recbole": {"model": "BPR", "embedding_size": DIM},
    "lightgcn, recbole": {"model": "LightGCN", "embedding_size": DIM, "n_layers": 2, "reg_weight": 0.0},
    "sasrec, recbole": {"model": "SASRec"},
    "sasrec, recbole 64": {"model": "SASRec", "inner_size": DIM},
}


def write_log(folder: Path) -> None:
    """The interactions as RecBole's NAME.inter."""
    generator = np.random.default_rng(0)
    degrees = LEAST + generator.multinomial(ROWS - LEAST * USERS, popularity(USERS))
    while (over := np.maximum(degrees - ITEMS // 2, 0).sum()) > 0:  # nobody has more than half of the catalog
        degrees = np.minimum(degrees, ITEMS // 2) + generator.multinomial(over, popularity(USERS))
    log_weights = np.log(popularity(ITEMS))
    folder.mkdir()
    with open(folder / f"{folder.name}.inter", "w") as file:
        file.write("user_id:token\titem_id:token\trating:float\ttimestamp:float\n")
        for user, degree in enumerate(degrees):
            # the largest of log-weights with Gumbel noise: items drawn without repeats
            items = np.argpartition(-(log_weights + generator.gumbel(size=ITEMS)), degree)[:degree]
            times = 10**9 + user + np.arange(degree) * 60
            file.writelines(f"u{user}\ti{item}\t5\t{at}\n" for item, at in zip(items, times, strict=True))


class Side:
    """A process that takes commands as lines of JSON: (case, what, batches)."""

    def __init__(self, command: list[str], scratch: Path) -> None:
        set_for_both = (
            dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"), "1") | KEEP_FREED_MEMORY
        )
        self._errors = scratch / "errors.txt"
        with self._errors.open("a") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=scratch,
                env={**os.environ, **set_for_both},
            )  # fmt: skip

    def ask(self, case: str, what: str, batches: int = 0) -> dict[str, float]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([case, what, batches]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(f"{case}, {what}: the process ended\n" + self._errors.read_text()[-4000:])
        return json.loads(answer)

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def our_side(source: Path, scratch: Path) -> None:
    """Answers commands on ours."""
    import pyarrow as pa
    import torch
    import torch.distributed as dist

    from sellarec.collab.task import build_collab
    from sellarec.config import Collab, Data, Tables
    from sellarec.data.log import item_counts, read_log, write_manifest, write_sequences
    from sellarec.data.prepare import prepare, rules_of
    from sellarec.data.sources.recbole import open_recbole
    from sellarec.evaluation.queries import write_queries
    from sellarec.training.engine import Engine, rank_queries
    from sellarec.training.stream import Order, prepared, row_groups, slices
    from sellarec.training.workers import Workers

    pa.set_cpu_count(1)
    log_folder = scratch / "log"
    opened = open_recbole(str(source))
    facts = prepare(
        opened, rules_of(Data(split_by="leave-one-out"), opened), log_folder, hashes={}, start_ray=None,
        say=lambda _: None,
    )  # fmt: skip
    write_manifest(log_folder, facts)
    log = read_log(log_folder)
    np.save(scratch / "counts.npy", item_counts(log))
    write_sequences(log, scratch / "sequences.parquet", HISTORY + 1)
    write_queries(log, "valid", scratch / "queries.parquet", None)
    workers = Workers(0, 1, torch.device("cpu"), dist.group.WORLD, dist.group.WORLD)

    def rows_of(order: Order, columns: list[str], how: Any, last: int) -> Iterator[pa.Table]:
        blocks = itertools.chain.from_iterable(prepared(order, piece, columns, how) for piece in order.pieces(0, last))
        return slices(blocks, order, 0, 1, 0, last)

    def start(case: str) -> tuple[Callable[[int], dict], Callable[[int], dict]]:
        settings = Collab(**SETTINGS | OURS[case])
        task = build_collab(log, settings, None, scratch / "counts.npy")
        engine = Engine(task, workers, 0, settings, Tables(), "float32")
        sequences = settings.train_on == "sequences"
        paths = [scratch / "sequences.parquet"] if sequences else log.split_paths("train")
        order = Order(tuple(row_groups([str(path) for path in paths])), settings.batch, 0)
        batches = enumerate(rows_of(order, list(task.columns), task.prepare, 10**6))

        def train(number: int) -> dict:
            targets = 0
            for step, rows in itertools.islice(batches, number or order.steps_per_epoch):
                engine.step(rows, step, 1.0)
                valid = rows.filter(rows["weight"].to_numpy() > 0)
                targets += len(valid["targets"].combine_chunks().flatten()) if sequences else len(valid)
            return {"targets": targets}

        def rank(_: int) -> dict:
            queries = Order(tuple(row_groups([str(scratch / "queries.parquet")])), QUERIES, None)
            columns = list(dict.fromkeys([*task.columns, "user", "relevant", "excluded"]))
            found = list(rows_of(queries, columns, task.prepare_to_score, queries.steps_per_epoch))
            ranked = rank_queries(engine, found, (K,), lambda _: None)
            assert ranked is not None
            return {"users": len(ranked.users), **ranked.means()}

        return train, rank

    answer(start)


def answer(start: Callable[[str], tuple[Callable[[int], dict], Callable[[int], dict]]]) -> None:
    """Take commands until there are none, timing what the case's functions do."""
    cases: dict[str, Any] = {}
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        case, what, batches = json.loads(line)
        if case not in cases:
            cases[case] = start(case)
        wall, cpu = time.perf_counter(), time.process_time()
        found = cases[case][what == "rank"](batches)
        found |= {"seconds": time.perf_counter() - wall, "CPU seconds": time.process_time() - cpu}
        print(json.dumps(found), file=out, flush=True)


def summary(case: str, what: str, unit: str, found: list[dict], against: list[dict] | None) -> dict:
    """Speeds of a case's rounds, and ratios to those of the side that it is compared with."""
    wall, cpu = ([one[unit] / one[clock] for one in found] for clock in ("seconds", "CPU seconds"))
    out = {
        "case": case, "what": what, f"{unit} of a round": found[0][unit], f"{unit}/s": statistics.median(wall),
        f"{unit} per CPU second": statistics.median(cpu), "rounds": found,
    }  # fmt: skip
    if against:
        for name, clock in (("ratio", "seconds"), ("ratio per CPU second", "CPU seconds")):
            ratios = [a[unit] / a[clock] / (b[unit] / b[clock]) for a, b in zip(found, against, strict=True)]
            out |= {name: statistics.median(ratios), f"lowest, highest {name}": [min(ratios), max(ratios)]}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, help="folder of RecBole's environment")
    models = ["mf", "lightgcn", "sasrec"]
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mf-batches", type=int, default=0, help="batches of a round of mf; 0: an epoch")
    parser.add_argument("--lightgcn-batches", type=int, default=20, help="batches of a round of lightgcn")
    parser.add_argument("--sasrec-batches", type=int, default=20, help="batches of a round of sasrec, ours")
    parser.add_argument("--recbole-sasrec-batches", type=int, default=3, help="batches of a round of sasrec, RecBole's")
    parser.add_argument("--quick", action="store_true", help="two rounds of few batches, two cases of each model")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.side:
        measure_alone(partial(our_side, *map(Path, settings.side)))
        return
    if settings.environment is None or settings.out is None:
        parser.error("--environment and --out are needed")
    pairs = {
        "mf": (["mf, adam", "mf, rowwise-adagrad"], ["mf, recbole"]),
        "lightgcn": (["lightgcn, ours"], ["lightgcn, recbole"]),
        "sasrec": (["sasrec, ours"], ["sasrec, recbole", "sasrec, recbole 64"]),
    }
    pairs = {name: pair for name, pair in pairs.items() if name in settings.models}
    if settings.quick:
        settings.rounds, settings.mf_batches, settings.lightgcn_batches = 2, 40, 2
        settings.sasrec_batches, settings.recbole_sasrec_batches = 4, 1
        pairs = {name: (ours[:1], theirs[:1]) for name, (ours, theirs) in pairs.items()}
    python = make_environment(settings.environment.absolute(), PINS)
    facts = {"recbole environment": PINS, "users": USERS, "items": ITEMS, "rows": ROWS, "mf batch": BATCH}
    facts |= {"sasrec sequences a batch": SEQUENCES, "threads a side": 1}
    lines: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_log(scratch / "generated")
        here = Path(__file__).absolute()
        ours = Side([sys.executable, str(here), "--side", f"{scratch}/generated", folder], scratch)
        # -P: this folder is not searched for modules, where this file would stand for the package
        cases = json.dumps(
            {"dim": DIM, "history": HISTORY, "batch": BATCH, "k": K, "queries": QUERIES, "cases": RECBOLE}
        )
        side = here.with_name("recbole_side.py")
        theirs = Side([str(python), "-P", str(side), f"{scratch}/generated", cases], scratch)
        batches = {**dict.fromkeys(OURS | RECBOLE, settings.mf_batches), "sasrec, ours": settings.sasrec_batches}
        batches |= dict.fromkeys(("lightgcn, ours", "lightgcn, recbole"), settings.lightgcn_batches)
        batches |= dict.fromkeys(("sasrec, recbole", "sasrec, recbole 64"), settings.recbole_sasrec_batches)
        for mine, others in pairs.values():
            sides = dict.fromkeys(mine, ours) | dict.fromkeys(others, theirs)
            for what, unit, rounds in (
                ("train", "targets", settings.rounds),
                ("rank", "users", min(3, settings.rounds)),
            ):
                found: dict[str, list[dict]] = {case: [] for case in sides}
                for case, one in sides.items():  # what is made at first use has no part in it
                    one.ask(case, what, 1)
                for _ in range(rounds):
                    for case, one in sides.items():
                        found[case].append(one.ask(case, what, batches[case]))
                for case in sides:
                    line = summary(case, what, unit, found[case], found[others[0]] if case in mine else None)
                    lines.append(line)
                    more = (
                        f", {line['ratio']:.2f} of {others[0]}'s (per CPU second {line['ratio per CPU second']:.2f})"
                        if case in mine
                        else ""
                    )
                    print(
                        f"{case}, {what}: {line[f'{unit}/s']:,.0f} {unit}/s, {line[f'{unit} per CPU second']:,.0f} per CPU "
                        f"second{more}",
                        flush=True,
                    )
                write(settings.out, facts, lines)  # what is measured so far
        ours.end()
        theirs.end()


if __name__ == "__main__":
    main()
