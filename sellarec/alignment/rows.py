"""What the reading tasks do with rows for alignment; they don't load torch."""

import numpy as np
import pyarrow as pa

from sellarec.collab.rows import flat, last, lists
from sellarec.training.stream import Prepare

LIKED = "semantic_history"
"""The column of liked items, and the feature by which their distilled vectors are looked up."""


def prepare(
    history: int, collab: Prepare | None, is_read: bool, rows: pa.Table, epoch: int, step: np.ndarray
) -> pa.Table:
    """Rows with `history` -> the same with `semantic_history`, list<int64>: the last of its items; then what the collaborative
    model makes of them (None: nothing).

    Args:
        history: items that are kept.
        is_read: whether the collaborative model takes `history`, which is left out otherwise.
    """
    liked = last_liked(rows, history)
    if not is_read:
        rows = rows.drop_columns(["history"])
    return (rows if collab is None else collab(rows, epoch, step)).append_column(LIKED, liked)


def last_liked(rows: pa.Table, history: int) -> pa.ChunkedArray:
    """list<int64>: the last items of each row's `history`, so many at most."""
    return pa.chunked_array([lists(*last(*flat(rows["history"]), history))])
