"""`nodesieve evaluate`: a circuit measured again, and beside others."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from nodesieve.cli.common import goes_on, model_of_run, run_argument, trust_remote_code_option
from nodesieve.config import DRAWS, AblationName, choices
from nodesieve.errors import UserError


@click.command("evaluate", short_help="Measure a run's circuit, on its own task or another.")
@run_argument
@click.option("--task", help="a built-in task or a file; by default the run's own")
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", show_default=True)
@click.option("--model", help="the model, where it has moved since the run")
@click.option("--device", help="torch device; by default the run's own")
@click.option("--ablation", type=click.Choice(choices(AblationName)), help="what closed nodes hold; by default as in the run")
@click.option("--controls", "with_controls", is_flag=True, help="measure random, complementary and smaller circuits beside it; see docs/evidence.md")
@click.option("--draws", type=click.IntRange(1), help=f"random circuits of each kind, for --controls  [default: {DRAWS}]")
@trust_remote_code_option
@click.option("--size-curve", "with_curve", is_flag=True, help="measure circuits of ten sizes cut from the run's scores; see docs/evidence.md")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def command(
    directory: Path,
    task: str | None,
    split: Any,
    model: str | None,
    device: str | None,
    ablation: Any,
    with_controls: bool,
    draws: int | None,
    with_curve: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Measure the circuit in DIRECTORY on the test data of its own task, or of another with --task."""
    import json

    from nodesieve.console import ConsoleJournal, print_controls, print_evaluation, print_size_curve
    from nodesieve.controls import controls_file, controls_kept_in, costs_nothing, name_of_examples, summary
    from nodesieve.evaluation import evaluate_circuit, problem_of
    from nodesieve.problem import as_counts, counts_in_words
    from nodesieve.run import load_run, resuming
    from nodesieve.size_curve import size_curve
    from nodesieve.tasks.load import task_of

    if draws is not None and not with_controls:
        raise UserError(f"--draws {draws} expects --controls, the random circuits of which it counts; add that, or leave it out")
    run = load_run(directory)
    if not run.metrics:
        print(f"the run is unfinished, this is its circuit of now; go on with: {resuming(directory)}", file=sys.stderr)
    loaded = model_of_run(run, model=model, device=device, trust_remote_code=trust_remote_code)
    examples = task_of(run.config, loaded.tokenizer, task=task)
    problem = problem_of(loaded, examples, run, splits=(split,), ablation=ablation)
    evaluation = evaluate_circuit(problem, run.circuit, splits=(split,))
    used = as_counts(problem.task)[split]
    title = f"{directory} on {examples.name}, {split} data ({counts_in_words(used)}), {problem.ablation_name} ablation"
    shown = asdict(evaluation)
    if not as_json:
        print_evaluation(evaluation, split=split, title=title)
    if with_curve:
        budget = None if "loss" in run.description else run.config.kl_budget  # else it is one of that loss
        shown["size_curve"] = size_curve(problem, run.scores, split=split, budget=budget)
        if not as_json:
            print_size_curve(shown["size_curve"], title="circuits cut from the run's scores")
    if with_controls:
        path = controls_file(directory, task=name_of_examples(problem, split), split=split, ablation=problem.ablation_name)
        with ConsoleJournal(directory, quiet=as_json) as journal, goes_on(lambda: f"what was measured is in {path}; " if path.is_file() else ""):
            measured = controls_kept_in(path, run, problem, split=split, draws=draws or DRAWS, journal=journal)
            found = summary(measured, nothing=costs_nothing(run))
        shown["controls"] = found
        if not as_json:
            print_controls(found, title="other circuits, measured alike")
    if as_json:
        print(json.dumps({"task": examples.name, "examples": used, "ablation": problem.ablation_name, **shown}, indent=2))
