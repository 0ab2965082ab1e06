"""The command line: parse, call, print. Heavy imports happen inside the commands, so that --help is quick.

Exit codes: 0 success, 2 bad input (one line, no traceback), 130 stopped by Ctrl-C with the run resumable.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import click

from nodesieve import __version__
from nodesieve.config import AblationName, DiscoverConfig, MethodName, choices, default_of, make_config
from nodesieve.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, UnknownFamilyWarning, UserError
from nodesieve.levels import LEVELS


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


def _config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One flag for each field of DiscoverConfig; None means "not given", so that --config and defaults can fill it."""
    hints = get_type_hints(DiscoverConfig)
    for field in reversed(fields(DiscoverConfig)):
        info: Any = field.default  # pydantic's FieldInfo
        allowed, default = choices(hints[field.name]), default_of(field)
        shown = ",".join(default) if isinstance(default, tuple) else default
        note = f"  [default: {shown}]" if shown not in (None, "", {}) and not isinstance(shown, bool) else ""
        flag = "--" + field.name.replace("_", "-")
        if hints[field.name] == bool | None:
            command = click.option(f"{flag}/--no-{flag[2:]}", field.name, default=None, help=info.description)(command)
            continue
        if isinstance(default, bool):
            command = click.option(flag, field.name, is_flag=True, default=None, help=info.description)(command)
            continue
        if isinstance(default, dict):
            kind: Any = PerLevelType()
        elif allowed:
            kind = click.Choice(allowed)
        else:
            kind = {int: int, float: float}.get(type(default)) or {float | None: float, int | None: int}.get(hints[field.name], str)
        command = click.option(flag, field.name, type=kind, default=None, help=info.description + note)(command)
    return command


class PerLevelType(click.ParamType):  # type: ignore[type-arg]
    """`head=1,layer=0.3` -> {"head": 1.0, "layer": 0.3}."""

    name = "level=number,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, float]:
        if isinstance(value, dict):
            return value
        out = {}
        for part in value.split(","):
            level, _, number = part.partition("=")
            try:
                out[level.strip()] = float(number)
            except ValueError:
                self.fail(f"expected LEVEL=NUMBER pairs such as head=1,layer=0.3 (levels: {', '.join(LEVELS)}), got {part!r}", param, ctx)
        return out


@cli.command(short_help="Find the circuit of a task in a model.")
@click.option("--out", type=click.Path(path_type=Path), help="the run's directory  [default: runs/MODEL-TASK]")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="options from a run's config.yaml; flags come on top")
@click.option("--resume", type=click.Path(path_type=Path), help="go on with the unfinished run in this directory")
@click.option("--overwrite", is_flag=True, help="replace what a finished or unfinished run left in the directory")
@click.option("--quiet", is_flag=True, help="no progress, no table; only the directory is printed")
@click.option("--trust-remote-code", is_flag=True, help="run Python code that comes with a model from the hub")
@_config_options
def discover(
    out: Path | None, config_file: Path | None, resume: Path | None, overwrite: bool, quiet: bool, trust_remote_code: bool, **options: Any
) -> None:
    """Find the smallest set of nodes of a model that alone reproduces what the model says on a task."""
    from nodesieve.run import DESCRIPTION, METRICS, STATES, has_state, read_config

    given = {name: value for name, value in options.items() if value is not None}
    if resume is not None:
        if given or config_file or out:
            raise UserError("--resume expects no other option of the run, since it repeats them; only --quiet goes with it")
        if not (resume / "config.yaml").is_file():
            raise UserError(f"--resume expects the directory of an unfinished run, found no config.yaml in {str(resume)!r}")
        config, directory = read_config(resume), resume
        if (directory / METRICS).is_file() and not has_state(directory):
            raise UserError(f"the run in {str(resume)!r} is finished; nothing to resume")
    else:
        base = read_config(config_file).to_dict() if config_file else {}
        config = make_config({**base, **given})
        directory = out or Path("runs") / f"{Path(config.model).stem}-{Path(config.task).stem}"
        used = [name for name in (METRICS, DESCRIPTION, *STATES.values(), "config.yaml") if (directory / name).exists()]
        if used and not overwrite:
            raise UserError(f"{str(directory)!r} already holds a run ({used[0]}); choose another --out, or add --overwrite, or --resume {directory}")
        if directory.is_file():
            raise UserError(f"--out expects a directory, got the file {str(directory)!r}")
    _discover(config, directory, fresh=resume is None, quiet=quiet, trust_remote_code=trust_remote_code)


