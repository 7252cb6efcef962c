"""The quality of matrix factorisation in the case bpr; read by sides in environments of their own too."""

from pathlib import Path

import numpy as np

INTERACTIONS, HELD_OUT = "interactions.npz", "held_out"
"""File of train pairs `user` and `item`, and of a held-out item of each user."""


def hit_rate(users: np.ndarray, items: np.ndarray, folder: Path, k: int = 10) -> float:
    """Share of users whose held-out item is among the k best of all but their train items; of vectors [users, D], [items, D]."""
    given, scores = np.load(folder / INTERACTIONS), users @ items.T
    wanted = scores[np.arange(len(users)), given[HELD_OUT]].copy()
    scores[given["user"], given["item"]] = -np.inf
    return float(((scores > wanted[:, None]).sum(1) < k).mean())
