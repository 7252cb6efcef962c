"""Inputs of the case bpr, and sellarec's side: epochs from Parquet, reading and drawing of negatives included."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sides.engine import engine_of
from sides.held_out import HELD_OUT, INTERACTIONS, hit_rate

HISTORY = 50
"""Items before a row that are never drawn for it."""


def inputs(work: dict[str, Any], folder: Path) -> None:
    """Users of long-tailed degrees who take items by their popularity and by a taste of 8 dimensions, each item once;
    a user's last one is held out."""
    generator = np.random.default_rng(0)
    users, items = work["users"], work["items"]
    weights = generator.lognormal(0.0, 1.2, users)
    degrees = np.minimum(20 + generator.multinomial(work["rows"] - 20 * users, weights / weights.sum()), items // 2)
    taste, traits = (generator.standard_normal((size, 8)) for size in (users, items))
    popular = generator.lognormal(0.0, 1.0, items)
    taken = []
    for user, degree in enumerate(degrees):
        # the largest of scores with Gumbel noise: items drawn without repeats
        scores = np.log(popular) + taste[user] @ traits.T + generator.gumbel(size=items)
        taken.append(generator.permutation(np.argpartition(-scores, degree)[:degree]))
    held_out = np.array([found[-1] for found in taken])
    user = np.repeat(np.arange(users), degrees - 1)
    item = np.concatenate([found[:-1] for found in taken])
    np.savez(folder / INTERACTIONS, user=user, item=item, **{HELD_OUT: held_out})


def ours(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    from sellarec.collab.model import Sizes
    from sellarec.collab.models.mf import Model
    from sellarec.collab.negatives import Negatives
    from sellarec.collab.task import CollabTask
    from sellarec.config import Collab
    from sellarec.training.stream import Order, prepared, row_groups, slices

    given = np.load(folder / INTERACTIONS)
    user, item, number = given["user"], given["item"], len(given["user"])
    starts = np.searchsorted(user, user, side="left")  # a user's rows lie together, in their order
    lengths = np.minimum(np.arange(number) - starts, HISTORY)
    places = np.repeat(np.arange(number) - lengths, lengths) + _counted(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    history = pa.LargeListArray.from_arrays(offsets, item[places]).cast(pa.list_(pa.int64()))
    known = np.ones(number, bool)
    columns = {"row": np.arange(number), "user": user, "item": item, "label": np.ones(number, np.int8)}
    rows = pa.table({**columns, "user_seen": known, "item_seen": known, "history": history})
    pq.write_table(rows, folder / "train.parquet", row_group_size=1 << 16)

    settings = Collab(
        dim=work["dim"], loss="bpr", negatives_per_row=1, biases=False, global_mean=False, l2=work["l2"],
        batch=work["batch"], table_learning_rate=work["learning_rate"],
    )  # fmt: skip
    counts = np.tile(np.bincount(item, minlength=work["items"]), (2, 1))
    model = Model(Sizes(work["users"], work["items"], 1.0), settings)
    task = CollabTask(model, settings, np.ones(work["items"], bool), Negatives("uniform", counts, 1, 0))
    engine = engine_of(task, settings)
    order, taken = Order(tuple(row_groups([str(folder / "train.parquet")])), work["batch"], seed=0), 0
    epochs = work["epochs"]

    def train(number: int) -> None:
        nonlocal taken
        last = taken + number * order.steps_per_epoch
        pieces = order.pieces(taken, last)
        blocks = chain.from_iterable(prepared(order, piece, task.columns, task.prepare) for piece in pieces)
        for batch in slices(blocks, order, 0, 1, taken, last):
            engine.step(batch, taken, 1.0)
            taken += 1

    def repeat() -> tuple[int, dict]:
        if taken:
            train(1)
            return number, {}
        train(epochs)
        shares = {kind: engine.tables.share(kind) for kind in ("user", "item")}
        rows = {kind: found.detach().numpy() for kind, found in engine.tables.look_up({}, shares).items()}
        rate = hit_rate(rows["user"], rows["item"], folder)
        return number * epochs, {"interactions": number, "hit rate at 10": rate}

    return repeat


def _counted(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... within each of some lengths."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
