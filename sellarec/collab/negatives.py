"""Sampled negatives: items that stand for what a user of a row was not interested in.

They are drawn in the tasks that read rows, which don't load torch. Shapes: b rows, n targets, N negatives of a target, I items.
"""

from typing import Literal

import numpy as np

from sellarec.data.keys import uniform
from sellarec.ranges import ranges

Kind = Literal["uniform", "popularity", "in-batch"]

MOST_DRAWS = 16
"""A negative that is known to be liked is drawn again; after so many draws the target goes without it."""

FEW = 4
"""Up to so many negatives of a row each is compared with all that the user is known to like; more are looked up among them,
sorted."""

MOST_TARGETS = 1 << 20
"""Above the number of targets of any row: keeps rows' draws apart."""

_SALT = 0x6E656761
"""Keeps these draws apart from others of the same seed and row."""


class Negatives:
    """Draws items, each row's by (seed, epoch, row) alone, and knows how likely they were to be drawn.

    Args:
        kind: `uniform` over the items of the train split; `popularity`, in proportion to their positive train rows; or
            `in-batch`: nothing is drawn, as the other rows' items serve.
        counts: int64 [2, I], each item's train rows, and the positive ones of them (`sellarec.data.log.item_counts`).
        number: N, negatives drawn for each target.

    Attributes:
        log_q: float32 [I], the logarithm of how likely an item is drawn.
    """

    def __init__(self, kind: Kind, counts: np.ndarray, number: int, seed: int) -> None:
        rows, positives = counts
        self.number, self._seed = (0 if kind == "in-batch" else number), seed
        weights = (rows > 0).astype(np.int64) if kind == "uniform" else positives
        self._items = np.flatnonzero(weights)
        self._ends = np.cumsum(weights[self._items])
        with np.errstate(divide="ignore"):  # -inf where an item is never drawn
            self.log_q = np.log(weights / weights.sum()).astype(np.float32)

    def draw(
        self, row: np.ndarray, targets: np.ndarray, liked: tuple[np.ndarray, np.ndarray], epoch: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Negatives of each row's targets, one row after the other; None where nothing is drawn.

        Args:
            row: int64 [b], ids of the rows.
            targets: int64 [b], how many targets each row has.
            liked: the items that each row's user is known to like, none of which is drawn: values, and int64 [b] lengths.

        Returns:
            int64 [n N], items; float32 [n N], `log_q` of each, or inf for one that doesn't count.
        """
        if not self.number:
            return None
        place, each = np.arange(len(row)), targets * self.number
        of_row = np.repeat(place, each)
        number = np.arange(len(of_row)) - np.repeat(np.cumsum(each) - each, each)
        seeds = row[of_row] * MOST_TARGETS * self.number + number
        negatives = np.zeros(len(of_row), np.int64)
        waiting = np.arange(len(of_row))
        for attempt in range(MOST_DRAWS):
            drawn = self._draw(uniform(seeds[waiting], _SALT, self._seed, epoch, attempt))
            negatives[waiting] = drawn
            waiting = waiting[_is_liked(of_row[waiting], drawn, *liked, len(self.log_q))]
            if not len(waiting):
                break
        log_q = self.log_q[negatives]
        log_q[waiting] = np.inf
        return negatives, log_q

    def log_rest(self, liked: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """float32 [b]: the logarithm of how likely an item that is drawn is none of those that each row's user likes (as of
        `draw`)."""
        values, lengths = liked
        size = len(self.log_q)
        distinct = np.unique(np.repeat(np.arange(len(lengths)), lengths) * size + values)
        q = np.bincount(distinct // size, weights=np.exp(self.log_q[distinct % size]), minlength=len(lengths))
        return np.log1p(-np.minimum(q, 1 - 1e-6)).astype(np.float32)

    def _draw(self, u: np.ndarray) -> np.ndarray:
        """Items by numbers drawn from [0, 1)."""
        return self._items[np.searchsorted(self._ends, u * self._ends[-1], side="right")]


def _is_liked(row: np.ndarray, items: np.ndarray, values: np.ndarray, lengths: np.ndarray, size: int) -> np.ndarray:
    """Which of the items are among their row's: bool [m].

    Args:
        row, items: int64 [m], in the order of rows.
        values, lengths: the items of all rows [b], one row after the other, and how many each has.
        size: of the catalog.
    """
    ends = np.cumsum(lengths)
    each = np.bincount(row, minlength=len(lengths))
    found = np.zeros(len(items), bool)
    if each.max(initial=0) <= FEW:  # of few a row each is compared with all that its row has
        first = np.cumsum(each) - each
        for number in range(each.max(initial=0)):
            rows = np.flatnonzero(each > number)
            whole = len(rows) == len(lengths)
            of_row = items[first[rows] + number]
            among = values if whole else values[ranges(ends[rows] - lengths[rows], lengths[rows])]
            same = np.flatnonzero(np.repeat(of_row, lengths[rows]) == among)
            hit = np.searchsorted(np.cumsum(lengths[rows]), same, side="right")
            found[first[rows[hit]] + number] = True
        return found
    known = np.sort(np.repeat(np.arange(len(lengths)), lengths) * size + values)
    asked = row * size + items
    return known[np.minimum(np.searchsorted(known, asked), len(known) - 1)] == asked
