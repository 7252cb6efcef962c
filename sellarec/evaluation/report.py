"""A run's report: one HTML page that needs nothing but itself, with the results and how each stage came to them."""

import importlib.resources
from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

import jinja2
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sellarec.evaluation.results import METRICS, PAIR_SEPARATOR, TABLE_CUTS
from sellarec.figures import ACCENT, INK, MUTED, NOTHING, PALETTE, SECOND, STYLE, share, show, svg

BEST_ATTAINABLE = "best attainable"
"""The name, among the models, of the scores that no model can beat: those of a generated world's own probabilities."""

ALIGNMENT_MEASURES = {
    "alignment": "mean squared distance of projected row and distilled vector",
    "uniformity_collab": "uniformity of projected rows",
    "uniformity_semantic": "uniformity of distilled vectors",
    "collab_to_semantic@1": "rows that find their vector first",
    "collab_to_semantic@10": "rows that find their vector among the first 10",
    "semantic_to_collab@1": "vectors that find their row first",
    "semantic_to_collab@10": "vectors that find their row among the first 10",
}
"""What stage align measures, in words."""

LONGEST_LABEL = 20  # characters of a model's name in a figure; the table holds the whole name
MARKED_POINTS = 30  # a curve of more points goes without a mark at each


def write_report(
    *,
    name: str,
    config_yaml: str,
    records: Sequence[Mapping[str, Any]],
    stages: Sequence[Mapping[str, Any]],
    versions: Mapping[str, str],
) -> str:
    """The page of one run, as HTML; the same input gives the same text.

    Args:
        name: of the run.
        config_yaml: the resolved config.
        records: those of results.json, of one run (see `sellarec.evaluation.results`).
        stages: in the order of the run, each {"stage", "artifact", "seconds", "manifest"}: its name, where its artifact
            lies, the wall time in this run (None where the artifact stood already), and the artifact's manifest, of
            which "seconds" and "facts" are read.
        versions: of packages, by name.

    Raises:
        ValueError: on no records, on records of several runs (two of one model, cut and metric), or on models that were
            not measured on the same rows.
    """
    results = _results(records)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "show": show, "share": share, "words": _words}
    template = importlib.resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    # The default style first: a matplotlibrc of the user's would make another page.
    with matplotlib.style.context(["default", STYLE]):
        return environment.from_string(template).render(
            name=name,
            palette=PALETTE,
            alignment_measures=ALIGNMENT_MEASURES,
            results=results,
            intervals=_interval_figures(results),
            curves=[_curves(stage) for stage in stages if "losses" in stage["manifest"]["facts"]],
            histories=_histories(stages),
            shards=_shards(stages),
            timings=_timings(stages),
            data=next((stage["manifest"]["facts"] for stage in stages if stage["stage"] == "prepare"), None),
            config_yaml=config_yaml,
            versions=versions,
        )


