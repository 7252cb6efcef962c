"""The main job: every stage from interactions to an evaluated SeLLa-Rec recommender. `--help` lists all settings."""

import sys
import traceback

from sellarec.config import parse
from sellarec.environment import check_environment
from sellarec.errors import StageFailed, UserError


def main(arguments: list[str]) -> int:
    try:
        check_environment()
        config = parse(arguments)
        from sellarec.pipeline import Run, run  # after the checks: it takes a second

        this = Run.of(config)
        try:
            run(this)
        except StageFailed as error:
            print(f"error: {error}", file=sys.stderr)
            this.place.write_text("error.log", "".join(traceback.format_exception(error)))
            print(f"The traceback is in {this.place}/error.log", file=sys.stderr)
            return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished stages are kept; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
