"""`nodesieve tasks`: the built-in tasks."""

from __future__ import annotations

import click

from nodesieve.cli.common import trust_remote_code_option
from nodesieve.errors import UserError


@click.command("tasks", short_help="List the built-in tasks.")
@click.option("--model", help="show examples as they are drawn for this model's tokenizer")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@trust_remote_code_option
def command(model: str | None, seed: int, trust_remote_code: bool) -> None:
    """List the built-in tasks; with --model, with examples."""
    from nodesieve.tasks import BUILTINS

    loaded = None
    if model is not None:
        from nodesieve.models import load_model

        loaded = load_model(model, trust_remote_code=trust_remote_code)
    for builtin in BUILTINS.values():
        print(f"{builtin.name:18} {builtin.description}")
        if loaded is not None:
            from nodesieve.tasks.load import load_task

            try:
                task = load_task(builtin.name, loaded.tokenizer, seed=seed)
            except UserError as error:  # of this tokenizer's words there are too few for this task
                print(f"  not for this model: {error}")
                continue
            print("  " + ", ".join(f"{len(examples)} {split}" for split, examples in task.splits.items()))
            for example in task.splits["validation"][:2]:
                print(f"    clean      {example.clean!r}\n    corrupted  {example.corrupted!r}")
                print(f"    answers    {', '.join(map(repr, example.answers))}   distractors {', '.join(map(repr, example.distractors))}")
