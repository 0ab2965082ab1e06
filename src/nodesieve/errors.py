"""The one exception that users meet, and a warning.

A `UserError` says what was expected, what came, and what to do, in one line. The command line prints it without a traceback
and exits with code `EXIT_BAD_INPUT`; from Python it is an ordinary `ValueError`.
"""

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


class UserError(ValueError):
    """Input that cannot be used: a file, an option, a model."""


class UnknownFamilyWarning(UserWarning):
    """A model of a family without a row was read by its structure. Every check passed, but nobody has looked at the family itself."""
