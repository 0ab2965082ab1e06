"""`nodesieve stability`: how much of a circuit other seeds and other data find again."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import click

from nodesieve.cli.common import goes_on, run_argument, saying, trust_remote_code_option
from nodesieve.errors import UserError


@click.command("stability", short_help="The run again with other seeds on resampled data: what is found every time?")
@run_argument
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1), help="further runs")
@click.option("--agree", type=click.IntRange(1), help="runs that must keep a node for the consensus to keep it  [default: more than half of all]")
@click.option("--quiet", is_flag=True, help="no progress")
@trust_remote_code_option
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def command(directory: Path, seeds: int, agree: int | None, quiet: bool, trust_remote_code: bool, as_json: bool) -> None:
    """Repeat the run in DIRECTORY, compare what was kept by level, and measure the circuit that the runs agree on."""
    import json

    from nodesieve.console import print_agreement, print_evaluation
    from nodesieve.evaluation import Evaluation
    from nodesieve.files import write_json
    from nodesieve.metrics import in_percent
    from nodesieve.models import model_of
    from nodesieve.run import STABILITY, load_run, resuming, weights_of
    from nodesieve.spawn import refuse_other_weights, refuse_what_changed
    from nodesieve.stability import CONSENSUS, agreement, consensus_run, repeat
    from nodesieve.tasks.load import task_of

    run = load_run(directory)
    if not run.metrics:
        raise UserError(f"expected a finished run in {str(directory)!r}; go on with: {resuming(directory)}")
    if run.description["method"] == CONSENSUS:
        raise UserError(f"expected a run, got in {str(directory)!r} what several runs agree on; give one of them")
    if "loss" in run.description:
        raise UserError(
            f"expected a run that kept the KL low, got one that was found in Python with a loss of its own, {run.description['loss']}; repeat it "
            "there, with discover(..., loss=...) and other seeds"
        )
    at_least = agree or (1 + seeds) // 2 + 1
    if at_least > 1 + seeds:
        raise UserError(f"--agree expects at most {1 + seeds}, the number of runs, got {at_least}")
    refuse_what_changed(directory, run.config)
    with goes_on():
        runs = [run, *repeat(run, directory / "stability", count=seeds, quiet=quiet, trust_remote_code=trust_remote_code, say=saying(quiet=quiet))]
    circuits = [one.circuit for one in runs]
    loaded = model_of(run.config, trust_remote_code=trust_remote_code)
    refuse_other_weights(loaded, weights_of(run.description), of=directory)
    shared = consensus_run(run, circuits, at_least=at_least, loaded=loaded, task=task_of(run.config, loaded.tokenizer))
    shared.save(directory / "stability" / CONSENSUS, overwrite=True)
    evaluation = Evaluation(**{field.name: shared.metrics[field.name] for field in fields(Evaluation)})
    found = {
        "runs": len(runs),
        "levels": agreement(circuits),
        "consensus": {
            "at_least": at_least,
            "size": shared.circuit.size,
            "nodes": {level: shared.circuit.kept(level) for level in shared.circuit.nodes.levels},
            **asdict(evaluation),
        },
    }
    write_json(directory / STABILITY, found)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_agreement(found, title=f"{len(runs)} runs like {directory}")
        title = f"nodes kept by at least {at_least} of {len(runs)} runs ({in_percent(shared.circuit.size)} of the leaves), test data"
        print_evaluation(evaluation, split="test", title=title)
        print(f"the circuit that they agree on: {directory / 'stability' / CONSENSUS}")
