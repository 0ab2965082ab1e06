"""`nodesieve export`: circuits for other tools."""

from __future__ import annotations

from pathlib import Path

import click

from nodesieve.cli.common import run_argument, trust_remote_code_option
from nodesieve.errors import UserError


@click.command("export", short_help="A run's circuit in the file of another tool.")
@run_argument
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "kind", type=click.Choice(["mib"]), default="mib", show_default=True, help="mib: Mechanistic Interpretability Benchmark")
@click.option("--model", help="the model, where it has moved since the run")
@trust_remote_code_option
def command(directory: Path, out: Path, kind: str, model: str | None, trust_remote_code: bool) -> None:
    """Write the circuit in DIRECTORY to the file OUT: its heads and MLPs, with scores."""
    from nodesieve.interop import to_mib
    from nodesieve.models import model_of
    from nodesieve.run import load_run, write_json
    from nodesieve.verify import gate, is_parallel

    run = load_run(directory)
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"OUT expects a file in a directory that exists, got {str(out)!r}")
    loaded = model_of(run.config, model=model, trust_remote_code=trust_remote_code)
    write_json(out, to_mib(run.circuit, run.scores, parallel=is_parallel(gate(loaded.model))))
    print(out)
