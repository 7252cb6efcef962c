"""The side of the package `datasets` in the case stream-datasets, which runs in an environment of its own."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sides.log_file import COLUMNS, LOG


def streamed(work: dict[str, Any], folder: Path) -> Callable[[], tuple[int, dict]]:
    """Rows from the file in each epoch, through a buffer that is shuffled."""
    os.environ |= {"HF_HOME": str(folder / "datasets"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    from datasets import config, load_dataset

    config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # else it sleeps for five seconds at the end of each epoch
    log = load_dataset("parquet", data_files=str(folder / LOG), split="train", streaming=True)
    shuffled, epochs = log.with_format("numpy").shuffle(seed=0, buffer_size=work["buffer"]), 0

    def repeat() -> tuple[int, dict]:
        nonlocal epochs
        shuffled.set_epoch(epochs)
        epochs += 1
        rows, sums = 0, np.zeros(len(COLUMNS), np.int64)
        for batch in shuffled.iter(batch_size=work["batch"]):
            columns = [batch[name] for name in COLUMNS]
            rows += len(columns[0])
            sums += [column.sum(dtype=np.int64) for column in columns]
        return rows, {"rows": rows, "sums": sums.tolist()}

    return repeat
