"""What a step costs, in numbers that don't depend on the machine's mood, against those stored in guard.json.

    python benchmarks/guard.py            compare: status 1, and each number that has slipped by its case, both values
    python benchmarks/guard.py --write    store today's: after a change that is meant, or of the versions of packages

Of one step (or ranking, or scoring) of each stage's task by the training loop's engine, on one and on two gloo workers, and of
encoding texts, on one:

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
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from sides.language import prompt_rows, titles
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).parent / "tables"))  # benchmarks share their helpers

from processes import measure, measure_alone
from traffic import collectives, wire_bytes

from sellarec.alignment.align import build_align
from sellarec.collab.model import Sizes
from sellarec.collab.negatives import Negatives
from sellarec.collab.task import CollabTask, model_class
from sellarec.config import Adapt, Align, Collab, Distil, Fuse, Pretrain, Prompt, Tables
from sellarec.fusion.fuse import build_fuse
from sellarec.language.adapt import build_adapt
from sellarec.language.distil import ItemEncoder
from sellarec.language.llm import find_llm
from sellarec.language.pretrain import build_decoder
from sellarec.language.scorer import base_model
from sellarec.language.templates import read_template
from sellarec.training import dense
from sellarec.training.engine import Engine
from sellarec.training.stream import Order, RowGroup, slices
from sellarec.training.table import Table
from sellarec.training.task import Graph, Task
from sellarec.training.workers import Workers

STORED = Path(__file__).parent / "guard.json"
COMMAND = "python benchmarks/guard.py --write"

TOLERANCE = 0.01
"""By what part a number may differ."""

WARM_UP = 2
USERS, ITEMS, DIM, BATCH, PROMPTS = 600, 400, 16, 256, 16
PROMPT = Prompt(template="compact", history=10)
LANGUAGE = {"micro_batch": 4}
EDGES = "edges.parquet"

MF = Collab(dim=DIM)
SASREC = Collab(
    model="sasrec",
    dim=DIM,
    layers=2,
    heads=1,
    history=10,
    user_rows=False,
    biases=False,
    loss="bpr",
    negatives_per_row=1,
)
LIGHTGCN = Collab(
    model="lightgcn", dim=DIM, layers=2, biases=False, loss="softmax", shared_negatives=True, negatives_per_row=1
)


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


def collab_task(settings: Collab = MF, folder: Path | None = None) -> CollabTask:
    """The task of a model on USERS and ITEMS.

    Args:
        folder: has the edges of a graph, for a model that smooths its rows over one.
    """
    model, seen = model_class(settings.model)(Sizes(USERS, ITEMS, 0.5), settings), np.ones(ITEMS, bool)
    negatives = None if settings.loss == "bce" else Negatives("uniform", np.ones((2, ITEMS), np.int64), 1, 0)
    graph = None if folder is None else Graph((str(folder / EDGES),), USERS, ITEMS)
    return CollabTask(model, settings, seen, negatives, graph)


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


Built = tuple[nn.Module | None, Callable[[], Any], int]
"""The decoder of a language model, the step, and tokens of its prompts."""


def decoder_of(task: Task) -> nn.Module | None:
    llm = getattr(getattr(task.model, "scorer", task.model), "llm", None)
    return None if llm is None else base_model(llm).base_model


def step_of(task: Task, settings: Any, number: int, workers: Workers) -> Built:
    engine = Engine(task, workers, 0, settings, Tables(), "float32")
    rows = prepared(task, number, workers, engine.micro_batch)
    return decoder_of(task), lambda: engine.step(rows, 0, 1.0), tokens_of(rows)


def tokens_of(rows: pa.Table) -> int:
    return len(rows["tokens"].combine_chunks().flatten()) if "tokens" in rows.column_names else 0


def ranking(folder: Path, workers: Workers) -> Built:
    """The whole catalog for some users."""
    task = collab_task()
    engine = Engine(task, workers, 0, MF, Tables(), "float32")
    rows = interactions(64)
    return None, lambda: engine.rank([rows], 10, lambda _: None), 0


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
    return decoder_of(task), lambda: engine.score([rows], lambda _: None), tokens_of(rows)


def encoding(folder: Path, workers: Workers) -> Built:
    """A vector for each of some titles."""
    encoder = ItemEncoder(find_llm(str(folder / "model"), None), None, "movie", Distil(micro_batch=4))
    texts = titles(PROMPTS)
    return encoder.decoder, lambda: encoder.encode(texts), sum(map(len, encoder.tokens(texts)[0]))


CASES: dict[str, Callable[[Path, Workers], Built]] = {
    "collab": lambda folder, workers: step_of(collab_task(), MF, BATCH, workers),
    "sasrec": lambda folder, workers: step_of(collab_task(SASREC), SASREC, BATCH, workers),
    "lightgcn": lambda folder, workers: step_of(collab_task(LIGHTGCN, folder), LIGHTGCN, BATCH, workers),
    "adapt": lambda folder, workers: step_of(adapt_task(folder), Adapt(**LANGUAGE), PROMPTS, workers),
    "align": lambda folder, workers: step_of(align_task(folder), Align(), BATCH, workers),
    "fuse": lambda folder, workers: step_of(fuse_task(folder), Fuse(**LANGUAGE), PROMPTS, workers),
    "ranking": ranking,
    "scoring": scoring,
    "distil": encoding,
}
ALONE = ("distil",)
"""Cases in which workers have nothing to do with each other."""


def observe(decoder: nn.Module | None, take_step: Callable[[], Any], given: int) -> dict[str, float]:
    """The numbers of a step, on this worker."""
    read = 0
    for _ in range(WARM_UP):
        take_step()

    def count(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        nonlocal read
        of_tokens = named.get("inputs_embeds", named.get("input_ids"))
        read += of_tokens.shape[:2].numel()

    if decoder is not None:
        decoder.register_forward_pre_hook(count, with_kwargs=True)
    dist.barrier()
    before, operations = wire_bytes(), Operations()
    with FlopCounterMode(display=False) as flops, operations:
        take_step()
    found: dict[str, float] = {"FLOPs": flops.get_total_flops()}
    found |= {f"operations of {name}": count for name, count in sorted(operations.counts.items())}
    if decoder is not None:
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
        if workers > 1 and name in ALONE:
            continue
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
        edges = interactions(10 * USERS).select(["row", "user", "item", "label"])
        pq.write_table(edges, Path(folder) / EDGES)
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
