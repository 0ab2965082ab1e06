"""A run's files: written whole, and refused in one line where they are no run's."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nodesieve as ns
from command_line import FEW, QUICK, nodesieve
from nodesieve.config import make_config
from nodesieve.files import write_text
from nodesieve.models import LoadedModel
from nodesieve.run import is_finished


@pytest.mark.parametrize(
    ("name", "part", "content", "message"),
    [
        ("circuit.json", "format_version", 99, "expected a run of format 1"),
        ("circuit.json", "format_version", "1", "expected a whole number under format_version in .*, got '1'"),
        ("circuit.json", "thresholds", {}, "found nothing under thresholds"),
        ("circuit.json", "thresholds", [1], "expected a JSON object under thresholds"),
        ("metrics.json", "size", "0.1", "expected a number under size"),
        ("circuit.json", "examples", None, "found nothing under examples"),
        ("metrics.json", "full", None, "found nothing under full"),
    ],
)
def test_files_that_are_no_runs_are_refused(finished: Path, tmp_path: Path, name: str, part: str, content: object, message: str) -> None:
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), part: content}))
    with pytest.raises(ns.UserError, match=message):
        ns.load_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("circuit.json", "{}", "found nothing under format_version"),
        ("history.jsonl", "1\n", "expected a JSON object with a step a line in .*, got 1"),
        ("circuit.safetensors", None, "found none in '[^;]*$"),  # the run is finished, so nothing is said of going on
    ],
)
def test_files_of_a_run_that_hold_nothing_are_refused(finished: Path, tmp_path: Path, name: str, content: str | None, message: str) -> None:
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ns.UserError, match=message):
        ns.load_run(tmp_path / "run")


def test_files_are_whole_or_not_there_and_as_readable_as_the_user_has_it(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    before = os.umask(0o077)
    try:
        write_text(path, "old")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "n" * 100_000 + "\ud800")  # fails in the middle
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_all_files_of_a_run_are_as_readable_as_its_text(finished: Path, tmp_path: Path) -> None:
    ns.load_run(finished).save(tmp_path / "run")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "run").iterdir()}
    assert len(modes) > 3
    assert set(modes.values()) == {modes["circuit.json"]}


def test_a_run_is_not_saved_over_another_unless_that_is_said(finished: Path, tmp_path: Path) -> None:
    run, out = ns.load_run(finished), tmp_path / "run"
    run.save(out)
    told = ("report.html", "size_curve.json", "stability.json")
    for name in told:
        (out / name).write_text("of what was here")
    with pytest.raises(ns.UserError, match=r"already holds a run .metrics.json.; choose another directory, or save with overwrite=True"):
        run.save(out)
    assert all((out / name).is_file() for name in told)
    run.save(out, overwrite=True)
    assert not any((out / name).exists() for name in told)
    with pytest.raises(ns.UserError, match="expected a directory that can be made"):
        run.save(out / "metrics.json")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("head_dim", (6,), "expected a circuit's tensors in .*, got other shapes"),
        ("mlp_output", (3,), "expected a circuit's tensors in .*, got other shapes"),
        ("layer", (2,), r"expected layer of \(3,\) in .*, got \(2,\)"),
        ("score.head", (3, 1), r"expected score.head of \(3, 4\) in .*, got \(3, 1\)"),
    ],
)
def test_circuits_of_other_shapes_are_refused(finished: Path, tmp_path: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "circuit.safetensors"
    tensors = load_file(path)
    save_file({**tensors, name: torch.ones(shape, dtype=tensors[name].dtype)}, path)
    with pytest.raises(ns.UserError, match=message):
        ns.load_run(tmp_path / "run")


def test_a_report_of_files_that_lack_something_is_refused_in_one_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished, tmp_path / "run")
    description = json.loads((tmp_path / "run" / "circuit.json").read_text())
    del description["versions"]
    (tmp_path / "run" / "circuit.json").write_text(json.dumps(description))
    assert nodesieve("report", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "expected whole files of a run in" in error
    assert error.count("\n") == 1


def test_a_run_made_in_python_says_how_its_examples_were_drawn(loaded: LoadedModel, model_directory: Path, tmp_path: Path) -> None:
    few = {**FEW, "seed": 3}
    task = ns.load_task("ioi", loaded.tokenizer, **few)
    options = {name: value for name, value in QUICK.items() if name not in FEW}
    run = ns.discover(ns.load_model(model_directory), task, make_config({**options, "method": "random"}))
    assert run.config.seed_of_data == 3
    run.save(tmp_path / "run")
    assert nodesieve("evaluate", tmp_path / "run") == 0


def test_a_run_made_in_python_says_which_revision_was_asked_for(loaded: LoadedModel) -> None:
    """And no other one, whatever the options say."""
    task, config = ns.load_task("ioi", loaded.tokenizer, **FEW), make_config({**QUICK, "method": "random", "revision": "v1"})
    assert ns.discover(replace(loaded, revision="c0ffee", asked="v2"), task, config).config.revision == "v2"
    assert ns.discover(replace(loaded, revision="sha256:c0ffee"), task, config).config.revision is None


def test_a_finished_run_leaves_nothing_to_go_on_from(finished: Path, tmp_path: Path) -> None:
    """Of another run that was there, unfinished."""
    for name in ("checkpoint.safetensors", "polishing.safetensors"):
        (tmp_path / name).write_bytes(b"")
    ns.load_run(finished).save(tmp_path, overwrite=True)
    assert is_finished(tmp_path)


def test_an_unfinished_run_is_not_taken_for_a_finished_one(finished: Path, tmp_path: Path) -> None:
    run = ns.load_run(finished)
    run.save(tmp_path)
    replace(run, metrics={}).save(tmp_path, overwrite=True)
    assert not is_finished(tmp_path)
    assert not ns.load_run(tmp_path).metrics


@pytest.mark.parametrize("method", ["gate_gradient", "random"])
def test_scores_have_one_fingerprint_wherever_they_come_from(loaded: LoadedModel, tmp_path: Path, method: str) -> None:
    run = ns.discover(loaded, ns.load_task("ioi", loaded.tokenizer, **FEW), make_config({**QUICK, "method": method}))
    run.save(tmp_path)
    assert ns.load_run(tmp_path).scores.fingerprint == run.scores.fingerprint


@pytest.fixture(scope="module")
def finished(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    ns.discover(loaded, ns.load_task("ioi", loaded.tokenizer, **FEW), make_config({**QUICK, "method": "random"})).save(out)
    return out
