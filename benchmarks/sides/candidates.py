"""Scoring candidates of users with what their prompts share read once, against each prompt by itself.

Both sides are stage adapt's task with a fresh adapter, as an export scores. Neither Ray nor TorchRec is needed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from sides.language import model_folder, prompt_rows, titles, write_model

from sellarec.config import Adapt, Prompt
from sellarec.language.adapt import build_adapt
from sellarec.language.llm import find_llm

SHOWN = 50
"""Scores that are compared."""

inputs = write_model


def repetition(work: dict[str, Any], folder: Path, shares: bool) -> Callable[[], tuple[int, dict]]:
    catalog, device, size = titles(work["items"]), torch.device(work["device"]), work["micro_batch"]
    prompt = Prompt(template=work["template"], history=work["history"], max_tokens=work["max_tokens"])
    source = find_llm(model_folder(work, folder), None)
    task = build_adapt(source, catalog, prompt, "movie", Adapt(targets=("all-linear",)))
    task.model.to(device).eval()
    for weight in task.model.parameters():
        weight.data = weight.data.to(getattr(torch, work["dtype"]))
    generator, number = np.random.default_rng(1), work["users"] * work["candidates"]
    histories = generator.integers(0, work["items"], (work["users"], work["history"]))
    rows = prompt_rows(
        list(np.repeat(histories, work["candidates"], axis=0)),
        generator.integers(0, work["items"], number),
        np.zeros(number),
    )
    given = task.prepare_to_score(rows, 0, np.zeros(number, np.int64))
    given = given.take(np.argsort(pc.list_value_length(given["tokens"]).to_numpy(), kind="stable"))

    alone = task.share(given, size)[2]

    @torch.no_grad()
    def repeat() -> tuple[int, dict]:
        used, read = (task.share(given, size)[:2]) if shares else (given, alone)
        batch = {name: value.to(device) for name, value in task.collate(used, None).items()}
        found = [
            task.score(task.model, {name: value[start : start + size] for name, value in batch.items()}, {})
            for start in range(0, number, size)
        ]
        scores = torch.empty(number)
        scores[torch.from_numpy(used["row"].to_numpy().copy())] = torch.cat(found).float().cpu()  # waits for a GPU
        return number, {"scores": scores[:SHOWN].tolist(), "tokens that the model reads": float(read)}

    return repeat


def ours(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    return repetition(work, folder, shares=True)


def one_by_one(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    return repetition(work, folder, shares=False)
