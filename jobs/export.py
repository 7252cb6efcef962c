"""Export a run's recommender in open formats: python jobs/export.py RUN --out DIR. `--help` lists all settings."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sellarec.environment import check_environment
from sellarec.errors import exit_status


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Write a finished run's recommender into one folder, which sellarec.load(DIR) reads."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder or URI of the run: WORKSPACE/runs/NAME."""
    out: Path
    """Folder to write, which isn't there yet."""
    histories: bool = True
    """Whether each user's last positives are written too; without them they are given with each call."""
    with_model: bool = False
    """Whether a base model that --llm named is copied too, where the run took it as it is; else it is referenced by name and
    hash, or commit."""


def main(arguments: list[str]) -> None:
    settings = tyro.cli(Settings, args=arguments, prog="export.py")
    check_environment()
    from sellarec.serving.export import export_run  # after the check: it imports what that looks for

    export_run(settings.run, settings.out, settings.histories, settings.with_model)
    print(f"export       {settings.out}")
    print(f'in Python    import sellarec; recommender = sellarec.load("{settings.out}")')


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
