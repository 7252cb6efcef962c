"""What a person wants to know first of a prepared log, read in batches; as text and as one HTML page.

Memory holds a counter for each user and item and a few batches of rows, never the log.
"""

from __future__ import annotations

import importlib.resources
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.style
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from sellarec.data.raw import SPLITS
from sellarec.errors import UserError
from sellarec.figures import ACCENT, MUTED, NOTHING, PALETTE, SECOND, STYLE, share, show, svg

BATCH_ROWS = 1 << 17

NUMBERED = ("user", "item", "label", "rating", "timestamp", "history_length", "user_seen", "item_seen", "warm")
"""Columns that are read; `row`, `history` and `expected` tell nothing here, and all others are categorical features."""

SKIPPED = ("row", "history", "expected")

MOST_SHOWN = 12
"""Values of a categorical feature that are listed."""

SPLIT_COLOURS = dict(zip(SPLITS, (ACCENT, MUTED, SECOND), strict=True))

COUNTS = FuncFormatter(lambda count, _: f"{count:,.0f}")  # powers of ten, which are formulas by default


@dataclass(frozen=True)
class Split:
    """Counts of one split.

    Attributes:
        rows, positives, warm, seen_users, seen_items: rows; of the latter two, those whose user (item) occurs in train.
        warm_positives: rows that are both.
        months: (year, month) -> rows; rows without a time are in `undated`.
        ratings: rating -> rows, None for no rating.
        histories: earlier positives of the user -> rows.
        features: categorical feature -> value -> rows.
    """

    rows: int
    positives: int
    warm: int
    warm_positives: int
    seen_users: int
    seen_items: int
    months: dict[tuple[int, int], int]
    undated: int
    ratings: Counter[float | None]
    histories: Counter[int]
    features: dict[str, Counter[Any]]


@dataclass(frozen=True)
class Description:
    """What is found in a prepared log.

    Attributes:
        folder: where it lies.
        facts: its manifest.
        splits: by name.
        user_degrees, item_degrees: rows of all splits -> users (items) with so many; 0 included.
    """

    folder: Path
    facts: dict[str, Any]
    splits: dict[str, Split]
    user_degrees: dict[int, int]
    item_degrees: dict[int, int]


@dataclass(frozen=True)
class Example:
    """A row in words: titles of its history, oldest first, title of its item, and its label.

    Attributes:
        items: the item, then the history, as numbers.
    """

    split: str
    items: list[int]
    title: str
    history: list[str]
    label: int


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared log.

    Raises:
        UserError: there is no folder, or no prepared log in it, or its manifest is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the folder of a prepared log")
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(
            f"{folder} holds no prepared log: there is no manifest.json in it; make one with jobs/prepare.py"
        )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): prepare the data again") from error
    if isinstance(facts, dict):
        facts = facts.get("facts", facts)  # stage prepare's artifact has more around them
    missing = [name for name in ("users", "items", "rows") if not isinstance(facts, dict) or name not in facts]
    if missing:
        raise UserError(f"{path} is no manifest of a prepared log: it has no {', '.join(missing)}")
    return facts


def describe(folder: Path) -> Description:
    """Read all interactions of a prepared log once and count.

    Raises:
        UserError: no prepared log, one that can't be read, or ids beyond the manifest's users and items.
    """
    facts = read_manifest(folder)
    users, items = np.zeros(facts["users"], np.int64), np.zeros(facts["items"], np.int64)
    splits = {}
    for name in SPLITS:
        splits[name] = _count(folder, name, facts.get("features", {}), users, items)
        if splits[name].rows != facts["rows"].get(name, 0):
            raise UserError(
                f"the {name} split in {folder} has {splits[name].rows:,} rows, but its manifest says "
                f"{facts['rows'].get(name, 0):,}: prepare the data again"
            )
    return Description(folder, facts, splits, _frequencies(users), _frequencies(items))


def _interactions(folder: Path, name: str) -> pyarrow.dataset.Dataset:
    path = folder / "interactions" / name
    if not path.is_dir():
        raise UserError(f"{folder} has no {name} split: there is no folder {path}; prepare the data again")
    try:
        return pyarrow.dataset.dataset(path, format="parquet")
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"Cannot read {path} of the prepared log: {error}. Prepare the data again.") from error


def _batches(dataset: pyarrow.dataset.Dataset, columns: list[str]) -> Iterator[pa.RecordBatch]:
    # Little read-ahead: by default some two million rows wait in memory.
    try:
        yield from dataset.to_batches(columns=columns, batch_size=BATCH_ROWS, batch_readahead=2, fragment_readahead=1)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"Cannot read {dataset.files}: {error}. Prepare the data again.") from error


