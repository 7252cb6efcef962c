"""A vector for each text: the language model's last hidden state at the text's last token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sides.language import model_folder, titles, write_model

from sellarec.config import Distil
from sellarec.language.distil import ItemEncoder
from sellarec.language.llm import find_llm

SHOWN = 3
"""Vectors that are compared."""

inputs = write_model


def found(vectors: np.ndarray) -> dict[str, Any]:
    return {"vectors": vectors[:SHOWN].tolist(), "mean size": float(np.abs(vectors).mean())}


def ours(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    settings = Distil(micro_batch=work["micro_batch"])
    source, device = find_llm(model_folder(work, folder), None), "cuda" if torch.cuda.is_available() else "cpu"
    encoder, texts = ItemEncoder(source, None, "movie", settings, device), titles(work["items"])
    return lambda: (len(texts), found(encoder.encode(texts)))


def plain(work: dict[str, Any], folder: Path, padding: str) -> Callable[[], tuple[int, dict]]:
    """A loop over batches of texts in the catalog's order, which the tokenizer pads; it asks for all hidden states."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, device = model_folder(work, folder), "cuda" if torch.cuda.is_available() else "cpu"  # as ours does
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, padding_side="right")
    tokenizer.pad_token = tokenizer.eos_token
    texts = [f"Movie: {title}" for title in titles(work["items"])]

    @torch.no_grad()
    def repeat() -> tuple[int, dict]:
        vectors = []
        for start in range(0, len(texts), work["micro_batch"]):
            some = texts[start : start + work["micro_batch"]]
            batch = tokenizer(
                some, padding=padding, truncation=True, max_length=Distil().max_tokens, return_tensors="pt"
            )
            mask = batch["attention_mask"].to(device)
            output = model(input_ids=batch["input_ids"].to(device), attention_mask=mask, output_hidden_states=True)
            states = output.hidden_states[-1]
            vectors.append(states[torch.arange(len(some), device=device), mask.sum(1) - 1].float().cpu())
        return len(texts), found(torch.cat(vectors).numpy())

    return repeat


def fixed_padding(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    return plain(work, folder, "max_length")


def padded_to_longest(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    return plain(work, folder, "longest")
