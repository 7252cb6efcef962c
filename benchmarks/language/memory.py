"""Memory of training a language model, as it is planned and as processes take it:
`python benchmarks/language/memory.py --out FILE.json`.

Each case is stage adapt's task on a Llama of random weights, with the default adapter, in processes of one thread: the model is
loaded by one of them and sharded, two steps are taken on prompts of the longest kind, and rows are scored. Prints what
`sellarec/language/memory.py` counts for each of these of a worker, and what a process's resident memory rose by at its peak: the
mean over them, as the memory of a machine is shared out evenly.

The processes hand back at once what they free. By default glibc keeps much of it (`--default-malloc`).
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[1] / "tables"))  # benchmarks share their helpers

from processes import measure, write

from sellarec.config import Adapt, Config, Pretrain, Prompt, Tables
from sellarec.language.adapt import build_adapt
from sellarec.language.llm import find_llm
from sellarec.language.memory import phases, shape_of, use_of
from sellarec.language.pretrain import build_decoder
from sellarec.language.templates import read_template
from sellarec.training.engine import Engine
from sellarec.training.workers import Workers, together_of_first

PHASES = ("loading", "a step", "scoring")

TITLE = "the silent river of the golden city"

CASES: list[dict[str, Any]] = [
    {"hidden": 256, "layers": 4, "vocabulary": 4096, "micro_batch": 4, "tokens": 256},
    {"hidden": 512, "layers": 4, "vocabulary": 16_384, "micro_batch": 1, "tokens": 128},
]
"""The first is mostly activations, the second mostly weights."""


HAND_BACK = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
"""Has glibc hand larger tensors back to the system when they are freed, however large those before were."""


def peak_growth(work: Callable[[], Any], start: int) -> tuple[Any, int]:
    """What `work` gives, and the most bytes that this process has resident meanwhile, above `start`."""
    Path("/proc/self/clear_refs").write_text("5")  # the kernel counts the peak anew
    found = work()
    return found, _status("VmHWM") - start


def _status(name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])


def write_model(folder: Path, hidden: int, layers: int, vocabulary: int, tokens: int) -> None:
    """A Llama of random weights; its tokenizer is small, its vocabulary is not."""
    from transformers import LlamaForCausalLM

    words = list(read_template("compact").words())
    decoder = Pretrain(vocabulary=400, context=tokens, hidden=hidden, layers=layers, heads=4)
    build_decoder([TITLE], words, decoder, 0, folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(vocabulary)
    model.save_pretrained(folder)


def prompts(batch: int) -> pa.Table:
    columns = {
        "row": np.arange(batch),
        "item": np.zeros(batch, np.int64),
        "label": pa.array(np.arange(batch) % 2, pa.int8()),
        "history": pa.array([[0] * 50] * batch, pa.list_(pa.int64())),
        "weight": np.ones(batch, np.float32),
    }
    return pa.table(columns)


def train(workers: Workers, folder: str, config: Config) -> dict[str, int]:
    """The peaks of loading, of two steps and of scoring."""
    settings, size = config.adapt, config.adapt.micro_batch
    start = _status("VmRSS")

    def load() -> Engine:
        make = partial(build_adapt, find_llm(folder, None), [TITLE], config.prompt, "movie", settings)
        task = together_of_first(make, workers)
        return Engine(task, workers, 0, settings, Tables(), "float32")

    engine, loading = peak_growth(load, start)
    rows = engine.task.prepare(prompts(2 * size), 0, np.zeros(2 * size, np.int64))
    longest = max(map(len, rows["tokens"].to_pylist()))
    assert longest > 0.9 * config.prompt.max_tokens, "prompts are of about the longest kind"
    _, stepping = peak_growth(lambda: [engine.step(rows, step, 1.0) for step in range(2)], start)
    _, scoring = peak_growth(lambda: engine.score([rows], lambda _: None), start)
    return dict(zip(PHASES, (loading, stepping, scoring), strict=True))


def worker(rank: int, workers: int, folder: str, small: str, config: Config) -> dict[str, int]:
    group = Workers(rank, workers, torch.device("cpu"), dist.group.WORLD, dist.group.WORLD)
    # what kernels and imports take has no part in it
    train(group, small, Config(prompt=Prompt(template="compact", max_tokens=64, history=50)))
    found = train(group, folder, config)
    peaks = torch.tensor(list(found.values()))
    dist.all_reduce(peaks)
    return dict(zip(found, (peaks // workers).tolist(), strict=True))


def planned(folder: str, config: Config, tokens: int) -> dict[str, int]:
    """What is counted for the same: of a run's stage without the comparison at its end, as no such thing is done here."""
    shape = shape_of(find_llm(folder, None), config.adapt)
    use = use_of("adapt", config, tokens)
    loading, stepping, _ = phases(shape, use).values()
    _, scoring, _ = phases(shape, replace(use, backward=False)).values()
    return {name: sum(found.values()) for name, found in zip(PHASES, (loading, stepping, scoring), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--default-malloc", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    settings = parser.parse_args()
    cases = []
    with tempfile.TemporaryDirectory() as root:
        make = partial(write_model, vocabulary=400)
        make(Path(root) / "small", hidden=16, layers=2, tokens=64)
        for number, case in enumerate(CASES):
            folder = str(Path(root) / str(number))
            model = {name: value for name, value in case.items() if name != "micro_batch"}
            write_model(Path(folder), **model)
            for workers in settings.workers:
                for checkpoints in (False, True):
                    config = Config(
                        workers=workers,
                        prompt=Prompt(template="compact", max_tokens=case["tokens"], history=50),
                        adapt=Adapt(micro_batch=case["micro_batch"], checkpoint_activations=checkpoints),
                    )
                    environment = {} if settings.default_malloc else HAND_BACK
                    found = measure(worker, workers, folder, f"{root}/small", config, environment=environment)
                    counted = planned(folder, config, case["tokens"])
                    facts = {**case, "workers": workers, "checkpoint_activations": checkpoints}
                    cases.append({**facts, "counted bytes": counted, "measured bytes": found})
                    shown = ", ".join(
                        f"{name} {counted[name] / 2**20:,.0f} MiB counted, {found[name] / 2**20:,.0f} measured"
                        for name in counted
                    )
                    print(f"{facts}: {shown}", flush=True)
                    write(settings.out, {"default malloc": settings.default_malloc}, cases)  # what is measured so far


if __name__ == "__main__":
    main()
