"""`nodesieve export`: circuits for other tools."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from nodesieve.cli.common import PATH, model_of_run, refuse_files_of_runs, run_argument, trust_remote_code_option
from nodesieve.errors import UserError

if TYPE_CHECKING:
    from nodesieve.models import LoadedModel
    from nodesieve.run import Run


@click.command("export", short_help="A run's circuit for other tools: a smaller checkpoint, or the benchmark's file.")
@run_argument
@click.argument("out", type=PATH)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["hf", "mib"]),
    default="mib",
    show_default=True,
    help="hf: a checkpoint for transformers; mib: Mechanistic Interpretability Benchmark",
)
@click.option("--model", help="the model, where it has moved since the run")
@click.option("--task", help="for hf: the prompts, where they have moved since the run")
@click.option("--device", help="torch device; by default the run's own")
@click.option("--ablation", type=click.Choice(["mean", "zero"]), help="for hf: what closed nodes hold; by default as in the run")
@trust_remote_code_option
def command(
    directory: Path, out: Path, kind: str, model: str | None, task: str | None, device: str | None, ablation: Any, trust_remote_code: bool
) -> None:
    """Write the circuit in DIRECTORY to OUT.

    hf: into a new directory OUT, the model without what the circuit closes, which transformers reads by itself. mib: to a file OUT, the circuit's
    heads and MLPs with scores.
    """
    from nodesieve.run import load_run

    run = load_run(directory)
    load = partial(model_of_run, run, model=model, device=device, trust_remote_code=trust_remote_code)
    if kind == "hf":
        _checkpoint(run, directory, out, load, task=task, ablation=ablation)
    elif ablation is not None:
        raise UserError(f"--ablation {ablation} expects --format hf, a checkpoint that holds its constants; add that, or leave it out")
    elif task is not None:
        raise UserError("--task expects --format hf, a checkpoint that is tried on prompts; add that, or leave it out")
    else:
        refuse_files_of_runs(out, directory, what="OUT")
        _mib(run, out, load)
    print(out)


def _mib(run: Run, out: Path, load: Callable[[], LoadedModel]) -> None:
    from nodesieve.circuit import refuse_other_nodes
    from nodesieve.files import write_json
    from nodesieve.interop import to_mib
    from nodesieve.verify import gate, is_parallel

    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"OUT expects a file in a directory that exists, got {str(out)!r}")
    gated = gate(load().model)
    refuse_other_nodes(run.circuit, gated.nodes)
    write_json(out, to_mib(run.circuit, run.scores, parallel=is_parallel(gated)))


def _checkpoint(run: Run, directory: Path, out: Path, load: Callable[[], LoadedModel], *, task: str | None, ablation: Any) -> None:
    from nodesieve.ablations import ABLATIONS
    from nodesieve.evaluation import problem_of
    from nodesieve.export import export
    from nodesieve.run import DESCRIPTION
    from nodesieve.tasks.load import task_of

    if ABLATIONS[ablation or run.config.ablation].aligned:
        raise UserError(
            "--format hf expects closed nodes that hold constants, got a circuit in which they hold what corrupted prompts give; "
            f"take --ablation mean or zero, and see what that does to the circuit with: nodesieve evaluate {quote(str(directory))} --ablation mean"
        )
    if out.name in ("", "..") or not out.parent.is_dir() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise UserError(f"OUT expects a new or empty directory with a name of its own, in one that exists, got {str(out)!r}")
    loaded = load()
    problem = problem_of(loaded, task_of(run.config, loaded.tokenizer, task=task), run, ablation=ablation)
    found = export(problem, loaded.tokenizer, run.circuit, out, beside={DESCRIPTION: (directory / DESCRIPTION).read_text("utf-8")})
    print(
        f"{found.parameters:,} parameters, the model has {found.parameters_before:,}; logits as of the gated model, to {found.difference:.1g}",
        file=sys.stderr,
    )
