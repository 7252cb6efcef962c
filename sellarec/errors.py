"""The errors that end a job with a message instead of a traceback."""

import os
import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """A user's mistake: the message says what was wrong, with both values, and what to do.

    Jobs print the message alone, without a traceback, and exit with status 2.
    """


class StageFailed(Exception):
    """A stage ended for a reason that isn't the user's mistake: the message names the stage and the cause.

    Jobs print the message, have the traceback written into the run's folder, and exit with status 1.
    """


class TrainingStopped(Exception):
    """A training ended before its end because its driver asked it to: nothing of it is kept."""


class TrainingPaused(Exception):
    """A training has as many evaluations behind it as were asked for, and has left a checkpoint.

    Attributes:
        evaluations: (step, metrics on the valid split by name) of each.
    """

    def __init__(self, evaluations: list[tuple[int, dict[str, float | None]]]) -> None:
        super().__init__(f"paused after {len(evaluations)} evaluations")
        self.evaluations = evaluations


def exit_status(main: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Run a job's `main` on its arguments: its exit status, with one line on stderr where it is not 0. SIGTERM ends it as Ctrl-C
    does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(arguments)
        sys.stdout.flush()
    except (UserError, StageFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept; the same command goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of what is printed has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0
