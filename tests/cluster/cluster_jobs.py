"""cluster/local.py as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH", "SELLAREC_"))}


def local(command: str, state: Path, *flags: str, status: int = 0) -> str:
    """cluster/local.py in a process of its own; what it prints to stdout, or to stderr where it is to fail."""
    arguments = [sys.executable, ROOT / "cluster" / "local.py", command, "--state", state, *flags]
    done = subprocess.run(arguments, capture_output=True, text=True, env={**CLEAN, "PYTHONPATH": str(ROOT)})
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout if status == 0 else done.stderr


def exported(printed: str) -> dict[str, str]:
    lines = [line.removeprefix("export ") for line in printed.splitlines() if line.startswith("export ")]
    return dict(line.split("=", 1) for line in lines)
