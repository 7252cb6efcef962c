"""Raw interactions to the prepared log's tables: dense ids, splits, histories, and what was seen in training."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sellarec.data.raw import SPLITS, Raw
from sellarec.errors import UserError

ROWS_PER_CHUNK = 65_536
"""Rows that a history column is built from at a time, and rows of a Parquet row group."""

SPLIT_SHARES = (0.8, 0.1, 0.1)
"""Default shares of the rows, by time, of train, valid and test."""

# Years 1 to 9999, what a date can name (seconds since 1970).
EARLIEST, LATEST = -62_135_596_800, 253_402_300_799


@dataclass(frozen=True)
class Prepared:
    """The tables of a prepared log and the facts about them, in the layout that `sellarec.data.log` writes."""

    interactions: dict[str, pa.Table]  # split -> rows
    items: pa.Table
    users: pa.Table
    facts: dict[str, Any]


def prepare(raw: Raw, *, history_cap: int, split: tuple[float, float, float] = SPLIT_SHARES) -> Prepared:
    """Return the prepared log of `raw`.

    Rows of a split are in time order, then in the source's. Users and items are numbered by first appearance in train,
    then valid, then test; items without interactions follow in the source's order. Where the source gives no split, its
    rows in time order are cut into the shares `split` (train, valid, test). Where it gives no histories, a row's
    history is the user's positives before it in time order (then source order), whatever split they lie in. The last
    `history_cap` items of a history are kept.

    Raises:
        UserError: an empty split, shares that do not add up to 1, or a `history_cap` below 1.
    """
    if history_cap < 1:
        raise UserError(f"data.history_cap is {history_cap}, but a history keeps at least 1 item.")
    if len(split) != 3 or min(split) <= 0 or abs(sum(split) - 1) > 1e-9:
        raise UserError(
            f"data.split, the shares of train, valid and test, is {split}: each must be above 0, and their sum 1."
        )
    rows = raw.interactions
    time = _time(rows["timestamp"])
    split_of, split_rule = _split_of(raw, time, split)
    order = np.lexsort((time, split_of))  # stable: rows of one time stay in the source's order
    split_sizes = np.bincount(split_of, minlength=len(SPLITS)).tolist()
    for name, size in zip(SPLITS, split_sizes, strict=True):
        if size == 0:
            raise UserError(
                f"The {name} split is empty: of {rows.num_rows:,} rows, {', '.join(map(str, split_sizes))} are "
                f"{', '.join(SPLITS)}. Split rule: {split_rule}. "
                "Give more rows, or another split (data.split where it is made by time)."
            )
    train_size = split_sizes[0]

    # Dictionary encoding numbers values by first appearance, which is the rule for dense ids.
    users = _array(rows["user"]).take(order).dictionary_encode()
    user = users.indices.to_numpy().astype(np.int64)
    item_type = rows["item"].type
    given = _given_history(rows["history"], item_type) if "history" in rows.column_names else None
    items = pa.concat_arrays(
        [
            _array(rows["item"]).take(order),
            _array(raw.items["external_id"]).cast(item_type),
            given.items if given else pa.nulls(0, item_type),
        ]
    ).dictionary_encode()
    codes = items.indices.to_numpy().astype(np.int64)
    item, catalog, history_items = np.split(codes, [rows.num_rows, rows.num_rows + raw.items.num_rows])

    label = rows["label"].to_numpy().astype(np.int8)
    if given:
        history = _History(history_items, given.end, given.length)
    else:
        back = np.argsort(order)
        history = _earlier_positives(user[back], item[back], label == 1, time)

    user_seen = user <= user[:train_size].max()
    item_seen = item <= item[:train_size].max()
    if "warm" in rows.column_names:
        warm, warm_rule = rows["warm"].to_numpy()[order], "as the source publishes it"
    else:
        warm, warm_rule = user_seen & item_seen, "user and item both occur in the train split"
    unknown = pa.nulls(rows.num_rows, pa.float32())
    log = pa.table(
        {
            "row": np.arange(rows.num_rows, dtype=np.int64),
            "user": user,
            "item": item,
            "label": label[order],
            "rating": _array(rows["rating"]).cast(pa.float32()).take(order)
            if "rating" in rows.column_names
            else unknown,
            "timestamp": _array(rows["timestamp"]).cast(pa.int64()).take(order),
            "history": _history_column(history, order, history_cap),
            "history_length": history.length[order].astype(np.int32),
            "user_seen": user_seen,
            "item_seen": item_seen,
            "warm": warm,
            "expected": _array(rows["expected"]).cast(pa.float32()).take(order)
            if "expected" in rows.column_names
            else unknown,
        }
    )
    starts = np.concatenate([[0], np.cumsum(split_sizes)]).tolist()
    interactions = {name: log.slice(starts[i], split_sizes[i]) for i, name in enumerate(SPLITS)}
    item_table = _item_table(items.dictionary, catalog, raw.items)
    user_table = pa.table(
        {"user": np.arange(len(users.dictionary), dtype=np.int64), "external_id": users.dictionary.cast(pa.string())}
    )
    facts = {
        "users": user_table.num_rows,
        "items": item_table.num_rows,
        "rows": {name: table.num_rows for name, table in interactions.items()},
        "positives": {name: pc.sum(table["label"]).as_py() for name, table in interactions.items()},
        "cold": {name: pc.sum(pc.invert(interactions[name]["warm"])).as_py() for name in SPLITS[1:]},
        "label_rule": raw.label_rule,
        "split_rule": split_rule,
        "warm_rule": warm_rule,
        "history_cap": history_cap,
        "dates": {name: _dates(table["timestamp"]) for name, table in interactions.items()},
        "dropped": dict(raw.dropped),
        "items_without_title": pc.sum(pc.equal(item_table["title"], "")).as_py(),
        "sources": dict(raw.sources),
        "noun": raw.noun,
    }
    return Prepared(interactions, item_table, user_table, facts)


@dataclass(frozen=True)
class _History:
    """Each row's uncapped history as a slice of one pool: items[end[row] - length[row] : end[row]]."""

    items: Any  # dense ids, int64 [entries]; the source's ids, an Arrow array, before numbering
    end: np.ndarray  # int64 [rows]
    length: np.ndarray  # int64 [rows]


