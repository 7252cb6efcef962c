"""What preparation does to one piece of a log at a time: each function is a task that reads files and writes files.

    partition_rows    a source's part     -> rows of each user partition, distinct ids
    sort_users        a user partition    -> its rows by user and time, without repeats
    cut_core          a user partition    -> which of its rows are left of a k-core
    build_histories   a user partition    -> rows with label, split and history, for each time bucket; sequences
    first_rows        a time bucket       -> the first row of each of its users and items
    write_bucket      a time bucket       -> its part of the prepared interactions
    read_described    a source's part     -> what it tells of users or items
    spread            a file of these     -> its rows, by range of dense ids
    write_range       a range of ids      -> its part of the prepared users or items

No task holds more than one piece. Rows carry 64-bit keys of users and items until `number` gives them dense ids. A row's
`position` is its place in the source: part number times 2^40, plus its number in the part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sellarec.data.keys import keys_of, look_up, write_numbering
from sellarec.data.log import INTERACTIONS, ITEMS, ROW_GROUP_ROWS, SEQUENCES, USERS
from sellarec.data.raw import ATTRIBUTES, SPLITS, Dropped, Part
from sellarec.errors import UserError
from sellarec.ranges import ranges

FLUSH_ROWS = 1 << 22
"""Rows that `partition_rows` collects before it writes them to their partitions."""

NO_TIME = np.iinfo(np.int64).max
"""Stands for an unknown time where rows are sorted: they come last."""

# Years 1 to 9999, what a date can name (seconds since 1970).
EARLIEST, LATEST = -62_135_596_800, 253_402_300_799

SplitRule = Literal["given", "shares", "dates", "leave-one-out", "random"]

MAX_VALUES = 100_000
"""Values of a categorical feature of an interaction; one with more is an id."""

SAMPLED_ROWS = 64
"""Times of each table that is read which tell where the time buckets begin."""


@dataclass(frozen=True)
class Rules:
    """How rows become the prepared log.

    Attributes:
        split: `given` by the source; `shares` of the rows by time; before and after `dates`; `leave-one-out`: a user's last row
            is test, the one before valid; `random`: shares of each user's rows, drawn by `seed`.
        shares: fractions of train, valid, test.
        dates: first second of valid and of test (seconds since 1970, UTC).
        positive_rating: lowest rating that is a positive, where the source has ratings and no labels.
        history_cap: most recent positives kept in a row's history.
        k_core: users and items with fewer rows are left out; 0 keeps all.
        k_core_once: counts are taken once, before any is left out; else until no more is left out.
        seed: of what is drawn.
    """

    split: SplitRule
    shares: tuple[float, float, float]
    dates: tuple[int, int] | None
    positive_rating: float
    history_cap: int
    k_core: int
    k_core_once: bool
    seed: int


# ---- a source's part ----


def partition_rows(
    part: Part, number: int, partitions: int, bad_rows: Any, features: Sequence[str], work: Path
) -> dict:
    """Write a part's rows to their user partitions, and its distinct ids.

    Files: rows/PARTITION/PART-CHUNK.arrow, ids/{user,item}/PART-CHUNK.arrow.

    Returns:
        Rows, reasons of dropped rows, splits, columns, values of the categorical features, a sample of times.
    """
    dropped = Dropped(bad_rows)
    facts: dict[str, Any] = {"rows": 0, "without_time": 0, "splits": [], "columns": [], "types": {}}
    values: dict[str, Counter[str]] = {name: Counter() for name in ("domain", *features)}
    sample: list[int] = []
    waiting: list[pl.DataFrame] = []
    chunk = tables = before = 0
    for table in part.read(dropped):
        if table.num_rows == 0:
            continue
        facts["columns"] = sorted({*facts["columns"], *table.column_names})
        for kind in ("user", "item"):
            found = "int64" if pa.types.is_integer(table[kind].type) else "string"
            if facts["types"].setdefault(kind, found) != found:
                raise ValueError(f"{part.name} gives {kind} ids of two types")
        rows = _rows_of(table, number, before, part.name)
        before += len(rows)
        if "rating" in rows.columns and "label" not in rows.columns and rows["rating"].null_count():
            rated = rows["rating"].is_not_null()
            where = f"{part.name}, row {before - len(rows) + (rated.arg_min() or 0) + 1}"
            dropped.bad(where, "there is no rating, of which labels are made", rows=len(rows) - int(rated.sum()))
            rows = rows.filter(rated)
        facts["rows"] += len(rows)
        facts["without_time"] += int(rows["timestamp"].null_count())
        known = rows["timestamp"].drop_nulls()
        sample += known.gather(np.linspace(0, len(known) - 1, min(SAMPLED_ROWS, len(known))).astype(np.int64)).to_list()
        if "split" in rows.columns:
            facts["splits"] = sorted({*facts["splits"], *rows["split"].unique().to_list()})
        if "history" in table.column_names:
            listed = pc.unique(pc.list_flatten(_one(table["history"])))
            ids = pl.DataFrame(
                {"key": keys_of(listed), "id": pl.Series(listed.cast(pa.large_string()), dtype=pl.String)}
            )
            _write(ids, work / "ids" / "item" / f"{number:05d}-{tables:05d}-history.arrow")
            tables += 1
        for name, counter in values.items():
            if name in rows.columns:
                counter.update(dict(rows[name].drop_nulls().value_counts().iter_rows()))
                check_values(name, len(counter))
        waiting.append(rows)
        if sum(map(len, waiting)) >= FLUSH_ROWS:
            _flush(waiting, number, chunk, partitions, work)
            waiting, chunk = [], chunk + 1
    if waiting:
        _flush(waiting, number, chunk, partitions, work)
    counted = {name: dict(found) for name, found in values.items() if found}
    return {**facts, "dropped": dict(dropped.counts), "values": counted, "times": sample}


def check_values(name: str, count: int) -> None:
    if count > MAX_VALUES:
        raise UserError(f"the feature {name} has {count:,} values or more, above {MAX_VALUES:,}: leave it out")


def _rows_of(table: pa.Table, number: int, first: int, name: str) -> pl.DataFrame:
    """A source's table with keys and positions, in the types of preparation."""
    count = table.num_rows
    columns: dict[str, Any] = {
        "position": (number << 40) + first + np.arange(count, dtype=np.int64),
        "user": _one(table["user"]),
        "item": _one(table["item"]),
    }
    for kind in ("user", "item"):
        if columns[kind].null_count:
            raise ValueError(f"{name} gives rows without {kind}")
        columns[f"{kind}_key"] = keys_of(columns[kind])
        columns[kind] = columns[kind].cast(pa.large_string())
    if "timestamp" in table.column_names:
        time = _one(table["timestamp"]).cast(pa.int64())
        bounds = pc.min_max(time).as_py()
        for value in bounds.values():
            if value is not None and not EARLIEST <= value <= LATEST:
                raise UserError(
                    f"{name}: the timestamp {value} is no time in seconds since 1970 (a table in milliseconds?)"
                )
        columns["timestamp"] = time
    else:
        columns["timestamp"] = pa.nulls(count, pa.int64())
    given = {
        "rating": pa.float32(), "label": pa.int8(), "split": pa.large_string(), "warm": pa.bool_(),
        "expected": pa.float32(), "domain": pa.large_string(),
    }  # fmt: skip
    for column in table.column_names:
        if column == "history":
            columns["history"] = _keyed_lists(_one(table["history"]))
        elif column not in columns:
            columns[column] = _one(table[column]).cast(given.get(column, pa.large_string()))
    rows = pl.from_arrow(pa.table(columns))
    assert isinstance(rows, pl.DataFrame)
    if "rating" in rows.columns and rows["rating"].is_nan().any():
        raise ValueError(f"{name} gives ratings that are NaN")
    return rows


