"""The model of larger clusters: as far as something ran, it says what was measured."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def simulated(tmp_path: Path, *flags: str) -> dict:
    command = [sys.executable, "benchmarks/tables/simulate.py", *flags, "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "A model, not validated" in done.stdout
    return json.loads((tmp_path / "out.json").read_text())


def test_bytes_are_those_that_were_measured(tmp_path: Path) -> None:
    measured = json.loads((ROOT / "benchmarks/tables/results/traffic.json").read_text())
    cases = {case["workers"]: case for case in measured["cases"] if case["case"] == "row-wise, same batch a worker"}
    assert set(cases) == {1, 2, 3, 4}
    for workers in (2, 3, 4):
        size = (
            "--users",
            "100000",
            "--items",
            "100000",
            "--dim",
            str(measured["dim"]),
            "--batch",
            str(measured["batch"]),
        )
        distinct = cases[workers]["distinct ids of a row"] / 2  # of users and items
        (cell,) = simulated(tmp_path, "--workers", str(workers), *size, "--distinct", str(distinct))["cells"]
        assert abs(cell["bytes sent"] / cases[workers]["sent bytes"] - 1) < 0.005


def test_by_hand(tmp_path: Path) -> None:
    """One GPU of 1 GB/s, of which half is reached: 2 features x 4 rows of (20 x 8 + 128) bytes, and the host's 3 ms."""
    flags = (
        "--workers",
        "1",
        "--users",
        "1000",
        "--items",
        "1000",
        "--dim",
        "8",
        "--batch",
        "4",
        "--interactions",
        "40",
    )
    assume = ("--assume.memory-gb-per-s", "1", "--assume.memory-share", "0.5", "--assume.host-ms", "3")
    (cell,) = simulated(tmp_path, *flags, *assume)["cells"]
    step = 2 * 4 * 288 / 0.5e9 + 0.003
    assert abs(cell["epoch seconds"] / (10 * step) - 1) < 1e-9
    assert cell["bytes sent"] == 0
    assert cell["bytes held"] == 2 * 1000 * (4 * 8 + 4)
