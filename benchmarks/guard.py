"""What a step costs, in numbers that don't depend on the machine's mood, against those stored in guard.json.

    python benchmarks/guard.py            compare: status 1, and each number that has slipped by its case, both values
    python benchmarks/guard.py --write    store today's: after a change that is meant, or of the versions of packages

Of one step (or ranking, or scoring) of each stage's task by the training loop's engine, on one and on two gloo workers:

    FLOPs              products of matrices, forwards and backwards (torch.utils.flop_counter)
    operations         calls of torch's operators, by namespace: each costs some microseconds, on a GPU a kernel or more
    tokens read        tokens and padding that go through the decoder, beside those that the prompts have
    collectives        by name, and the bytes that a worker sent over its connections

Of two workers those of the first. A number that falls is to be stored too, or it could rise again unseen.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from sides.language import prompt_rows, titles
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).parent / "tables"))  # benchmarks share their helpers

from processes import measure, measure_alone
from traffic import collectives, wire_bytes

from sellarec.alignment.align import build_align
from sellarec.collab.model import Sizes
from sellarec.collab.models.mf import Model
from sellarec.collab.task import CollabTask
from sellarec.config import Adapt, Align, Collab, Fuse, Pretrain, Prompt, Tables
from sellarec.fusion.fuse import build_fuse
from sellarec.language.adapt import build_adapt
from sellarec.language.llm import find_llm
from sellarec.language.pretrain import build_decoder
from sellarec.language.scorer import base_model
from sellarec.language.templates import read_template
from sellarec.training import dense
from sellarec.training.engine import Engine, Workers
from sellarec.training.stream import Order, RowGroup, slices
from sellarec.training.table import Table
from sellarec.training.task import Task

STORED = Path(__file__).parent / "guard.json"
COMMAND = "python benchmarks/guard.py --write"

TOLERANCE = 0.01
"""By what part a number may differ."""

WARM_UP = 2
USERS, ITEMS, DIM, BATCH, PROMPTS = 600, 400, 16, 256, 16
PROMPT = Prompt(template="compact", history=10)
LANGUAGE = {"micro_batch": 4}


class Operations(TorchDispatchMode):
    """Counts calls of operators by their namespace (aten, c10d, fbgemm, ...)."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "profiler":  # marks in a trace
            self.counts[func.namespace] += 1
        return func(*args, **(kwargs or {}))


def interactions(number: int) -> pa.Table:
    generator = np.random.default_rng(0)
    known = np.ones(number, bool)
    histories = [generator.integers(0, ITEMS, size) for size in generator.integers(1, 11, number)]
    rows = prompt_rows(histories, generator.integers(0, ITEMS, number), generator.integers(0, 2, number))
    return pa.table(
        {
            **{name: rows[name] for name in rows.column_names},
            "user": generator.integers(0, USERS, number),
            "user_seen": known,
            "item_seen": known,
            "excluded": rows["history"],
        }
    )


def collab_task() -> CollabTask:
    settings = Collab(dim=DIM)
    return CollabTask(Model(Sizes(USERS, ITEMS, 0.5), settings), settings, np.ones(ITEMS, bool))


def drawn(width: int, start: int, stop: int) -> np.ndarray:
    """Distilled vectors of some items."""
    return np.random.default_rng(1).standard_normal((ITEMS, width)).astype(np.float32)[start:stop]


def adapt_task(folder: Path) -> Task:
    return build_adapt(find_llm(str(folder / "model"), None), titles(ITEMS), PROMPT, "movie", Adapt(**LANGUAGE))


def align_task(folder: Path) -> Task:
    return build_align(collab_task(), 32, partial(drawn, 32), DIM, Align(), np.arange(2), 0)


def fuse_task(folder: Path) -> Task:
    source, width = find_llm(str(folder / "model"), None), 32
    semantic = Table("semantic", ITEMS, width, ("semantic",), read=partial(drawn, width))
    return build_fuse(
        source, titles(ITEMS), PROMPT, "movie", folder / "adapter", collab_task(), semantic, 64, None, None,
        Fuse(**LANGUAGE), 0,
    )  # fmt: skip


def prepared(task: Task, number: int, workers: Workers, micro_batch: int | None) -> pa.Table:
    """This worker's slice of a batch, cut as the training loop cuts it."""
    rows = interactions(number).drop_columns("weight")
    if task.prepare is not None:
        rows = task.prepare(rows, 0, np.zeros(number, np.int64))
    order = Order((RowGroup("", 0, number),), number, None)
    return next(slices(iter([rows]), order, workers.rank, workers.world_size, 0, 1, micro_batch))


Built = tuple[Engine, Callable[[], Any], int]
"""The engine, the step, and tokens of its prompts."""


def step_of(task: Task, settings: Any, number: int, workers: Workers) -> Built:
    engine = Engine(task, workers, 0, settings, Tables(), "float32")
    rows = prepared(task, number, workers, engine.micro_batch)
    return engine, lambda: engine.step(rows, 0, 1.0), tokens_of(rows)


