"""The command line, run in the process of the tests, and flags that make a run short."""

from __future__ import annotations

import pytest

from nodesieve import cli

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