def _discover(config: DiscoverConfig, directory: Path, *, fresh: bool, quiet: bool, trust_remote_code: bool) -> None:
    from nodesieve.console import ConsoleJournal, print_summary
    from nodesieve.discovery import Interrupted
    from nodesieve.discovery import discover as run_discovery
    from nodesieve.models import model_of
    from nodesieve.report.page import render
    from nodesieve.run import CIRCUIT, DESCRIPTION, HISTORY, METRICS, REPORT, STATES, has_state, write_config, write_text
    from nodesieve.tasks.load import task_of

    loaded = model_of(config, trust_remote_code=trust_remote_code)
    task = task_of(config, loaded.tokenizer)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if fresh:
            for name in (METRICS, DESCRIPTION, CIRCUIT, HISTORY, REPORT, *STATES.values()):
                (directory / name).unlink(missing_ok=True)
            write_config(directory, config)
    except OSError as error:
        raise UserError(f"--out expects a directory that can be written, got {str(directory)!r}: {error.strerror}") from error
    with ConsoleJournal(directory, quiet=quiet) as journal, _stop_on_interrupt(journal):
        try:
            run = run_discovery(loaded, task, config, journal=journal)
        except UserError:
            if fresh and not has_state(directory):  # refused before it began: leave nothing that looks like a run
                (directory / "config.yaml").unlink(missing_ok=True)
                with suppress(OSError):
                    directory.rmdir()  # if nothing else is in it
            raise
        except KeyboardInterrupt as interrupted:
            if isinstance(interrupted, Interrupted):
                interrupted.run.save(directory)
                (directory / METRICS).unlink(missing_ok=True)
            print(f"stopped; go on with: nodesieve discover --resume {directory}", file=sys.stderr)
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
    run.save(directory)
    write_text(directory / REPORT, render([(directory.name, run)]))
    for name in STATES.values():
        (directory / name).unlink(missing_ok=True)
    if quiet:
        print(directory)
    else:
        print_summary(run)
        print(f"report: {directory / REPORT}")


@contextmanager
def _stop_on_interrupt(journal: Any) -> Iterator[None]:
    """While scoring, the first Ctrl-C asks the run to stop after its step; a second one, or one later on, stops at once."""

    def stop(signum: int, frame: object) -> None:
        if journal.stopping or journal.phase != "scoring":
            raise KeyboardInterrupt
        journal.stopping = True
        print("stopping after this step", file=sys.stderr)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_RUN = click.argument("directory", type=click.Path(path_type=Path))