def _results(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The records by model, cut and metric, and what the tables need beside them."""
    if not records:
        raise ValueError("there are no records to report")
    cells: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    counts: dict[tuple[str, str], int] = {}
    for record in records:
        model, cut, metric = record["model"], record["rows"], record["metric"]
        if (model, cut, metric) in cells:
            raise ValueError(f"two records of {model!r}, {cut}, {metric}: report one run at a time")
        cells[model, cut, metric] = record
        if counts.setdefault((cut, metric), record["count"]) != record["count"]:
            raise ValueError(
                f"{model!r} counts {record['count']} on {cut}, {metric}, another model {counts[cut, metric]}: "
                "they were not measured on the same rows"
            )
    names = list(dict.fromkeys(record["model"] for record in records))
    cuts = list(dict.fromkeys(record["rows"] for record in records))
    pairs = [name for name in names if PAIR_SEPARATOR in name]
    models = [name for name in names if name not in pairs and name != BEST_ATTAINABLE]
    values: dict[tuple[str, str], list[float]] = {column: [] for column in counts}
    for (name, cut, metric), record in cells.items():
        if name in models and record["value"] is not None:
            values[cut, metric].append(record["value"])
    return {
        "cells": cells,
        "counts": counts,
        "metrics": METRICS,
        "main_cuts": [cut for cut in TABLE_CUTS if cut in cuts],
        "other_cuts": [cut for cut in cuts if cut not in TABLE_CUTS],
        "models": models,
        "pairs": pairs,
        "best": BEST_ATTAINABLE if BEST_ATTAINABLE in names else None,
        # The models that the differences are about.
        "subjects": {name.split(PAIR_SEPARATOR)[0] for name in pairs},
        "highest": {column: max(found, default=None) for column, found in values.items()},
        **{key: records[0][key] for key in ("seed", "split", "protocol")},
    }


def _interval_figures(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each cut of the main table, the models' AUC with their intervals; all figures over the same axis."""
    cells, models = results["cells"], results["models"]
    numbers = [
        record[key]
        for (name, cut, metric), record in cells.items()
        if metric == "auc" and cut in results["main_cuts"] and name not in results["pairs"]
        for key in ("value", "low", "high")
        if record[key] is not None
    ]
    if not numbers:
        return []
    low, high = min(0.5, *numbers), max(0.5, *numbers)
    margin = 0.04 * (high - low) or 0.01
    figures = []
    for cut in results["main_cuts"]:
        found = [cells.get((name, cut, "auc")) for name in models]
        best = cells.get((results["best"], cut, "auc"))
        best_value = None if best is None else best["value"]

        def draw(axes: Axes, found: list[Any] = found, best_value: float | None = best_value) -> None:
            axes.axvline(0.5, color=MUTED, linewidth=0.8)
            if best_value is not None:
                axes.axvline(best_value, color=SECOND, linestyle=(0, (4, 2)))
            for row, (name, record) in enumerate(zip(models, found, strict=True)):
                if record is None or record["value"] is None:
                    axes.text(0.5, row, f" {NOTHING}", va="center", color=MUTED)
                    continue
                color = ACCENT if name in results["subjects"] or not results["subjects"] else MUTED
                if record["low"] is not None:
                    axes.hlines(row, record["low"], record["high"], color=color, linewidth=2)
                axes.plot(record["value"], row, "o", color=color, markersize=5.5)
            axes.set_xlim(low - margin, high + margin)
            axes.set_ylim(len(models) - 0.4, -0.6)
            axes.set_yticks(range(len(models)), [_short(name) for name in models], color=INK)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.grid(axis="y", visible=False)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.set_xlabel("AUC")

        figures.append(
            {
                "cut": cut,
                "best": best_value,
                "svg": svg(draw, f"AUC of {len(models)} models on {cut} rows", 0.75 + 0.26 * len(models)),
            }
        )
    return figures


def _curves(stage: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a stage with gradients, and its remaining facts."""
    name, facts = stage["stage"], dict(stage["manifest"]["facts"])
    losses, evaluations, kept = facts.pop("losses"), facts.pop("evaluations"), facts.pop("kept_step")
    facts.pop("first_losses", None)  # for comparing runs, not for reading
    facts.pop("histories", None)  # a table of its own
    steps, workers, device = facts.pop("steps"), facts.pop("workers"), facts.pop("device")
    optimizers, _ = facts.pop("optimizers"), facts.pop("sharding")
    alignment = _alignment(facts.pop("alignment", None))

    def draw_losses(axes: Axes) -> None:
        _curve(axes, losses, 1, color=ACCENT, label="loss")
        _finish_curves(axes, kept)

    def draw_evaluations(axes: Axes) -> None:
        for label, color in zip(evaluations[0][1], (ACCENT, SECOND), strict=False):
            points = [(step, metrics[label]) for step, metrics in evaluations]
            _curve(axes, points, 1, color=color, label=label.upper())
        _finish_curves(axes, kept)

    return {
        "stage": name,
        "kept": kept,
        "alignment": alignment,
        "loss": svg(draw_losses, f"training loss of stage {name} by step", 1.9) if losses else None,
        "valid": svg(draw_evaluations, f"validation metrics of stage {name} by step", 1.9) if evaluations else None,
        "facts": {
            "steps": f"{show(steps)}, kept: {show(kept)}",
            "workers": f"{show(workers)} ({show(device)})",
            **{f"optimizer, {part}": text for part, text in optimizers.items()},
            **facts,
        },
    }


def _alignment(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What stage align measured, with the `views` that were compared: of items, and of users where those were aligned."""
    if found is None:
        return None
    views = {"items": {when: found[when] for when in ("before", "after")}}
    if "users" in found:
        views["users"] = {when: found[when]["users"] for when in ("before", "after")}
    return {**found, "views": views}


def _curve(axes: Axes, points: Sequence[Sequence[float | None]], column: int, *, color: str, label: str) -> None:
    steps, values = (
        np.array([nan if point[index] is None else point[index] for point in points], dtype=np.float64)
        for index in (0, column)
    )
    axes.plot(steps, values, "o-" if len(points) <= MARKED_POINTS else "-", color=color, label=label)


def _finish_curves(axes: Axes, kept: int | None) -> None:
    if kept is not None:
        axes.axvline(kept, color=INK, linewidth=1, linestyle=(0, (1, 1.5)), label="kept step")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("step")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, borderaxespad=0.2, columnspacing=1.4)


def _histories(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How many prompts' histories were cut to fit, a line a stage and what it read: a split, or the model that read test."""
    return [
        {"stage": stage["stage"], "read": read, **counts}
        for stage in stages
        for read, counts in stage["manifest"]["facts"].get("histories", {}).items()
    ]


def _shards(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The sharding plans of all stages, a line a table."""
    return [
        {"stage": stage["stage"], "workers": stage["manifest"]["facts"]["workers"], **line}
        for stage in stages
        for line in stage["manifest"]["facts"].get("sharding", [])
    ]


def _timings(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    lines = []
    for stage in stages:
        stood = stage["seconds"] is None
        seconds = stage["manifest"]["seconds"] if stood else stage["seconds"]
        lines.append({"stage": stage["stage"], "artifact": stage["artifact"], "stood": stood, "seconds": seconds})
    longest = max((line["seconds"] for line in lines if line["seconds"] is not None), default=0.0)
    for line in lines:
        line["percent"] = 100 * line["seconds"] / longest if longest and line["seconds"] is not None else 0.0
    total = sum(stage["seconds"] for stage in stages if stage["seconds"] is not None)
    return {"lines": lines, "total": total, "any_stood": any(line["stood"] for line in lines)}


def _number(number: float | None, *, signed: bool = False) -> str:
    if number is None:
        return NOTHING
    return (f"{number:+z.4f}" if signed else f"{number:z.4f}").replace("-", "−")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 1]}…"
