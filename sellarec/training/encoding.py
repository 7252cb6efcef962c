"""Encoding a catalog's texts with a language model that all workers hold together, under Ray Train (`distil.sharded`)."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import ray

from sellarec.artifacts import Place
from sellarec.config import STORAGE_TIMEOUT, WORKER_TIMEOUT, Distil
from sellarec.errors import StageFailed, UserError
from sellarec.language.distil import BLOCK_ROWS, ItemEncoder, what_stands, write_part, written_vectors
from sellarec.language.llm import LlmSource
from sellarec.training.progress import note
from sellarec.training.storage import Storage
from sellarec.training.workers import Workers, together_of_first


@dataclass(frozen=True)
class Encoding:
    """All that a worker needs; as `sellarec.language.distil.distil` takes it.

    Attributes:
        catalog: items in all.
        timeout: seconds after which a worker that doesn't answer counts as lost.
        storage_timeout: seconds for which storage that fails is tried again.
    """

    items: list[str]
    catalog: int
    settings: Distil
    source: LlmSource
    adapter: Path | None
    noun: str
    output: Place
    mark: str
    part_rows: int
    board: Any = None
    timeout: float = WORKER_TIMEOUT
    storage_timeout: float = STORAGE_TIMEOUT


def encode_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    encoding: Encoding = config["encoding"]
    try:
        encode(encoding, Workers.join(encoding.timeout))
    except UserError as error:
        encoding.output.reach()  # what isn't found while storage is away is no mistake: workers are started again, and wait
        ray.get(encoding.board.put.remote({"error": str(error)}))
    except StageFailed as error:
        ray.get(encoding.board.put.remote({"failed": str(error)}))


def encode(encoding: Encoding, workers: Workers) -> None:
    """Write the parts that don't stand yet. Each block of items is shared out evenly; worker 0 gathers its vectors."""
    settings, output = encoding.settings, encoding.output
    storage = Storage(workers, "distil", encoding.storage_timeout, partial(note, encoding.board, "distil"), output)
    storage.wait()
    written = storage.first(f"reading {output}", partial(what_stands, output, encoding.mark))
    make = partial(ItemEncoder, encoding.source, encoding.adapter, encoding.noun, settings, workers=workers)
    encoder = together_of_first(make, workers)
    encoder.share()
    field = pyarrow.dataset.field("item")
    for start in range(written["items"], encoding.catalog, encoding.part_rows):
        stop = min(start + encoding.part_rows, encoding.catalog)
        columns = {"item": field, "text": pyarrow.dataset.field(settings.text)}
        rows = pyarrow.dataset.dataset(encoding.items).to_table(columns, filter=(field >= start) & (field < stop))
        rows = rows.sort_by("item")
        parts = []
        for first in range(0, len(rows), BLOCK_ROWS):
            block = rows.slice(first, BLOCK_ROWS)
            own = block["text"].take(workers.share_of(len(block)).numpy()).to_pylist()
            ids, cut = encoder.tokens(own)
            found = encoder.vectors(ids)
            if workers.sum(float(not np.isfinite(found).all()))[0]:  # the same on all, so that none waits for another
                last = start + first + len(block) - 1
                raise StageFailed(
                    f"stage distil: the vector of one of the items {start + first} to {last} is not finite"
                )
            gathered = workers.collect((found, cut))
            if gathered is not None:
                vectors, all_cut = (np.concatenate(found)[: len(block)] for found in zip(*gathered, strict=True))
                parts.append(written_vectors(block["item"], vectors, all_cut))
                encoding.board.put.remote(
                    {"stage": "distil", "done": start + first + len(block), "items": encoding.catalog}
                )
        part = pa.concat_tables(parts) if parts else None
        written = storage.first(f"writing {output}/vectors", partial(write_part, part, written, output))
