"""`nodesieve nodes`: what a circuit keeps, by name."""

from __future__ import annotations

from pathlib import Path

import click

from nodesieve.cli.common import run_argument
from nodesieve.levels import LEVELS


@click.command("nodes", short_help="The kept nodes of a run by name, with their scores.")
@run_argument
@click.option("--level", "levels", multiple=True, type=click.Choice(list(LEVELS)), help="only this level; may be given more than once")
def command(directory: Path, levels: tuple[str, ...]) -> None:
    """Print the kept nodes of the circuit in DIRECTORY, one a line: canonical name, tab, score (nothing for a level without scores)."""
    from nodesieve.run import load_run

    run = load_run(directory)
    for level in levels or run.circuit.nodes.levels:
        for index in run.circuit.masks[level].nonzero().tolist():
            score = f"{float(run.scores.values[level][tuple(index)]):.4g}" if level in run.scores.levels else ""
            name = run.circuit.nodes.name(level, tuple(index))
            click.echo(f"{name}\t{score}")
