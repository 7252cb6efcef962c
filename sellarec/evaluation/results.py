"""From the scores of the test rows to the records of results.json and the table that a job ends with."""

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import numpy as np
import pyarrow as pa

from sellarec.evaluation.bootstrap import Interval, bootstrap
from sellarec.evaluation.metrics import user_aucs

CUTS = ("all", "warm", "cold", "cold_user", "cold_item", "with_history")
TABLE_CUTS = ("all", "warm", "cold")
METRICS = ("auc", "uauc")
PAIR_SEPARATOR = " - "
NAME_WIDTH = 18  # with six cells of 20 characters this fills 150 columns


def cut_masks(test: pa.Table) -> dict[str, np.ndarray]:
    """Which rows each cut holds: bool [rows] by the name of the cut.

    `all`; `warm` and `cold` as the log says; `cold_user` and `cold_item`: the user (item) has no train row;
    `with_history`: the user has an earlier positive, the rows that SeLLa-Rec's own filter keeps.

    Raises:
        ValueError: on a missing column, or one with nulls.
    """
    warm = _column(test, "warm").astype(bool)
    return {
        "all": np.ones(test.num_rows, dtype=bool),
        "warm": warm,
        "cold": ~warm,
        "cold_user": ~_column(test, "user_seen").astype(bool),
        "cold_item": ~_column(test, "item_seen").astype(bool),
        "with_history": _column(test, "history_length") > 0,
    }


def evaluate_scores(
    test: pa.Table,
    scores: Mapping[str, np.ndarray],
    *,
    pairs: Sequence[tuple[str, str]],
    split: str = "test",
    seed: int,
    protocol: str,
    replicates: int = 1_000,
) -> list[dict[str, Any]]:
    """The records of results.json: AUC and UAUC of every model, and the difference of every pair, on every cut.

    `count` is all rows of the cut for AUC, the users with both classes for UAUC, as `unit` says. `value`, `low` and
    `high` are None where the cut lacks rows of either class (UAUC: a user with both); `low` and `high` alone are None
    where a single user counts.

    Args:
        test: the rows' columns user, item, label, warm, user_seen, item_seen, history_length.
        scores: for each model real numbers of shape [rows], in the order of `test`.
        pairs: models (a, b) whose difference is recorded as the model "a - b".
        split: name of the split, recorded.
        seed: of the run, recorded; it seeds the bootstrap too.
        protocol: how the rows were chosen and scored, in words, recorded.
        replicates: of the bootstrap over users.

    Raises:
        ValueError: on a missing or non-finite score (naming the model and how many), an unknown model in a pair, a pair
            named twice, a model whose name holds " - ", or a column that is missing or has nulls.
    """
    for name in scores:
        if PAIR_SEPARATOR in name:
            raise ValueError(f"model {name!r} holds {PAIR_SEPARATOR!r}, which names a difference; call it otherwise")
    for pair in pairs:
        unknown = set(pair) - set(scores)
        if unknown:
            raise ValueError(f"pair {pair} names {sorted(unknown)}; the models with scores are {sorted(scores)}")
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"a pair is named twice: {list(pairs)}")
    scores = {name: _check_scores(name, values, test.num_rows) for name, values in scores.items()}
    users, labels = _column(test, "user"), _column(test, "label")
    _column(test, "item")
    names = {name: name for name in scores} | {pair: PAIR_SEPARATOR.join(pair) for pair in pairs}
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    for cut, mask in cut_masks(test).items():
        cut_users, cut_labels = users[mask], labels[mask]
        cut_scores = {name: values[mask] for name, values in scores.items()}
        for metric in METRICS:
            intervals = bootstrap(
                cut_users, cut_labels, cut_scores, metric, pairs=pairs, replicates=replicates, seed=seed
            )
            rows = len(cut_labels)
            count = rows if metric == "auc" else len(user_aucs(cut_users, cut_labels, np.zeros(rows)).users)
            for key, name in names.items():
                records[name].append(
                    {
                        "model": name,
                        "rows": cut,
                        "metric": metric,
                        **interval_numbers(intervals[key]),
                        "count": count,
                        "unit": "rows" if metric == "auc" else "users",
                        "seed": seed,
                        "split": split,
                        "protocol": protocol,
                    }
                )
    return [record for of_model in records.values() for record in of_model]


