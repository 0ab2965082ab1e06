"""`nodesieve discover`: options from flags and files, the run in its directory, and what Ctrl-C leaves of it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import click

from nodesieve.cli.common import trust_remote_code_option
from nodesieve.config import DiscoverConfig, choices, default_of, make_config
from nodesieve.errors import EXIT_INTERRUPTED, UserError
from nodesieve.levels import LEVELS


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


@click.command("discover", short_help="Find the circuit of a task in a model.")
@click.option("--out", type=click.Path(path_type=Path), help="the run's directory  [default: runs/MODEL-TASK]")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="options from a run's config.yaml; flags come on top")
@click.option("--resume", type=click.Path(path_type=Path), help="go on with the unfinished run in this directory")
@click.option("--overwrite", is_flag=True, help="replace what a finished or unfinished run left in the directory")
@click.option("--quiet", is_flag=True, help="no progress, no table; only the directory is printed")
@trust_remote_code_option
@_config_options
def command(
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