def _array(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.nulls(0, column.type)


def _time(timestamp: pa.ChunkedArray) -> np.ndarray:
    """Seconds as int64; rows without a time come last."""
    seconds = timestamp.cast(pa.int64())
    bounds = pc.min_max(seconds).as_py()
    for value in bounds.values():
        if value is not None and not EARLIEST <= value <= LATEST:
            raise UserError(f"The timestamp {value} is no time in seconds since 1970 (a table in milliseconds?).")
    return seconds.fill_null(np.iinfo(np.int64).max).to_numpy()


def _split_of(raw: Raw, time: np.ndarray, shares: tuple[float, float, float]) -> tuple[np.ndarray, str]:
    """The index in SPLITS of every row, and the rule in words."""
    rows = raw.interactions
    if "split" in rows.column_names:
        if raw.split_rule is None:
            raise ValueError("raw.split_rule must say how the given split was made")
        split_of = pc.index_in(rows["split"], pa.array(SPLITS))
        if split_of.null_count:
            raise ValueError(f"raw.interactions['split'] holds other values than {', '.join(SPLITS)}")
        return split_of.to_numpy().astype(np.int64), raw.split_rule
    missing = rows["timestamp"].null_count
    if missing:
        raise UserError(f"{missing:,} of {rows.num_rows:,} rows have no timestamp, so the log cannot be split by time.")
    ends = [round(rows.num_rows * shares[0]), round(rows.num_rows * (shares[0] + shares[1]))]
    split_of = np.empty(rows.num_rows, dtype=np.int64)
    split_of[np.argsort(time, kind="stable")] = np.searchsorted(ends, np.arange(rows.num_rows), side="right")
    rule = "by time: the first {:g} of the rows are train, the next {:g} valid, the last {:g} test".format(*shares)
    return split_of, rule


def _given_history(column: pa.ChunkedArray, item_type: pa.DataType) -> _History:
    length = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    items = _array(pc.list_flatten(column)).cast(item_type)
    return _History(items, np.cumsum(length), length)


def _earlier_positives(user: np.ndarray, item: np.ndarray, is_positive: np.ndarray, time: np.ndarray) -> _History:
    """Histories from the log itself: the user's positives before each row, by time and then by the source's order.

    All arguments have one entry per row, in the source's order.
    """
    by_user = np.lexsort((time, user))
    sorted_user, sorted_positive = user[by_user], is_positive[by_user]
    positives_before = np.cumsum(sorted_positive) - sorted_positive
    first_of_user = np.searchsorted(sorted_user, sorted_user, side="left")
    end = np.empty(len(user), dtype=np.int64)
    length = np.empty(len(user), dtype=np.int64)
    end[by_user] = positives_before
    length[by_user] = positives_before - positives_before[first_of_user]
    return _History(item[by_user][sorted_positive], end, length)


def _history_column(history: _History, order: np.ndarray, cap: int) -> pa.ChunkedArray:
    """The last `cap` items of each history, rows in `order`; list<int64>, built in chunks to bound its memory."""
    chunks = []
    for first in range(0, len(order), ROWS_PER_CHUNK):
        rows = order[first : first + ROWS_PER_CHUNK]
        kept = np.minimum(history.length[rows], cap)
        offsets = np.concatenate([[0], np.cumsum(kept)])
        positions = np.repeat(history.end[rows] - kept - offsets[:-1], kept) + np.arange(offsets[-1])
        chunks.append(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(history.items[positions])))
    return pa.chunked_array(chunks, pa.list_(pa.int64()))


def _item_table(external: pa.Array, catalog: np.ndarray, described: pa.Table) -> pa.Table:
    """Items by dense id; `catalog` holds the dense id of each row of `described`, of which the first counts."""
    row_of = np.full(len(external), -1, dtype=np.int64)
    row_of[catalog[::-1]] = np.arange(len(catalog))[::-1]  # of equal indices, numpy keeps the last
    rows = pa.array(row_of, mask=row_of < 0)
    title = _array(described["title"]).cast(pa.string()).take(rows).fill_null("")
    text = _array(described["text"]).cast(pa.string()).take(rows).fill_null("")
    return pa.table(
        {
            "item": np.arange(len(external), dtype=np.int64),
            "external_id": external.cast(pa.string()),
            "title": title,
            "text": pc.if_else(pc.equal(text, ""), title, text),
        }
    )


def _dates(timestamp: pa.ChunkedArray) -> list[str | None]:
    """First and last time in UTC, ISO 8601; None where there are no timestamps."""
    bounds = pc.min_max(timestamp).as_py()
    return [None if s is None else datetime.fromtimestamp(s, UTC).isoformat() for s in (bounds["min"], bounds["max"])]
