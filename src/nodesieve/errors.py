"""The one exception that users meet, warnings, and how a command is stopped and ends then.

A `UserError` says what was expected, what came, and what to do, in one line. The command line prints it without a traceback
and exits with code `EXIT_BAD_INPUT`; from Python it is an ordinary `ValueError`.
"""

import signal
import sys
from typing import NoReturn

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130
DOES_NOT_FIT = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, StopIteration)  # what a wrong guess at a model ends in
STOPS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what batch systems send before they end a job


class UserError(ValueError):
    """Input that cannot be used: a file, an option, a model."""


class ModelWarning(UserWarning):
    """What a user should know of a model that is used all the same."""


class SeenPromptsWarning(UserWarning):
    """Prompts that a circuit is measured on are among those that it was searched or chosen on."""


class UnusedWeightsWarning(ModelWarning):
    """A checkpoint holds weights of parts that the model has not, such as a value head."""


class UnknownFamilyWarning(ModelWarning):
    """A model of a family without a row was read by its structure. Every check passed, but nobody has looked at the family itself."""


def refuse_other_kinds(who: str, *expected: tuple[str, object, type]) -> None:
    """Raise UserError where what is given is of another kind: (what was expected, what was given, its type) of each."""
    for what, given, kind in expected:
        if not isinstance(given, kind):
            raise UserError(f"{who} expects {what}, got {type(given).__name__}")


class Trying:
    """Around an attempt at something that a model may not be made for: what it then raises ends the block, and nothing else. That a device has no
    memory left says nothing of the model, and is raised."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        from torch import OutOfMemoryError

        return isinstance(error, DOES_NOT_FIT) and not isinstance(error, OutOfMemoryError)


def end_stopped() -> NoReturn:
    """End the process as Ctrl-C does where there is nothing to go on from."""
    print("stopped", file=sys.stderr)
    sys.exit(EXIT_INTERRUPTED)
