"""Environments of their own for peers, so that they are no dependencies of the project."""

import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path


def make_environment(folder: Path, packages: Sequence[str]) -> Path:
    """An environment with these packages in `folder`, made (pip as configured) where it isn't there; gives its Python.

    Raises:
        subprocess.CalledProcessError: pip has failed.
    """
    python = folder / "bin" / "python"
    made = folder / "made"
    if not made.is_file() or made.read_text() != " ".join(packages):
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        made.write_text(" ".join(packages))
    return python