@cli.command(short_help="Measure a run's circuit, on its own task or another.")
@_RUN
@click.option("--task", help="a built-in task or a file; by default the run's own")
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", show_default=True)
@click.option("--model", help="the model, where it has moved since the run")
@click.option("--device", help="torch device; by default the run's own")
@click.option("--ablation", type=click.Choice(choices(AblationName)), help="what closed nodes hold; by default as in the run")
@click.option("--controls", "with_controls", is_flag=True, help="measure random, complementary and smaller circuits beside it; see docs/evidence.md")
@click.option("--draws", default=100, show_default=True, type=click.IntRange(1), help="random circuits of each kind, for --controls")
@click.option("--trust-remote-code", is_flag=True, help="run Python code that comes with a model from the hub")
@click.option("--size-curve", "with_curve", is_flag=True, help="measure circuits of ten sizes cut from the run's scores; see docs/evidence.md")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def evaluate(
    directory: Path,
    task: str | None,
    split: Any,
    model: str | None,
    device: str | None,
    ablation: Any,
    with_controls: bool,
    draws: int,
    with_curve: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Measure the circuit in DIRECTORY on the test data of its own task, or of another with --task."""
    import json

    from nodesieve.console import ConsoleJournal, print_controls, print_evaluation, print_size_curve
    from nodesieve.controls import controls_file, controls_kept_in, summary
    from nodesieve.evaluation import evaluate_circuit, problem_of
    from nodesieve.models import model_of
    from nodesieve.run import load_run
    from nodesieve.size_curve import size_curve
    from nodesieve.tasks.load import task_of

    run = load_run(directory)
    loaded = model_of(run.config, model=model, device=device, trust_remote_code=trust_remote_code)
    examples = task_of(run.config, loaded.tokenizer, task=task)
    problem = problem_of(loaded, examples, run, splits=(split,), ablation=ablation)
    evaluation = evaluate_circuit(problem, run.circuit, splits=(split,))
    title = f"{directory} on {examples.name}, {split} data, {problem.ablation_name} ablation"
    shown = asdict(evaluation)
    if not as_json:
        print_evaluation(evaluation, title=title)
    if with_curve:
        shown["size_curve"] = size_curve(problem, run.scores, split=split, budget=run.config.kl_budget)
        if not as_json:
            print_size_curve(shown["size_curve"], title="circuits cut from the run's scores")
    if with_controls:
        path = controls_file(directory, task=problem.task.name, split=split, ablation=problem.ablation_name)
        with ConsoleJournal(directory, quiet=as_json) as journal, _goes_on(f"what was measured is in {path}; "):
            found = summary(controls_kept_in(path, run, problem, split=split, draws=draws, journal=journal))
        shown["controls"] = found
        if not as_json:
            print_controls(found, title="other circuits, measured alike")
    if as_json:
        print(json.dumps({"task": examples.name, "ablation": problem.ablation_name, **shown}, indent=2))


@contextmanager
def _goes_on(kept: str = "") -> Iterator[None]:
    """Around work that keeps what it has done: Ctrl-C ends the command and says that it can be given again."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped; {kept}the same command goes on", file=sys.stderr)
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None


@cli.command(short_help="The run again with other seeds on resampled data: what is found every time?")
@_RUN
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1), help="further runs")
@click.option("--agree", type=click.IntRange(1), help="runs that must keep a node for the consensus to keep it  [default: more than half of all]")
@click.option("--quiet", is_flag=True, help="no progress")
@click.option("--trust-remote-code", is_flag=True, help="run Python code that comes with a model from the hub")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def stability(directory: Path, seeds: int, agree: int | None, quiet: bool, trust_remote_code: bool, as_json: bool) -> None:
    """Repeat the run in DIRECTORY, compare what was kept by level, and measure the circuit that the runs agree on."""
    import json

    from nodesieve.console import print_agreement, print_evaluation
    from nodesieve.evaluation import evaluate as measure
    from nodesieve.models import model_of
    from nodesieve.run import load_run, write_json
    from nodesieve.stability import agreement, consensus, repeat
    from nodesieve.tasks.load import task_of

    run = load_run(directory)
    if not run.metrics:
        raise UserError(f"expected a finished run in {str(directory)!r}; go on with: nodesieve discover --resume {directory}")
    at_least = agree or (1 + seeds) // 2 + 1
    if at_least > 1 + seeds:
        raise UserError(f"--agree expects at most {1 + seeds}, the number of runs, got {at_least}")
    with _goes_on():
        runs = [run, *repeat(run, directory / "stability", count=seeds, quiet=quiet, trust_remote_code=trust_remote_code)]
    circuits = [one.circuit for one in runs]
    shared = consensus(circuits, at_least=at_least)
    loaded = model_of(run.config, trust_remote_code=trust_remote_code)
    evaluation = measure(loaded, task_of(run.config, loaded.tokenizer), replace(run, circuit=shared))
    found = {
        "runs": len(runs),
        "levels": agreement(circuits),
        "consensus": {
            "at_least": at_least,
            "size": shared.size,
            "nodes": {level: shared.kept(level) for level in shared.nodes.levels},
            **asdict(evaluation),
        },
    }
    write_json(directory / "stability.json", found)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_agreement(found, title=f"{len(runs)} runs like {directory}")
        print_evaluation(
            evaluation, title=f"nodes kept by at least {at_least} of {len(runs)} runs ({100 * shared.size:.1f}% of the leaves), test data"
        )