def _count(
    folder: Path, name: str, vocabularies: Mapping[str, list[str]], users: np.ndarray, items: np.ndarray
) -> Split:
    """The counts of a split; adds its rows to those of each user and item (int64 [users], [items]).

    Args:
        vocabularies: values of each categorical feature, by their codes.
    """
    dataset = _interactions(folder, name)
    features = [column for column in dataset.schema.names if column not in NUMBERED + SKIPPED]
    sums: Counter[str] = Counter()
    months: Counter[int] = Counter()
    ratings: Counter[float | None] = Counter()
    histories: Counter[int] = Counter()
    values: dict[str, Counter[Any]] = {feature: Counter() for feature in features}
    counters: dict[str, Counter[Any]] = {"rating": ratings, **values}
    for batch in _batches(dataset, [column for column in dataset.schema.names if column not in SKIPPED]):
        if batch.num_rows == 0:
            continue
        for side, counts in (("user", users), ("item", items)):
            found = batch[side].to_numpy()
            if found.min() < 0 or found.max() >= len(counts):
                raise UserError(
                    f"the {name} split in {folder} has {side} {found.min()} to {found.max()}, but the manifest says "
                    f"{len(counts):,} {side}s, numbered from 0: prepare the data again"
                )
            np.add.at(counts, found, 1)
        positive, warm = pc.equal(batch["label"], 1), batch["warm"]
        sums["rows"] += batch.num_rows
        for key, flags in (
            ("positives", positive),
            ("warm", warm),
            ("warm_positives", pc.and_(positive, warm)),
            ("seen_users", batch["user_seen"]),
            ("seen_items", batch["item_seen"]),
        ):
            sums[key] += pc.sum(flags).as_py() or 0
        seconds = pc.drop_null(batch["timestamp"]).to_numpy().astype("datetime64[s]")
        sums["undated"] += batch.num_rows - len(seconds)
        _add(months, seconds.astype("datetime64[M]").astype(np.int64))
        _add(histories, batch["history_length"].to_numpy())
        for column, counter in counters.items():
            for pair in pc.value_counts(batch[column]).to_pylist():
                counter[pair["values"]] += pair["counts"]
    return Split(
        **{
            key: sums[key]
            for key in ("rows", "positives", "warm", "warm_positives", "seen_users", "seen_items", "undated")
        },
        months={(1970 + month // 12, month % 12 + 1): months[month] for month in sorted(months)},
        ratings=ratings,
        histories=histories,
        features={
            feature: Counter({None if code is None else vocabularies[feature][code]: n for code, n in found.items()})
            for feature, found in values.items()
        },
    )


def _add(counter: Counter[int], values: np.ndarray) -> None:
    found, counts = np.unique(values, return_counts=True)
    counter.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))


def _frequencies(counts: np.ndarray) -> dict[int, int]:
    found, times = np.unique(counts, return_counts=True)
    return dict(zip(found.tolist(), times.tolist(), strict=True))


