"""The command line, run in the process of the tests, and flags that make a run short."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from nodesieve import cli
from nodesieve.console import ConsoleJournal
from nodesieve.tasks.base import SPLITS
from nodesieve.tasks.words import FEMALE_NAMES as NAMES

FEW = {"train_size": 32, "validation_size": 64, "redraws": 1}  # examples of a built-in task
QUICK = {**FEW, "steps": 6, "batch_size": 4, "force": True, "polish": False}


def nodesieve(*arguments: object) -> int:
    """Run the command line in this process -> its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["nodesieve", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def few_prompts(directory: Path, *, corrupted: str = "{b} and {a} went") -> Path:
    """A task file with 13 examples in each split, of names a and b, for what takes long with the hundreds of a built-in task."""
    rows = (row_of_names(a, b, corrupted=corrupted, split=SPLITS[i % 3]) for i, (a, b) in enumerate(pairwise(NAMES[:40])))
    return write_rows(directory / "few.jsonl", rows)


def prompts_of_names(file: Path, *, first: int = 0) -> Path:
    """A file of 40 prompts without splits."""
    return write_rows(file, (row_of_names(a, b) for a, b in pairwise(NAMES[first : first + 41])))


def row_of_names(a: str, b: str, *, corrupted: str = "{b} and {a} went", **more: str) -> dict[str, str]:
    return {"clean": f"{a} and {b} went", "corrupted": corrupted.format(a=a, b=b), "answers": f" {a}", "distractors": f" {b}", **more}


def write_rows(file: Path, rows: Iterable[Mapping[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file


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