def tokens_of(rows: pa.Table) -> int:
    return len(rows["tokens"].combine_chunks().flatten()) if "tokens" in rows.column_names else 0


def ranking(folder: Path, workers: Workers) -> Built:
    """The whole catalog for some users."""
    task = collab_task()
    engine = Engine(task, workers, 0, Collab(dim=DIM), Tables(), "float32")
    rows = interactions(64)
    return engine, lambda: engine.rank([rows], 10, lambda _: None), 0


def scoring(folder: Path, workers: Workers) -> Built:
    """Candidates of two users."""
    task, number = adapt_task(folder), 2 * PROMPTS
    engine = Engine(task, workers, 0, Adapt(**LANGUAGE), Tables(), "float32")
    generator = np.random.default_rng(0)
    histories = list(np.repeat(generator.integers(0, ITEMS, (2, 10)), PROMPTS, axis=0))
    rows = prompt_rows(histories, generator.integers(0, ITEMS, number), np.zeros(number))
    rows = task.prepare_to_score(rows, 0, np.zeros(number, np.int64))
    share = number // workers.world_size
    rows = rows.slice(workers.rank * share, share)
    return engine, lambda: engine.score([rows], lambda _: None), tokens_of(rows)


CASES: dict[str, Callable[[Path, Workers], Built]] = {
    "collab": lambda folder, workers: step_of(collab_task(), Collab(dim=DIM), BATCH, workers),
    "adapt": lambda folder, workers: step_of(adapt_task(folder), Adapt(**LANGUAGE), PROMPTS, workers),
    "align": lambda folder, workers: step_of(align_task(folder), Align(), BATCH, workers),
    "fuse": lambda folder, workers: step_of(fuse_task(folder), Fuse(**LANGUAGE), PROMPTS, workers),
    "ranking": ranking,
    "scoring": scoring,
}


def observe(engine: Engine, take_step: Callable[[], Any], given: int) -> dict[str, float]:
    """The numbers of a step, on this worker."""
    model, read = engine.task.model, 0
    for _ in range(WARM_UP):
        take_step()

    def count(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        nonlocal read
        read += named["inputs_embeds"].shape[:2].numel()

    llm = getattr(getattr(model, "scorer", model), "llm", None)
    if llm is not None:
        base_model(llm).base_model.register_forward_pre_hook(count, with_kwargs=True)
    dist.barrier()
    before, operations = wire_bytes(), Operations()
    with FlopCounterMode(display=False) as flops, operations:
        take_step()
    found: dict[str, float] = {"FLOPs": flops.get_total_flops()}
    found |= {f"operations of {name}": count for name, count in sorted(operations.counts.items())}
    if llm is not None:
        found |= {"tokens read": read, "tokens given": given}
    if dist.get_world_size() > 1:
        dist.barrier()
        found["sent bytes"] = int((wire_bytes() - before)[0])
        found |= {f"collectives, {name}": count for name, count in collectives(take_step).items()}
    return found


def worker(rank: int, workers: int, folder: str) -> dict[str, dict[str, float]]:
    dense.MIN_BLOCK_BYTES = 0  # layers are gathered one by one, as large ones are
    found = {}
    for name, build in CASES.items():
        torch.manual_seed(0)
        group = Workers(rank, workers, torch.device("cpu"), dist.new_group(), dist.new_group())
        found[f"{name}, {workers} worker{'s' if workers > 1 else ''}"] = observe(*build(Path(folder), group))
    return found


def numbers() -> dict[str, dict[str, float]]:
    """By case, the numbers of a step today."""
    with tempfile.TemporaryDirectory() as folder:
        words = list(read_template(PROMPT.template).words())
        shape = Pretrain(vocabulary=512, context=256, hidden=32, layers=2, heads=2)
        build_decoder(titles(ITEMS), words, shape, 0, Path(folder) / "model")
        adapt_task(Path(folder)).model.llm.save_pretrained(Path(folder) / "adapter")
        of_two, of_one = measure(worker, 2, folder), {}
        measure_alone(lambda: of_one.update(worker(0, 1, folder)))
        return of_one | of_two


def slips(stored: dict[str, dict[str, float]], found: dict[str, dict[str, float]]) -> list[str]:
    """What differs, by case, with both values."""
    told = []
    for case in sorted({*stored, *found}):
        before, now = stored.get(case, {}), found.get(case, {})
        for name in sorted({*before, *now}):
            was, is_now = before.get(name, 0), now.get(name, 0)
            if abs(is_now - was) > TOLERANCE * was:
                way = "rose" if is_now > was else "fell"
                told.append(f"{case}: {name} {way} from {was:,} to {is_now:,}")
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="store today's numbers")
    arguments = parser.parse_args()
    found = numbers()
    if arguments.write:
        STORED.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    told = slips(json.loads(STORED.read_text()), found)
    if told:
        print("\n".join([*told, f"If that is meant, store it: {COMMAND}"]))
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
