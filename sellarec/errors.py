"""The errors that end a job with a message instead of a traceback."""


class UserError(Exception):
    """A user's mistake: the message says what was wrong, with both values, and what to do.

    Jobs print the message alone, without a traceback, and exit with status 2.
    """


class StageFailed(Exception):
    """A stage ended for a reason that isn't the user's mistake: the message names the stage and the cause.

    Jobs print the message, write the traceback to the run's folder, and exit with status 1.
    """