@cli.command(short_help="Methods side by side on one model and task.")
@click.option("--model", help="as for discover  [default: smollm2-135m]")
@click.option("--task", help="as for discover  [default: ioi]")
@click.option("--methods", required=True, help="names with commas between them, e.g. sieve,multigranular,gate_gradient")
@click.option("--budget", type=float, help="KL budget in nats  [default: 0.25]")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1), help="runs of each method: seeds 0, 1, ...")
@click.option("--polish/--no-polish", default=None, help="polish the circuit of every method, as is the default, or of none")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="further options, as in a run's config.yaml")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="directory for the runs and the comparison")
@click.option("--quiet", is_flag=True, help="no progress; only the table")
@click.option("--trust-remote-code", is_flag=True, help="run Python code that comes with a model from the hub")
def compare(
    model: str | None,
    task: str | None,
    methods: str,
    budget: float | None,
    seeds: int,
    polish: bool | None,
    config_file: Path | None,
    out: Path,
    quiet: bool,
    trust_remote_code: bool,
) -> None:
    """Find the circuit of one task by several methods, each through the same selection, and compare what they keep. Finished runs are kept."""
    from nodesieve.compare import compare as run_comparison
    from nodesieve.console import print_comparison
    from nodesieve.report.comparison import render
    from nodesieve.run import read_config, write_text

    names: Any = tuple(dict.fromkeys(name for name in methods.split(",") if name))
    unknown = [name for name in names if name not in choices(MethodName)]
    if unknown or not names:
        raise UserError(f"--methods expects names among {', '.join(choices(MethodName))}, got {', '.join(unknown) or 'none'}")
    given = {"model": model, "task": task, "kl_budget": budget, "polish": polish}
    base = read_config(config_file).to_dict() if config_file else {}
    config = make_config({**base, **{name: value for name, value in given.items() if value is not None}})
    if out.exists() and not out.is_dir():
        raise UserError(f"--out expects a directory, got the file {str(out)!r}")

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr)

    with _goes_on():
        found = run_comparison(config, out, methods=names, seeds=range(seeds), quiet=quiet, say=say, trust_remote_code=trust_remote_code)
    write_text(out / "compare.html", render(found))
    print_comparison(
        found, title=f"{config.task} in {config.model}, KL budget {config.kl_budget:g}, means over {seeds} {'seed' if seeds == 1 else 'seeds'}"
    )
    print(f"comparison: {out / 'compare.html'}")


@cli.command(short_help="Write report.html for one run, or one page for several.")
@click.argument("directories", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="the page  [default: report.html in the first directory]")
def report(directories: tuple[Path, ...], out: Path | None) -> None:
    """Write a self-contained HTML page about the runs in DIRECTORIES."""
    from nodesieve.report.page import render
    from nodesieve.run import REPORT, load_run, write_text

    page = render([(directory.name or str(directory), load_run(directory)) for directory in directories])
    target = out or directories[0] / REPORT
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"--out expects a file in a directory that exists, got {str(target)!r}")
    write_text(target, page)
    print(target)


