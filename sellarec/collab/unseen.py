"""Cases in which training has nothing of a row's user, item or history, and how many of the test rows they are.

What each counts as, a model says in words (`CollabModel.unseen`, and of what its loss leaves out `CollabTask.unseen`).
"""

from collections.abc import Collection

import polars as pl

from sellarec.data.log import Log, train_sequences

USER, ITEM = "unseen user", "unseen item"
"""It has no train row."""

HISTORY = "empty history"
"""Of no item, or of items without a train row alone, which are left out."""

USER_WITHOUT_POSITIVE, ITEM_WITHOUT_POSITIVE = "user without a positive", "item without a positive"
"""It has train rows, but no positive one: a ranking loss has no target of it."""

ITEM_WITHOUT_SEQUENCE = "item in no sequence"
"""It has train rows, but lies in none of the train sequences."""


def unseen_shares(log: Log, cases: Collection[str], longest: int) -> dict[str, float]:
    """The share of the test rows that each of these cases is, from 0 to 1.

    Args:
        longest: items of a train sequence, for ITEM_WITHOUT_SEQUENCE.
    """
    test = pl.scan_parquet(log.split_paths("test"))
    counts = {case: _rows(test, case, log, longest).select(pl.len()).collect(engine="streaming") for case in cases}
    return {case: count.item() / log.facts["rows"]["test"] for case, count in counts.items()}


def _rows(test: pl.LazyFrame, case: str, log: Log, longest: int) -> pl.LazyFrame:
    """The test rows that a case is."""
    if case in (USER, ITEM):
        return test.filter(~pl.col("user_seen" if case == USER else "item_seen"))
    if case == HISTORY:
        seen = pl.scan_parquet(log.paths("items")).filter("seen").select(history="item")
        read = test.select("row", "history").explode("history").join(seen, on="history", how="semi")
        return test.select("row").join(read.select("row").unique(), on="row", how="anti")
    kind = "user" if case == USER_WITHOUT_POSITIVE else "item"
    if case == ITEM_WITHOUT_SEQUENCE:
        trained = train_sequences(log, longest).select(item=pl.concat_list("history", "item")).explode("item")
    else:
        trained = pl.scan_parquet(log.split_paths("train")).filter(pl.col("label") == 1).select(kind)
    return test.filter(f"{kind}_seen").select(kind).join(trained.unique(), on=kind, how="anti")