def format_table(records: Sequence[Mapping[str, Any]]) -> str:
    """One run's records as plain text: models by AUC and UAUC on all, warm and cold rows, then the paired differences.

    A name longer than 18 characters stands on a line of its own, so that the table keeps to 150 columns.

    Raises:
        ValueError: on no records, on records of several runs (two of one model, cut and metric), or on models that were
            not measured on the same rows.
    """
    if not records:
        raise ValueError("there are no records to print")
    cells: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    counts: dict[tuple[str, str], int] = {}
    for record in records:
        model, cut, metric = record["model"], record["rows"], record["metric"]
        if (model, cut, metric) in cells:
            raise ValueError(f"two records of {model!r}, {cut}, {metric}: print one run at a time")
        cells[model, cut, metric] = record
        if counts.setdefault((cut, metric), record["count"]) != record["count"]:
            raise ValueError(
                f"{model!r} counts {record['count']} on {cut}, {metric}, another model {counts[cut, metric]}: "
                "they were not measured on the same rows"
            )
    names = list(dict.fromkeys(record["model"] for record in records))
    models = [name for name in names if PAIR_SEPARATOR not in name]
    pairs = [name for name in names if PAIR_SEPARATOR in name]

    columns = [(cut, metric) for cut in TABLE_CUTS for metric in METRICS if (cut, metric) in counts]
    table = [
        ["", *(f"{metric.upper()} {cut}" for cut, metric in columns)],
        ["model", *(_count(counts[column], column[1]) for column in columns)],
        *([name, *(_cell(cells.get((name, *column)), signed=False) for column in columns)] for name in models),
    ]
    blocks = [f"{records[0]['split']} rows, {records[0]['protocol']}; [95% interval, bootstrap over users]"]
    if models:
        blocks.append(_align(table))
    if pairs:
        cuts = [cut for cut in TABLE_CUTS if any((cut, metric) in counts for metric in METRICS)]
        metrics = [metric for metric in METRICS if any((cut, metric) in counts for cut in cuts)]
        differences = [
            [name if metric == metrics[0] else "", metric.upper()]
            + [_cell(cells.get((name, cut, metric)), signed=True) for cut in cuts]
            for name in pairs
            for metric in metrics
        ]
        blocks.append(_align([["paired difference", "", *cuts], *differences], name_width=60))
    return "\n\n".join(blocks)


def _column(test: pa.Table, name: str) -> np.ndarray:
    if name not in test.column_names:
        raise ValueError(f"the rows lack the column {name!r}; they have {test.column_names}")
    column = test.column(name)
    if column.null_count:
        raise ValueError(f"column {name!r} has {column.null_count} nulls in {test.num_rows} rows")
    return column.to_numpy()


def _check_scores(name: str, scores: np.ndarray, rows: int) -> np.ndarray:
    scores = np.asarray(scores)
    if scores.shape != (rows,):
        raise ValueError(
            f"model {name!r} has scores of shape {scores.shape} for {rows} rows ({rows - scores.size} missing)"
        )
    if scores.dtype.kind not in "fiu":
        raise ValueError(f"model {name!r} has scores of dtype {scores.dtype}; they must be real numbers")
    refused = int((~np.isfinite(scores)).sum())
    if refused:
        raise ValueError(f"model {name!r} has {refused} missing or non-finite scores in {rows} rows")
    return scores


def interval_numbers(interval: Interval) -> dict[str, float | None]:
    numbers = {"value": interval.value, "low": interval.low, "high": interval.high}
    return {name: None if isnan(number) else number for name, number in numbers.items()}


def _count(count: int, metric: str) -> str:
    noun = "row" if metric == "auc" else "user"
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _cell(record: Mapping[str, Any] | None, *, signed: bool) -> str:
    if record is None or record["value"] is None:
        return "n/a"
    low, high = record["low"], record["high"]
    interval = "n/a" if low is None else f"{_number(low, signed=signed)}, {_number(high, signed=signed)}"
    return f"{_number(record['value'], signed=signed)} [{interval}]"


def _number(number: float, *, signed: bool) -> str:
    text = f"{number:+z.4f}" if signed else f"{number:z.4f}"
    # Five characters for 1 as for any other number: a column of perfect scores is no wider than the rest.
    return text.replace("0.", ".", 1) if text.lstrip("+-").startswith("0.") else text.removesuffix("0")


def _align(table: Sequence[Sequence[str]], name_width: int = NAME_WIDTH) -> str:
    """Columns two blanks apart, the first to the left, under a rule; too long a name gets a line of its own."""
    header_rows = next(index for index, row in enumerate(table) if row[0]) + 1
    first = max(len(row[0]) for row in table if len(row[0]) <= name_width)
    widths = [first, *(max(len(row[column]) for row in table) for column in range(1, len(table[0])))]
    lines = []
    for index, (name, *cells) in enumerate(table):
        if len(name) > name_width:
            lines.append(name)
            name = ""
        line = [name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]
        lines.append("  ".join(line).rstrip())
        if index == header_rows - 1:
            lines.append("-" * (sum(widths) + 2 * len(cells)))
    return "\n".join(lines)