def example_rows(folder: Path, number: int) -> list[Example]:
    """The last `number` rows of each split, that is the latest ones, in words.

    Raises:
        UserError: the log can't be read, or lacks one of their items.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    for name in SPLITS:
        last: list[dict[str, Any]] = []
        for fragment in reversed(list(_interactions(folder, name).get_fragments())):
            for group in reversed(fragment.split_by_row_group()):
                rows = group.to_table(columns=["item", "history", "label"])
                last = rows.slice(max(0, rows.num_rows - number + len(last))).to_pylist() + last
                if len(last) >= number:
                    break
            if len(last) >= number:
                break
        found += [(name, row) for row in last]
    wanted = {item for _, row in found for item in (row["item"], *row["history"])}
    catalog = pyarrow.dataset.dataset(folder / "items", format="parquet")
    titles: dict[int, str] = {}
    chosen = pc.field("item").isin(pa.array(sorted(wanted), pa.int64()))
    for batch in catalog.to_batches(columns=["item", "title"], filter=chosen, batch_readahead=2, fragment_readahead=1):
        titles.update(zip(batch["item"].to_pylist(), batch["title"].to_pylist(), strict=True))
    if missing := wanted - titles.keys():
        raise UserError(f"{folder / 'items'} lacks item {min(missing)}: prepare the data again")
    return [
        Example(
            split=name,
            items=[row["item"], *row["history"]],
            title=titles[row["item"]] or "",
            history=[titles[item] or "" for item in row["history"]],
            label=row["label"],
        )
        for name, row in found
    ]


def summary(description: Description) -> dict[str, str]:
    """The first facts in words, by name."""
    facts, splits = description.facts, description.splits
    rows = sum(split.rows for split in splits.values())
    cells = facts["users"] * facts["items"]
    lines = {
        "users": f"{facts['users']:,}, {_spread_of(description.user_degrees)}",
        "items": f"{facts['items']:,}, {_spread_of(description.item_degrees)}",
        "interactions": f"{rows:,}" + (f", {100 * rows / cells:.3g}% of all pairs" if cells else ""),
    }
    for name in ("noun", "label_rule", "split_rule", "warm_rule", "k_core", "history_cap"):
        if facts.get(name) is not None:
            lines[name.replace("_", " ")] = show(facts[name])
    histories: Counter[int] = Counter()
    ratings: Counter[Any] = Counter()
    for split in splits.values():
        histories.update(split.histories)
        ratings.update(split.ratings)
    if rows:
        lines["history"] = f"{share(histories[0], rows)} of the rows have none, median {_median(histories):,}"
    if rated := {rating: count for rating, count in ratings.items() if rating is not None}:
        shares = ", ".join(f"{rating:g}: {share(rated[rating], sum(rated.values()))}" for rating in sorted(rated))
        lines["ratings"] = shares if len(rated) <= MOST_SHOWN else f"{len(rated)} values"
    for feature in _features(splits):
        value, counts = feature["lines"][0]
        shown = f"{show(value)} ({share(sum(counts.values()), rows)})"
        lines[feature["name"]] = f"{feature['values']:,} values, most often {shown}"
    dropped = facts.get("dropped") or {}
    lines["dropped"] = "; ".join(f"{count:,} rows: {reason}" for reason, count in dropped.items()) or "no rows"
    return lines


def _spread_of(degrees: Mapping[int, int]) -> str:
    """Median, mean and highest of rows a user or item, and the share of the most frequent hundredth."""
    value, times = np.array(list(degrees), np.int64), np.array(list(degrees.values()), np.int64)
    rows, nodes = int(value @ times), int(times.sum())
    if not rows:
        return "none with rows"
    median = _median(degrees)
    top = max(1, round(nodes / 100))
    # From the top down: so many of each value belong to the hundredth.
    taken = np.diff(np.minimum(np.cumsum(times[::-1]), top), prepend=0)
    of_top = float(taken @ value[::-1]) / rows
    return (
        f"rows each: median {median:,}, mean {rows / nodes:.1f}, at most {int(value[-1]):,}; "
        f"{of_top:.1%} of all belong to the most frequent 1%"
    )


def _median(counts: Mapping[int, int]) -> int:
    """The lower median of values that are counted."""
    values = sorted(counts)
    below = np.cumsum([counts[value] for value in values])
    return values[int(np.searchsorted(below, (below[-1] + 1) // 2))]


def as_text(description: Description) -> str:
    """The description for a terminal."""
    lines = [f"{name:<14} {text}" for name, text in summary(description).items()]
    lines += ["", f"{'split':<8}{'rows':>14}{'positive':>10}{'warm':>8}{'user seen':>11}{'item seen':>11}   dates"]
    for name, split in description.splits.items():
        shares = [split.positives, split.warm, split.seen_users, split.seen_items]
        texts = [share(part, split.rows) for part in shares]
        lines.append(
            f"{name:<8}{split.rows:>14,}{texts[0]:>10}{texts[1]:>8}{texts[2]:>11}{texts[3]:>11}   {_dates(split)}"
        )
    return "\n".join(lines)


def _dates(split: Split) -> str:
    if not split.months:
        return NOTHING
    first, last = ("{}-{:02}".format(*month) for month in (min(split.months), max(split.months)))
    return f"{first} to {last}" + (f", {split.undated:,} rows undated" if split.undated else "")


def as_page(description: Description, examples: Sequence[Mapping[str, Any]]) -> str:
    """One HTML page that needs nothing but itself.

    Args:
        examples: rows to show, each with split, label, title, history (titles) and, where it was made, prompt and tokens.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"show": show, "share": share}
    template = importlib.resources.files(__package__).joinpath("describe.html").read_text(encoding="utf-8")
    with matplotlib.style.context(["default", STYLE]):
        return environment.from_string(template).render(
            name=description.folder.absolute().name,
            palette=PALETTE,
            summary=summary(description),
            splits=description.splits,
            dates={name: _dates(split) for name, split in description.splits.items()},
            figures=_figures(description),
            features=_features(description.splits),
            sources=description.facts.get("sources") or {},
            examples=examples,
        )


