"""The log that collaborative models are trained on, step for step, as `engine_cases` takes it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from prepared import prepare_into, rules, source_of

from sellarec.data.log import item_counts, write_sequences
from sellarec.evaluation.queries import queries

USERS, ITEMS = 9, 13
"""Ids that are drawn are below; there is one user more."""
HISTORY = 4
"""Items of a history; of a sequence one more."""


def write_log(folder: Path) -> Path:
    """Some 70 train rows; users and items that only other splits have; repeated pairs."""
    generator = np.random.default_rng(4)
    count = 90
    user = np.minimum(generator.integers(0, USERS, count), generator.integers(0, USERS, count))
    item = np.minimum(generator.integers(0, ITEMS, count), generator.integers(0, ITEMS, count))
    user[-4:], item[-6:-3] = USERS, ITEMS  # new ones
    label = generator.random(count) < 0.65
    return write_rows(folder, user, item, label)


def write_rows(folder: Path, user: np.ndarray, item: np.ndarray, label: np.ndarray) -> Path:
    """A log of such rows, in the order of time, with what models read beside it, and queries of the valid and test splits."""
    rows = {"user": user, "item": item, "label": pa.array(label, pa.int8()), "timestamp": np.arange(len(user))}
    log = prepare_into(folder, source_of(pa.table(rows)), rules(history_cap=6))
    np.save(folder / "counts.npy", item_counts(log))
    write_sequences(log, folder / "sequences.parquet", HISTORY + 1)
    pq.write_table(pa.concat_tables([queries(log, split) for split in ("valid", "test")]), folder / "queries.parquet")
    return folder
