"""What a result says of where it was taken."""

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil


def facts(packages: Sequence[str]) -> dict[str, Any]:
    """Date, commit, hardware, and the versions of packages."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "--", "..", ":!results"], capture_output=True, text=True)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit + (" with changes" if changed.stdout.strip() else ""),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cores used": len(os.sched_getaffinity(0)),
        "memory bytes": psutil.virtual_memory().total,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    """None where it isn't installed, as on a machine where only some cases can be run."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """As Linux names it; empty where it has no name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
