"""`nodesieve compare`: methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nodesieve.cli.common import PATH, goes_on, saying, trust_remote_code_option, usual_place
from nodesieve.config import choices, make_config, names_in
from nodesieve.errors import UserError
from nodesieve.method_rows import MethodName


@click.command("compare", short_help="Methods side by side on one model and task.")
@click.option("--model", help="as for discover  [default: smollm2-135m]")
@click.option("--task", help="as for discover  [default: ioi]")
@click.option("--methods", required=True, help="names with commas between them, e.g. sieve,multigranular,gate_gradient; the tables are of these")
@click.option("--kl-budget", "--budget", "kl_budget", type=float, help="KL budget in nats  [default: 0.25]")
@click.option(
    "--seeds", default=1, show_default=True, type=click.IntRange(1), help="runs of each method: seeds 0, 1, ..., or from the config's seed on"
)
@click.option("--levels", help="levels that get gates, the same for every method, as for discover  [default: all but embedding]")
@click.option("--polish/--no-polish", default=None, help="polish the circuit of every method, as is the default, or of none")
@click.option("--config", "config_file", type=PATH, help="further options, as in a run's config.yaml")
@click.option("--out", type=PATH, help="directory for the runs and the comparison  [default: runs/compare-MODEL-TASK]")
@click.option("--quiet", is_flag=True, help="no progress; only the table")
@trust_remote_code_option
def command(
    model: str | None,
    task: str | None,
    methods: str,
    kl_budget: float | None,
    seeds: int,
    levels: str | None,
    polish: bool | None,
    config_file: Path | None,
    out: Path | None,
    quiet: bool,
    trust_remote_code: bool,
) -> None:
    """Find the circuit of one task by several methods, each through the same selection, and compare what they keep. Finished runs are kept."""
    from nodesieve.compare import compare as run_comparison
    from nodesieve.console import print_comparison
    from nodesieve.files import write_text
    from nodesieve.report.comparison import render
    from nodesieve.run import read_config

    names: Any = tuple(dict.fromkeys(filter(None, names_in(methods))))
    unknown = [name for name in names if name not in choices(MethodName)]
    if unknown or not names:
        raise UserError(f"--methods expects names among {', '.join(choices(MethodName))}, got {', '.join(unknown) or 'none'}")
    given = {"model": model, "task": task, "kl_budget": kl_budget, "levels": levels, "polish": polish}
    base = read_config(config_file).to_dict() if config_file else {}
    config = make_config({**base, **{name: value for name, value in given.items() if value is not None}})
    out = out or usual_place(config, prefix="compare-")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out expects a directory, got the file {str(out)!r}")
    range_of_seeds = range(config.seed, config.seed + seeds)
    with goes_on():
        found = run_comparison(
            config, out, methods=names, seeds=range_of_seeds, quiet=quiet, say=saying(quiet=quiet), trust_remote_code=trust_remote_code
        )
    write_text(out / "compare.html", render(found))
    print_comparison(
        found, title=f"{config.task} in {config.model}, KL budget {config.kl_budget:g}, means over {seeds} {'seed' if seeds == 1 else 'seeds'}"
    )
    print(f"comparison: {out / 'compare.html'}")
