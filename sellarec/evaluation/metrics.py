"""AUC and UAUC of binary labels: exact with ties, whatever the order of the rows or the workers that scored them.

Both count pairs. With P positive and N negative rows, AUC is the share of the P * N pairs in which the positive row
scores higher, a tied pair counting one half. Pairs are counted in integers, so that the same rows in another order give
the same bits.
"""

from typing import NamedTuple

import numpy as np


class UserAUCs(NamedTuple):
    """AUC of each user that has at least two rows and both classes, by ascending id; all arrays have shape [users]."""

    users: np.ndarray  # int64
    aucs: np.ndarray  # float64
    positives: np.ndarray  # int64, rows with label 1
    negatives: np.ndarray  # int64, rows with label 0


class UAUC(NamedTuple):
    """Unweighted mean of the users' AUCs, and how many users it counts."""

    value: float
    users: int


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Pooled AUC of all rows; nan where the rows hold one class only, or there are none.

    Args:
        labels: 0/1 or bool, shape [rows].
        scores: real numbers of any dtype, shape [rows]; compared as they are, never rounded or binned.

    Raises:
        ValueError: on shapes that differ, a label other than 0 and 1, or a NaN score.
    """
    labels, scores = check_rows(labels, scores)
    if labels.size == 0:
        return float("nan")
    _, labels, tie_starts = _in_order(np.zeros(labels.size, np.int8), labels, scores)
    twice_wins, positives, negatives = _count_pairs(labels, tie_starts, segment_starts=np.zeros(1, dtype=np.int64))
    pairs = int(positives[0]) * int(negatives[0])
    return int(twice_wins[0]) / (2 * pairs) if pairs else float("nan")


def user_aucs(users: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> UserAUCs:
    """AUC of every user that has at least two rows and both classes; the other users are left out.

    Args:
        users: integer ids, shape [rows], in any order.
        labels: 0/1 or bool, shape [rows].
        scores: real numbers of any dtype, shape [rows].

    Raises:
        ValueError: on shapes that differ, user ids that are no integers, a label other than 0 and 1, or a NaN score.
    """
    labels, scores = check_rows(labels, scores)
    users = check_users(users, labels.size)
    if labels.size == 0:
        none = np.zeros(0, dtype=np.int64)
        return UserAUCs(none, np.zeros(0), none, none)
    users, labels, tie_starts = _in_order(users, labels, scores)
    user_starts = _starts(users)
    twice_wins, positives, negatives = _count_pairs(labels, tie_starts, user_starts)
    both = (positives > 0) & (negatives > 0)
    positives, negatives = positives[both], negatives[both]
    return UserAUCs(
        users[user_starts[both]].astype(np.int64), twice_wins[both] / (2 * positives * negatives), positives, negatives
    )


def uauc(users: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> UAUC:
    """UAUC as CoLLM and SeLLa-Rec publish it: the unweighted mean of `user_aucs`; nan where no user has both classes.

    Raises:
        ValueError: as `user_aucs`.
    """
    aucs = user_aucs(users, labels, scores).aucs
    return UAUC(float(aucs.mean()) if aucs.size else float("nan"), int(aucs.size))


def check_rows(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The labels as bool and the scores as they are, both of shape [rows].

    Raises:
        ValueError: on shapes that differ, a label other than 0 and 1, scores that are no real numbers, or a NaN score.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(f"labels and scores must both have shape [rows]; they have {labels.shape} and {scores.shape}")
    if labels.size == 0:
        return labels.astype(bool), scores
    if scores.dtype.kind not in "fiub":
        raise ValueError(f"scores must be real numbers; their dtype is {scores.dtype}")
    positive = labels == 1
    other = np.flatnonzero(~(positive | (labels == 0)))
    if other.size:
        raise ValueError(f"labels must be 0 or 1; row {other[0]} has {labels[other[0]]} ({other.size} such rows)")
    missing = int(np.isnan(scores).sum())
    if missing:
        raise ValueError(f"{missing} of {scores.size} scores are NaN; every row needs a score")
    return positive, scores


def check_users(users: np.ndarray, rows: int) -> np.ndarray:
    """The user ids as an integer array of shape [rows].

    Raises:
        ValueError: on another shape, or ids that are no integers.
    """
    users = np.asarray(users)
    if users.shape != (rows,):
        raise ValueError(f"users must have one id per row: shape {(rows,)}; it is {users.shape}")
    if rows and users.dtype.kind not in "iu":
        raise ValueError(f"user ids must be integers; their dtype is {users.dtype}")
    return users


def _in_order(users: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users and labels of rows sorted by user, then score, and where runs of equal scores of a user begin."""
    first = users.min()
    if scores.dtype.itemsize <= 4 and scores.dtype.kind == "f" and int(users.max()) - int(first) < 2**31:
        # Rows as integers of 31 bits of user, 32 of score and the label sort many times faster than by an order of theirs.
        bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)  # one zero, not two
        ascending = bits ^ np.where(bits >> 31, np.uint32(2**32 - 1), np.uint32(2**31))
        offset = first.astype(np.uint64)  # unsigned differences don't overflow, whatever the ids' dtype
        rows = (users.astype(np.uint64) - offset) << 33 | ascending.astype(np.uint64) << 1 | labels
        rows.sort()
        return ((rows >> 33) + offset).astype(users.dtype), rows & 1 == 1, _starts(rows >> 1)
    order = np.lexsort((scores, users))
    users, scores = users[order], scores[order]
    return users, labels[order], np.union1d(_starts(users), _starts(scores))


def _starts(values: np.ndarray) -> np.ndarray:
    """Positions at which a run of equal values begins in a sorted, non-empty array."""
    return np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])


def _count_pairs(
    labels: np.ndarray, tie_starts: np.ndarray, segment_starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per segment: twice the (positive, negative) pairs won, a tie being half a win; positives; negatives (int64).

    The rows are sorted by segment, then score; `tie_starts` are where runs of equal scores within a segment begin.
    """
    rows = labels.size
    segment_sizes = np.diff(segment_starts, append=rows)
    tie_sizes = np.diff(tie_starts, append=rows)
    # A row's mid-rank within its segment, doubled to stay an integer: first rank + last rank of its run of ties.
    twice_ranks = np.repeat(2 * tie_starts + tie_sizes + 1, tie_sizes) - np.repeat(2 * segment_starts, segment_sizes)
    positives = np.add.reduceat(labels.astype(np.int64), segment_starts)
    twice_rank_sums = np.add.reduceat(np.where(labels, twice_ranks, 0), segment_starts)
    return twice_rank_sums - positives * (positives + 1), positives, segment_sizes - positives
