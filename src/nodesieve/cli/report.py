"""`nodesieve report`: the page of runs."""

from __future__ import annotations

from pathlib import Path

import click

from nodesieve.cli.common import PATH, refuse_files_of_runs
from nodesieve.errors import UserError


@click.command("report", short_help="Write report.html for one run, or one page for several.")
@click.argument("directories", nargs=-1, required=True, type=PATH)
@click.option("--out", type=PATH, help="the page  [default: report.html in the first directory]")
def command(directories: tuple[Path, ...], out: Path | None) -> None:
    """Write a self-contained HTML page about the runs in DIRECTORIES."""
    from nodesieve.files import write_text
    from nodesieve.report.page import render
    from nodesieve.run import REPORT, load_run

    page = render([(directory.resolve().name, load_run(directory)) for directory in directories])
    target = out or directories[0] / REPORT
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"--out expects a file in a directory that exists, got {str(target)!r}")
    if target.resolve().name != REPORT:
        refuse_files_of_runs(target, *directories, what="--out")
    write_text(target, page)
    print(target)
