"""What several commands share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from nodesieve.errors import EXIT_INTERRUPTED

run_argument = click.argument("directory", type=click.Path(path_type=Path))
trust_remote_code_option = click.option("--trust-remote-code", is_flag=True, help="run Python code that comes with a model from the hub")


@contextmanager
def goes_on(kept: str = "") -> Iterator[None]:
    """Around work that keeps what it has done: Ctrl-C ends the command and says that it can be given again."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped; {kept}the same command goes on", file=sys.stderr)
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
