"""Ctrl-C and SIGTERM: what they leave of a run, by when they come."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from command_line import ctrl_c, few_prompts, nodesieve, quick_flags
from nodesieve.console import ConsoleJournal
from nodesieve.run import has_state, load_run


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("error", ["ImportError('half of it')", "UserError('could not load')", "KeyboardInterrupt"])
def test_ctrl_c_in_the_middle_of_an_import_is_no_error_of_its_own(error: str, number: str) -> None:
    program = f"""
import signal
from nodesieve import __main__, cli
from nodesieve.errors import UserError

def importing(**options):
    try:
        signal.raise_signal(signal.{number})
    except KeyboardInterrupt:
        raise {error} from None

signal.signal(signal.SIGINT, signal.default_int_handler)
cli.cli.main = importing
__main__.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


@pytest.mark.parametrize(
    ("method", "steps", "stop", "lines"),
    [("hybrid", 6, 3, 5), ("hybrid", 6, 5, 5), ("sieve", 45, 40, 3), ("sieve", 45, 5, 3), ("multigranular", 6, 3, 6)],
)
def test_ctrl_c_leaves_a_run_that_can_be_read_and_resumed(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, steps: int, stop: int, lines: int
) -> None:
    out = tmp_path / "run"
    command = ["discover", "--model", model_directory, "--task", few_prompts(tmp_path), "--out", out]
    with ctrl_c(lambda step, facts: "kl" in facts and step >= stop):
        assert nodesieve(*command, *quick_flags(method=method, steps=steps)) == 130
    assert f"--resume {out}" in capsys.readouterr().err.replace("\n", " ")
    assert not json.loads((out / "circuit.json").read_text())["complete"]
    assert nodesieve("evaluate", out) == 0
    assert "the run is unfinished" in capsys.readouterr().err
    assert nodesieve("nodes", out) == 0
    assert nodesieve("discover", "--resume", out) == 0
    assert json.loads((out / "circuit.json").read_text())["complete"]
    assert len((out / "history.jsonl").read_text().splitlines()) == lines
    assert nodesieve("discover", "--resume", out) == 2
    (out / "report.html").unlink()
    assert nodesieve("discover", "--resume", out) == 0  # as where it was stopped while that was drawn
    assert (out / "report.html").is_file()


def test_a_second_ctrl_c_does_not_wait_for_the_step(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def press(step: int, facts: Mapping[str, float]) -> bool:
        return "kl" in facts

    out = tmp_path / "run"
    command = ["discover", "--model", model_directory, "--task", few_prompts(tmp_path), "--out", out, *quick_flags(method="multigranular")]
    with ctrl_c(press), ctrl_c(press):
        assert nodesieve(*command) == 130
    assert capsys.readouterr().err.count("stopping after this step") == 1
    assert not has_state(out)
    assert nodesieve("discover", "--resume", out) == 0


@pytest.mark.parametrize("phase", ["selecting", "polishing", "evaluating"])
def test_ctrl_c_after_scoring_leaves_one_too(model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    out, whole, original = tmp_path / "run", tmp_path / "whole", ConsoleJournal.say
    command = ["discover", "--model", model_directory, "--task", few_prompts(tmp_path), *quick_flags(polish=True, levels="head")]
    assert nodesieve(*command, "--out", whole) == 0

    def say(self: ConsoleJournal, text: str) -> None:
        original(self, text)
        if text == phase:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(ConsoleJournal, "say", say)
        assert nodesieve(*command, "--out", out) == 130
    assert not json.loads((out / "circuit.json").read_text())["complete"]
    assert not (out / "metrics.json").exists()
    assert nodesieve("evaluate", out) == 0
    assert nodesieve("discover", "--resume", out) == 0
    assert load_run(out).circuit.fingerprint == load_run(whole).circuit.fingerprint


@pytest.mark.parametrize("method", ["activation_difference", "weight_magnitude"])
def test_ctrl_c_stops_methods_that_never_look_at_it_or_are_done_by_then(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    out, original = tmp_path / "run", ConsoleJournal.say

    def say(self: ConsoleJournal, text: str) -> None:
        original(self, text)
        if text == "scoring":
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(ConsoleJournal, "say", say)
        assert nodesieve("discover", "--model", model_directory, "--out", out, *quick_flags(method=method)) == 130
    assert not (out / "metrics.json").exists()
    assert not (out / "circuit.json").exists()  # nothing has cut the ranking yet
    assert nodesieve("discover", "--resume", out) == 0
    assert json.loads((out / "circuit.json").read_text())["complete"]


def test_a_signal_that_was_to_be_ignored_is(model_directory: Path, tmp_path: Path) -> None:
    """As SIGINT is in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ctrl_c(lambda step, facts: True):
            assert nodesieve("discover", "--model", model_directory, "--out", tmp_path / "run", *quick_flags(method="random")) == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_before_the_first_step_leaves_a_run_that_begins_anew(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with ctrl_c(lambda step, facts: not facts):  # examples of the first pass are counted without a KL
        assert nodesieve("discover", "--model", model_directory, "--out", out, *quick_flags(method="multigranular")) == 130
    assert f"--resume {out}" in capsys.readouterr().err.replace("\n", " ")
    assert not (out / "circuit.json").exists()
    assert nodesieve("discover", "--resume", out) == 0
    assert json.loads((out / "circuit.json").read_text())["complete"]
