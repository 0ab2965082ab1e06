"""The command line: parse, call, print. Each command is a file of that name. Heavy imports happen inside the commands, so that --help is quick.

Exit codes: 0 success, 2 bad input (one line, no traceback), 130 stopped by Ctrl-C or SIGTERM with the run resumable.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from nodesieve import __version__
from nodesieve.cli import check_model, compare, discover, evaluate, export, nodes, report, stability, tasks
from nodesieve.errors import EXIT_BAD_INPUT, ModelWarning, SeenPromptsWarning, UserError, end_stopped


def main(stopped: Sequence[int] = ()) -> None:
    """Run the command that `sys.argv` holds.

    Args:
        stopped: signals that have come; holds some where one came in the middle of an import, which may then fail in any way.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may have letters that the terminal has not
    try:
        with _plain_warnings():
            code = cli.main(standalone_mode=False)  # what a command's Exit carried; None where it just returned
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        end_stopped()
    except Exception as error:
        if stopped:
            end_stopped()
        if not isinstance(error, click.ClickException | UserError | OSError):
            raise
        _fail(_in_words(error))
    sys.exit(code if isinstance(code, int) else 0)


def _in_words(error: Exception) -> str:
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, UserError):
        return str(error)
    return f"expected to read and write what the command names, could not: {error}"  # a full disk, a directory that is not ours


def _fail(message: str) -> NoReturn:
    print("nodesieve: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Our own warnings in one line, without the place in the code."""
    show = warnings.showwarning

    def plainly(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, ModelWarning | SeenPromptsWarning):
            print("nodesieve: warning: " + " ".join(str(message).split()), file=sys.stderr)
        else:
            show(message, category, *rest, **more)

    with warnings.catch_warnings():
        warnings.showwarning = plainly
        yield


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Find circuits in language models: the smallest set of nodes that alone reproduces what the model says."""


for module in (check_model, compare, discover, evaluate, export, nodes, report, stability, tasks):
    cli.add_command(module.command)
