"""What the sides that run a language model share: the model, titles, and prompts."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sellarec.config import Adapt, Pretrain
from sellarec.language.cost import training_operations
from sellarec.language.llm import find_llm
from sellarec.language.memory import shape_of
from sellarec.language.pretrain import build_decoder
from sellarec.language.templates import read_template

WORDS = (
    "the", "of", "and", "silent", "golden", "last", "river", "harbor", "night", "winter", "king", "stranger", "city", "road"
)  # fmt: skip


def titles(number: int) -> list[str]:
    """Of 2 to 6 words and a year, about as long as MovieLens'."""
    generator = np.random.default_rng(0)
    found = [" ".join(generator.choice(WORDS, generator.integers(2, 7))).capitalize() for _ in range(number)]
    return [f"{title} ({year})" for title, year in zip(found, generator.integers(1930, 2001, number), strict=True)]


def write_model(work: dict[str, Any], folder: Path) -> None:
    """A model of random weights in `folder`/model, where `work.llm` names no other."""
    if work.get("llm"):
        return
    from transformers import AutoConfig, AutoModelForCausalLM

    words = list(read_template(work["template"]).words())
    # its tokenizer is small; of the vocabulary of a real model only the size counts, as that of its logits
    small = Pretrain(vocabulary=2048, context=work["max_tokens"], hidden=16, layers=1, heads=1)
    build_decoder(titles(work["items"]), words, small, 0, folder / "model")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        work["family"], vocab_size=max(work["vocabulary"], small.vocabulary), hidden_size=work["hidden"],
        num_hidden_layers=work["layers"], intermediate_size=work["intermediate"] or 3 * work["hidden"],
        num_attention_heads=work["heads"], num_key_value_heads=work["key_value_heads"] or work["heads"],
        max_position_embeddings=work["max_tokens"], tie_word_embeddings=work["tied"],
        initializer_range=work["hidden"] ** -0.5, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")


def model_folder(work: dict[str, Any], folder: Path) -> str:
    return work.get("llm") or str(folder / "model")


def model_flops(work: dict[str, Any], folder: Path, settings: Adapt, batches: Sequence[pa.Table]) -> dict[str, float]:
    """What steps of training an adapter ask for, by the model's definition: operations of the real tokens, logits of two answers'
    tokens, two operations for each frozen weight forward and two backward (`sellarec.language.cost`); and the peak of this
    machine, measured: what a product of large square matrices reaches."""
    shape = shape_of(find_llm(model_folder(work, folder), None), settings)
    lengths = [len(tokens) for batch in batches for tokens in batch["tokens"].to_pylist()]
    asked = sum(training_operations(shape, 1, length, 2, "adapter", False) for length in lengths)
    return {"model FLOPs": asked, "peak FLOPs/s": peak_flops(work["device"], getattr(torch, work["dtype"]))}


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Operations a second of the best of some products of square matrices."""
    size, tries = (8192, 10) if device == "cuda" else (1024, 5)
    left, right = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    del left, right
    if device == "cuda":  # the peak of memory is told of what follows
        torch.cuda.reset_peak_memory_stats()
    return 2 * size**3 / min(seconds)


def prompt_rows(histories: list[np.ndarray], items: np.ndarray, labels: np.ndarray) -> pa.Table:
    """Rows as tasks of text-only prompts read them."""
    return pa.table(
        {
            "row": np.arange(len(items)),
            "item": items,
            "label": labels.astype(np.int8),
            "history": pa.array([history.tolist() for history in histories], pa.list_(pa.int64())),
            "weight": np.ones(len(items), np.float32),
        }
    )
