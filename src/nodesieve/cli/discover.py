"""`nodesieve discover`: options from flags and files, the run in its directory, and what Ctrl-C leaves of it."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, get_type_hints

import click

from nodesieve.cli.common import PATH, trust_remote_code_option, usual_place
from nodesieve.config import DiscoverConfig, choices, default_of, make_config
from nodesieve.errors import EXIT_INTERRUPTED, STOPS, UserError
from nodesieve.files import alone_in
from nodesieve.levels import LEVELS
from nodesieve.method_rows import METHOD_ROWS, PER_LEVEL, method_for

if TYPE_CHECKING:
    from nodesieve.run import Run


USUAL = {**PER_LEVEL, "penalties": METHOD_ROWS[method_for(())].penalties}
# What directories are called in which a run waits that another is to take the place of: while files are on their way there or back, none is anywhere
# else, so they may be moved back whatever happened; once all are there, what lies outside is the other run's.
MOVING, ASIDE = ".moving-", ".before-"


def _config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One flag for each field of DiscoverConfig; None means "not given", so that --config and defaults can fill it."""
    hints = get_type_hints(DiscoverConfig)
    for field in reversed(fields(DiscoverConfig)):
        info: Any = field.default  # pydantic's FieldInfo
        allowed, default = choices(hints[field.name]), default_of(field)
        shown = ",".join(default) if isinstance(default, tuple) else _in_short(USUAL[field.name]) if field.name in USUAL else default
        note = f"  [default: {shown}]" if shown not in (None, "") and not isinstance(shown, bool) else ""
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


def _in_short(numbers: Mapping[str, float]) -> str:
    """Numbers by level, but for the levels that have the same as most."""
    most, _ = Counter(numbers.values()).most_common(1)[0]
    apart = [f"{level}={x:g}" for level, x in numbers.items() if x != most]
    return f"{','.join(apart)} and {most:g} for the others" if apart else f"{most:g} for all levels"


class PerLevelType(click.ParamType):  # type: ignore[type-arg]
    """`head=1,layer=0.3` -> {"head": 1.0, "layer": 0.3}."""

    name = "level=number,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, float]:
        if isinstance(value, dict):
            return value
        out = {}
        for part in value.split(","):
            name, _, number = part.partition("=")
            level = name.strip()
            if level in out:
                self.fail(f"expected each level once, got {level!r} twice", param, ctx)
            try:
                out[level] = float(number)
            except ValueError:
                self.fail(f"expected LEVEL=NUMBER pairs such as head=1,layer=0.3 (levels: {', '.join(LEVELS)}), got {part!r}", param, ctx)
        return out


@click.command("discover", short_help="Find the circuit of a task in a model.")
@click.option("--out", type=PATH, help="the run's directory  [default: runs/MODEL-TASK]")
@click.option("--config", "config_file", type=PATH, help="options from a run's config.yaml; flags come on top")
@click.option("--resume", type=PATH, help="go on with the unfinished run in this directory")
@click.option("--overwrite", is_flag=True, help="replace the finished or unfinished run in the directory; stability/ stays")
@click.option("--quiet", is_flag=True, help="no progress, no table; only the directory is printed")
@trust_remote_code_option
@_config_options
def command(
    out: Path | None, config_file: Path | None, resume: Path | None, overwrite: bool, quiet: bool, trust_remote_code: bool, **options: Any
) -> None:
    """Find the smallest set of nodes of a model that alone reproduces what the model says on a task."""
    from nodesieve.run import CONFIG, REPORT, file_of_a_run, is_finished, load_run, read_config

    given = {name: value for name, value in options.items() if value is not None}
    if resume is not None:
        if given or config_file or out or overwrite:
            raise UserError("--resume expects no other option of the run, since it repeats them; only --quiet and --trust-remote-code go with it")
        if not (resume / CONFIG).is_file():
            raise UserError(f"--resume expects the directory of an unfinished run, found no {CONFIG} in {str(resume)!r}")
        directory = resume
    else:
        # The method goes by what is given, be it at its default.
        if given.get("method") == "auto" and not config_file:
            del given["method"]
        config = read_config(config_file).changed(given) if config_file else make_config(given)
        directory = out or usual_place(config)
        if directory.is_file():
            raise UserError(f"--out expects a directory, got the file {str(directory)!r}")
        if config.within is not None and directory.resolve() == Path(config.within).resolve():
            raise UserError(f"--within expects the directory of another run than --out, got {str(directory)!r} for both")
    with alone_in(directory):
        _bring_back(directory)
        if resume is None:
            used = file_of_a_run(directory)
            if used is not None and not overwrite:
                raise UserError(
                    f"{str(directory)!r} already holds a run ({used}); choose another --out, or add --overwrite, or --resume {quote(str(directory))}"
                )
        else:
            config = read_config(resume)
            if is_finished(directory):
                if not (directory / REPORT).is_file():  # it was stopped while that was drawn
                    print(f"report: {_report(directory, load_run(directory))}")
                    return
                raise UserError(f"the run in {str(resume)!r} is finished; nothing to resume")
        _discover(config, directory, fresh=resume is None, quiet=quiet, trust_remote_code=trust_remote_code)


