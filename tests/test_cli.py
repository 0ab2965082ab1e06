"""The command line on tiny models: commands that read a run, bad input, Ctrl-C."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import chdir
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from command_line import NAMES, ctrl_c, few_prompts, nodesieve, prompts_of_names, quick_flags, row_of_names, write_rows
from conftest import tiny_model
from nodesieve.config import make_config
from nodesieve.console import ConsoleJournal
from nodesieve.errors import UserError
from nodesieve.models import LoadedModel
from nodesieve.run import load_run
from nodesieve.tasks import BUILTINS
from nodesieve.verify import Check


@pytest.mark.parametrize(
    "command", [["discover", "--out", ""], ["discover", "--resume", ""], ["evaluate", ""], ["export", "run", ""], ["report", "run", "--out", ""]]
)
def test_an_empty_path_is_not_the_current_directory(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert nodesieve(*command) == 2
    error = capsys.readouterr().err
    assert "expected a path, got an empty one" in error
    assert error.count("\n") == 1


def test_where_nothing_can_be_written_that_is_said(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert nodesieve("discover", "--model", model_directory, "--out", out, "--method", "random", "--keep", "0.3", "--quiet", *quick_flags()) == 0
    capsys.readouterr()
    for command in (["report", out, "--out", "/proc/report.html"], ["export", out, "/proc/circuit.json"]):
        assert nodesieve(*command) == 2
        error = capsys.readouterr().err
        assert error.startswith("nodesieve: expected")
        assert error.count("\n") == 1


def test_lines_of_progress_tell_the_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with ConsoleJournal(tmp_path, quiet=False) as journal:
        journal._bar.get_time = lambda: now
        for step in range(0, 201, 10):
            journal.progress(step, 200, kl=0.5)
            now += 31.0
    lines = capsys.readouterr().err.splitlines()
    assert "100/200 5:10 left KL 0.50" in lines
    assert lines[-1] == "200/200 KL 0.50"


def test_the_other_commands_read_a_run(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert (
        nodesieve("discover", "--model", model_directory, "--out", out, "--method", "gate_gradient", "--keep", "0.05", "--quiet", *quick_flags()) == 0
    )
    assert capsys.readouterr().out.strip() == str(out)
    assert nodesieve("nodes", out, "--level", "head_dim") == 0
    lines = capsys.readouterr().out.splitlines()
    kept = json.loads((out / "metrics.json").read_text())["nodes"]["head_dim"]["kept"]
    assert len(lines) == kept
    assert all(line.startswith("head_dim.") and float(line.split("\t")[1]) > 0 for line in lines)
    assert nodesieve("evaluate", out, "--split", "validation", "--json") == 0
    found = json.loads(capsys.readouterr().out)["circuit"]
    assert list(found) == ["validation"]
    assert found["validation"]["kl"] == pytest.approx(load_run(out).metrics["circuit"]["validation"]["kl"], rel=1e-4)
    assert nodesieve("evaluate", out, "--task", "gendered_pronoun", "--json") == 0
    assert json.loads(capsys.readouterr().out)["task"] == "gendered_pronoun"
    assert nodesieve("evaluate", out) == 0
    assert "kl_p95" in capsys.readouterr().out
    assert nodesieve("report", out, out, "--out", tmp_path / "both.html") == 0
    assert (tmp_path / "both.html").read_text().count("<h1>") == 2
    shutil.copytree(out, tmp_path / "copy")
    for directory in (out, tmp_path / "copy"):
        (directory / "report.html").unlink()
    assert nodesieve("report", out, tmp_path / "copy") == 0
    assert all(f"<h1>{name}" in (out / "report.html").read_text() for name in ("run", "copy"))
    assert not (tmp_path / "copy" / "report.html").exists()
    with chdir(tmp_path / "copy"):
        assert nodesieve("report", ".") == 0
    assert "<h1>copy" in (tmp_path / "copy" / "report.html").read_text()
    assert nodesieve("export", out, tmp_path / "mib.json") == 0
    assert json.loads((tmp_path / "mib.json").read_text())["edges"] == {}
    capsys.readouterr()
    config = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(config.replace("device: auto", "device: abacus"))  # as of a machine with another one
    assert nodesieve("export", out, tmp_path / "mib.json") == 2
    assert nodesieve("export", out, tmp_path / "mib.json", "--device", "cpu") == 0
    (out / "config.yaml").write_text(config)
    capsys.readouterr()
    assert nodesieve("export", out, tmp_path / "nowhere" / "mib.json") == 2
    assert "a directory that exists" in capsys.readouterr().err
    assert nodesieve("check-model", model_directory, "--dtype", "bfloat16") == 0
    assert "FAILED" not in capsys.readouterr().out
    shown = []
    for seed in (0, 1):
        assert nodesieve("tasks", "--model", model_directory, "--seed", seed) == 0
        shown.append(capsys.readouterr().out)
        assert "512 train" in shown[-1]
    assert shown[0] != shown[1]


def test_a_task_of_whose_words_a_model_knows_too_few_does_not_end_the_list(
    model_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, tokenizer: object, **options: object) -> None:
        raise UserError("expected more words")

    monkeypatch.setattr("nodesieve.tasks.load.load_task", refuse)
    assert nodesieve("tasks", "--model", model_directory) == 0
    assert capsys.readouterr().out.count("\n  not for this model: expected more words\n") == len(BUILTINS)


def test_a_model_that_fails_a_check_is_refused(model_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [Check(name="one", passed=True, detail=""), Check(name="another", passed=False, detail="off by 3")]
    monkeypatch.setattr("nodesieve.verify.verify", lambda gated: checks)
    assert nodesieve("check-model", model_directory) == 2
    told = capsys.readouterr()
    assert "ok     one\nFAILED another: off by 3" in told.out
    assert told.err == "nodesieve: 1 check failed; this model cannot be used as it is\n"


def test_nodes_of_all_levels_are_listed_and_those_that_were_not_scored_without_a_score(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["discover", "--model", model_directory, "--task", few_prompts(tmp_path), "--keep", "0.9", "--quiet"]
    assert nodesieve(*command, *quick_flags(method="random", levels="mlp_neuron")) == 0
    out = Path("runs") / f"{model_directory.name}-few"  # unless told otherwise
    assert capsys.readouterr().out == f"{out}\n"
    assert nodesieve("nodes", out) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(part["kept"] for part in json.loads((out / "metrics.json").read_text())["nodes"].values())
    assert all(line.startswith("mlp_neuron.") != line.endswith("\t") for line in lines)


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(model_directory, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    save_file({**weights, "v_head.weight": torch.ones(1, 32)}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert nodesieve("check-model", tmp_path / "model") == 0
    error = capsys.readouterr().err
    assert error.startswith("nodesieve: warning: ")
    assert error.endswith("has weights that are not of this model and are left out: v_head.weight\n")
    assert error.count("\n") == 1


def test_controls_are_kept_in_the_run_and_not_measured_twice(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, out = few_prompts(tmp_path), tmp_path / "run"
    command = ["discover", "--model", model_directory, "--task", task, "--out", out, "--method", "gate_gradient", "--keep", "0.3", "--quiet"]
    assert nodesieve(*command, *quick_flags()) == 0
    assert nodesieve("evaluate", out, "--ablation", "zero", "--json") == 0
    zero = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert zero["ablation"] == "zero"
    assert nodesieve("evaluate", out, "--draws", "2") == 2
    assert "--draws 2 expects --controls" in capsys.readouterr().err
    assert nodesieve("evaluate", out, "--controls", "--draws", "2", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["circuit"]["test"]["kl"] != zero["circuit"]["test"]["kl"]
    assert set(told["intervals"]["test"]) == set(told["circuit"]["test"])
    assert told["controls"]["random"]["count"] == told["controls"]["random_by_layer"]["count"] == 2
    assert told["controls"]["circuit"]["kl_mean"] == pytest.approx(told["circuit"]["test"]["kl"], rel=1e-5)
    (file,) = out.glob("controls-*.json")
    assert re.fullmatch(r"controls-few-[0-9a-f]{8}-test-counterfactual.json", file.name)
    kept = json.loads(file.read_text())
    kept["groups"]["random"]["0"]["kl"] = 77.0
    file.write_text(json.dumps(kept))
    assert nodesieve("evaluate", out, "--controls", "--draws", "3") == 0
    assert "77.000" in capsys.readouterr().out  # read, not measured again
    assert nodesieve("evaluate", out, "--controls", "--draws", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["controls"]["random"]["count"] == 1
    assert len(json.loads(file.read_text())["groups"]["random"]) == 3
    for name in ("circuit", "scores", "examples", "weights"):
        file.write_text(json.dumps({**kept, name: "another"}))
        assert nodesieve("evaluate", out, "--controls", "--draws", "2", "--json") == 0
        assert json.loads(capsys.readouterr().out)["controls"] == told["controls"]  # measured anew
    for content in ("no JSON", "[]"):
        file.write_text(content)
        assert nodesieve("evaluate", out, "--controls") == 2
        assert "remove it to start anew" in capsys.readouterr().err
    file.unlink()
    shown = {}
    for split, more in (("test", []), ("validation", ["--controls", "--draws", "1"])):
        assert nodesieve("evaluate", out, "--split", split, *more, "--size-curve", "--json") == 0
        shown[split] = json.loads(capsys.readouterr().out)
    measured = shown["validation"]["circuit"]["validation"]["kl"]
    assert shown["validation"]["controls"]["circuit"]["kl_mean"] == pytest.approx(measured, rel=1e-5) != told["circuit"]["test"]["kl"]
    assert shown["validation"]["size_curve"] != shown["test"]["size_curve"]
    with ctrl_c(lambda step, facts: True):
        assert nodesieve("evaluate", out, "--controls") == 130
    assert f"stopped; what was measured is in {file}; the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["discover", "--steps", "0"], "option steps: input should be greater than or equal to 1, got 0"),
        (["discover", "--steps", "many"], "'many' is not a valid integer"),
        (["discover", "--levels", "head,brain"], "mlp_output, embedding, got head, brain\n"),
        (["discover", "--penalties", "head"], "expected LEVEL=NUMBER pairs"),
        (["discover", "--penalties", "head=1,head=2"], "expected each level once, got 'head' twice"),
        (["discover", "--penalties", "brain=1"], "expected level names"),
        (["discover", "--penalties", "head=-1,layer=2"], "penalties expects numbers of at least 0, got head=-1\n"),
        (["discover", "--within", ".", "--method", "fisher"], "within expects method hybrid, sieve, multigranular, got fisher"),
        (["discover", "--kl-budget", "-1"], "greater than 0, got -1"),
        (["discover", "--method", "magic"], "'magic' is not one of"),
        (["discover", "--model", "no/such-model-here"], "could not load 'no/such-model-here'"),
        (["discover", "--model", "missing.gguf"], "expected a GGUF file, found none"),
        (["discover", "--task", "no-such-task"], "expected a built-in task (ioi, greater_than, gendered_pronoun, "),
        (["discover", "--device", "abacus"], "expected a device that torch has here"),
        (["discover", "--device", "meta"], "expected a device that computes"),
        (["discover", "--revision", "main"], "--revision expects a model on the hub"),
        (["discover", "--controller", "target_size", "--levels", "head,layer", "--force"], "steers the share of head_dim, mlp_neuron"),
        (["discover", "--keep", "0.1", "--levels", "mlp_neuron", "--force"], "which leave"),
        (["discover", "--resume", "nowhere"], "--resume expects the directory of an unfinished run"),
        (["discover", "--resume", "nowhere", "--seed", "1"], "--resume expects no other option of the run"),
        (["evaluate", "nowhere"], "expected a run's directory"),
        (["nodes", "nowhere"], "expected a run's directory"),
        (["report"], "Missing argument"),
        (["check-model", "no/such-model-here"], "could not load"),
        (["check-model", __file__], "expected a model directory or a .gguf file, got the file"),
        (["check-model", str(Path(__file__).parent)], "expected a model directory with a config.json, found none in"),
        (["fly"], "No such command 'fly'"),
        (["compare", "--task", "nope", "--methods", "random", "--out", "out"], "or a file, found neither under 'nope' in '/"),
        (["discover", "--task", ""], "or a file, found neither under ''"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "discover" and not {"--model", "--resume"} & set(arguments):
        arguments = [*arguments, "--model", str(model_directory)]
    assert nodesieve(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_knows_its_own_file_from_another_directory(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the path that it was given leads nowhere."""
    file, out = prompts_of_names(tmp_path / "task.jsonl"), tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    assert nodesieve("discover", "--model", model_directory, "--task", "task.jsonl", *quick_flags(), "--out", out, "--quiet") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert nodesieve("evaluate", out, "--task", file) == 0
    prompts_of_names(file, first=1)
    capsys.readouterr()
    assert nodesieve("evaluate", out, "--task", "../task.jsonl") == 2
    assert "examples that the run was made with" in capsys.readouterr().err


