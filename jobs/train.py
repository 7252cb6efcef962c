"""The main job: every stage from interactions to an evaluated SeLLa-Rec recommender. `--help` lists all settings."""

import sys

from sellarec.environment import check_environment
from sellarec.errors import exit_status


def main(arguments: list[str]) -> None:
    check_environment()
    from sellarec.command_line import parse  # after the check: these import what it looks for

    config = parse(arguments)
    from sellarec.pipeline import run
    from sellarec.run import Run

    run(Run.of(config))


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
