"""The command line, run in the process of the tests, and flags that make a run short."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest

from nodesieve import cli
from nodesieve.console import ConsoleJournal

QUICK = {"steps": 6, "train_size": 32, "batch_size": 4, "force": True, "polish": False}


def nodesieve(*arguments: object) -> int:
    """Run the command line in this process -> its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["nodesieve", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def quick_flags(**more: object) -> list[str]:
    flags: list[str] = []
    for name, value in {**QUICK, **more}.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "polish":
            flags.append(flag if value else "--no-polish")
        else:
            flags += [flag] * bool(value) if isinstance(value, bool) else [flag, str(value)]
    return flags


@contextmanager
def ctrl_c(when: Callable[[int, Mapping[str, float]], bool]) -> Iterator[None]:
    """Press Ctrl-C whenever progress is told and `when(step, facts)` holds."""
    original = ConsoleJournal.progress

    def progress(self: ConsoleJournal, step: int, total: int, **facts: float) -> None:
        original(self, step, total, **facts)
        if when(step, facts):
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConsoleJournal, "progress", progress)
        yield
