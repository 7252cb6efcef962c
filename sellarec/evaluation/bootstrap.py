"""Confidence intervals from a bootstrap over users, all models on the same resamples.

A replicate draws as many users as there are, with replacement; a user brings all its rows along, as often as it is
drawn. Users, not rows, are drawn because the rows of one user depend on each other. As every model meets the same
draws, the replicates of a difference between two models are differences within pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sellarec.evaluation.metrics import auc, check_rows, check_users, user_aucs

# Replicates are worked through in chunks of about this many weights (8 bytes each), which stay in a core's cache.
CHUNK_WEIGHTS = 1 << 18


@dataclass(frozen=True)
class Interval:
    """A metric with its 95% percentile interval; nan where it isn't defined.

    `low` and `high` are nan too where fewer than two users count: resampling one user says nothing about its spread.
    """

    value: float
    low: float
    high: float
    replicates: int  # those in which the metric was defined (both classes were drawn), which the interval rests on


@dataclass(frozen=True)
class SortedRows:
    """Rows sorted by score once, so that AUC under any weights of the users takes one cumulative sum."""

    positive_users: np.ndarray  # int64 [positives], index of each positive row's user
    negative_users: np.ndarray  # int64 [negatives], by ascending score
    negatives_below: np.ndarray  # int64 [positives], negative rows that score lower than the positive one
    negatives_not_above: np.ndarray  # int64 [positives], negative rows that score lower or the same


def bootstrap(
    users: np.ndarray,
    labels: np.ndarray,
    scores: Mapping[str, np.ndarray],
    metric: str,
    *,
    pairs: Sequence[tuple[str, str]] = (),
    replicates: int = 1_000,
    seed: int,
) -> dict[str | tuple[str, str], Interval]:
    """The metric of each model, and of each pair (a, b) the difference a - b, with 95% intervals.

    The draw of replicate r depends on the seed, r and the number of users alone: the same for every model, metric and
    order of the rows.

    Args:
        users: integer ids, shape [rows].
        labels: 0/1 or bool, shape [rows].
        scores: for each model real numbers of shape [rows].
        metric: "auc" (pooled; a row weighs as much as its user is drawn) or "uauc" (mean over users with both classes).
        pairs: models to compare.
        replicates: number of resamples.
        seed: of the draws, not negative.

    Raises:
        ValueError: on an unknown metric or model, fewer than one replicate, or rows that `metrics.user_aucs` refuses.
    """
    unknown = {name for pair in pairs for name in pair} - set(scores)
    if unknown:
        raise ValueError(f"pairs name {sorted(unknown)}; the models with scores are {sorted(scores)}")
    samples, values, counted_users = _replicate(users, labels, scores, metric, replicates, seed)
    intervals: dict[str | tuple[str, str], Interval] = {
        name: percentile_interval(values[name], samples[name], counted_users) for name in scores
    }
    for a, b in pairs:
        intervals[a, b] = percentile_interval(values[a] - values[b], samples[a] - samples[b], counted_users)
    return intervals


def sort_rows(user_index: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> SortedRows:
    """Sort the rows of one model for `weighted_aucs`; user_index: int [rows], counted from 0, labels: bool [rows]."""
    positive, negative = np.flatnonzero(labels), np.flatnonzero(~labels)
    positive = positive[np.argsort(scores[positive])]
    negative = negative[np.argsort(scores[negative])]
    return SortedRows(
        positive_users=user_index[positive],
        negative_users=user_index[negative],
        negatives_below=np.searchsorted(scores[negative], scores[positive], side="left"),
        negatives_not_above=np.searchsorted(scores[negative], scores[positive], side="right"),
    )


def weighted_aucs(rows: SortedRows, weights: np.ndarray) -> np.ndarray:
    """Pooled AUC under each column of user weights, ties exact; nan where a class has no weight.

    Args:
        rows: the sorted rows of one model.
        weights: float64 [users, replicates], not negative; whole numbers give an exact count of pairs.

    Returns:
        float64 [replicates].
    """
    positive_weights = weights[rows.positive_users]
    cumulative = np.zeros((rows.negative_users.size + 1, weights.shape[1]))
    np.cumsum(weights[rows.negative_users], axis=0, out=cumulative[1:])
    wins = np.einsum("pr,pr->r", positive_weights, cumulative[rows.negatives_below])
    wins_and_ties = np.einsum("pr,pr->r", positive_weights, cumulative[rows.negatives_not_above])
    pairs = positive_weights.sum(axis=0) * cumulative[-1]
    return np.divide(wins + wins_and_ties, 2 * pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0)


def _replicate(
    users: np.ndarray,
    labels: np.ndarray,
    scores: Mapping[str, np.ndarray],
    metric: str,
    replicates: int,
    seed: int,
) -> tuple[dict[str, np.ndarray], dict[str, float], int]:
    """Each model's metric in every replicate (float64 [replicates]) and on the rows, and how many users count."""
    if metric not in ("auc", "uauc"):
        raise ValueError(f'metric must be "auc" or "uauc"; it is {metric!r}')
    if replicates < 1:
        raise ValueError(f"replicates must be at least 1; it is {replicates}")
    checked = {name: check_rows(labels, values) for name, values in scores.items()}
    user_ids, user_index = np.unique(check_users(users, len(np.asarray(labels))), return_inverse=True)
    samples = {name: np.full(replicates, np.nan) for name in scores}
    if metric == "auc":
        values = {name: auc(*rows) for name, rows in checked.items()}
        sorted_rows = {name: sort_rows(user_index, *rows) for name, rows in checked.items()}
        counted_users, width = user_ids.size, user_index.size
    else:
        per_user = {name: user_aucs(users, *rows) for name, rows in checked.items()}
        values = {name: float(u.aucs.mean()) if u.aucs.size else float("nan") for name, u in per_user.items()}
        # Which users have both classes is a fact of the labels, the same for every model.
        counted = next((u.users for u in per_user.values()), user_ids[:0])
        counted_index = np.searchsorted(user_ids, counted)
        counted_users, width = counted.size, user_ids.size
    if counted_users < 2:
        return samples, values, counted_users
    chunk = max(1, CHUNK_WEIGHTS // width)
    for start in range(0, replicates, chunk):
        stop = min(start + chunk, replicates)
        weights = user_weights(user_ids.size, start, stop, seed)
        if metric == "auc":
            for name, rows in sorted_rows.items():
                samples[name][start:stop] = weighted_aucs(rows, weights)
        else:
            weights = weights[counted_index]
            drawn = weights.sum(axis=0)
            for name, per in per_user.items():
                np.divide(per.aucs @ weights, drawn, out=samples[name][start:stop], where=drawn > 0)
    return samples, values, counted_users


def user_weights(users: int, start: int, stop: int, seed: int) -> np.ndarray:
    """How often replicates start .. stop - 1 draw each user: float64 [users, stop - start]."""
    counts = np.empty((users, stop - start))
    for replicate in range(start, stop):
        drawn = np.random.default_rng((seed, replicate)).integers(users, size=users)
        counts[:, replicate - start] = np.bincount(drawn, minlength=users)
    return counts


def percentile_interval(value: float, samples: np.ndarray, counted_users: int) -> Interval:
    """The 2.5% and 97.5% percentiles of the replicates in which the metric is defined."""
    defined = samples[~np.isnan(samples)]
    if counted_users < 2 or not defined.size:
        return Interval(value, float("nan"), float("nan"), 0)
    low, high = np.percentile(defined, [2.5, 97.5])
    return Interval(value, float(low), float(high), int(defined.size))
