"""The one exception that users meet.

A `UserError` says what was expected, what came, and what to do, in one line. The command line prints it without a traceback
and exits with code 2; from Python it is an ordinary `ValueError`.
"""


class UserError(ValueError):
    """Input that cannot be used: a file, an option, a model."""
