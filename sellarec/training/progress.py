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
