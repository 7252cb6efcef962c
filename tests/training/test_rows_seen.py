"""Which rows are stepped on when workers are killed, a killed job goes on with more, and workers become more and fewer: each row
once an epoch."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import main_job
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import record_rows

from sellarec.training.stream import Order

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROWS = (4_000, 3_333)
"""Of two files: the last batch of an epoch is short, and slices of 4 workers are padded."""


def start(folder: Path, *workers: int) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, record_rows.__file__, str(folder), *map(str, workers)]
    with open(folder / "log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def lines(folder: Path) -> list[dict]:
    """What all workers have recorded, by time; a killed one's last line may be cut off."""
    found = []
    for path in (folder / "seen").glob("*.jsonl"):
        text = path.read_text()
        found += [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return sorted(found, key=lambda line: line["time"])


def wait_for_step(folder: Path, step: int, job: subprocess.Popen, workers: int) -> None:
    deadline = time.monotonic() + 180
    while not any(line["step"] >= step and line["workers"] == workers for line in lines(folder)):
        assert job.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.1)


def test_each_row_once_an_epoch_across_kills_and_another_number_of_workers(tmp_path: Path) -> None:
    order = written(tmp_path)
    per_epoch = order.steps_per_epoch
    job = start(tmp_path, 2)
    try:
        wait_for_step(tmp_path, per_epoch // 2, job, workers=2)
        main_job.training_workers(job)[0].send_signal(signal.SIGKILL)
        killed = time.time()
        wait_for_step(tmp_path, per_epoch + per_epoch // 3, job, workers=2)
    finally:
        main_job.end(job)  # the whole job, its driver and Ray included
    job = start(tmp_path, 4)
    try:
        assert job.wait(240) == 0, (tmp_path / "log").read_text()
    finally:
        main_job.end(job)

    seen = lines(tmp_path)
    lives = [
        [line for line in seen if line["workers"] == 2 and line["time"] < killed],
        [line for line in seen if line["workers"] == 2 and line["time"] >= killed + 1],
        [line for line in seen if line["workers"] == 4],
    ]
    reading = [line["references"] for line in lives[2] if line["rank"] == 0]
    assert reading[-1] < reading[0], "blocks that were handed on are let go"
    assert max(line["references"] for line in lives[2] if line["rank"] > 0) < 5
    begins = [min(line["step"] for line in life) for life in lives]
    assert begins[0] == 0 < begins[1] < per_epoch < begins[2], "each life goes on from a checkpoint of the one before"
    check(lives, order)


def test_each_row_once_an_epoch_while_workers_become_more_and_fewer(tmp_path: Path) -> None:
    """Of the 5 CPUs that there are for 3 workers another job holds fewer and fewer, then as many as at first."""
    order = written(tmp_path)
    held = tmp_path / "held"
    held.write_text("3")
    job = start(tmp_path, 3, 1)
    try:
        begin = 0
        for workers in (1, 2, 3):
            wait_for_step(tmp_path, begin + 5, job, workers)
            begin = max(line["step"] for line in lines(tmp_path))
            replaced = tmp_path / "held.new"
            replaced.write_text(str({1: 2, 2: 1, 3: 3}[workers]))
            replaced.rename(held)
        assert begin < 2 * order.steps_per_epoch - 20, "no steps are left for the last workers"
        main_job.training_workers(job)[0].send_signal(signal.SIGKILL)
        assert job.wait(240) == 0, (tmp_path / "log").read_text()
    finally:
        main_job.end(job)
    seen = lines(tmp_path)
    lives = [list(life) for _, life in itertools.groupby(seen, key=lambda line: line["workers"])]
    assert [life[0]["workers"] for life in lives] == [1, 2, 3, 1]
    check(lives, order)


def written(folder: Path) -> Order:
    """The order of rows that are written into a folder."""
    ends = np.cumsum((0, *ROWS))
    for number, (low, high) in enumerate(itertools.pairwise(ends)):
        pq.write_table(pa.table({"row": np.arange(low, high)}), folder / f"rows-{number}.parquet", row_group_size=500)
    return record_rows.order_of(folder)


def check(lives: list[list[dict]], order: Order) -> None:
    """Each row was stepped on once an epoch, in the order of one worker.

    Args:
        lives: what each group of workers has recorded; of a step the last group that took it counts.
    """
    begins = [min(line["step"] for line in life) for life in lives]
    per_epoch = order.steps_per_epoch
    rows_of_step = {}
    for step in range(per_epoch * record_rows.EPOCHS):
        life = max(number for number, first in enumerate(begins) if first <= step)
        parts = [line for line in lives[life] if line["step"] == step]
        assert sorted(line["rank"] for line in parts) == list(range(parts[0]["workers"])), step
        rows_of_step[step] = [row for line in sorted(parts, key=lambda line: line["rank"]) for row in line["rows"]]
    for epoch in range(record_rows.EPOCHS):
        found = [row for step in range(per_epoch) for row in rows_of_step[epoch * per_epoch + step]]
        assert sorted(found) == list(range(sum(ROWS)))
        pieces = order.pieces(epoch * per_epoch, (epoch + 1) * per_epoch)
        assert found == [row for piece in pieces for row in order.read(piece, ("row",))["row"].to_pylist()]
