"""Sampled negatives: items that stand for what a user of a row was not interested in.

They are drawn in the tasks that read rows, which don't load torch. Shapes: b rows, N negatives of a row, I items.
"""

from typing import Literal

import numpy as np
import pyarrow as pa

from sellarec.data.keys import uniform

Kind = Literal["uniform", "popularity", "in-batch"]

MOST_DRAWS = 16
"""A negative that the user is known to like is drawn again; after so many draws the last one stands."""


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
        if kind == "uniform":
            self._items = np.flatnonzero(rows)
            self._log_q = np.where(rows > 0, -np.log(len(self._items)), 0).astype(np.float32)
            self._ends = None
        else:
            self._items = np.flatnonzero(positives)
            # an item without positives is drawn by nobody; its likelihood is only asked for in rows that don't count
            self._log_q = np.log(np.maximum(positives, 1) / positives.sum()).astype(np.float32)
            self._ends = np.cumsum(positives[self._items])

    def prepare(self, rows: pa.Table, epoch: int, step: np.ndarray, keep_history: bool) -> pa.Table:
        """Rows with `item`, `row` and `history` -> the same with

        negative: list<int64>, N items; none of them the row's item or in its history, where MOST_DRAWS allow.
        log_q, negative_log_q: float32 and list<float32>, the logarithm of how likely an item is drawn.
        """
        items, histories = rows["item"].to_numpy(), rows["history"].combine_chunks()
        # what the users are known to like, as one sorted array of numbers of (row, item)
        size, place = len(self._log_q), np.arange(len(rows))
        liked = np.repeat(place, np.diff(histories.offsets.to_numpy())) * size + histories.flatten().to_numpy()
        liked = np.sort(np.concatenate([liked, place * size + items]))
        place = np.repeat(place, self._number)
        seeds = np.repeat(rows["row"].to_numpy() * self._number, self._number) + np.arange(len(place)) % self._number
        negatives = np.zeros(len(place), np.int64)
        waiting = np.arange(len(place))
        for attempt in range(MOST_DRAWS):
            drawn = self._draw(uniform(seeds[waiting], self._seed, epoch, attempt))
            negatives[waiting] = drawn
            waiting = waiting[_is_in(place[waiting] * size + drawn, liked)]
            if not len(waiting):
                break
        rows = rows.append_column("log_q", pa.array(self._log_q[items]))
        offsets = np.arange(len(rows) + 1, dtype=np.int32) * self._number
        for name, values in (("negative", negatives), ("negative_log_q", self._log_q[negatives])):
            rows = rows.append_column(name, pa.ListArray.from_arrays(offsets, pa.array(values)))
        return rows if keep_history else rows.drop_columns(["history"])

    def _draw(self, u: np.ndarray) -> np.ndarray:
        """Items by numbers drawn from [0, 1)."""
        if self._ends is None:
            return self._items[(u * len(self._items)).astype(np.int64)]
        return self._items[np.searchsorted(self._ends, u * self._ends[-1], side="right")]


def _is_in(values: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Which of the values are among sorted others, of which there is at least one: bool."""
    return found[np.minimum(np.searchsorted(found, values), len(found) - 1)] == values