def _figures(description: Description) -> list[dict[str, Any]]:
    """The figures that have anything to show."""
    splits = {name: split for name, split in description.splits.items() if split.rows}
    drawn: list[tuple[str, Any]] = [
        ("Users by their rows", partial(_draw_degrees, degrees=description.user_degrees, nodes="users")),
        ("Items by their rows", partial(_draw_degrees, degrees=description.item_degrees, nodes="items")),
    ]
    if any(split.months for split in splits.values()):
        drawn.append(("Rows a month", partial(_draw_months, splits=splits)))
    if any(rating is not None for split in splits.values() for rating in split.ratings):
        drawn.append(("Ratings", partial(_draw_ratings, splits=splits)))
    if splits:
        drawn.append(("Earlier positives of a row's user", partial(_draw_histories, splits=splits)))
        drawn.append(("Positives, all rows and warm ones", partial(_draw_labels, splits=splits)))
    return [{"title": title, "svg": svg(draw, title, 2.1)} for title, draw in drawn]


def _draw_degrees(axes: Axes, degrees: Mapping[int, int], nodes: str) -> None:
    """How many have at least so many rows: a straight line is a power law, and no binning is needed."""
    value, times = np.array(list(degrees), np.int64), np.array(list(degrees.values()), np.int64)
    at_least = np.cumsum(times[::-1])[::-1]
    shown = value > 0
    axes.step(value[shown], at_least[shown], color=ACCENT, where="pre")
    if shown.any():
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(COUNTS)
            axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("rows")
    axes.set_ylabel(f"{nodes} with so many or more")


def _draw_months(axes: Axes, splits: Mapping[str, Split]) -> None:
    for name, split in splits.items():
        months = {year * 12 + month - 1: rows for (year, month), rows in split.months.items()}
        if months:
            # Months without rows are zeros, not a line across.
            span = np.arange(min(months), max(months) + 1)
            axes.step(
                span / 12, [months.get(int(m), 0) for m in span], color=SPLIT_COLOURS[name], where="post", label=name
            )
            if len(span) == 1:
                axes.plot(span / 12, [months[int(span[0])]], "o", color=SPLIT_COLOURS[name])
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda year, _: f"{year:.0f}"))
    _finish(axes, "year", "rows")


def _draw_ratings(axes: Axes, splits: Mapping[str, Split]) -> None:
    for place, (name, split) in enumerate(splits.items()):
        found = {rating: rows for rating, rows in split.ratings.items() if rating is not None}
        shares = [rows / split.rows for rows in found.values()]
        axes.bar([rating + 0.14 * (place - 1) for rating in found], shares, 0.14, color=SPLIT_COLOURS[name], label=name)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="x", visible=False)
    _finish(axes, "rating", "share of the split")


def _draw_histories(axes: Axes, splits: Mapping[str, Split]) -> None:
    for name, split in splits.items():
        lengths = np.array(sorted(split.histories), np.int64)
        rows = np.array([split.histories[int(length)] for length in lengths])
        at_least = np.cumsum(rows[::-1])[::-1] / split.rows
        axes.step(lengths, at_least, color=SPLIT_COLOURS[name], where="pre", label=name)
    axes.set_xscale("symlog", linthresh=1)
    axes.xaxis.set_major_formatter(COUNTS)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.02)
    _finish(axes, "earlier positives", "share of rows with so many or more")


def _draw_labels(axes: Axes, splits: Mapping[str, Split]) -> None:
    for place, split in enumerate(splits.values()):
        axes.bar(place - 0.2, split.positives / split.rows, 0.36, color=ACCENT, label="all" if not place else None)
        if split.warm:
            axes.bar(
                place + 0.2, split.warm_positives / split.warm, 0.36, color=SECOND, label="warm" if not place else None
            )
    axes.set_xticks(range(len(splits)), list(splits))
    axes.set_ylim(0, 1)
    axes.grid(axis="x", visible=False)
    _finish(axes, "", "share of positives")


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, borderaxespad=0.2, columnspacing=1.4)


def _features(splits: Mapping[str, Split]) -> list[dict[str, Any]]:
    """Each categorical feature: its number of values, and the most frequent ones with their rows by split."""
    out = []
    for feature in dict.fromkeys(name for split in splits.values() for name in split.features):
        total: Counter[Any] = Counter()
        for split in splits.values():
            total.update(split.features.get(feature, {}))
        shown = [value for value, _ in total.most_common(MOST_SHOWN)]
        out.append(
            {
                "name": feature,
                "values": len(total),
                "lines": [
                    (value, {name: split.features.get(feature, {}).get(value, 0) for name, split in splits.items()})
                    for value in shown
                ],
            }
        )
    return out
