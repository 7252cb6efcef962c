"""The side of the package `implicit` in the case bpr, which runs in an environment of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from implicit.bpr import BayesianPersonalizedRanking
from scipy.sparse import csr_matrix
from sides.held_out import INTERACTIONS, hit_rate


def train(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    given = np.load(folder / INTERACTIONS)
    number, shape = len(given["user"]), (work["users"], work["items"])
    matrix = csr_matrix((np.ones(number, np.float32), (given["user"], given["item"])), shape)
    model = BayesianPersonalizedRanking(
        factors=work["dim"] - 1,  # it adds a column for biases
        learning_rate=work["implicit_learning_rate"],
        regularization=work["implicit_regularization"],
        iterations=1,
        num_threads=1,
        random_state=0,
    )

    def repeat() -> tuple[int, dict]:
        model.iterations = 1 if model.user_factors is not None else work["epochs"]
        is_first = model.user_factors is None
        model.fit(matrix, show_progress=False)
        if not is_first:
            return number, {}
        rate = hit_rate(model.user_factors, model.item_factors, folder)
        return number * work["epochs"], {"interactions": number, "hit rate at 10": rate}

    return repeat
