"""`nodesieve discover` on tiny models: what a run leaves behind, what it says, what it leaves alone."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from command_line import ctrl_c, few_prompts, nodesieve, prompts_of_names, quick_flags
from nodesieve.cli.discover import ASIDE, _bring_back, _set_aside
from nodesieve.config import make_config
from nodesieve.errors import UserError
from nodesieve.levels import DEFAULT_LEVELS, LEVELS
from nodesieve.method_rows import readers_of
from nodesieve.run import FILES, load_run
from nodesieve.tasks.words import FEMALE_NAMES as NAMES


def test_prompts_whose_corrupted_ones_say_the_same_are_refused(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = few_prompts(tmp_path, corrupted="{a} and {b} went")
    command = ["discover", "--model", model_directory, "--task", file, "--out", tmp_path / "run", "--only-correct"]
    assert nodesieve(*command, *quick_flags(steps=1, force=False)) == 2
    assert "closing every node costs more than the KL budget of 0.25, got" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert nodesieve(*command[:-1], *quick_flags(steps=1)) == 0
    capsys.readouterr()
    assert nodesieve("evaluate", tmp_path / "run") == 0
    assert "test data (13 examples)" in " ".join(capsys.readouterr().out.split())


def test_skipped_pairs_are_counted_and_one_is_shown(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "task.jsonl", tmp_path / "run"
    pairs = [(f"{a} and {b} went", f"{b} and {a} went" + " to" * (i % 3 == 0)) for i, (a, b) in enumerate(pairwise(NAMES[:40]))]
    file.write_text("".join(json.dumps({"clean": c, "corrupted": d, "answers": " Mary", "distractors": " Kyle"}) + "\n" for c, d in pairs), "utf-8")
    assert nodesieve("discover", "--model", model_directory, "--task", file, "--out", out, *quick_flags(steps=1)) == 0
    counts = json.loads((out / "circuit.json").read_text())["examples"]["splits"]
    assert sum(part["skipped_unequal_length"] for part in counts.values()) == 13
    error = capsys.readouterr().err
    assert all(f"skipped in {split}, e.g.: '" in error for split, part in counts.items() if part["skipped_unequal_length"])


def test_a_refused_run_leaves_nothing_that_looks_like_one(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    for _ in range(2):
        assert nodesieve("discover", "--model", model_directory, "--out", out, *quick_flags(force=False)) == 2
        assert "expected a full model that does the task" in capsys.readouterr().err
    assert not out.exists()


def test_what_is_given_chooses_the_method_be_it_at_its_default(model_directory: Path, tmp_path: Path) -> None:
    for place, flags in (("asked", {"method": "auto"}), ("left", {})):
        assert nodesieve("discover", "--model", model_directory, "--out", tmp_path / place, *quick_flags(controller="kl_budget", **flags)) == 0
        assert load_run(tmp_path / place).config.method == "multigranular"


@pytest.mark.parametrize(("method", "kind", "steps"), [("sieve", "score", [6]), ("multigranular", "log_alpha", [1, 2, 3, 4, 5, 6])])
def test_a_run_leaves_every_file_of_the_contract(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, kind: str, steps: list[int]
) -> None:
    out = tmp_path / "run"
    assert nodesieve("discover", "--model", model_directory, "--task", "ioi", "--out", out, *quick_flags(method=method)) == 0
    printed = capsys.readouterr().out
    assert "all ablated" in printed
    assert str(out / "report.html") in printed.replace("\n", "")
    assert sorted(path.name for path in out.iterdir()) == [
        "circuit.json",
        "circuit.safetensors",
        "config.yaml",
        "history.jsonl",
        "metrics.json",
        "report.html",
    ]
    tensors = load_file(out / "circuit.safetensors")
    assert all(tensors[level].dtype == torch.uint8 for level in LEVELS if level != "expert")
    assert "expert" not in tensors
    assert all(
        tensors[f"{kind}.{level}"].dtype == torch.float32 and tensors[f"{kind}.{level}"].shape == tensors[level].shape
        for level in DEFAULT_LEVELS
        if level != "expert"
    )
    metrics, circuit = json.loads((out / "metrics.json").read_text()), json.loads((out / "circuit.json").read_text())
    assert {"nodes", "parameters", "full", "circuit", "ablated", "budget", "steps", "seconds", "peak_memory_bytes", "device"} <= set(metrics)
    assert {"kl", "kl_p95", "accuracy", "logit_diff", "exact_match", "faithfulness"} <= set(metrics["circuit"]["test"])
    assert metrics["ablated"]["test"]["faithfulness"] in (0.0, None)
    assert circuit["format_version"] == 1
    assert {"model", "ablation", "levels", "thresholds", "task", "seed", "counts", "versions", "examples"} <= set(circuit)
    assert all(part["kept"] == int(tensors[level].sum()) for level, part in metrics["nodes"].items())
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == steps
    assert {"loss", "kl", "penalty", "open", "lambda", "seconds"} <= set(rows[0])

    again = tmp_path / "again"
    assert nodesieve("discover", "--config", out / "config.yaml", "--out", again, "--quiet") == 0
    assert all(torch.equal(tensor, load_file(again / "circuit.safetensors")[name]) for name, tensor in tensors.items())


def test_a_run_is_not_overwritten_unless_asked(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("model: x\n")
    assert nodesieve("discover", "--model", model_directory, "--out", tmp_path, *quick_flags()) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == "model: x\n"
    assert nodesieve("discover", "--model", model_directory, "--out", tmp_path, "--overwrite", "--quiet", *quick_flags()) == 0


@pytest.mark.parametrize("flags", [["--kl-budget", "100"], ["--within", "nowhere"], ["--within", "run"], ["--device", "abacus"]])
def test_a_refused_run_leaves_the_one_that_was_there(
    model_directory: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["discover", "--model", model_directory, "--task", prompts_of_names(tmp_path / "task.jsonl"), "--out", "run"]
    assert nodesieve(*command, "--quiet", *quick_flags()) == 0
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    capsys.readouterr()
    quick = quick_flags(force=False) if "--kl-budget" in flags else quick_flags()
    assert nodesieve(*command, "--overwrite", *flags, *(["--only-correct"] if "--kl-budget" in flags else []), *quick) == 2
    assert "nodesieve: " in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before
    Path("run/controls-task-test-counterfactual.json").write_text("{}")
    assert nodesieve(*command, "--overwrite", "--quiet", *quick_flags(seed=1)) == 0
    assert load_run("run").config.seed == 1
    assert {path.name for path in Path("run").iterdir()} == set(before)  # nor is left what was measured of the other


@pytest.mark.parametrize("begun", [False, True])
def test_what_a_killed_run_was_to_replace_comes_back_unless_that_had_begun(
    model_directory: Path, tmp_path: Path, begun: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["discover", "--model", model_directory, "--task", prompts_of_names(tmp_path / "task.jsonl"), "--out", tmp_path / "run"]
    assert nodesieve(*command, "--quiet", *quick_flags()) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    aside = tmp_path / "run" / f"{ASIDE}x"  # as SIGKILL leaves it
    aside.mkdir()
    for name in before:
        (tmp_path / "run" / name).rename(aside / name)
    (tmp_path / "run" / "config.yaml").write_text("seed: 7\n")
    if begun:
        (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert nodesieve(*command, *quick_flags()) == 2
    err = capsys.readouterr().err
    assert "already holds a run" in err
    assert ("what was there is back" in err) == (not begun)
    assert not aside.exists()
    assert ({path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before) == (not begun)


@pytest.mark.parametrize("name", [".moving-x", ".before-x"])
def test_what_held_nothing_is_not_said_to_be_back(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.yaml").write_text("")
    _bring_back(tmp_path)
    assert "what was there is back" in capsys.readouterr().err
    (tmp_path / ".moving-x").mkdir()
    _bring_back(tmp_path)
    assert capsys.readouterr().err == ""
    (tmp_path / "empty").mkdir()
    with _set_aside(tmp_path / "empty") as replaces:
        assert not replaces
        assert not any((tmp_path / "empty").iterdir())


class Killed(BaseException):
    pass


@pytest.mark.parametrize("error", [Killed, OSError])
@pytest.mark.parametrize("after", range(2 * len(FILES) + 2))
def test_a_run_that_gives_way_is_whole_again_whenever_that_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], after: int
) -> None:
    """On its way aside, and on its way back from there."""
    before = {name: f"the old {name}" for name in FILES}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    renames, rename = 0, Path.rename

    def stopped(path: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames > after and (error is Killed or renames == after + 1):  # nothing more is done by what was killed; a disk may fail once
            raise error(5, "failed")
        return rename(path, target)

    def replacing() -> None:
        with _set_aside(tmp_path):
            (tmp_path / "config.yaml").write_text("the new")
            raise Killed  # before there is anything to go on from

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stopped)
        with pytest.raises((Killed, UserError, OSError)):
            replacing()
    _bring_back(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_nothing_is_set_aside_where_nothing_was(model_directory: Path, tmp_path: Path) -> None:
    """A run that is killed would leave the folder."""
    seen: list[set[str]] = []

    def looks(step: int, facts: object) -> bool:
        seen.append({path.name for path in tmp_path.iterdir()})
        return False

    flags = ["--model", model_directory, "--out", tmp_path, *quick_flags()]
    with ctrl_c(looks):
        assert nodesieve("discover", *flags, "--quiet") == 0
        fresh, seen = seen, []
        assert nodesieve("discover", *flags, "--quiet", "--overwrite") == 0
    assert fresh
    assert not any(name.startswith(".before-") for names in fresh for name in names)
    assert any(name.startswith(".before-") for names in seen for name in names)


def test_what_a_user_should_know_of_a_run_is_told(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = prompts_of_names(tmp_path / "task.jsonl"), tmp_path / "run"
    file.write_text(file.read_text() + file.read_text().splitlines()[0] + "\n")
    command = ["discover", "--model", model_directory, "--task", file, "--out", out, "--controller", "kl_budget"]
    assert nodesieve(*command, *quick_flags(redraws=2)) == 0
    error = " ".join(capsys.readouterr().err.split())
    assert "left out for being there twice: 1" in error
    assert "only 8 validation examples decide" in error
    assert "--train-size has no effect on prompts of one's own" in error
    assert "--redraws has no effect on prompts of one's own" in error
    assert load_run(out).config.method == "multigranular"  # as any controller asks for, be it the default one
    assert json.loads((out / "circuit.json").read_text())["examples"]["duplicates"] == 1
    assert "Left out for being there twice: 1" in (out / "report.html").read_text()
    assert nodesieve("discover", "--config", out / "config.yaml", "--method", "sieve", "--out", tmp_path / "other", "--quiet") == 0
    assert load_run(tmp_path / "other").config.penalties == make_config({"method": "sieve"}).penalties


def test_help_says_what_numbers_levels_have_and_so_does_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert nodesieve("discover", "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the sieve's [default: head=2,head_dim=2.5,mlp_output=1 and 1.5 for the others]" in said
    assert "learning rate of each level's log_alpha [default: 0.05 for all levels]" in said
    page = (Path(__file__).parents[1] / "docs" / "method.md").read_text("utf-8").partition("## Prices")[2].partition("##")[0]
    named, *rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|") and "---" not in line]
    assert {method for first, *_ in rows for method in first.split("`, `")} == set(readers_of("penalties"))
    for first, *numbers in rows:
        for method in first.split("`, `"):
            penalties = make_config({"method": method}).penalties
            others = [x for level, x in penalties.items() if level not in named]
            assert numbers == [f"{penalties[level]:g}" for level in named[1:-1]] + [f"{others[0]:g}"]
            assert len(set(others)) == 1
