"""Sampled negatives: items that stand for what a user of a row was not interested in.

They are drawn in the tasks that read rows, which don't load torch. Shapes: b rows, N negatives of a row, I items.
"""

from typing import Literal

import numpy as np
import pyarrow as pa

from sellarec.data.keys import uniform

Kind = Literal["uniform", "popularity", "in-batch"]

MOST_DRAWS = 16
"""A negative that is the row's own item or in its history is drawn again; after so many draws the row goes without it."""

_SALT = 0x6E656761
"""Keeps these draws apart from others of the same seed and row."""


class Negatives:
    """Draws items, each row's by (seed, epoch, row) alone, and says how likely they were to be drawn.

    Args:
        kind: `uniform` over the items of the train split; `popularity`, in proportion to their positive train rows; or
            `in-batch`: nothing is drawn, as the other rows' items serve, but their likelihood is told.
        counts: int64 [2, I], each item's train rows, and the positive ones of them (`sellarec.data.log.item_counts`).
        number: N, negatives drawn for each row.
    """

    def __init__(self, kind: Kind, counts: np.ndarray, number: int, seed: int) -> None:
        rows, positives = counts
        self._number, self._seed = (0 if kind == "in-batch" else number), seed
        weights = (rows > 0).astype(np.int64) if kind == "uniform" else positives
        self._items = np.flatnonzero(weights)
        self._ends = np.cumsum(weights[self._items])
        with np.errstate(divide="ignore"):  # -inf where an item is never drawn
            self._log_q = np.log(weights / weights.sum()).astype(np.float32)

    def prepare(self, rows: pa.Table, epoch: int, step: np.ndarray, keep_history: bool) -> pa.Table:
        """Rows with `row` and `item` -> the same with

        log_q: float32, the logarithm of how likely the row's own item is drawn;
        and where negatives are drawn, from rows with `history`, which is left out unless `keep_history`:
        negative: list<int64>, N items; none of them the row's item or in its history.
        negative_log_q: list<float32>, the same of these; inf for one that doesn't count.
        """
        items = rows["item"].to_numpy()
        rows = rows.append_column("log_q", pa.array(self._log_q[items]))
        if not self._number:
            return rows
        histories = rows["history"].combine_chunks()
        # what the users are known to like, as one sorted array of numbers of (row, item)
        size, place = len(self._log_q), np.arange(len(rows))
        liked = np.repeat(place, np.diff(histories.offsets.to_numpy())) * size + histories.flatten().to_numpy()
        liked = np.sort(np.concatenate([liked, place * size + items]))
        place = np.repeat(place, self._number)
        seeds = np.repeat(rows["row"].to_numpy() * self._number, self._number) + np.arange(len(place)) % self._number
        negatives = np.zeros(len(place), np.int64)
        waiting = np.arange(len(place))
        for attempt in range(MOST_DRAWS):
            drawn = self._draw(uniform(seeds[waiting], _SALT, self._seed, epoch, attempt))
            negatives[waiting] = drawn
            waiting = waiting[_is_in(place[waiting] * size + drawn, liked)]
            if not len(waiting):
                break
        log_q = self._log_q[negatives]
        log_q[waiting] = np.inf
        offsets = np.arange(len(rows) + 1, dtype=np.int32) * self._number
        for name, values in (("negative", negatives), ("negative_log_q", log_q)):
            rows = rows.append_column(name, pa.ListArray.from_arrays(offsets, pa.array(values)))
        return rows if keep_history else rows.drop_columns(["history"])

    def _draw(self, u: np.ndarray) -> np.ndarray:
        """Items by numbers drawn from [0, 1)."""
        return self._items[np.searchsorted(self._ends, u * self._ends[-1], side="right")]


def _is_in(values: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Which of the values are among sorted others, of which there is at least one: bool."""
    return found[np.minimum(np.searchsorted(found, values), len(found) - 1)] == values
