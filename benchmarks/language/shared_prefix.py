"""Scoring candidates of users with what their prompts share read once, against each prompt by itself:
`python benchmarks/language/shared_prefix.py --out FILE.json`.

Each user has a history of titles and as many candidates as asked for; all go through stage adapt's task with a fresh adapter, in
micro-batches, as an export scores them. Rounds of both ways take turns, after one of each that doesn't count. Prints the median
seconds of a round, the tokens that the model reads (padding included), and by how much scores differ. One process; neither Ray
nor TorchRec is needed.

    python benchmarks/language/shared_prefix.py --hidden 256 --layers 6 --heads 4 --out FILE.json     (random weights)
    python benchmarks/language/shared_prefix.py --llm FOLDER --dtype bfloat16 --device cuda --out FILE.json
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

sys.path.append(str(Path(__file__).parents[1] / "tables"))  # benchmarks share their helpers

from processes import write

from sellarec.config import Adapt, Pretrain, Prompt
from sellarec.language.adapt import TextTask, build_adapt
from sellarec.language.llm import find_llm
from sellarec.language.pretrain import build_decoder
from sellarec.language.templates import read_template

WORDS = [
    "the",
    "of",
    "and",
    "silent",
    "golden",
    "last",
    "river",
    "harbor",
    "night",
    "winter",
    "king",
    "stranger",
    "city",
    "road",
]


def titles(number: int) -> list[str]:
    """Of 2 to 6 words and a year, about as long as MovieLens'."""
    generator = np.random.default_rng(0)
    found = [" ".join(generator.choice(WORDS, generator.integers(2, 7))).capitalize() for _ in range(number)]
    return [f"{title} ({year})" for title, year in zip(found, generator.integers(1930, 2001, number), strict=True)]


def rows(settings: argparse.Namespace) -> pa.Table:
    generator, number = np.random.default_rng(1), settings.users * settings.candidates
    histories = generator.integers(0, settings.items, (settings.users, settings.history))
    return pa.table(
        {
            "row": np.arange(number),
            "item": generator.integers(0, settings.items, number),
            "label": np.zeros(number, np.int8),
            "history": pa.array(np.repeat(histories, settings.candidates, axis=0).tolist(), pa.list_(pa.int64())),
            "weight": np.ones(number, np.float32),
        }
    )


@torch.no_grad()
def score(task: TextTask, given: pa.Table, size: int, shares: bool, device: torch.device) -> tuple[np.ndarray, int]:
    """Scores by row, and the tokens that the model reads for them."""
    arranged, shared, alone = task.share(given, size)
    used = arranged if shares else given
    batch = {name: value.to(device) for name, value in task.collate(used, None).items()}
    found = [
        task.score(task.model, {name: value[start : start + size] for name, value in batch.items()}, {})
        for start in range(0, len(used), size)
    ]
    scores = np.empty(len(used), np.float32)
    scores[used["row"].to_numpy()] = torch.cat(found).float().cpu().numpy()
    return scores, shared if shares else alone


def measure(settings: argparse.Namespace, folder: str, template: str, size: int) -> dict:
    device, catalog = torch.device(settings.device), titles(settings.items)
    prompt = Prompt(template=template, history=settings.history, max_tokens=settings.max_tokens)
    task = build_adapt(find_llm(folder, None), catalog, prompt, "movie", Adapt(targets=("all-linear",)))
    task.model.to(device).eval()
    for weight in task.model.parameters():
        weight.data = weight.data.to(getattr(torch, settings.dtype))
    given = task.prepare_to_score(rows(settings), 0, np.zeros(settings.users * settings.candidates, np.int64))
    given = given.take(np.argsort(pc.list_value_length(given["tokens"]).to_numpy(), kind="stable"))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    found: dict[bool, tuple[np.ndarray, int]] = {}
    for number in range(settings.rounds + 1):
        for shares in (False, True) if number % 2 else (True, False):
            start = time.perf_counter()
            found[shares] = score(task, given, size, shares, device)  # ends with a copy to the host, which waits
            if number:
                seconds[shares].append(time.perf_counter() - start)
    (alone, alone_tokens), (shared, shared_tokens) = found[False], found[True]
    median = {shares: float(np.median(times)) for shares, times in seconds.items()}
    return {
        "template": template,
        "micro_batch": size,
        "weights": sum(weight.numel() for weight in task.model.parameters()),
        "rows": len(given),
        "tokens alone": alone_tokens,
        "tokens shared": shared_tokens,
        "seconds alone": seconds[False],
        "seconds shared": seconds[True],
        "times as fast": median[False] / median[True],
        "largest difference of scores": float(np.abs(alone - shared).max()),
        "standard deviation of scores": float(alone.std()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", help="folder of a language model; else one of random weights, of the shape below")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--template", nargs="+", default=["full", "compact"])
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[16])
    parser.add_argument("--users", type=int, default=1)
    parser.add_argument("--candidates", type=int, default=100, help="of each user")
    parser.add_argument("--history", type=int, default=10, help="titles")
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", default="", help="what else ran on the machine, for the result")
    parser.add_argument("--out", type=Path, required=True)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as made:
        if settings.llm is None:
            shape = {"hidden": settings.hidden, "layers": settings.layers, "heads": settings.heads}
            words = [text for name in settings.template for text in read_template(name).words()]
            decoder = Pretrain(vocabulary=4096, context=settings.max_tokens, **shape)
            build_decoder(titles(settings.items), words, decoder, 0, Path(made))
        device = torch.cuda.get_device_name() if settings.device == "cuda" else "cpu"
        facts = {
            name: value for name, value in vars(settings).items() if name not in ("out", "template", "micro_batch")
        }
        facts |= {"device": device, "load average": os.getloadavg()}
        cases = []
        for template in settings.template:
            for size in settings.micro_batch:
                case = measure(settings, settings.llm or made, template, size)
                cases.append(case)
                print(
                    f"{template}, micro_batch {size}: {case['rows']} rows, {case['tokens alone']:,} tokens in "
                    f"{np.median(case['seconds alone']):.3f} s, shared {case['tokens shared']:,} in "
                    f"{np.median(case['seconds shared']):.3f} s: {case['times as fast']:.2f} times as fast; scores differ by "
                    f"{case['largest difference of scores']:.1e} (standard deviation "
                    f"{case['standard deviation of scores']:.2g})",
                    flush=True,
                )
                write(settings.out, facts, cases, packages=("transformers", "peft", "numpy"))  # what is measured so far


if __name__ == "__main__":
    main()
