"""Interactions under a source's own ids to the prepared log: out of core, on any number of processes and nodes.

What is done to one piece is in `phases`; here is the order of the phases, what is decided between them, and that finished
pieces are not done again. Pieces lie in `work/` inside the log's folder, which must be seen by all nodes.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sellarec.checks import seconds
from sellarec.config import Data
from sellarec.data import phases
from sellarec.data.files import file_hashes, file_size
from sellarec.data.log import Log, read_log
from sellarec.data.phases import Rules
from sellarec.data.raw import SPLITS, Dropped, Part, Source
from sellarec.errors import UserError
from sellarec.training.progress import PROGRESS_SECONDS

PIECE_ROWS = 1 << 21
"""Rows of a user partition or a time bucket (on average): what a task holds."""

PIECE_BYTES = 3 << 30
"""Memory that a task asks for, so that no more run at once than have room: three of them and Ray took 8.2 GiB, with histories
of up to 50 (benchmarks/data/results)."""

SPLIT_WORDS = {
    "leave-one-out": "a user's last row is test, the one before it valid, the others train; all of users with fewer than 3 rows",
    "random": "of each user's rows {0:g} are train, {1:g} valid and {2:g} test, drawn at random",
    "shares": "by time: the first {0:g} of the rows are train, the next {1:g} valid, the last {2:g} test",
}


def prepare(
    source: Source,
    rules: Rules,
    folder: Path,
    *,
    hashes: dict[str, str],
    bad_rows: str = "refuse",
    previous: Path | None = None,
    start_ray: Callable[[], None] | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write the tables of the prepared log of a source into `folder`, and return the facts for its manifest.

    What it was made of stays there until `discard_work`: cut off before that, the same call goes on where it was.

    Rows of a split are in time order, then in the source's; rows without a time come last. Users and items are numbered
    by first appearance in train, then valid, then test; items without interactions follow in the source's order, and are
    left out under a k-core. Of exact repeats of a row the first counts.

    Args:
        hashes: SHA-256 of the source's files, by name.
        bad_rows: refuse the first row that can't be read, or drop and count all of them.
        previous: a log whose ids are kept; what is new here follows after them.
        start_ray: called once, before pieces are handed to other processes: where the rows are more than PIECE_ROWS. With
            None all is done in this process.
        say: prints a line of progress.

    Raises:
        UserError: a bad row or file, an empty split, a split by time of rows without times.
    """
    old = None if previous is None else read_log(previous)
    partitions = max(1, -(-(source.rows_about or _rows_about(source)) // PIECE_ROWS))
    work = folder / WORK
    parts = hashlib.sha256(pickle.dumps((source.interactions, source.items, source.users, source.features))).hexdigest()
    code = file_hashes([str(path) for path in sorted(Path(__file__).parent.rglob("*.py"))])
    _begin(folder, [repr(rules), hashes, parts, bad_rows, old and [str(previous), old.facts], partitions, code])
    start_ray = cache(start_ray) if start_ray and partitions > 1 else None
    run = partial(_run, work=work, start_ray=start_ray, say=say)

    # rows by user
    read = run(
        "reading",
        {
            f"{number:05d} {part.name}": partial(
                phases.partition_rows, part, number, partitions, bad_rows, source.features, work
            )
            for number, part in enumerate(source.interactions)
        },
    )
    rows = sum(part["rows"] for part in read)
    left_out = _sum(part["dropped"] for part in read)
    if rows == 0:
        where = ", ".join(source.files) or "the source"
        raise UserError(f"there are no rows in {where}" + (f" but bad ones ({_reasons(left_out)})" if left_out else ""))
    types = _id_types(read, old)
    without_time = sum(part["without_time"] for part in read)
    columns = set().union(*(part["columns"] for part in read))
    has_valid = any("valid" in part["splits"] for part in read)
    split, split_rule = _split_rule(source, rules, rows, without_time, has_valid)
    vocabularies = _vocabularies(read, {} if old is None else old.facts["features"])
    given_histories = "history" in columns
    described = {
        "item": [*([_earlier(old, "item", types["item"])] if old else []), *source.items],
        "user": [*([_earlier(old, "user", types["user"])] if old else []), *source.users],
    }
    told = {
        kind: run(
            f"reading {kind}s",
            {
                f"{number:05d} {part.name}": partial(phases.read_described, kind, part, number, bad_rows, work)
                for number, part in enumerate(parts)
            },
        )
        for kind, parts in described.items()
    }
    for kind in told:
        _check_types(kind, types[kind], told[kind])

    # each user's rows in order, without repeats, and the k-core
    by_user = range(partitions)
    ordered = run("sorting", {str(p): partial(phases.sort_users, p, rules, work) for p in by_user})
    dropped = _sum(part["dropped"] for part in [*read, *told["item"], *told["user"], *ordered])
    cuts = 0
    if rules.k_core:
        cuts, dropped["below the k-core"] = _cut_to_core(rules, partitions, work, run)

    # rows by time
    by_split = split in ("given", "leave-one-out", "random", "dates")
    by_position = without_time == rows
    edges = _edges(read, max(1, -(-rows // PIECE_ROWS)), by_position)
    buckets = phases.Buckets(tuple(edges), by_position, by_split, has_valid, cuts)
    spread = run("rows by time", {str(p): partial(phases.spread_rows, p, rules, buckets, work) for p in by_user})
    sizes = _sum({int(b): n for b, n in part["buckets"].items()} for part in spread)
    rows = sum(sizes.values())
    if rows == 0:
        raise UserError("the k-core leaves no rows: lower data.k_core")
    starts, ends = _rows_of_splits(sizes, len(edges) + 1, by_split, rules.shares, split_rule, dropped)

    # dense ids
    run("first rows", {str(b): partial(phases.first_rows, b, starts[b], given_histories, work) for b in starts})
    if not rules.k_core:
        run("catalog", {str(n): partial(phases.list_catalog, n, work) for n in range(len(described["item"]))})
    elif old:
        run("catalog", {"0": partial(phases.list_catalog, 0, work)})
    kept = None if old is None else old.directory
    (counts,) = run("ids", {"all": partial(_number_all, ends[0], kept, types, work)})

    # what is read later
    run("histories", {str(p): partial(phases.build_histories, p, rules, buckets, folder, work) for p in by_user})
    places = _parts_of_splits(starts, sizes, ends)
    written = run(
        "interactions",
        {
            str(b): partial(
                phases.write_bucket,
                b,
                starts[b],
                ends,
                places[b],
                vocabularies,
                folder,
                work,
            )
            for b in starts
        },
    )
    ranges: dict[str, list[dict]] = {}
    for kind in ("user", "item"):
        files = [*(work / "ids" / kind).glob("*.arrow"), *(work / "described" / kind).glob("*.arrow")]
        pieces = {f"{p.parent.parent.name} {p.name}": partial(phases.spread, kind, p, work) for p in sorted(files)}
        run(f"{kind} ids", pieces)
        ranges[kind] = run(
            f"{kind}s",
            {
                str(r): partial(phases.write_range, kind, r, counts[kind], folder, work)
                for r in range(-(-counts[kind] // phases.RANGE_ROWS))
            },
        )
    splits = {name: [part[name] for part in written if name in part] for name in SPLITS}
    times = {name: [t for part in parts for t in part["times"] if t is not None] for name, parts in splits.items()}
    facts = {
        "users": counts["user"],
        "items": counts["item"],
        "rows": {name: sum(part["rows"] for part in parts) for name, parts in splits.items()},
        "positives": {name: sum(part["positives"] for part in parts) for name, parts in splits.items()},
        "cold": {name: sum(part["cold"] for part in splits[name]) for name in SPLITS[1:]},
        "label_rule": _label_rule(source, rules, columns),
        "split_rule": split_rule,
        "warm_rule": "as the source publishes it"
        if "warm" in columns
        else f"user and item both occur in the train split{'' if old is None else f', or in that of {previous}'}",
        "k_core_rule": _core_rule(rules),
        "history_rule": "as the source publishes it"
        if given_histories
        else "the user's positives before the row, by time and then in the source's order, "
        + ("of the train split" if rules.split == "random" else "whatever split they lie in"),
        "history_cap": rules.history_cap,
        "dates": {name: [_date(min(t)), _date(max(t))] if t else [None, None] for name, t in times.items()},
        "dropped": {reason: count for reason, count in sorted(dropped.items()) if count},
        "items_without_title": sum(part["without_title"] for part in ranges["item"]),
        "titles_cleaned": sum(part["control_characters"] for part in ranges["item"]),
        "features": vocabularies,
        "id_types": types,
        "sources": hashes,
        "noun": source.noun,
        "extends": None
        if old is None
        else {
            "log": str(previous),
            "users": old.facts["users"],
            "items": old.facts["items"],
            **{name: counts[name] for name in ("users seen there alone", "items seen there alone")},
        },
    }
    return facts


def check_expected(facts: dict[str, Any], expected: tuple[int, int, int, int, int] | None) -> None:
    """Raises UserError where a prepared log hasn't the counts (train, valid, test rows, users, items) that it should have."""
    if expected is None:
        return
    names = ("train rows", "valid rows", "test rows", "users", "items")
    found = (*(facts["rows"][name] for name in SPLITS), facts["users"], facts["items"])
    other = [f"{f:,} {n}, not {e:,}" for n, f, e in zip(names, found, expected, strict=True) if f != e]
    if other:
        raise UserError(
            f"the prepared log has {'; '.join(other)}: this is not the published data, or not prepared by its rule; "
            "--data.expected None takes it as it is"
        )


def rules_of(data: Data, source: Source) -> Rules:
    """The rules that settings stand for: `auto` is the source's own split where it gives one."""
    split = data.split_by
    if split == "auto":
        split = "shares" if source.split_rule is None else "given"
    dates = None if data.split_dates is None else (seconds(data.split_dates[0]), seconds(data.split_dates[1]))
    return Rules(
        split, data.split, dates, data.positive_rating, data.history_cap, data.k_core, data.k_core_once, data.split_seed
    )


WORK = "work"
"""Folder of the pieces, in the log's own."""

MADE_FOR = ".made-for.json"
"""What a log, finished or not, is made for: it tells that its folder is preparation's own, and stays there."""


def _begin(folder: Path, made_for: list) -> None:
    """Keep the pieces of an earlier try that was cut off, if it was the same in all that matters; else delete them.

    Raises:
        UserError: the folder holds something else, which would be overwritten.
    """
    mark, work = folder / MADE_FOR, folder / WORK
    tables = [folder / table for table in ("interactions", "sequences", "items", "users")]
    made_for = json.loads(json.dumps(made_for))
    if not mark.exists():
        others = [path.name for path in (work, *tables) if path.exists()]
        if others:
            raise UserError(
                f"{folder} holds {', '.join(others)}, which preparation would overwrite, and no sign that an earlier "
                "preparation left them: give another folder, or delete them"
            )
    elif json.loads(mark.read_text()) != made_for:
        discard_work(folder)
        for path in tables:
            shutil.rmtree(path, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(mark, made_for)


def discard_work(folder: Path) -> None:
    """Delete the pieces that a log is made of, where there are any."""
    # what vouches for the pieces first: a deletion that is cut off must leave nothing that seems whole
    for path in (folder / WORK / "done", folder / WORK):
        if path.exists():
            shutil.rmtree(path)


BYTES_OF_ROW = {
    ".parquet": 8,
    ".csv": 20,
    ".dat": 20,
    ".data": 20,
    ".inter": 20,
    ".txt": 8,
    ".jsonl": 150,
    ".json": 100,
}
"""About the least bytes that an interaction takes in a file of a kind."""


def _rows_about(source: Source) -> int:
    """At most about so many rows, by the sizes of the files; packed ones unpack to some five times their size."""
    total = 0.0
    for path in source.files:
        packed = path.endswith((".gz", ".zip"))
        suffix = Path(path.removesuffix(".gz")).suffix
        total += file_size(path) * (5 if packed else 1) / BYTES_OF_ROW.get(suffix, 20)
    return int(total)


def _run(
    phase: str,
    pieces: Mapping[str, Callable[[], dict]],
    *,
    work: Path,
    start_ray: Callable[[], None] | None,
    say: Callable[[str], None],
) -> list[dict]:
    """Carry out a phase on each of its pieces that isn't done yet; what they return, in the order of the pieces.

    A piece that is done has a file in work/done/PHASE. The pieces of a small log are done here, else by Ray Data.
    """
    done = work / "done" / phase
    done.mkdir(parents=True, exist_ok=True)
    marks = {name: done / f"{number:06d}.json" for number, name in enumerate(pieces)}
    todo = [name for name, mark in marks.items() if not mark.exists()]
    start = told = time.monotonic()
    if start_ray is None or len(todo) == 1:
        for name in todo:
            _carry_out(pieces[name], marks[name])
    elif todo:
        start_ray()
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        items = [{"name": name} for name in todo]

        def carry_out(row: dict) -> dict:
            try:
                _carry_out(pieces[row["name"]], marks[row["name"]])
            except UserError as error:
                return {"error": str(error)}
            return {"error": ""}

        smallest = min(node["Resources"].get("memory", PIECE_BYTES) for node in ray.nodes() if node["Alive"])
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        results = dataset.map(carry_out, memory=min(PIECE_BYTES, smallest)).iter_rows()
        for finished, row in enumerate(results, start=1):
            if row["error"]:
                raise UserError(row["error"])
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                share = (len(pieces) - len(todo) + finished) / len(pieces)
                say(f"prepare   {phase}: {100 * share:.0f}% of {len(pieces)} pieces, {told - start:.0f} s")
    return [json.loads(mark.read_text()) for mark in marks.values()]


def _carry_out(piece: Callable[[], dict], mark: Path) -> None:
    _write_json(mark, piece())


def _write_json(path: Path, value: Any) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(value))
    os.replace(unfinished, path)


def _number_all(train_rows: int, previous: Path | None, types: dict[str, str], work: Path) -> dict[str, int]:
    numbers = {kind: phases.number(kind, train_rows, previous, types[kind], work) for kind in ("user", "item")}
    return {
        **{kind: count for kind, (count, _) in numbers.items()},
        **{f"{kind}s seen there alone": alone for kind, (_, alone) in numbers.items()},
    }


def _sum(counts: Iterable[dict[Any, int]]) -> Counter:
    total: Counter = Counter()
    for part in counts:
        total.update(part)
    return total


def _id_types(read: list[dict], old: Log | None) -> dict[str, str]:
    found = {kind: {part["types"][kind] for part in read if part["rows"]} for kind in ("user", "item")}
    types = {}
    for kind, names in found.items():
        if len(names) > 1:
            raise UserError(
                f"{kind} ids are numbers in some parts of the source and text in others: give one or the other"
            )
        (types[kind],) = names
        if old is not None and old.facts["id_types"][kind] != types[kind]:
            raise UserError(
                f"{kind} ids of {old.directory} are {old.facts['id_types'][kind]}, those of the new data {types[kind]}: "
                "new data can only extend ids of the same type"
            )
    return types


def _check_types(kind: str, id_type: str, told: list[dict]) -> None:
    """Refuse descriptions whose ids would never meet those of the interactions."""
    others = {found for part in told for found in part["types"]} - {id_type}
    if others:
        raise UserError(
            f"{kind} ids are {id_type} in the interactions and {others.pop()} in the descriptions of {kind}s: "
            "give one or the other"
        )


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} rows: {reason}" for reason, count in sorted(dropped.items()) if count)


def in_words(facts: dict[str, Any]) -> list[str]:
    """What a person should hear of a log that was prepared: a line for its sizes, and for what may be amiss."""
    rows, positives = facts["rows"], facts["positives"]
    cold = f" ({facts['cold']['test']:,} cold)"
    lines = [
        f"{facts['users']:,} users, {facts['items']:,} items; rows: "
        + ", ".join(f"{rows[name]:,} {name}" for name in SPLITS)
        + cold
    ]
    if facts["dropped"]:
        lines.append(f"left out: {_reasons(facts['dropped'])}")
    if facts["items_without_title"]:
        lines.append(f"note: {facts['items_without_title']:,} of {facts['items']:,} items have no title")
    one_sided = [name for name in SPLITS if positives[name] in (0, rows[name])]
    if one_sided:
        lines.append(f"note: all rows of {', '.join(one_sided)} have one label ({facts['label_rule']})")
    return lines


def _split_rule(source: Source, rules: Rules, rows: int, without_time: int, has_valid: bool) -> tuple[str, str]:
    if rules.split == "given":
        if source.split_rule is None:
            raise UserError("the source gives no split: choose data.split_by shares, dates, leave-one-out or random")
        share = rules.shares[1] / (rules.shares[0] + rules.shares[1])
        drawn = "" if has_valid else f"; of each user's train rows {share:.3g} are valid, rounded down, drawn at random"
        return rules.split, source.split_rule + drawn
    if without_time and rules.split in ("shares", "dates"):
        mend = (
            "map its column (--data.columns.timestamp)" if without_time == rows else "leave those rows out of the files"
        )
        raise UserError(
            f"{without_time:,} of {rows:,} rows have no timestamp, so the log cannot be split by time: {mend}, or choose "
            "--data.split-by leave-one-out or random"
        )
    if rules.split == "dates":
        assert rules.dates is not None
        valid, test = (_date(t) for t in rules.dates)
        return rules.split, f"by time: train before {valid}, valid before {test}, test from then on"
    return rules.split, SPLIT_WORDS[rules.split].format(*rules.shares)


def _earlier(old: Log, kind: str, id_type: str) -> Part:
    return Part(f"{kind}s of {old.directory}", partial(_read_earlier, old.paths(f"{kind}s"), kind, id_type))


def _read_earlier(paths: list[Path], kind: str, id_type: str, dropped: Dropped) -> Iterator:
    for path in paths:
        table = pq.read_table(path).drop_columns([kind, "seen"])
        position = table.schema.get_field_index("external_id")
        ids = table["external_id"].cast(id_type)
        yield table.set_column(position, kind, ids)


def _cut_to_core(rules: Rules, partitions: int, work: Path, run: Callable) -> tuple[int, int]:
    """Cut until nothing more is left out; returns how often, and how many rows."""
    removed = number = 0
    for number in range(1 if rules.k_core_once else 1_000_000):
        run(f"rare items {number}", {"all": partial(_rare_items, rules, work)})
        cut = run(
            f"k-core {number}", {str(p): partial(phases.cut_core, p, number, rules, work) for p in range(partitions)}
        )
        found = sum(part["removed"] for part in cut)
        removed += found
        if found == 0:
            break
    return number + 1, removed


def _rare_items(rules: Rules, work: Path) -> dict:
    phases.rare_items(rules, work)
    return {}


def _edges(read: list[dict], buckets: int, by_position: bool) -> list[int]:
    """Where time buckets of about as many rows each begin, from a sample."""
    if buckets == 1:
        return []
    if by_position:
        places = [(n << 40) + r for n, part in enumerate(read) for r in range(0, part["rows"], 1024)]
    else:
        places = [t for part in read for t in part["times"]]
    wanted = np.quantile(np.array(places, dtype=np.int64), np.arange(1, buckets) / buckets, method="lower")
    return np.unique(wanted).tolist()


def _rows_of_splits(
    sizes: Counter,
    buckets: int,
    by_split: bool,
    shares: tuple[float, float, float],
    rule: str,
    dropped: Mapping[str, int],
) -> tuple[dict[int, int], list[int]]:
    """The number of each bucket's first row, and of the row after the last one of each split."""
    starts, total = {}, 0
    in_split = [0, 0, 0]
    for bucket in sorted(sizes):
        starts[bucket] = total
        total += sizes[bucket]
        in_split[bucket // buckets if by_split else 0] += sizes[bucket]
    if by_split:
        ends = np.cumsum(in_split).tolist()
    else:
        ends = [round(total * shares[0]), round(total * (shares[0] + shares[1])), total]
    counts = np.diff([0, *ends])
    for name, count in zip(SPLITS, counts, strict=True):
        if count == 0:
            raise UserError(
                f"The {name} split is empty: of {total:,} rows, {', '.join(map(str, counts.tolist()))} are "
                f"{', '.join(SPLITS)}. Split rule: {rule}. Left out: {_reasons(dropped) or 'none'}. Give more rows, or another "
                "split (data.split, data.split_by)."
            )
    return starts, ends


def _parts_of_splits(starts: dict[int, int], sizes: Counter, ends: list[int]) -> dict[int, dict[int, int]]:
    """For each bucket, the number of the file that it fills in each split that it has rows of."""
    files = [0, 0, 0]
    found: dict[int, dict[int, int]] = {}
    for bucket, start in starts.items():
        found[bucket] = {}
        for split, (low, high) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if max(low, start) < min(high, start + sizes[bucket]):
                found[bucket][split] = files[split]
                files[split] += 1
    return found


def _vocabularies(read: list[dict], earlier: dict[str, list[str]]) -> dict[str, list[str]]:
    """The values of each categorical feature: those of an earlier log in their order, then new ones, the most frequent first."""
    found = {}
    for name in dict.fromkeys(name for part in read for name in part["values"]):
        counts = _sum(part["values"].get(name, {}) for part in read)
        known = earlier.get(name, [])
        new = counts.keys() - set(known)
        phases.check_values(name, len(known) + len(new))
        found[name] = [*known, *sorted(new, key=lambda value: (-counts[value], value))]
    return found


def _label_rule(source: Source, rules: Rules, columns: set[str]) -> str:
    if "label" in columns:
        return source.label_rule or "as the source gives it"
    if "rating" in columns:
        return f"1 where the rating is at least {rules.positive_rating:g}, else 0"
    return "1 for every row (implicit feedback)"


def _core_rule(rules: Rules) -> str | None:
    if not rules.k_core:
        return None
    how = "counted once" if rules.k_core_once else "again until none is left out"
    return f"users and items with fewer than {rules.k_core} rows are left out, {how}"


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
