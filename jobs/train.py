"""The main job: every stage from interactions to an evaluated SeLLa-Rec recommender. `--help` lists all settings."""

import sys

from sellarec.config import parse
from sellarec.environment import check_environment
from sellarec.errors import StageFailed, UserError


def main(arguments: list[str]) -> int:
    try:
        check_environment()
        config = parse(arguments)
        from sellarec.pipeline import Run, run  # after the checks: it takes a second

        run(Run.of(config))
    except (UserError, StageFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("interrupted: finished stages are kept; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
