"""Time and memory of preparing generated interactions, over their number.

    python benchmarks/data/prepare_curve.py --rows 1000000 10000000 100000000 --out curve.json [--scratch DIR] [--repeats N]

Users and items grow with the rows, in Amazon Reviews 2023's proportions (571.54 M reviews, 54.51 M users, 48.19 M items). What
is timed is the whole of `sellarec.data.prepare` in a process of its own, Ray's start and the drawing of the rows
included. Memory is sampled twice a second over that process and all that it starts: the sum of proportional set sizes (a page
that several processes share counts once), and, as an upper bound, the sum of resident set sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil

ROWS, USERS, ITEMS = 571_540_000, 54_510_000, 48_190_000
"""Of Amazon Reviews 2023 (amazon-reviews-2023.github.io)."""

PACKAGES = ("sellarec", "ray", "pyarrow", "polars", "numpy")


def prepare_generated(rows: int, folder: Path) -> None:
    """What is measured."""
    from sellarec.artifacts import Place
    from sellarec.config import Data
    from sellarec.data.log import write_manifest
    from sellarec.data.prepare import discard_work, prepare, rules_of
    from sellarec.data.synthetic import Synthetic, synthetic_source
    from sellarec.training.cluster import connect
    from sellarec.training.progress import Console

    source = synthetic_source(Synthetic(users=rows * USERS // ROWS, items=rows * ITEMS // ROWS, interactions=rows))
    console = Console()
    facts = prepare(
        source,
        rules_of(Data(), source),
        folder,
        hashes={},
        start_ray=lambda: connect(1, console, Place.of(str(folder)), device="cpu"),
        say=console.line,
    )
    write_manifest(folder, facts)
    discard_work(folder)


def memory(process: psutil.Process) -> tuple[int, int]:
    """Bytes of a process and all below it: proportional and resident set sizes, summed."""
    proportional = resident = 0
    for one in (process, *process.children(recursive=True)):
        try:
            found = one.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended meanwhile
            continue
        proportional, resident = proportional + found.pss, resident + found.rss
    return proportional, resident


def measure(rows: int, scratch: Path) -> dict:
    folder = Path(tempfile.mkdtemp(prefix=f"prepare-{rows}-", dir=scratch))
    start = time.monotonic()
    child = subprocess.Popen([sys.executable, __file__, "--prepare", str(rows), str(folder)])
    peak_proportional = peak_resident = peak_disk = 0
    process = psutil.Process(child.pid)
    free = shutil.disk_usage(folder).free
    while child.poll() is None:
        proportional, resident = memory(process)
        peak_proportional, peak_resident = max(peak_proportional, proportional), max(peak_resident, resident)
        peak_disk = max(peak_disk, free - shutil.disk_usage(folder).free)
        time.sleep(0.5)
    seconds = time.monotonic() - start
    if child.returncode:
        sys.exit(f"the preparation of {rows:,} rows failed with status {child.returncode}")
    log_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    facts = json.loads((folder / "manifest.json").read_text())
    shutil.rmtree(folder)
    return {
        "rows": rows,
        "kept_rows": sum(facts["rows"].values()),
        "users": facts["users"],
        "items": facts["items"],
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds),
        "peak_pss_bytes": peak_proportional,
        "peak_rss_sum_bytes": peak_resident,
        "peak_disk_bytes": peak_disk,
        "log_bytes": log_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--prepare", nargs=2, metavar=("ROWS", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare_generated(int(arguments.prepare[0]), Path(arguments.prepare[1]))
        return
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "runs": [],
    }
    for _ in range(arguments.repeats):
        for rows in arguments.rows:
            run = measure(rows, arguments.scratch)
            result["runs"].append(run)
            print(
                f"{rows:>13,} rows  {run['seconds']:8.1f} s  {run['rows_per_second']:>9,} rows/s  "
                f"peak {run['peak_pss_bytes'] / 2**30:.2f} GiB (sum of RSS {run['peak_rss_sum_bytes'] / 2**30:.2f})",
                flush=True,
            )
            if arguments.out:
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
