"""Discoveries in processes of their own, one after another: what each needs in memory is then its own, and a finished one is never made again."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nodesieve.config import DiscoverConfig
from nodesieve.errors import EXIT_INTERRUPTED, STOPS, UserError
from nodesieve.files import absent, alone_in, read_json, remove_empty
from nodesieve.models import LoadedModel, model_of
from nodesieve.run import (
    CIRCUIT,
    CONFIG,
    DESCRIPTION,
    REPORT,
    has_state,
    is_finished,
    load_run,
    read_config,
    refuse_other_examples,
    weights_of,
    write_config,
)
from nodesieve.tasks import BUILTINS
from nodesieve.tasks.base import Task
from nodesieve.tasks.load import task_of
from nodesieve.tasks.readers import read_task
from nodesieve.tasks.rows import refuse_records


def ensure_run(directory: Path, config: DiscoverConfig, *, quiet: bool = False, trust_remote_code: bool = False) -> None:
    """`nodesieve discover` into `directory`, unless that has been done; an unfinished run is gone on with.

    Raises:
        UserError: the directory holds a run with other options, or the run failed.
        KeyboardInterrupt: the run was stopped.
    """
    if (directory / CONFIG).is_file():
        _refuse_others(directory, config)
        refuse_what_changed(directory, config)
    if is_finished(directory) and (directory / REPORT).is_file():
        return
    flags = ["--quiet"] if quiet else []
    made = absent(directory)
    if has_state(directory) or is_finished(directory):  # of the latter the report is left to draw
        flags += ["--resume", str(directory)]
    else:
        directory.mkdir(parents=True, exist_ok=True)
        write_config(directory, config)
        flags += ["--config", str(directory / CONFIG), "--out", str(directory), "--overwrite"]
    flags += ["--trust-remote-code"] if trust_remote_code else []
    code = _call(["discover", *flags])
    if code in (EXIT_INTERRUPTED, *(-number for number in STOPS)):  # the latter where it was about to begin or to end, and may be finished
        raise KeyboardInterrupt
    if code:
        with suppress(UserError), alone_in(directory):  # unless another process makes this very run
            if not is_finished(directory) and not has_state(directory):  # refused before it began: nothing is left in the way of other options
                (directory / CONFIG).unlink(missing_ok=True)
        remove_empty(made or [directory])
        said = "failed; its own message is above"
        if code < 0:
            number = signal.Signals(-code)
            said = f"was killed by {number.name}{', as the system does where memory runs out' if number == signal.SIGKILL else ''}"
        raise UserError(f"the run in {str(directory)!r} {said}")


def refuse_what_changed(directory: Path, config: DiscoverConfig) -> None:
    """Raise UserError where the file of prompts that the run in `directory` was made with holds others now, or the run of --within has another
    circuit."""
    refuse_records(config.task)
    if not (directory / DESCRIPTION).is_file():
        return
    description = read_json(directory / DESCRIPTION)
    if config.task not in BUILTINS:
        refuse_other_examples(description, read_task(config.task, seed=config.seed_of_data))
    if config.within is not None and (Path(config.within) / CIRCUIT).is_file():
        outer = load_run(config.within).circuit.fingerprint
        if description.get("within", outer) != outer:
            raise UserError(
                f"expected the circuit in {config.within!r} that the run in {str(directory)!r} was searched within, got another; bring it back, or "
                "choose another directory"
            )


def refuse_changed_inputs(directories: Sequence[Path], config: DiscoverConfig, *, trust_remote_code: bool = False) -> None:
    """Raise UserError unless all finished runs are of the same weights and, where some are still to be made, these are the model's now and the task's
    examples are those that they were made with."""
    done = {place: read_json(place / DESCRIPTION) for place in directories if is_finished(place)}
    known = {place: weights for place, description in done.items() if (weights := weights_of(description))}
    if not done:
        return
    first, weights = next(iter(known.items()), (directories[0], None))
    for place, own in known.items():
        if own != weights:
            raise UserError(
                f"expected runs of the same weights, got others in {str(place)!r} than in {str(first)!r}: side by side they say nothing of either "
                "model; remove those of the weights that are not wanted, or choose another directory"
            )
    if len(done) == len(directories):
        return
    loaded = model_of(config, trust_remote_code=trust_remote_code)  # held for the moment only, not beside the runs
    refuse_other_weights(loaded, weights, of=first)
    drawn: dict[tuple[int, ...], Task] = {}
    for place, description in done.items():
        made = read_config(place)
        if made.task != config.task:  # which `ensure_run` refuses
            continue
        options = (made.seed_of_data, made.train_size, made.validation_size, made.redraws)
        if options not in drawn:
            drawn[options] = task_of(made, loaded.tokenizer)
        try:
            refuse_other_examples(description, drawn[options])
        except UserError as error:
            raise UserError(f"in {str(place)!r}: {error}") from error


def refuse_other_weights(loaded: LoadedModel, weights: str | None, *, of: Path) -> None:
    """Raise UserError unless the weights, which the run in `of` was made with, are the model's now; old runs do not say theirs."""
    if weights not in (None, loaded.fingerprint):
        raise UserError(
            f"expected the weights of {loaded.id!r} that the run in {str(of)!r} was made with, got others: runs and measurements of both say "
            "nothing of either model; bring the weights back, or choose another directory"
        )


def _call(arguments: list[str]) -> int:
    """`nodesieve` in another process -> its exit code. Each Ctrl-C or SIGTERM here stops that one, which is given the time to save its state.

    -P: no module is taken from the current directory, whatever is called as one of ours or Python's there.
    """
    process = subprocess.Popen([sys.executable, "-P", "-m", "nodesieve", *arguments], stdout=subprocess.DEVNULL, start_new_session=True)  # noqa: S603
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGTERM)  # heeded in the background of a shell, too


def _refuse_others(directory: Path, config: DiscoverConfig) -> None:
    there, wanted = read_config(directory).to_dict(), config.to_dict()
    for options in (there, wanted):
        options["within"] = options["within"] and str(Path(options["within"]).resolve())  # however it is written
    differing = [name for name in wanted if there[name] != wanted[name]]
    if differing:
        name = differing[0]
        raise UserError(
            f"expected a run with {name} = {wanted[name]!r} in {str(directory)!r}, found one with {there[name]!r}; "
            "choose another directory or remove it"
        )