@cli.command(short_help="The kept nodes of a run by name, with their scores.")
@_RUN
@click.option("--level", "levels", multiple=True, type=click.Choice(list(LEVELS)), help="only this level; may be given more than once")
def nodes(directory: Path, levels: tuple[str, ...]) -> None:
    """Print the kept nodes of the circuit in DIRECTORY, one a line: canonical name, tab, score (nothing for a level without scores)."""
    from nodesieve.run import load_run

    run = load_run(directory)
    for level in levels or run.circuit.nodes.levels:
        for index in run.circuit.masks[level].nonzero().tolist():
            score = f"{float(run.scores.values[level][tuple(index)]):.4g}" if level in run.scores.levels else ""
            name = run.circuit.nodes.name(level, tuple(index))
            click.echo(f"{name}\t{score}")


@cli.command(short_help="A run's circuit in the file of another tool.")
@_RUN
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "kind", type=click.Choice(["mib"]), default="mib", show_default=True, help="mib: Mechanistic Interpretability Benchmark")
@click.option("--model", help="the model, where it has moved since the run")
def export(directory: Path, out: Path, kind: str, model: str | None) -> None:
    """Write the circuit in DIRECTORY to the file OUT: its heads and MLPs, with scores."""
    from nodesieve.interop import to_mib
    from nodesieve.models import model_of
    from nodesieve.run import load_run, write_json
    from nodesieve.verify import gate, is_parallel

    run = load_run(directory)
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"OUT expects a file in a directory that exists, got {str(out)!r}")
    loaded = model_of(run.config, model=model)
    write_json(out, to_mib(run.circuit, run.scores, parallel=is_parallel(gate(loaded.model))))
    print(out)


@cli.command("check-model", short_help="Check that gates fit a model, and list its levels.")
@click.argument("model")
@click.option("--revision", help="branch, tag or commit on the hub")
@click.option("--device", default="auto", show_default=True, help="torch device")
@click.option("--trust-remote-code", is_flag=True, help="run Python code that comes with a model from the hub")
def check_model(model: str, revision: str | None, device: str, trust_remote_code: bool) -> None:
    """Load MODEL, run it with all gates open, closed and in between, and say whether everything is as it must be."""
    from nodesieve.architectures import is_known
    from nodesieve.console import print_levels
    from nodesieve.gated_model import GatedModel
    from nodesieve.models import load_model
    from nodesieve.verify import gate, verify

    loaded = load_model(model, revision=revision, device=device, trust_remote_code=trust_remote_code)
    gated = GatedModel(loaded.model) if is_known(loaded.model) else gate(loaded.model)
    print_levels(gated.architecture, title=f"{model} ({loaded.model.config.model_type})")
    failed = []
    for check in verify(gated):
        print(f"{'ok    ' if check.passed else 'FAILED'} {check.name}{'' if check.passed else ': ' + check.detail}")
        failed += [] if check.passed else [check.name]
    if failed:
        raise UserError(f"{len(failed)} checks failed; this model cannot be used as it is")


@cli.command(short_help="List the built-in tasks.")
@click.option("--model", help="show examples as they are drawn for this model's tokenizer")
@click.option("--seed", default=0, show_default=True, type=int)
def tasks(model: str | None, seed: int) -> None:
    """List the built-in tasks; with --model, with examples."""
    from nodesieve.tasks import BUILTINS

    loaded = None
    if model is not None:
        from nodesieve.models import load_model

        loaded = load_model(model)
    for builtin in BUILTINS.values():
        print(f"{builtin.name:18} {builtin.description}")
        if loaded is not None:
            from nodesieve.tasks.load import load_task

            task = load_task(builtin.name, loaded.tokenizer, seed=seed)
            print("  " + ", ".join(f"{len(examples)} {split}" for split, examples in task.splits.items()))
            for example in task.splits["validation"][:2]:
                print(f"    clean      {example.clean!r}\n    corrupted  {example.corrupted!r}")
                print(f"    answers    {', '.join(map(repr, example.answers))}   distractors {', '.join(map(repr, example.distractors))}")