def test_no_command_at_all_gets_the_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert nodesieve() == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Usage: ")
    assert any(line.split()[:1] == ["discover"] for line in lines)


@pytest.mark.filterwarnings("default::nodesieve.errors.SeenPromptsWarning")
def test_what_is_measured_are_the_examples_of_the_run(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that are added to a file without splits cut it anew, and what was learned from may be test data then."""
    file, out = prompts_of_names(tmp_path / "task.jsonl"), tmp_path / "run"
    command = ["--model", model_directory, "--task", file, *quick_flags()]
    assert nodesieve("discover", *command, "--out", out, "--quiet") == 0
    with ctrl_c(lambda step, facts: "kl" in facts):
        assert nodesieve("discover", *command, "--out", tmp_path / "stopped") == 130
    assert nodesieve("evaluate", out) == 0
    fingerprints = json.loads((out / "circuit.json").read_text())["examples"]["fingerprints"]
    assert set(fingerprints) == {"train", "validation", "test"}
    prompts_of_names(file, first=1)
    capsys.readouterr()
    for again in (["evaluate", out], ["stability", out, "--seeds", "1"]):
        assert nodesieve(*again) == 2
        error = capsys.readouterr().err
        assert "examples that the run was made with" in error
        assert error.count("\n") == 1
    assert nodesieve("evaluate", out, "--task", f"{tmp_path}/../{tmp_path.name}/{file.name}") == 2  # the same file
    assert "examples that the run was made with" in capsys.readouterr().err
    assert nodesieve("discover", "--resume", tmp_path / "stopped") == 2
    assert "that the run in" in capsys.readouterr().err
    assert nodesieve("evaluate", out, "--task", "") == 2
    assert "expected a" in capsys.readouterr().err
    assert nodesieve("evaluate", out, "--task", prompts_of_names(tmp_path / "other.jsonl", first=1)) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert re.search(r"warning: 6 of the 8 test examples in .*other.jsonl' are of prompts that the circuit was searched or chosen on", warning)
    unseen = write_rows(tmp_path / "unseen.jsonl", (row_of_names(b, a) for a, b in pairwise(NAMES[:41])))
    assert nodesieve("evaluate", out, "--task", unseen) == 0
    assert capsys.readouterr().err == ""
    prompts_of_names(file)
    assert nodesieve("evaluate", out) == 0
    assert nodesieve("discover", "--resume", tmp_path / "stopped", "--quiet") == 0


def test_a_circuit_in_other_weights_is_measured_and_exported_with_a_word_about_it(
    loaded: LoadedModel, model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "run", tmp_path / "other"
    assert nodesieve("discover", "--model", model_directory, "--method", "random", "--out", out, "--quiet", *quick_flags()) == 0
    model = tiny_model("llama", vocabulary=len(loaded.tokenizer))
    model.get_input_embeddings().weight.data.mul_(1.5)
    model.save_pretrained(other)
    loaded.tokenizer.save_pretrained(other)
    capsys.readouterr()
    assert nodesieve("evaluate", out) == 0
    assert capsys.readouterr().err == ""
    assert nodesieve("export", out, tmp_path / "mib.json") == 0
    assert capsys.readouterr().err == ""
    for command in (
        ("evaluate", out),
        ("export", out, tmp_path / "mib.json"),
        ("export", out, tmp_path / "hf", "--format", "hf", "--ablation", "zero"),
    ):
        assert nodesieve(*command, "--model", other) == 0
        assert "are not those that the circuit was found in" in capsys.readouterr().err
    tiny_model("mixtral", vocabulary=len(loaded.tokenizer)).save_pretrained(tmp_path / "routed")
    loaded.tokenizer.save_pretrained(tmp_path / "routed")
    (tmp_path / "mib.json").unlink()
    for command in (("export", out, tmp_path / "mib.json"), ("evaluate", out)):
        assert nodesieve(*command, "--model", tmp_path / "routed") == 2
        assert "expected a circuit of this model, which has" in capsys.readouterr().err
    assert not (tmp_path / "mib.json").exists()
    tiny_model("gpt_neox", vocabulary=len(loaded.tokenizer)).save_pretrained(tmp_path / "parallel")
    loaded.tokenizer.save_pretrained(tmp_path / "parallel")
    for place, parallel in ((other, False), (tmp_path / "parallel", True)):
        assert nodesieve("export", out, tmp_path / "mib.json", "--model", place) == 0
        assert json.loads((tmp_path / "mib.json").read_text())["cfg"]["parallel_attn_mlp"] == parallel


def test_config_files_say_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    for content, message in (("speed: 3\n", "got 'speed'"), ("[1]\n", "expected options by name"), ("a: [\n", "got in line 2: ")):
        file.write_text(content)
        assert nodesieve("discover", "--config", file) == 2
        assert message in capsys.readouterr().err
    assert yaml.safe_load(yaml.safe_dump(make_config({}).to_dict())) == make_config({}).to_dict()
    assert make_config(make_config({"levels": "head,layer"}).to_dict()) == make_config({"levels": ["layer", "head"]})
