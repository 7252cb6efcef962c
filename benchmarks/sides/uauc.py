"""AUC of all rows and the mean AUC of users. Both labels are drawn for many rows of few scores, so that there are ties."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from sellarec.evaluation.metrics import auc, uauc


def draw(work: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    users = generator.integers(0, work["users"], work["rows"])
    labels = generator.integers(0, 2, work["rows"])
    return users, labels, generator.standard_normal(work["rows"]).round(3).astype(np.float32)


def repetition(work: dict[str, Any], measure: Callable[..., tuple[float, float]]) -> Callable[[], tuple[int, dict]]:
    users, labels, scores = draw(work)

    def repeat() -> tuple[int, dict]:
        of_all, of_users = measure(users, labels, scores)
        return len(users), {"AUC": of_all, "UAUC": of_users}

    return repeat


def ours(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    return repetition(
        work, lambda users, labels, scores: (auc(labels, scores), uauc(users, labels, scores).value)
    )  # fmt: skip


def scikit_learn(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    """A loop over users, as published code has it, but over rows that are sorted by user once."""

    def measure(users: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
        order = np.argsort(users, kind="stable")
        starts = np.flatnonzero(np.diff(users[order])) + 1
        of_users = [
            roc_auc_score(labels[rows], scores[rows])
            for rows in np.split(order, starts)
            if 0 < labels[rows].sum() < len(rows)
        ]
        return roc_auc_score(labels, scores), float(np.mean(of_users))

    return repetition(work, measure)


def ranks(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    """What a careful user would write with pandas: mean ranks within each user (Mann and Whitney's U), without a loop."""
    import pandas as pd

    def measure(users: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
        frame = pd.DataFrame({"user": users, "label": labels, "score": scores})

        def areas(rank: pd.Series, by: pd.Series | np.ndarray) -> pd.Series:
            of_positives = (rank * frame["label"]).groupby(by).sum()
            positives, size = frame["label"].groupby(by).sum(), frame["label"].groupby(by).size()
            negatives = size - positives
            area = (of_positives - positives * (positives + 1) / 2) / (positives * negatives)
            return area[(positives > 0) & (negatives > 0)]

        of_users = areas(frame.groupby("user")["score"].rank(), frame["user"])
        return areas(frame["score"].rank(), np.zeros(len(frame), np.int8)).iloc[0], of_users.mean()

    return repetition(work, measure)
