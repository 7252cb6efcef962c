"""Benchmarks' scripts as a user runs them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

HANG = 600
"""Seconds after which a script, and what it started, is ended; each process then says where it stood."""


def command(script: str, *arguments: object) -> subprocess.CompletedProcess:
    with subprocess.Popen(
        [sys.executable, BENCHMARKS / f"{script}.py", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONFAULTHANDLER": "1"},
    ) as process:
        try:
            printed, errors = process.communicate(timeout=HANG)
        except subprocess.TimeoutExpired:
            first = psutil.Process(process.pid)
            for each in (*first.children(recursive=True), first):
                each.send_signal(signal.SIGABRT)
            printed, errors = process.communicate(timeout=60)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, printed, errors)
