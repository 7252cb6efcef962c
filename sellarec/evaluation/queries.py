"""What is ranked for whom: the users of a split, the items that they like there, and those that are left out.

Shapes: u users, N negatives of a user.
"""

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sellarec.data.keys import uniform
from sellarec.data.log import ROW_GROUP_ROWS, Log
from sellarec.errors import UserError

BEFORE = {"valid": ("train",), "test": ("train", "valid")}
"""The splits whose items are left out of what is ranked for the users of a split."""

PROTOCOL = {
    "valid": "ranking of the whole catalog but for the user's train items",
    "test": "ranking of the whole catalog but for the user's train and valid items",
}

QUERY_COLUMNS = ("row", "user", "item", "label", "history", "user_seen", "item_seen")

CHUNK_USERS = 1024
"""Users whose candidates are drawn at once."""

_SALT = 0x63616E64
"""Keeps these draws apart from others of the same seed and user."""


def queries(log: Log, split: str, most: int | None = None) -> pa.Table:
    """One row for each user with a positive in a split, by user.

    Args:
        most: of more users every so many-th, so half as many at least.

    Returns:
        QUERY_COLUMNS, of the user's first row in the split: what was known of the user before it; `relevant` list<int64>, the
        items of the user's positives in the split; `excluded` list<int64>, the items of the user's rows in the splits before
        that are none of `relevant`.

    Raises:
        UserError: the split has no positives.
    """
    rows = pl.from_arrow(log.split(split, list(QUERY_COLUMNS)))
    assert isinstance(rows, pl.DataFrame)
    relevant = rows.filter(pl.col("label") == 1).group_by("user").agg(pl.col("item").unique().sort().alias("relevant"))
    if not len(relevant):
        raise UserError(
            f"the {split} split has no positives, so there is nothing to rank for: take auc or uauc, or other data"
        )
    relevant = relevant.sort("user")
    if most is not None and len(relevant) > most:
        relevant = relevant.gather_every(-(-len(relevant) // most))
    wanted = relevant.select("user")
    earlier = pl.concat([pl.scan_parquet(log.split_paths(name)).select("user", "item") for name in BEFORE[split]]).join(
        wanted.lazy(), on="user", how="semi"
    )
    known = relevant.explode("relevant").rename({"relevant": "item"})
    excluded = (
        earlier.unique()
        .join(known.lazy(), on=["user", "item"], how="anti")
        .group_by("user")
        .agg(excluded=pl.col("item").sort())
    ).collect()
    first = rows.join(wanted, on="user", how="semi").unique("user", keep="first", maintain_order=True)
    out = first.join(relevant, on="user").join(excluded, on="user", how="left").sort("user")
    return out.with_columns(pl.col("excluded").fill_null([])).to_arrow().cast(_SCHEMA)


_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("user", pa.int64()),
        ("item", pa.int64()),
        ("label", pa.int8()),
        ("history", pa.list_(pa.int64())),
        ("user_seen", pa.bool_()),
        ("item_seen", pa.bool_()),
        ("relevant", pa.list_(pa.int64())),
        ("excluded", pa.list_(pa.int64())),
    ]
)


def write_queries(log: Log, split: str, path: Path, most: int | None = None) -> pa.Table:
    """Write `queries` as Parquet; gives their users and relevant items."""
    found = queries(log, split, most)
    pq.write_table(found, path, row_group_size=ROW_GROUP_ROWS)
    return found.select(["user", "relevant"])


def write_candidates(log: Log, split: str, number: int, seed: int, path: Path) -> pa.Table:
    """Write a row for each user of a split and each candidate: the relevant items, and items drawn from the catalog.

    Drawn uniformly by (seed, user), without repeats, of all items but the user's relevant and excluded ones. A
    sampled ranking doesn't tell which model is better in full ranking (Krichene and Rendle, 2020): it is for comparing with
    what was published so.

    Args:
        number: N.

    Returns:
        As `write_queries`.

    Raises:
        UserError: the catalog has fewer than twice as many items as are drawn, or a user has had so many of them that fewer
            are left.
    """
    items = log.facts["items"]
    if items < 2 * number:
        raise UserError(
            f"candidates are {number} of {items} items: rank the whole catalog (full), or draw half of them at most"
        )
    found, seen = queries(log, split), log.items(["seen"])["seen"].to_numpy()
    had = sum(pc.list_value_length(found[name]).to_numpy() for name in ("relevant", "excluded"))
    most = int(had.argmax())
    if items - had[most] < number:
        raise UserError(
            f"candidates are {number}, but user {found['user'][most]} has had {had[most]} of the {items} items, so only "
            f"{items - had[most]} are left: draw fewer, or rank the whole catalog (full)"
        )
    writer, row = None, 0
    for start in range(0, len(found), CHUNK_USERS):
        part = found.slice(start, CHUNK_USERS)
        users = part["user"].to_numpy()
        taken = [part[name].combine_chunks() for name in ("relevant", "excluded")]
        whose = [np.repeat(np.arange(len(part)), np.diff(lists.offsets.to_numpy())) for lists in taken]
        relevant, excluded = (lists.flatten().to_numpy() for lists in taken)
        known = np.concatenate([whose[0] * items + relevant, whose[1] * items + excluded])
        drawn = np.zeros(0, np.int64)
        counts = np.zeros(len(part), np.int64)
        attempt = 0
        while (counts < number).any():
            lack = np.flatnonzero(counts < number)
            place = np.repeat(lack, number)
            u = uniform(users[place] * number + np.tile(np.arange(number), len(lack)), _SALT, seed, attempt)
            fresh = place * items + np.minimum((u * items).astype(np.int64), items - 1)
            fresh = fresh[~np.isin(fresh, known) & ~np.isin(fresh, drawn)]
            fresh = fresh[np.sort(np.unique(fresh, return_index=True)[1])]
            fresh = fresh[np.argsort(fresh // items, kind="stable")]
            rank = np.arange(len(fresh)) - np.searchsorted(fresh // items, fresh // items)
            fresh = fresh[rank < number - counts[fresh // items]]
            drawn = np.concatenate([drawn, fresh])
            counts += np.bincount(fresh // items, minlength=len(part))
            attempt += 1
        place, item = np.divmod(np.sort(np.concatenate([whose[0] * items + relevant, drawn])), items)
        rows = part.select(list(QUERY_COLUMNS)).take(place)
        columns = {
            "row": np.arange(row, row + len(rows)),
            "item": item,
            "label": np.isin(place * items + item, known[: len(relevant)]).astype(np.int8),
            "item_seen": seen[item],
        }
        for name, values in columns.items():
            rows = rows.set_column(rows.column_names.index(name), name, pa.array(values))
        writer = writer or pq.ParquetWriter(path, rows.schema)
        writer.write_table(rows, row_group_size=ROW_GROUP_ROWS)
        row += len(rows)
    assert writer is not None
    writer.close()
    return found.select(["user", "relevant"])