def _discover(config: DiscoverConfig, directory: Path, *, fresh: bool, quiet: bool, trust_remote_code: bool) -> None:
    from nodesieve.console import ConsoleJournal, print_summary
    from nodesieve.discovery import Interrupted
    from nodesieve.discovery import discover as run_discovery
    from nodesieve.models import model_of
    from nodesieve.run import resuming, write_config
    from nodesieve.tasks.load import task_of

    loaded = model_of(config, trust_remote_code=trust_remote_code)
    task = task_of(config, loaded.tokenizer)
    room = _set_aside(directory) if fresh else nullcontext(False)
    with room as replaces, ConsoleJournal(directory, quiet=quiet) as journal, _stop_on_interrupt(journal):
        if fresh:
            write_config(directory, config)
        try:
            run = run_discovery(loaded, task, config, journal=journal)
        except KeyboardInterrupt as interrupted:
            if isinstance(interrupted, Interrupted):
                interrupted.run.save(directory, overwrite=True)
            back = replaces and not _has_begun(directory)
            end = "before there was anything to go on from; what was there is back" if back else f"go on with: {resuming(directory)}"
            print(f"stopped{' ' if back else '; '}{end}", file=sys.stderr)
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
    run.save(directory, overwrite=True)
    report = _report(directory, run)
    if quiet:
        print(directory)
    else:
        print_summary(run)
        print(f"report: {report}")


def _has_begun(directory: Path) -> bool:
    """Is there something of a run that goes on, or of its circuit?"""
    from nodesieve.run import CIRCUIT, has_state

    return has_state(directory) or (directory / CIRCUIT).is_file()


def _report(directory: Path, run: Run) -> Path:
    """Draw the run's report into its directory."""
    from nodesieve.files import write_text
    from nodesieve.report.page import render
    from nodesieve.run import REPORT

    write_text(directory / REPORT, render([(directory.resolve().name, run)]))
    return directory / REPORT


def _bring_back(directory: Path) -> None:
    """What was there before a run that was to take its place and was killed with nothing to go on from."""
    back = False
    for moving in directory.glob(f"{MOVING}*"):
        back = any(moving.iterdir()) or back
        _move_back(moving, directory)
    for aside in directory.glob(f"{ASIDE}*"):
        if not _has_begun(directory):
            _put_back(aside, directory)
            back = True
        shutil.rmtree(aside, ignore_errors=True)
    if back:
        print(f"a run that was to replace the one in {str(directory)!r} was killed before it had begun; what was there is back", file=sys.stderr)


def _put_back(aside: Path, directory: Path) -> None:
    """Takes away what a run leaves that has not begun, and brings back what was set aside for it, if there was anything."""
    from nodesieve.run import CONFIG, HISTORY

    for name in (CONFIG, HISTORY):
        (directory / name).unlink(missing_ok=True)
    if aside.is_dir():
        _move_back(_renamed(aside, MOVING), directory)


def _move_back(moving: Path, directory: Path) -> None:
    for path in moving.iterdir():
        path.rename(directory / path.name)
    moving.rmdir()


def _renamed(place: Path, prefix: str) -> Path:
    return place.rename(place.with_name(prefix + place.name.partition("-")[2]))


@contextmanager
def _set_aside(directory: Path) -> Iterator[bool]:
    """Makes room for a run in `directory` -> was there another? What that one has left goes for good only once the new one is done, or was stopped
    with something to go on from; where it is refused or stopped before that, all is as it was."""
    from nodesieve.run import CONTROLS, FILES

    try:
        moving = Path(tempfile.mkdtemp(dir=directory, prefix=MOVING))
        try:
            for path in (*(directory / name for name in FILES), *directory.glob(CONTROLS)):
                if path.is_file():
                    path.rename(moving / path.name)
        except BaseException:
            _move_back(moving, directory)
            raise
        replaces = any(moving.iterdir())
        if replaces:
            aside = _renamed(moving, ASIDE)
        else:
            moving.rmdir()  # so that a run that is killed leaves nothing of it
            aside = moving
    except OSError as error:
        raise UserError(f"--out expects a directory that can be written, got {str(directory)!r}: {error.strerror}") from error
    try:
        yield replaces
    except BaseException as error:
        stopped = isinstance(error, click.exceptions.Exit)  # a run that was stopped is gone on with from its config alone
        if not _has_begun(directory) and (replaces or not stopped):
            _put_back(aside, directory)
        else:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _stop_on_interrupt(journal: Any) -> Iterator[None]:
    """While scoring, the first Ctrl-C or SIGTERM asks the run to stop after its step; a second one, or one later on, stops at once."""
    from nodesieve.journal import SCORING

    def stop(signum: int, frame: object) -> None:
        if journal.stopping or journal.phase != SCORING:
            raise KeyboardInterrupt
        journal.stopping = True
        print("stopping after this step", file=sys.stderr)

    heeded = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]  # SIGINT is not in the background of a shell
    before = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
