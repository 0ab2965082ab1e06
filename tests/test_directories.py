"""A run's directory: one process at a time, the options that the run began with, and what was there before."""

from __future__ import annotations

import io
import json
import shutil
import signal
import threading
from pathlib import Path

import pytest
import yaml

from command_line import ctrl_c, few_prompts, nodesieve, quick_flags
from nodesieve import spawn
from nodesieve.config import make_config
from nodesieve.errors import UserError
from nodesieve.files import alone_in
from nodesieve.run import load_run, read_config, write_config


def test_one_process_at_a_time_is_at_work_in_a_directory(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["discover", "--model", model_directory, "--task", few_prompts(tmp_path), "--out", out, *quick_flags()]
    with alone_in(out):
        assert nodesieve(*command) == 2
        assert nodesieve(*command, "--overwrite") == 2
    assert capsys.readouterr().err.count("expected a directory in which no run is under way") == 2
    assert not out.exists()  # it was made for nothing
    with ctrl_c(lambda step, facts: "kl" in facts):
        assert nodesieve(*command) == 130
    with alone_in(out):
        assert nodesieve("discover", "--resume", out) == 2
    assert nodesieve("discover", "--resume", out) == 0
    assert not (out / ".lock").exists()


def test_a_comparison_does_not_tidy_up_after_another(model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn, "_call", lambda arguments: 2)
    place, config = tmp_path / "random-0", make_config({"model": str(model_directory), "method": "random"})
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with alone_in(place):
            held.set()
            done.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(60)
    with pytest.raises(UserError, match="failed; its own message is above"):
        spawn.ensure_run(place, config)
    assert read_config(place) == config
    done.set()
    other.join()
    with pytest.raises(UserError, match="failed; its own message is above"):
        spawn.ensure_run(place, config)
    assert not place.exists()


@pytest.mark.parametrize(("number", "said"), [(signal.SIGKILL, "SIGKILL, as the system does where memory runs out$"), (signal.SIGSEGV, "SIGSEGV$")])
def test_a_run_that_the_system_killed_is_said_to_be(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    monkeypatch.setattr(spawn, "_call", lambda arguments: -number)
    with pytest.raises(UserError, match=f"was killed by {said}"):
        spawn.ensure_run(tmp_path / "random-0", make_config({"model": str(model_directory), "method": "random"}))


def test_a_run_of_its_own_process_takes_no_module_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "statistics.py").write_text("raise SystemExit('taken from here')")
    monkeypatch.chdir(tmp_path)
    assert spawn._call(["discover", "--task", "nope", "--model", "nowhere/here"]) == 2
    assert "taken from here" not in capfd.readouterr().err


def test_a_run_to_stay_within_is_the_same_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config({"within": str(tmp_path / "outer")})
    write_config(tmp_path, config)
    spawn._refuse_others(tmp_path, make_config({"within": "outer"}))
    for other in ("another", None):
        with pytest.raises(UserError, match="expected a run with within"):
            spawn._refuse_others(tmp_path, make_config({"within": other}))


@pytest.mark.parametrize("changed", [{"method": "multigranular"}, {"seed": 5}, {"ablation": "mean"}, {"kl_budget": 0.1}, {"levels": ["head"]}])
def test_a_run_goes_on_with_the_options_that_it_began_with(
    model_directory: Path, tmp_path: Path, changed: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with ctrl_c(lambda step, facts: "kl" in facts and step >= 40):
        flags = quick_flags(steps=64, method="sieve")
        assert nodesieve("discover", "--model", model_directory, "--task", few_prompts(tmp_path), "--out", out, *flags) == 130
    config = yaml.safe_load((out / "config.yaml").read_text())
    (out / "config.yaml").write_text(yaml.safe_dump({**config, **changed}))
    capsys.readouterr()
    assert nodesieve("discover", "--resume", out) == 2
    assert f"expected the option {next(iter(changed))} that the run in" in capsys.readouterr().err
    (out / "config.yaml").write_text(yaml.safe_dump({**config, "cache_limit": 0.0}))  # of no consequence
    assert nodesieve("discover", "--resume", out) == 0


def test_stopped_before_there_is_anything_the_run_that_was_there_is_back(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["discover", "--model", model_directory, "--task", few_prompts(tmp_path), "--out", out, "--quiet"]
    assert nodesieve(*command, *quick_flags()) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    with ctrl_c(lambda step, facts: not facts):  # examples of the first pass are counted without a KL
        assert nodesieve(*command, "--overwrite", *quick_flags(method="multigranular", seed=1)) == 130
    assert "what was there is back" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with ctrl_c(lambda step, facts: "kl" in facts):
        assert nodesieve(*command, "--overwrite", *quick_flags(seed=1)) == 130
    assert "go on with" in capsys.readouterr().err
    assert nodesieve("discover", "--resume", out, "--quiet") == 0
    assert load_run(out).config.seed == 1


def test_the_command_that_goes_on_can_be_pasted(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my run"
    with ctrl_c(lambda step, facts: "kl" in facts):
        assert nodesieve("discover", "--model", model_directory, "--task", few_prompts(tmp_path), "--out", out, *quick_flags()) == 130
    assert f"nodesieve discover --resume '{out}'" in capsys.readouterr().err


def test_an_export_is_not_written_over_the_run(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    command = ["discover", "--model", model_directory, "--task", few_prompts(tmp_path), "--out", out, "--quiet"]
    assert nodesieve(*command, *quick_flags(method="random")) == 0
    before = json.loads((out / "circuit.json").read_text())
    assert nodesieve("export", out, out / "circuit.json") == 2
    other = shutil.copytree(out, tmp_path / "other")
    assert nodesieve("export", out, other / "circuit.json") == 2
    assert nodesieve("report", out, "--out", other / "metrics.json") == 2
    assert capsys.readouterr().err.count("expects another file than those of a run") == 3
    assert json.loads((out / "circuit.json").read_text()) == before
    assert nodesieve("export", out, out / "mib.json") == 0
    (tmp_path / "empty").mkdir()
    assert nodesieve("export", out, tmp_path / "empty" / "circuit.json") == 0  # where no run is, it is a name like any other


def test_letters_that_the_terminal_has_not_are_written_otherwise(model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    command = ["discover", "--model", model_directory, "--task", few_prompts(tmp_path), "--out", tmp_path / "für"]
    assert nodesieve(*command, *quick_flags(method="random")) == 0
    terminal.seek(0)
    assert "f\\xfcr" in terminal.read()
