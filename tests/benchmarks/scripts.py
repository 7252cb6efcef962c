"""Benchmarks' scripts as a user runs them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

HANG = 600
"""Seconds after which a script, and what it started, is ended; each process then says where it stood."""


def command(script: str, *arguments: object) -> subprocess.CompletedProcess:
    process = subprocess.Popen(
        [sys.executable, BENCHMARKS / f"{script}.py", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONFAULTHANDLER": "1"},
        start_new_session=True,
    )
    try:
        printed, errors = process.communicate(timeout=HANG)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)
        printed, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, printed, errors)
