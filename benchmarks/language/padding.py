"""Padding of prompts that are trained on: `python benchmarks/language/padding.py --data LOG --llm MODEL --out FILE.json`.

Of a prepared log's train rows, in the order of the first epoch: which share of the tokens that the model reads is padding, where
each worker sorts its slice of the global batch by length, and where the batch is dealt out by length
(`sellarec.training.stream.dealt`). Exact counts, no timing.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from sellarec.config import Prompt
from sellarec.data.log import read_log
from sellarec.language.llm import context_length, load_tokenizer, read_config
from sellarec.language.prompts import Prompts
from sellarec.training.stream import Order, dealt, row_groups, slice_rows

WORKERS = (1, 2, 4, 8)


def padded(lengths: np.ndarray, micro_batch: int) -> int:
    """Tokens that the model reads of a worker's prompts, in micro-batches in their order, each padded to its longest."""
    parts = (lengths[start : start + micro_batch] for start in range(0, len(lengths), micro_batch))
    return sum(len(part) * int(part.max()) for part in parts)


def shares(lengths: np.ndarray, batch: int, micro_batch: int, workers: int) -> dict[str, float]:
    """What is padding of the tokens that are read of all full global batches, by how prompts go to workers."""
    share, read, real = slice_rows(batch, workers), {"sorted slices": 0, "dealt": 0}, 0
    for start in range(0, len(lengths) - batch + 1, batch):
        some = lengths[start : start + batch]
        real += int(some.sum())
        places = dealt(some, share, workers, micro_batch)
        for rank in range(workers):
            read["sorted slices"] += padded(np.sort(some[rank * share : (rank + 1) * share]), micro_batch)
            own = places[rank]
            read["dealt"] += padded(some[own[own >= 0]], micro_batch)
    return {name: 1 - real / tokens for name, tokens in read.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of a prepared log")
    parser.add_argument("--llm", type=Path, required=True, help="folder of a language model")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--template", default="auto")
    parser.add_argument("--batch", type=int, default=64, help="rows of the global batch; a multiple of the workers")
    parser.add_argument("--micro-batch", type=int, default=16)
    settings = parser.parse_args()
    log = read_log(settings.data)
    tokenizer, context = load_tokenizer(settings.llm), context_length(read_config(settings.llm))
    titles = log.items(["title"])["title"].to_pylist()
    prompts = Prompts(tokenizer, titles, Prompt(template=settings.template), log.facts["noun"], context, "fused")
    order = Order(tuple(row_groups([str(path) for path in log.split_paths("train")])), settings.batch, 1)
    lengths = []
    for piece in order.pieces(0, order.steps_per_epoch):
        rows = order.read(piece, ("item", "history"))
        built = prompts.build(rows["item"].to_numpy(), rows["history"].combine_chunks())
        lengths.append(np.diff(built["tokens"].combine_chunks().offsets.to_numpy()))
    tokens = np.concatenate(lengths)
    found = {workers: shares(tokens, settings.batch, settings.micro_batch, workers) for workers in WORKERS}
    print(f"{len(tokens):,} prompts of {tokens.min()} to {tokens.max()} tokens, {tokens.mean():.1f} on average")
    for workers, of in found.items():
        print(f"{workers} workers: " + ", ".join(f"{name} {share:.1%}" for name, share in of.items()))
    facts = {"prompts": len(tokens), "batch": settings.batch, "micro_batch": settings.micro_batch, "padding": found}
    settings.out.write_text(json.dumps(facts | {"template": prompts.template}, indent=1) + "\n")


if __name__ == "__main__":
    main()
