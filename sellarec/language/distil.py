"""Stage distil: one semantic vector per item, the adapted model's last hidden state at the item's last token.

Ray Data batch inference over the catalog; vectors stay float32.
"""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import torch

from sellarec.artifacts import Place
from sellarec.language import llm as llms
from sellarec.language.scorer import base_model
from sellarec.training.progress import PROGRESS_SECONDS

MAX_TOKENS = 64
"""Longest text that is read of an item (tokens), as published."""

BLOCK_ROWS = 4096
"""Items that an actor takes at a time."""

PART_ROWS = 65_536
"""Items of a file of vectors."""


class ItemEncoder:
    """An actor's model: texts in, vectors out."""

    def __init__(
        self, source: llms.LlmSource, adapter: Path, noun: str, threads: int, board: Any, catalog: int
    ) -> None:
        torch.set_num_threads(threads)
        folder = source.folder()
        model = llms.with_adapter(llms.load_model(folder, source.storage), adapter)
        llms.compute_in(model, torch.float32)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(self._device).eval()
        self._tokenizer = llms.load_tokenizer(folder)
        self._noun = noun.capitalize()
        self._board, self._catalog, self._told = board, catalog, time.monotonic()
        self._limit = min(MAX_TOKENS, llms.context_length(model.config))

    @torch.no_grad()
    def __call__(self, items: pa.Table) -> pa.Table:
        """Columns item, text -> item, vector (fixed-size list of H float32)."""
        if time.monotonic() - self._told > PROGRESS_SECONDS:
            self._told = time.monotonic()
            # blocks are encoded nearly in order, so the first item of this one tells how far the catalog is
            self._board.put.remote({"stage": "distil", "done": items["item"][0].as_py(), "items": self._catalog})
        texts = [f"{self._noun}: {text}" for text in items["text"].to_pylist()]
        ids = [tokens[: self._limit] for tokens in self._tokenizer(texts)["input_ids"]]
        longest = max(len(tokens) for tokens in ids)
        tokens = torch.zeros(len(ids), longest, dtype=torch.long)
        mask = torch.zeros(len(ids), longest, dtype=torch.long)
        for row, text in enumerate(ids):
            tokens[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        decoder = base_model(self._model).base_model
        states = decoder(input_ids=tokens.to(self._device), attention_mask=mask.to(self._device)).last_hidden_state
        last = states[torch.arange(len(ids)), mask.sum(1) - 1].float().cpu().numpy()
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(last.reshape(-1)), last.shape[1])
        return pa.table({"item": items["item"], "vector": vectors})


def distil(
    items: list[str],
    text: str,
    source: llms.LlmSource,
    adapter: Path,
    noun: str,
    batch: int,
    workers: int,
    gpus: bool,
    output: Place,
    board: Any,
) -> dict[str, Any]:
    """Encode the whole catalog with `workers` actors and write `vectors/part-*.parquet`, in item order.

    Args:
        items: the log's files of items, in order.
        text: the column that is read, title or text.
        board: actor that takes progress records.

    Returns:
        Facts for the manifest: items and width.

    Raises:
        RuntimeError: a vector is not finite, or the items aren't exactly those of the catalog.
    """  # fmt: skip
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    catalog = sum(pq.read_metadata(path).num_rows for path in items)
    threads = max(1, (os.cpu_count() or 1) // workers)
    dataset = ray.data.read_parquet(items, columns=["item", text]).rename_columns(["item", "text"])
    vectors = dataset.repartition(max(1, -(-catalog // BLOCK_ROWS))).map_batches(
        ItemEncoder,
        fn_constructor_args=(source, adapter, noun, threads, board, catalog),
        batch_size=batch,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=1 if gpus else None,
    )
    done, width, part = 0, 0, 0
    with (output / "vectors").writing() as folder:
        for table in vectors.iter_batches(batch_size=PART_ROWS, batch_format="pyarrow"):
            expected = np.arange(done, done + len(table))
            if not np.array_equal(table["item"].to_numpy(), expected):
                raise RuntimeError(f"distil: items {done} to {done + len(table)} came back in another order")
            width = table.schema.field("vector").type.list_size
            flat = table["vector"].combine_chunks().flatten().to_numpy()
            if not np.isfinite(flat).all():
                bad = done + int(np.flatnonzero(~np.isfinite(flat).reshape(-1, width).all(1))[0])
                raise RuntimeError(f"distil: the vector of item {bad} is not finite")
            pq.write_table(table, folder / f"part-{part:05d}.parquet")
            done, part = done + len(table), part + 1
    return {"items": done, "width": width}


class SavedVectors:
    """Distilled vectors of an artifact: `read(start, stop)` gives float32 [stop - start, H]."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def width(self) -> int:
        return pyarrow.dataset.dataset(self._folder).schema.field("vector").type.list_size

    def read(self, start: int, stop: int) -> np.ndarray:
        field = pyarrow.dataset.field("item")
        table = pyarrow.dataset.dataset(self._folder).to_table(filter=(field >= start) & (field < stop)).sort_by("item")
        return table["vector"].combine_chunks().flatten().to_numpy().reshape(stop - start, self.width)
