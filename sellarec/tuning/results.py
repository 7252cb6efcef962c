"""What a sweep leaves: a table of all trials, a plot of the metric against each setting, TensorBoard's view of both."""

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from sellarec.artifacts import Place
from sellarec.figures import ACCENT, MUTED, STYLE
from sellarec.tuning.space import Domain


@dataclass(frozen=True)
class Row:
    """How a trial went.

    Attributes:
        trial: its number, from 1.
        settings: by dotted name, as they were at its end.
        status: finished (its artifact stands), stopped (early, by the scheduler) or failed.
        value: the best of the sweep's metric on the valid split; None where it failed.
        kept: the metrics on the valid split of the state that it keeps; None where it keeps none.
        evaluations: (step, metrics by name) of each evaluation on the valid split.
        seconds: wall time; None where it failed.
        artifact: STAGE-FINGERPRINT; None where it keeps none.
        cause: why it failed.
        begun: the settings that it, or whom it went on from, began with, where these changed on the way.
        changes: how they changed since then, as a stage's `changes` has it.
    """

    trial: int
    settings: Mapping[str, Any]
    status: str
    value: float | None
    kept: Mapping[str, float | None] | None
    evaluations: Sequence[Sequence[Any]]
    seconds: float | None
    artifact: str | None
    cause: str | None
    begun: Mapping[str, Any] | None = None
    changes: Sequence[str] = ()

    def recipe(self, stage: str) -> dict[str, Any]:
        """Settings by which the stage makes its artifact."""
        return {**self.begun, f"{stage}.changes": tuple(self.changes)} if self.begun else dict(self.settings)


def write_results(place: Place, rows: Sequence[Row], space: Sequence[Domain], stage: str, metric: str) -> None:
    """Write trials.csv, trials.parquet, plots/SETTING.svg and tensorboard/trials/ into the run's folder."""
    with place.writing() as folder:
        _write_tables(folder, rows, space)
        (folder / "plots").mkdir(exist_ok=True)
        with matplotlib.style.context(["default", STYLE]):
            for domain in space:
                plot(rows, domain, stage, metric).savefig(
                    folder / "plots" / f"{domain.name}.svg", metadata={"Date": None}
                )
        _write_tensorboard(folder / "tensorboard" / "trials", rows, stage, metric)


def _write_tables(folder: Path, rows: Sequence[Row], space: Sequence[Domain]) -> None:
    records = [
        {
            "trial": row.trial,
            **{domain.name: _cell(row.settings[domain.name]) for domain in space},
            "status": row.status,
            "value": row.value,
            **{f"valid {name}": (row.kept or {}).get(name) for name in ("auc", "uauc")},
            "evaluations": [{"step": step, **metrics} for step, metrics in row.evaluations],
            "seconds": row.seconds,
            "artifact": row.artifact,
            "cause": row.cause,
            "begun": json.dumps(row.begun) if row.begun else None,
            "changes": list(row.changes),
        }
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(records), folder / "trials.parquet")
    with open(folder / "trials.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        for record in records:
            listed = {name: json.dumps(record[name]) for name in ("evaluations", "changes")}
            writer.writerow({**record, **listed})


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value


def plot(rows: Sequence[Row], domain: Domain, stage: str, metric: str) -> Figure:
    """The metric of each trial against one setting."""
    figure = Figure(figsize=(5.0, 3.2), layout="constrained")
    axes = figure.subplots()
    if domain.kind == "choice":
        labels = [str(label) for label in domain.labels]
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    elif domain.kind == "loguniform":
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    for status, color, marker in (("stopped", MUTED, "x"), ("finished", ACCENT, "o")):
        chosen = [row for row in rows if row.status == status]
        if not chosen:
            continue
        values = [row.settings[domain.name] for row in chosen]
        if domain.kind == "choice":
            values = [domain.labels.index(_cell(value)) for value in values]
        found = np.array([row.value for row in chosen], dtype=np.float64)
        axes.plot(values, found, marker, color=color, label=f"{status} ({len(chosen)})")
    axes.set_xlabel(domain.name)
    axes.set_ylabel(f"{metric.upper()} of {stage} on the valid split")
    axes.legend(loc="best")
    return figure


def _write_tensorboard(folder: Path, rows: Sequence[Row], stage: str, metric: str) -> None:
    """Each trial's curve, and its settings and metric for TensorBoard's view of hyperparameters. What was there is replaced."""
    from torch.utils.tensorboard import SummaryWriter

    if folder.is_dir():
        shutil.rmtree(folder)
    for row in rows:
        if row.value is None:
            continue
        with SummaryWriter(str(folder / f"trial-{row.trial:03d}")) as writer:
            for step, metrics in row.evaluations:
                for name, value in metrics.items():
                    if value is not None:
                        writer.add_scalar(f"{stage}/valid {name.upper()}", value, step)
            settings = {name: _cell(value) for name, value in row.settings.items()}
            writer.add_hparams(settings, {f"best valid {metric.upper()}": row.value}, run_name=".")


def format_rows(rows: Sequence[Row], space: Sequence[Domain], metric: str) -> str:
    """A table of trials for a terminal, the given order kept."""
    head = ["trial", f"valid {metric.upper()}", *(domain.name for domain in space), "seconds"]
    lines = [head] + [
        [
            str(row.trial),
            "–" if row.value is None else f"{row.value:.4f}",
            *(str(_cell(row.settings[domain.name])) for domain in space),
            "–" if row.seconds is None else f"{row.seconds:.0f}",
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
