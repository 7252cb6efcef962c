"""A sweep: one stage trained many times with drawn settings, compared on the valid split. `--help` lists all settings."""

import sys

from sellarec.environment import check_environment
from sellarec.errors import exit_status


def main(arguments: list[str]) -> None:
    check_environment()
    from sellarec.command_line import parse_sweep  # after the check: these import what it looks for

    settings = parse_sweep(arguments)
    from sellarec.tuning.sweep import sweep

    sweep(settings)


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))
