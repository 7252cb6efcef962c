"""How workers tell the driver how far they are: a small actor that keeps records until the driver fetches them."""

import time
from typing import Any

PROGRESS_SECONDS = 5.0
"""Seconds between two progress lines."""


class ProgressBoard:
    """Records of all workers of one stage, in order of arrival; and whether the driver asks them to stop."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._stop = False

    def stop(self) -> None:
        """Ask the workers to leave a checkpoint and end."""
        self._stop = True

    def is_stopping(self) -> bool:
        return self._stop

    def put(self, record: dict[str, Any]) -> None:
        self._records.append(record)

    def take(self) -> list[dict[str, Any]]:
        """The records since the last call."""
        records, self._records = self._records, []
        return records


def note(board: Any, stage: str, line: str) -> None:
    """Have the driver print a line of a stage."""
    board.put.remote({"note": f"{stage:<9} {line}"})


def duration(seconds: float) -> str:
    """3725 -> '1:02:05', 65 -> '1:05'."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Console:
    """Prints a run's progress: one line at a time, each headed by the time since the run began."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def line(self, text: str) -> None:
        print(f"[{duration(time.monotonic() - self._start):>7}] {text}", flush=True)


def describe(record: dict[str, Any]) -> str:
    """One progress line."""
    if "items" in record:
        return f"{record['stage']:<9} {record['done']:,}/{record['items']:,} items"
    if "scored" in record:
        return f"{record['stage']:<9} {record['what']}: {record['scored']:,}/{record['rows']:,} {record['done']}"
    if "model" in record:
        return f"{record['stage']:<9} {record['model']}: {record['rows']:,} rows scored in {record['seconds']:.1f} s"
    head = f"{record['stage']:<9} step {record['step']}/{record['steps']}"
    if "valid" in record:
        best = " (best so far)" if record["best"] == record["step"] else f" (best at step {record['best']})"
        metrics = "  ".join(f"{name.upper()} {_number(value)}" for name, value in record["valid"].items())
        return f"{head}  valid {metrics}{best}"
    percent = 100 * record["step"] / max(1, record["steps"])
    left = "" if record["seconds left"] is None else f"  {duration(record['seconds left'])} left"
    return (
        f"{head} ({percent:.0f}%)  loss {record['loss']:.4f}  {record['rows/s']:,.0f} rows/s  "
        f"waiting for data {record['data wait %']:.0f}%{left}"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
