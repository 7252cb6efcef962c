"""No-learning baselines, which every table of results must hold: on CoLLM's ML-1M they beat published models."""

from dataclasses import dataclass

import numpy as np

PSEUDO_COUNTS = 5.0


@dataclass(frozen=True)
class Means:
    """Smoothed shares of positives, fitted on train rows; arrays are indexed by dense id."""

    global_mean: float
    item_means: np.ndarray  # float64 [largest item id of train + 1]
    user_means: np.ndarray  # float64 [largest user id of train + 1]


def fit_means(
    users: np.ndarray, items: np.ndarray, labels: np.ndarray, *, pseudo_counts: float = PSEUDO_COUNTS
) -> Means:
    """Mean label of each item and of each user, drawn to the global mean g: (positives + c g) / (rows + c).

    Args:
        users: dense ids, int, shape [rows] (the train rows only).
        items: dense ids, int, shape [rows].
        labels: 0/1, shape [rows].
        pseudo_counts: c, in rows.

    Raises:
        ValueError: on no rows, shapes that differ, a negative id, a label other than 0 and 1, or pseudo-counts not
            above zero.
    """
    users, items, labels = _check_ids(users, "user"), _check_ids(items, "item"), np.asarray(labels)
    if not users.shape == items.shape == labels.shape:
        raise ValueError(
            "users, items and labels must have the same shape [rows]; "
            f"they have {users.shape}, {items.shape}, {labels.shape}"
        )
    if labels.size == 0:
        raise ValueError("there are no train rows to fit means on")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")
    if not pseudo_counts > 0:
        raise ValueError(f"pseudo_counts must be above 0; it is {pseudo_counts}")
    global_mean = float(np.mean(labels, dtype=np.float64))

    def smoothed(ids: np.ndarray) -> np.ndarray:
        rows = np.bincount(ids)
        means = (np.bincount(ids, weights=labels) + pseudo_counts * global_mean) / (rows + pseudo_counts)
        # c g / c is not always g to the last bit, and unknown ids must tie with each other.
        return np.where(rows > 0, means, global_mean)

    return Means(global_mean, smoothed(items), smoothed(users))


def item_mean(means: Means, items: np.ndarray) -> np.ndarray:
    """Score of each row: its item's smoothed mean, the global mean for an item without train rows; float64 [rows].

    Raises:
        ValueError: on a negative item id.
    """
    return _look_up(means.item_means, _check_ids(items, "item"), means.global_mean)


def item_user_mean(means: Means, users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Score of each row: the sum of its item's and its user's smoothed means; float64 [rows].

    Raises:
        ValueError: on a negative id, or users and items of different shapes.
    """
    users = _check_ids(users, "user")
    item_scores = item_mean(means, items)
    if users.shape != item_scores.shape:
        raise ValueError(
            f"users and items must have the same shape [rows]; they have {users.shape} and {item_scores.shape}"
        )
    return item_scores + _look_up(means.user_means, users, means.global_mean)


def _look_up(table: np.ndarray, ids: np.ndarray, unknown: float) -> np.ndarray:
    known = ids < table.size
    return np.where(known, table[np.where(known, ids, 0)], unknown)


def _check_ids(ids: np.ndarray, noun: str) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"{noun} ids must be integers of shape [rows]; they are {ids.dtype} of shape {ids.shape}")
    if ids.size and ids.min() < 0:
        raise ValueError(f"{noun} ids must not be negative; the smallest is {ids.min()}")
    return ids.astype(np.int64)
