"""The command line: parse, call, print. Each command is a file of that name. Heavy imports happen inside the commands, so that --help is quick.

Exit codes: 0 success, 2 bad input (one line, no traceback), 130 stopped by Ctrl-C with the run resumable.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from nodesieve import __version__
from nodesieve.cli import check_model, compare, discover, evaluate, export, nodes, report, stability, tasks
from nodesieve.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, UnknownFamilyWarning, UserError


def main() -> None:
    """Entry point of `nodesieve`."""
    try:
        with _plain_warnings():
            code = cli.main(standalone_mode=False)  # what a command's Exit carried; None where it just returned
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = error.exit_code
    except click.ClickException as error:
        _fail(error.format_message())
    except UserError as error:
        _fail(str(error))
    except OSError as error:  # a full disk, a directory that is not ours
        _fail(f"expected to read and write what the command names, could not: {error}")
    except (KeyboardInterrupt, click.Abort):
        print("stopped", file=sys.stderr)
        code = EXIT_INTERRUPTED
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    print("nodesieve: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Our own warnings in one line, without the place in the code."""
    show = warnings.showwarning

    def plainly(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, UnknownFamilyWarning):
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