def _one(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.nulls(0, column.type)


def _keyed_lists(lists: pa.Array) -> pa.Array:
    """Lists of ids -> lists of keys."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
    keys = keys_of(pc.list_flatten(lists))
    return pa.LargeListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)])), pa.array(keys))


def _flush(tables: list[pl.DataFrame], number: int, chunk: int, partitions: int, work: Path) -> None:
    rows = pl.concat(tables)
    name = f"{number:05d}-{chunk:05d}.arrow"
    for kind in ("user", "item"):
        # two ids of one key are both kept, so that `write_range` finds them
        ids = rows.select(pl.col(f"{kind}_key").alias("key"), pl.col(kind).alias("id")).unique()
        _write(ids, work / "ids" / kind / name)
    rows = rows.drop("user", "item").with_columns((pl.col("user_key") % partitions).alias("partition"))
    for (partition,), part in rows.partition_by("partition", as_dict=True, include_key=False).items():
        _write(part, work / "rows" / f"{partition:05d}" / name)


def _write(table: pl.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table.write_ipc(path, compression="lz4")


def _read_all(folder: Path) -> pl.DataFrame:
    """All files of a folder, in the order of their names."""
    tables = [pl.read_ipc(path) for path in sorted(folder.glob("*.arrow"))]
    return pl.concat(tables, how="diagonal") if tables else pl.DataFrame()


# ---- a user partition ----


def sort_users(partition: int, rules: Rules, work: Path) -> dict:
    """Sort a partition's rows by user, time and position, and leave out exact repeats of a row. Writes sorted/PARTITION.arrow."""
    rows = _read_all(work / "rows" / f"{partition:05d}")
    if rows.is_empty():
        return {"rows": 0, "dropped": {}}
    before = len(rows)
    rows = rows.sort(pl.col("user_key"), pl.col("timestamp").fill_null(NO_TIME), pl.col("position"))
    same = [name for name in ("user_key", "item_key", "timestamp", "rating", "label", "split") if name in rows.columns]
    rows = rows.unique(same, keep="first", maintain_order=True)
    if rules.k_core:
        counts = rows.group_by("item_key").len("count")
        _write(counts.cast({"count": pl.Int64}), work / "counts" / f"{partition:05d}.arrow")
    _write(rows, work / "sorted" / f"{partition:05d}.arrow")
    return {"rows": len(rows), "dropped": {"exact repeat of an earlier row": before - len(rows)}}


def core_mask(partition: int, cuts: int, work: Path) -> Path:
    """The file that says which rows of a sorted partition are left after so many cuts (only the last two are there)."""
    return work / "core" / f"{partition:05d}-{cuts % 2}.npy"


def cut_core(partition: int, cuts: int, rules: Rules, work: Path) -> dict:
    """Leave out rows of users, and of the items named in core/rare.npy, that have fewer than k rows.

    Writes which rows are left (never over the file that it reads, or a cut that is done again would find nothing to leave
    out) and the items' new counts.

    Args:
        cuts: how often rows have been left out before.
    """
    sorted_rows = work / "sorted" / f"{partition:05d}.arrow"
    if not sorted_rows.exists():
        return {"removed": 0}
    keys = pl.read_ipc(sorted_rows, columns=["user_key", "item_key"])
    user, item = keys["user_key"].to_numpy(), keys["item_key"].to_numpy()
    left = np.load(core_mask(partition, cuts, work)) if cuts else np.ones(len(user), bool)
    before = int(left.sum())
    _, group = np.unique(user, return_inverse=True)
    rare = np.load(work / "core" / "rare.npy")
    frequent = ~_contains(rare, item)
    if rules.k_core_once:
        left &= frequent & (np.bincount(group)[group] >= rules.k_core)
    else:
        left &= frequent
        left &= np.bincount(group, weights=left)[group] >= rules.k_core
    np.save(core_mask(partition, cuts + 1, work), left)
    counts = pl.DataFrame({"item_key": item[left]}).group_by("item_key").len("count").cast({"count": pl.Int64})
    _write(counts, work / "counts" / f"{partition:05d}.arrow")
    return {"removed": before - int(left.sum())}


def _contains(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Whether each wanted key is among the sorted known ones."""
    if len(known) == 0:
        return np.zeros(len(wanted), bool)
    return known[np.minimum(np.searchsorted(known, wanted), len(known) - 1)] == wanted


def rare_items(rules: Rules, work: Path) -> None:
    """Sum the items' counts over all partitions, and write the keys of those below k to core/rare.npy."""
    counts = pl.scan_ipc(work / "counts" / "*.arrow")
    rare = counts.group_by("item_key").agg(pl.col("count").sum()).filter(pl.col("count") < rules.k_core)
    keys = rare.select("item_key").collect(engine="streaming")["item_key"].to_numpy()
    (work / "core").mkdir(exist_ok=True)
    np.save(work / "core" / "rare.npy", np.sort(keys))


@dataclass(frozen=True)
class Buckets:
    """How rows are spread over time.

    Attributes:
        edges: times at which a bucket begins, but for the first.
        by_position: no row has a time, and `edges` are positions.
        by_split: the split is known of a user's rows (not a matter of all rows' times), and comes before time in the order
            of buckets.
        has_valid: the given split has valid rows; else they are drawn from each user's train rows.
        cuts: how often rows were left out for the k-core.
    """

    edges: tuple[int, ...]
    by_position: bool
    by_split: bool
    has_valid: bool
    cuts: int


def _sorted_rows(partition: int, rules: Rules, buckets: Buckets, work: Path) -> pl.DataFrame:
    """A partition's rows that are left, by user, time and position, with `label`, `split` and `bucket`; may be empty."""
    path = work / "sorted" / f"{partition:05d}.arrow"
    if not path.exists():
        return pl.DataFrame()
    rows = pl.read_ipc(path)
    if buckets.cuts:
        rows = rows.filter(pl.Series(np.load(core_mask(partition, buckets.cuts, work))))
    if rows.is_empty():
        return rows
    rows = rows.with_columns(pl.Series("label", _labels(rows, rules.positive_rating)))
    first, sizes = _users(rows)
    split = _splits(rows, rules, first, sizes, buckets.has_valid) if buckets.by_split else np.zeros(len(rows), np.int64)
    time = rows["position"] if buckets.by_position else rows["timestamp"].fill_null(NO_TIME)
    edges = np.asarray(buckets.edges, np.int64)
    bucket = split * (len(edges) + 1) + np.searchsorted(edges, time.to_numpy(), side="right")
    return rows.with_columns(pl.Series("split", split.astype(np.int8)), pl.Series("bucket", bucket))


def _users(rows: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Of rows sorted by user: the place of the first row of each row's user, [rows], and each user's number of rows."""
    user = rows["user_key"].to_numpy()
    starts = np.flatnonzero(np.concatenate([[True], user[1:] != user[:-1]]))
    sizes = np.diff(np.append(starts, len(user)))
    return np.repeat(starts, sizes), sizes


def spread_rows(partition: int, rules: Rules, buckets: Buckets, work: Path) -> dict:
    """Write what users and items are numbered by of a partition's rows to time buckets, keys/BUCKET/PARTITION.arrow.

    Returns:
        Rows of each bucket.
    """
    rows = _sorted_rows(partition, rules, buckets, work)
    if rows.is_empty():
        return {"buckets": {}}
    names = ["user_key", "item_key", "split", "timestamp", "position", "bucket"]
    if "history" in rows.columns:
        names.append("history")
        rows = rows.with_columns(pl.col("history").list.tail(rules.history_cap))
    return {"buckets": _write_buckets(rows.select(names), work / "keys", partition)}


def _write_buckets(rows: pl.DataFrame, folder: Path, partition: int) -> dict[str, int]:
    counts = {}
    for (number,), part in rows.partition_by("bucket", as_dict=True, include_key=False).items():
        _write(part, folder / f"{number:05d}" / f"{partition:05d}.arrow")
        counts[str(number)] = len(part)
    return counts


def build_histories(partition: int, rules: Rules, buckets: Buckets, log: Path, work: Path) -> dict:
    """Give a partition's rows their dense ids and histories, and write them to time buckets, rows-by-time/BUCKET/PARTITION.arrow.

    Also writes the partition's users as one row each, with all that they did in time order:
    sequences/part-PARTITION.parquet of the log. A row's history is the user's positives before it, by time and then by
    position, whatever split they lie in; where splits are drawn at random, those of train, as a train row would else tell of
    what lies in test. Where the source gives histories, those are kept.
    """
    rows = _sorted_rows(partition, rules, buckets, work)
    if rows.is_empty():
        return {"users": 0}
    item = look_up(rows["item_key"].to_numpy(), work / "numbers" / "item")
    rows = rows.with_columns(
        pl.Series("user", look_up(rows["user_key"].to_numpy(), work / "numbers" / "user")), pl.Series("item", item)
    )
    label = rows["label"].to_numpy()
    if "history" in rows.columns:
        lengths = rows["history"].list.len().to_numpy().astype(np.int64)
        given = rows["history"].list.tail(rules.history_cap).to_arrow()
        offsets = given.offsets.to_numpy()
        entries = look_up(given.values.to_numpy()[offsets[0] : offsets[-1]], work / "numbers" / "item")
        offsets = offsets - offsets[0]
    else:
        first, _ = _users(rows)
        shown = label * (rows["split"].to_numpy() == 0) if rules.split == "random" else label
        before = np.cumsum(shown) - shown
        lengths = before - before[first]
        kept = np.minimum(lengths, rules.history_cap)
        offsets = np.concatenate([[0], np.cumsum(kept)])
        entries = item[shown == 1][ranges(before - kept, kept)]
    history = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(entries))
    rows = rows.drop("user_key", "item_key").with_columns(
        pl.Series("history", history), pl.Series("history_length", lengths.astype(np.int32))
    )
    _write_buckets(rows, work / "rows-by-time", partition)
    if "rating" not in rows.columns:
        rows = rows.with_columns(pl.lit(None, pl.Float32).alias("rating"))
    grouped = rows.group_by("user", maintain_order=True).agg("item", "label", "rating", "timestamp")
    sequences = grouped.sort("user").to_arrow().cast(SEQUENCES)
    folder = log / "sequences"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(sequences, folder / f"part-{partition:05d}.parquet", compression="zstd")
    return {"users": len(sequences)}


def _labels(rows: pl.DataFrame, positive_rating: float) -> np.ndarray:
    if "label" in rows.columns:
        return rows["label"].to_numpy().astype(np.int8)
    if "rating" in rows.columns:
        return (rows["rating"].to_numpy() >= positive_rating).astype(np.int8)
    return np.ones(len(rows), np.int8)


def _splits(rows: pl.DataFrame, rules: Rules, first: np.ndarray, sizes: np.ndarray, has_valid: bool) -> np.ndarray:
    """The index in SPLITS of each of the rows, which are sorted by user and time."""
    size = np.repeat(sizes, sizes)
    place = np.arange(len(rows)) - first
    if rules.split == "leave-one-out":
        # of users with fewer than three rows nothing is left to learn from, if any is kept back
        last = size - 1 - place
        return np.where(size < 3, 0, np.where(last == 0, 2, np.where(last == 1, 1, 0)))
    if rules.split == "random":
        rank = _random_rank(rows["user_key"].to_numpy(), first, rules.seed)
        train, valid = (np.round(size * share).astype(np.int64) for share in (rules.shares[0], rules.shares[1]))
        return np.where(rank < train, 0, np.where(rank < train + valid, 1, 2))
    if rules.split == "dates":
        assert rules.dates is not None
        return np.searchsorted(np.asarray(rules.dates), rows["timestamp"].to_numpy(), side="right").astype(np.int64)
    assert rules.split == "given"
    split = rows["split"].replace_strict(list(SPLITS), [0, 1, 2], return_dtype=pl.Int64).to_numpy().copy()
    if not has_valid:
        train = np.flatnonzero(split == 0)
        owner = first[train]
        rank = _random_rank(rows["user_key"].to_numpy()[train], np.searchsorted(owner, owner), rules.seed)
        count = np.bincount(owner, minlength=len(rows))[owner]
        part = rules.shares[1] / (rules.shares[0] + rules.shares[1])
        split[train[rank < np.floor(count * part)]] = 1
    return split


def _random_rank(user: np.ndarray, first: np.ndarray, seed: int) -> np.ndarray:
    """The place of each row in a random order of its user's rows: a function of the seed, the user and how many there are.

    Args:
        user: keys, of rows sorted by user.
        first: for each row, the place of its user's first one.
    """
    salt = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    place = np.arange(len(user))
    with np.errstate(over="ignore"):
        of_user = keys_of(pa.array((user + salt).view(np.int64)))
        drawn = keys_of(pa.array((of_user + (place - first).astype(np.uint64)).view(np.int64)))
    order = np.lexsort((drawn, first))
    rank = np.empty(len(user), np.int64)
    rank[order] = place - first[order]
    return rank


# ---- a time bucket ----


def _bucket(number: int, folder: Path) -> pl.DataFrame:
    """A bucket's rows in the log's order: by split, time and position."""
    return _read_all(folder / f"{number:05d}").sort(
        pl.col("split"), pl.col("timestamp").fill_null(NO_TIME), pl.col("position")
    )


def first_rows(number: int, first: int, given_histories: bool, work: Path) -> dict:
    """Write the first row of each of a bucket's users and items, firsts/{user,item}/BUCKET.arrow.

    Args:
        first: number of the bucket's first row in the log.
        given_histories: items that occur in histories alone count too, after all rows.
    """
    rows = _bucket(number, work / "keys").with_row_index("row", offset=first)
    for kind in ("user", "item"):
        found = rows.group_by(pl.col(f"{kind}_key").alias("key")).agg(pl.col("row").min().cast(pl.Int64))
        if kind == "item" and given_histories:
            lists = rows.select(pl.col("history").alias("key"), "row").explode("key").drop_nulls()
            # in the order of rows, then within the list
            place = pl.int_range(pl.len(), dtype=pl.Int64).over("row")
            rank = (pl.col("row").cast(pl.Int64) * (1 << 20) + place).alias("rank")
            others = lists.with_columns(rank).group_by("key").agg((pl.col("rank").min() + HISTORY_ONLY).alias("row"))
            found = pl.concat([found, others.select("key", "row")])
        _write(found, work / "firsts" / kind / f"{number:05d}.arrow")
    return {"rows": len(rows)}


CATALOG_ONLY = 1 << 60
"""Where items are ordered by first appearance, those without interactions follow from here, in the source's order."""

HISTORY_ONLY = 1 << 61
"""And from here those of which only given histories know."""


def write_bucket(
    number: int,
    first: int,
    ends: Sequence[int],
    bucket_in_split: dict[int, int],
    vocabularies: dict[str, list[str]],
    log: Path,
    work: Path,
) -> dict:
    """Write a bucket's rows with dense ids: interactions/SPLIT/part-NUMBER.parquet.

    Args:
        first: number of the bucket's first row in the log.
        ends: number of the row after the last one of train, valid and test.
        bucket_in_split: by split, the number of the bucket's part there.
        vocabularies: values of each categorical feature, in the order of their codes.

    Returns:
        By split: rows, positives, cold rows, first and last time.
    """  # fmt: skip
    rows = _bucket(number, work / "rows-by-time")
    count = len(rows)
    user, item = rows["user"].to_numpy(), rows["item"].to_numpy()
    user_seen = np.load(work / "numbers" / "user.seen.npy", mmap_mode="r")[user]
    item_seen = np.load(work / "numbers" / "item.seen.npy", mmap_mode="r")[item]
    table = {
        "row": first + np.arange(count),
        "user": user,
        "item": item,
        "label": rows["label"].to_numpy(),
        "rating": rows["rating"].to_arrow() if "rating" in rows.columns else pa.nulls(count, pa.float32()),
        "timestamp": rows["timestamp"].to_arrow(),
        "history": rows["history"].to_arrow(),
        "history_length": rows["history_length"].to_numpy(),
        "user_seen": user_seen,
        "item_seen": item_seen,
        "warm": rows["warm"].to_numpy() if "warm" in rows.columns else user_seen & item_seen,
        "expected": rows["expected"].to_arrow() if "expected" in rows.columns else pa.nulls(count, pa.float32()),
    }
    for name, values in vocabularies.items():
        codes = rows[name].replace_strict(values, list(range(len(values))), default=None, return_dtype=pl.Int32)
        table[name] = codes.to_arrow()
    schema = INTERACTIONS
    for name in vocabularies:
        schema = schema.append(pa.field(name, pa.int32()))
    everything = pa.table(table).cast(schema)
    facts = {}
    begin = 0
    for split, end in enumerate(ends):
        low, high = max(first, begin) - first, min(first + count, end) - first
        begin = end
        if low >= high:
            continue
        part = everything.slice(low, high - low)
        path = log / "interactions" / SPLITS[split] / f"part-{bucket_in_split[split]:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(part, path, row_group_size=ROW_GROUP_ROWS, compression="zstd")
        bounds = pc.min_max(part["timestamp"]).as_py()
        facts[SPLITS[split]] = {
            "rows": len(part),
            "positives": pc.sum(part["label"]).as_py(),
            "cold": pc.sum(pc.invert(part["warm"])).as_py(),
            "times": [bounds["min"], bounds["max"]],
        }
    return facts


# ---- users and items ----

KIND_COLUMNS = {"item": ("title", "text", "attributes", "links"), "user": ("attributes",)}


def read_described(kind: str, part: Part, number: int, bad_rows: Any, work: Path) -> dict:
    """Write what a source's part tells of users or items: described/KIND/PART-CHUNK.arrow, and their order of appearance."""
    dropped = Dropped(bad_rows)
    count = 0
    types = set()
    for chunk, table in enumerate(part.read(dropped)):
        ids = _one(table[kind])
        types.add("int64" if pa.types.is_integer(ids.type) else "string")
        position = (number << 40) + count + np.arange(len(ids), dtype=np.int64)
        columns: dict[str, Any] = {"key": keys_of(ids), "id": ids.cast(pa.large_string()), "position": position}
        for name in KIND_COLUMNS[kind]:
            empty = pa.nulls(len(ids), ATTRIBUTES if name in ("attributes", "links") else pa.string())
            columns[name] = _one(table[name]) if name in table.column_names else empty
        rows = pl.from_arrow(pa.table(columns))
        assert isinstance(rows, pl.DataFrame)
        _write(rows, work / "described" / kind / f"{number:05d}-{chunk:05d}.arrow")
        count += len(ids)
    return {"rows": count, "types": sorted(types), "dropped": dict(dropped.counts)}


def list_catalog(number: int, work: Path) -> dict:
    """Let the items of a described part appear after all interactions: firsts/item/catalog-PART.arrow."""
    for path in sorted((work / "described" / "item").glob(f"{number:05d}-*.arrow")):
        rows = pl.read_ipc(path, columns=["key", "position"])
        firsts = rows.group_by("key").agg((pl.col("position").min() + CATALOG_ONLY).alias("row"))
        _write(firsts, work / "firsts" / "item" / f"catalog-{path.name}")
    return {}


def spread(kind: str, path: Path, work: Path) -> dict:
    """Write the rows of a file of ids or descriptions to the ranges of dense ids that they belong to."""
    rows = pl.read_ipc(path)
    number = look_up(rows["key"].to_numpy(), work / "numbers" / kind, unknown=-1)
    rows = rows.with_columns(pl.Series("number", number)).filter(pl.col("number") >= 0)
    rows = rows.with_columns((pl.col("number") // RANGE_ROWS).alias("range"))
    what = path.parent.parent.name
    for (part,), found in rows.partition_by("range", as_dict=True, include_key=False).items():
        _write(found, work / "ranges" / kind / f"{part:05d}" / what / path.name)
    return {}


def write_range(kind: str, part: int, count: int, log: Path, work: Path) -> dict:
    """Write a range of the users or items by dense id: KINDs/part-RANGE.parquet. Of several descriptions the first counts.

    Returns:
        items without a title, and titles that held control characters (replaced by blanks).

    Raises:
        RuntimeError: two ids have the same key.
    """
    folder = work / "ranges" / kind / f"{part:05d}"
    low, high = part * RANGE_ROWS, min(count, (part + 1) * RANGE_ROWS)
    ids, described = _read_all(folder / "ids"), _read_all(folder / "described")
    names = pl.concat([table.select("number", "id") for table in (ids, described) if len(table)]).unique()
    if names["number"].n_unique() != len(names):
        first, second = names.filter(pl.col("number").is_duplicated()).sort("number")["id"].to_list()[:2]
        raise RuntimeError(f"the {kind}s '{first}' and '{second}' have the same 64-bit key")
    table = pl.DataFrame({"number": np.arange(low, high)}).join(names, on="number", how="left")
    facts = {}
    columns = KIND_COLUMNS[kind]
    if len(described):
        described = described.sort("position").unique("number", keep="first", maintain_order=True)
        table = table.join(described.select("number", *columns), on="number", how="left")
    else:
        table = table.with_columns(pl.lit(None).alias(name) for name in columns)
    table = table.sort("number")
    if kind == "item":
        title = table["title"].cast(pl.String).fill_null("")
        clean = title.str.replace_all(CONTROL, " ")
        text = table["text"].cast(pl.String).fill_null("")
        text = pl.select(pl.when(text.str.strip_chars() == "").then(clean).otherwise(text))[:, 0]
        table = table.with_columns(clean.alias("title"), text.alias("text"))
        facts = {
            "without_title": int((clean.str.strip_chars() == "").sum()),
            "control_characters": int((title != clean).sum()),
        }
    seen = np.load(work / "numbers" / f"{kind}.seen.npy", mmap_mode="r")[low:high]
    table = table.rename({"number": kind, "id": "external_id"}).with_columns(pl.Series("seen", np.array(seen)))
    schema = ITEMS if kind == "item" else USERS
    path = log / f"{kind}s" / f"part-{part:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    arrow = table.select(schema.names).to_arrow().cast(schema)
    pq.write_table(arrow, path, row_group_size=ROW_GROUP_ROWS, compression="zstd")
    return facts


CONTROL = r"[\x00-\x1f\x7f-\x9f]+"
"""Characters that no title needs and that would break prompts and lines."""

RANGE_ROWS = 1 << 20
"""Users or items of one file of the log."""


def number(kind: str, train_rows: int, previous: Path | None, id_type: str, work: Path) -> tuple[int, int]:
    """Number the users or items by their first row, after those of a previous log; returns how many there are, and how many of
    them the previous log's train split alone has.

    Writes numbers/KIND (key -> dense id) and numbers/KIND.seen.npy (whether each occurs in train, here or there).
    """
    firsts = pl.scan_ipc(work / "firsts" / kind / "*.arrow").group_by("key").agg(pl.col("row").min())
    found = firsts.collect(engine="streaming").sort("row", "key")
    keys, seen = found["key"].to_numpy(), found["row"].to_numpy() < train_rows
    there_alone = 0
    if previous is not None:
        old = _previous(previous, kind, id_type)
        old_keys, old_seen = old["key"].to_numpy(), old["seen"].to_numpy().copy()
        order = np.argsort(old_keys)
        again = _contains(old_keys[order], keys)
        place = order[np.searchsorted(old_keys[order], keys[again])]
        there_alone = int(old_seen.sum()) - int((old_seen[place] & seen[again]).sum())
        old_seen[place] |= seen[again]
        keys, seen = np.concatenate([old_keys, keys[~again]]), np.concatenate([old_seen, seen[~again]])
    (work / "numbers").mkdir(exist_ok=True)
    write_numbering(keys, np.arange(len(keys)), work / "numbers" / kind)
    np.save(work / "numbers" / f"{kind}.seen.npy", seen)
    return len(keys), there_alone


def _previous(log: Path, kind: str, id_type: str) -> pl.DataFrame:
    """Keys of an earlier log's users or items, by dense id, and whether its train split has them."""
    table = pq.read_table(log / f"{kind}s", columns=[kind, "external_id", "seen"]).sort_by(kind)
    keys = keys_of(_one(table["external_id"].cast(id_type)))
    return pl.DataFrame({"key": keys, "seen": table["seen"].to_numpy()})
