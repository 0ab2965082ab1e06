"""What several commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nodesieve.errors import EXIT_INTERRUPTED, UserError

if TYPE_CHECKING:
    from nodesieve.config import DiscoverConfig
    from nodesieve.models import LoadedModel
    from nodesieve.run import Run


def usual_place(config: DiscoverConfig, *, prefix: str = "") -> Path:
    """Where what is found goes if nobody says."""
    return Path("runs") / f"{prefix}{Path(config.model).name.removesuffix('.gguf')}-{Path(config.task).stem}"


class _Given(click.Path):
    """A path that is not empty, as a variable of the shell that is not set makes it: that would be the current directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("expected a path, got an empty one", param, ctx)
        return super().convert(value, param, ctx)


PATH = _Given(path_type=Path)
run_argument = click.argument("directory", type=PATH)
trust_remote_code_option = click.option("--trust-remote-code", is_flag=True, help="run Python code that comes with a model from the hub")


def saying(*, quiet: bool) -> Callable[[str], None]:
    """Tells what begins, unless nothing is to be told."""
    return (lambda text: None) if quiet else partial(print, file=sys.stderr)


@contextmanager
def goes_on(kept: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Around work that keeps what it has done: Ctrl-C ends the command and says that it can be given again, after what `kept` says by then."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped; {kept()}the same command goes on", file=sys.stderr)
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None


def refuse_files_of_runs(path: Path, *directories: Path, what: str) -> None:
    """Raise UserError where `path` is a file of a run: of one in `directories`, or of one that lies where `path` does."""
    from nodesieve.run import file_of_a_run, is_of_a_run

    around = path.resolve().parent
    if any(is_of_a_run(path, directory) for directory in (*directories, *([around] if file_of_a_run(around) else []))):
        raise UserError(f"{what} expects another file than those of a run, got {str(path)!r}")


def model_of_run(run: Run, *, model: str | None = None, device: str | None = None, trust_remote_code: bool = False) -> LoadedModel:
    """The model that a run's circuit is to be put into, with a word where its weights are not those that it was found in."""
    from nodesieve.models import model_of

    loaded = model_of(run.config, model=model, device=device, trust_remote_code=trust_remote_code)
    if not run.was_found_in(loaded.fingerprint):
        print(f"the weights of {loaded.id} are not those that the circuit was found in", file=sys.stderr)
    return loaded
