"""Several runs of one thing: stability and comparison, each run in a process of its own."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nodesieve as ns
from command_line import FEW, QUICK, few_prompts, nodesieve, quick_flags, row_of_names, write_rows
from nodesieve import spawn
from nodesieve.circuit import Circuit
from nodesieve.config import SEEDS, make_config
from nodesieve.console import print_summary
from nodesieve.controls import complement
from nodesieve.levels import LEVELS
from nodesieve.models import LoadedModel
from nodesieve.nodes import NodeSpace
from nodesieve.report import comparison
from nodesieve.report.page import render
from nodesieve.report.tables import tables
from nodesieve.stability import agreement, chance, consensus, consensus_run, jaccard, repeat

NODES = NodeSpace(layers=2, heads=3, head_dim=4, neurons=10, width=6)


def random_circuit(seed: int) -> Circuit:
    generator = torch.Generator().manual_seed(seed)
    return Circuit.of({level: torch.rand(NODES.shape(level), generator=generator) < 0.8 for level in LEVELS}, NODES)


def test_jaccard_and_chance() -> None:
    a, b = random_circuit(0), random_circuit(1)
    shared = int((a.masks["mlp_neuron"] & b.masks["mlp_neuron"]).sum())
    assert jaccard(a, b, "mlp_neuron") == pytest.approx(shared / (a.kept("mlp_neuron") + b.kept("mlp_neuron") - shared))
    assert jaccard(a, a, "head") == 1
    assert chance(10, 10, 10) == 1
    assert chance(50, 50, 100) == pytest.approx(25 / 75, rel=0.01)
    assert chance(0, 0, 5) == 1
    assert chance(0, 3, 5) == 0
    assert chance(1, 1, 270) == pytest.approx(1 / 270)  # the same node, or none
    assert chance(2, 2, 4) == pytest.approx(1 / 6 + 4 / 6 / 3)  # both, one of them, or neither
    draws = [len(set(torch.randperm(1000)[:300].tolist()) & set(torch.randperm(1000)[:200].tolist())) for _ in range(200)]
    assert chance(300, 200, 1000) == pytest.approx(sum(shared / (500 - shared) for shared in draws) / 200, rel=0.05)
    c = random_circuit(2)
    found = agreement([a, b, c])["head_dim"]
    indices = [jaccard(*pair, "head_dim") for pair in ((a, b), (a, c), (b, c))]
    assert (found["lowest"], found["highest"]) == (min(indices), max(indices))
    assert found["jaccard"] == pytest.approx(sum(indices) / 3)
    kept = [circuit.kept("head_dim") for circuit in (a, b, c)]
    assert found["chance"] == pytest.approx(sum(chance(kept[i], kept[j], NODES.count("head_dim")) for i, j in ((0, 1), (0, 2), (1, 2))) / 3)


def test_consensus_keeps_what_enough_runs_keep_and_is_closed() -> None:
    circuits = [random_circuit(seed) for seed in range(3)]
    everything, nothing_missing = consensus(circuits, at_least=1), consensus(circuits, at_least=3)
    for level in LEVELS:
        masks = torch.stack([circuit.masks[level] for circuit in circuits])
        assert torch.equal(everything.masks[level], masks.any(0))
        assert bool((~nothing_missing.masks[level] | masks.all(0)).all())
    most = consensus(circuits, at_least=2)
    votes = torch.stack([circuit.masks["head_dim"] for circuit in circuits]).sum(0)
    assert bool((~most.masks["head_dim"] | (votes >= 2)).all())
    assert nothing_missing.kept("head_dim") < most.kept("head_dim") < everything.kept("head_dim")
    assert consensus(circuits[:1] * 3, at_least=3).fingerprint == circuits[0].fingerprint


def test_a_consensus_is_held_to_the_budget_on_validation_data(loaded: LoadedModel) -> None:
    task, config = ns.load_task("gendered_pronoun", loaded.tokenizer, **FEW), make_config({**QUICK, "method": "random", "keep": 0.5})
    run = ns.discover(loaded, task, config)
    shared = consensus_run(run, [run.circuit, Circuit.whole(run.circuit.nodes)], at_least=2, loaded=loaded, task=task)
    assert shared.circuit.fingerprint == run.circuit.fingerprint
    assert shared.metrics["budget"] == {**run.metrics["budget"], "validation_kl_upper": pytest.approx(run.metrics["budget"]["validation_kl_upper"])}


def test_a_consensus_has_gates_where_its_runs_have(loaded: LoadedModel) -> None:
    task = ns.load_task("gendered_pronoun", loaded.tokenizer, **FEW)
    run = ns.discover(loaded, task, make_config({**QUICK, "method": "random", "keep": 0.7, "levels": ["head", "head_dim"]}))
    shared = consensus_run(run, [run.circuit] * 2, at_least=2, loaded=loaded, task=task)
    assert shared.scores.levels == run.scores.levels == ("head", "head_dim")
    assert shared.scores.circuit(shared.threshold).fingerprint == shared.circuit.fingerprint == run.circuit.fingerprint
    own, other = (complement(one.circuit, one.scores) for one in (run, shared))
    assert other.fingerprint == own.fingerprint  # neurons, which no gate could close, are open in both
    assert own.kept("mlp_neuron") == own.nodes.count("mlp_neuron")


def test_a_circuit_of_the_size_asked_for_has_missed_no_budget(loaded: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    task = ns.load_task("gendered_pronoun", loaded.tokenizer, **FEW)
    asked = ns.discover(loaded, task, make_config({**QUICK, "method": "random", "keep": 0.3, "kl_budget": 0.01}))
    shared = consensus_run(asked, [asked.circuit], at_least=1, loaded=loaded, task=task)  # keeps what runs agree on, whatever was asked for
    for run, shown in ((asked, "of at most 30.0% that were asked for"), (shared, "The budget of 0.01 was")):
        page = render([("run", run)])
        assert shown in page
        assert ('class="verdict missed"' in page) == (run is shared)
    print_summary(asked)
    said = " ".join(capsys.readouterr().out.split())
    assert "at most 30.0% of the leaves, as asked for: KL 0." in said
    assert "NOT met" not in said


def some_row(method: str, seed: int, **more: Any) -> dict[str, Any]:
    """Of a comparison; its numbers are made of 10 and the seed."""
    number = 10 + seed
    nodes = {level: {"kept": number * 1000, "total": 99999} for level in ("head", "mlp_block", "head_dim", "mlp_neuron", "mlp_output")}
    points = [{"share": share, "kl": share + number} for share in (0.05, 0.1, 0.2, 0.5)]
    curve = {unit: {"cpr": number / 100, "cmd": number / 10, "compactness": number / 1000, "points": points} for unit in ("parts", "leaves")}
    return {
        "method": method,
        "seed": seed,
        "met": seed == 0,
        "size": number / 100,
        "unpolished": None,
        "polish_seconds": None,
        "nodes": nodes,
        "parameters": {"kept": number, "total": 20},
        "test": {"kl": number / 100, "exact_match": 0.5, "faithfulness": None},
        "seconds": number,
        "peak_memory_bytes": number * 10**9,
        "passes": {"forward": number, "backward": 1000},
        "curve": curve,
        **more,
    }


@pytest.mark.parametrize("asked", [None, 0.3])
def test_the_page_says_what_was_asked_of_the_methods(asked: float | None) -> None:
    about = {"model": "m", "task": "t", "ablation": "zero", "budget": 0.25, "asked": asked}
    page = comparison.render({**about, "rows": [some_row("random", 0, versions={"nodesieve": "1"})]})
    assert ("KL budget 0.25 ·" in page) == ("The smallest circuit whose" in page) == (asked is None)
    assert ("· 30.0% of the leaves ·" in page) == ("The largest circuit of at most 30.0%" in page) == (asked == 0.3)


def test_tables_are_means_over_the_seeds_of_each_method() -> None:
    polished = {"unpolished": 0.5, "polish_seconds": 7, "test": {"kl": 0.01, "exact_match": 1.0, "faithfulness": 0.9}}
    shown = tables([some_row("random", 0), some_row("greedy", 5, **polished), some_row("random", 2)])
    smallest, ranking = shown["smallest circuit"], shown["as a ranking"]
    assert smallest[1] == "random|1 of 2|11,000|11,000|11,000|11,000|11,000|11.0%|-|55.0%|0.110|50.0%|-|11|11.00|11 + 1,000".split("|")
    assert smallest[2][7:] == "15.0%|50.0%|75.0%|0.010|100.0%|0.90|15 + 7|15.00|15 + 1,000".split("|")
    assert ranking[0][1:4] == ["CPR, parts", "CMD, parts", "compactness, parts"]
    assert ranking[1] == ["random", *["0.11", "1.10", "0.011"] * 2, "11.05", "11.10", "11.20", "11.50"]
    assert len(smallest) == len(ranking) == 3


def test_what_overflows_has_no_mean() -> None:
    row = some_row("random", 1, test={"kl": None, "exact_match": None, "faithfulness": None})
    row["curve"]["leaves"]["points"][0]["kl"] = None
    smallest, ranking = (lines[1] for lines in tables([some_row("random", 0), row]).values())
    assert smallest[10:13] == ["-", "-", "-"]
    assert ranking[7:9] == ["-", "10.60"]
    about = {"model": "m", "task": "t", "ablation": "zero", "budget": 0.25, "asked": None}
    assert "<svg" in comparison.render({**about, "rows": [{**row, "versions": {"nodesieve": "1"}}]})


def test_every_method_is_compared_once_by_seeds_from_the_config_s_own_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def compared(config: Any, out: Path, *, methods: Any, seeds: Any, **_: Any) -> None:
        asked.extend((methods, list(seeds)))
        raise KeyboardInterrupt

    monkeypatch.setattr("nodesieve.compare.compare", compared)
    (tmp_path / "options.yaml").write_text("seed: 3\n")
    command = ["compare", "--config", tmp_path / "options.yaml", "--out", tmp_path / "out", "--methods", "random,greedy,random", "--seeds", 2]
    assert nodesieve(*command) == 130
    assert asked == [("random", "greedy"), [3, 4]]


def test_a_run_that_is_stopped_while_it_ends_stays(model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, place = make_config({"model": str(model_directory), "method": "random", **QUICK}), tmp_path / "random-0"
    called = spawn._call
    monkeypatch.setattr(spawn, "_call", lambda arguments: called(arguments) or -signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        spawn.ensure_run(place, config, quiet=True)
    spawn.ensure_run(place, config, quiet=True)  # finished: nothing is called
    assert ns.load_run(place).config == config


def _change_weights(run: Path) -> None:
    """A finished run as if it had been made before its model was trained further."""
    description = json.loads((run / "circuit.json").read_text())
    description["model"]["weights"] = "others"
    (run / "circuit.json").write_text(json.dumps(description))


def test_stability_repeats_a_run_on_resampled_data(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    command = ["discover", "--model", model_directory, "--task", few_prompts(tmp_path), "--out", run, "--quiet", "--seed", 3]
    assert nodesieve(*command, *quick_flags()) == 0
    capsys.readouterr()
    assert nodesieve("stability", run, "--seeds", 2, "--json", "--quiet") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == 3
    assert found["consensus"]["at_least"] == 2
    assert json.loads((run / "stability.json").read_text()) == found
    assert nodesieve("stability", run, "--seeds", 1, "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)["consensus"]["at_least"] == 2  # more than half of two
    assert nodesieve("stability", run, "--seeds", 2, "--quiet") == 0
    capsys.readouterr()
    shared = ns.load_run(run / "stability" / "consensus")
    assert shared.metrics["circuit"]["test"] == found["consensus"]["circuit"]["test"]
    assert [shared.metrics[name] for name in ("steps", "seconds", "peak_memory_bytes")] == [None] * 3  # each run has its own
    assert torch.equal(shared.circuit.masks["head"], shared.scores.circuit(shared.threshold).masks["head"])
    assert nodesieve("evaluate", run / "stability" / "consensus", "--controls", "--draws", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out)["circuit"] == {"test": shared.metrics["circuit"]["test"]}
    assert nodesieve("report", run / "stability" / "consensus") == 0
    assert nodesieve("nodes", run / "stability" / "consensus", "--level", "head") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + shared.circuit.kept("head")
    again = ns.load_run(run / "stability" / "seed-4")
    assert (again.config.seed, again.config.seed_of_data, again.config.bootstrap) == (4, 3, True)
    made = (run / "stability" / "seed-4" / "metrics.json").stat().st_mtime_ns
    assert nodesieve("stability", run, "--seeds", 2, "--agree", 3) == 0
    assert "nodes kept by at least 3 of 3 runs" in " ".join(capsys.readouterr().out.split())
    assert (run / "stability" / "seed-4" / "metrics.json").stat().st_mtime_ns == made
    assert nodesieve("stability", run, "--seeds", 2, "--agree", 4) == 2
    capsys.readouterr()
    assert nodesieve("stability", run / "stability" / "consensus", "--seeds", 1) == 2
    assert "what several runs agree on" in capsys.readouterr().err
    description = json.loads((run / "circuit.json").read_text())
    (run / "circuit.json").write_text(json.dumps({**description, "loss": "mine"}))
    assert nodesieve("stability", run, "--seeds", 2) == 2
    assert "expected a run that kept the KL low" in capsys.readouterr().err
    (run / "circuit.json").write_text(json.dumps(description))
    _change_weights(run)
    assert nodesieve("stability", run, "--seeds", 3) == 2
    assert "expected runs of the same weights" in capsys.readouterr().err
    for place in ("seed-4", "seed-5"):
        _change_weights(run / "stability" / place)
    assert nodesieve("stability", run, "--seeds", 3) == 2
    assert "that the run in" in capsys.readouterr().err
    assert not (run / "stability" / "seed-6").exists()
    assert nodesieve("stability", run, "--seeds", 2) == 2  # nothing to make, but the consensus would be measured in other weights
    assert "that the run in" in capsys.readouterr().err


def test_what_a_builtin_task_draws_otherwise_by_now_is_told_before_any_run(model_directory: Path, tmp_path: Path) -> None:
    loaded, done = ns.load_model(str(model_directory)), tmp_path / "random-0"
    run = ns.discover(loaded, ns.load_task("ioi", loaded.tokenizer, **FEW), make_config({**QUICK, "method": "random"}))
    of_another_version = {**run.description["examples"]["fingerprints"], "test": "0" * 64}
    described = {**run.description, "examples": {**run.description["examples"], "fingerprints": of_another_version}}
    for description, told in ((run.description, nullcontext()), (described, pytest.raises(ns.UserError, match="expected the test examples"))):
        replace(run, description=description).save(done, overwrite=True)
        spawn.refuse_changed_inputs([done], run.config)  # nothing is left to make
        with told:
            spawn.refuse_changed_inputs([done, tmp_path / "random-1"], run.config)


def test_a_file_that_has_changed_is_told_before_any_run(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, options = tmp_path / "compared", tmp_path / "options.yaml"
    options.write_text("\n".join(f"{name}: {str(value).lower()}" for name, value in QUICK.items()))
    command = ["compare", "--model", model_directory, "--task", few_prompts(tmp_path), "--config", options, "--out", out]
    assert nodesieve(*command, "--methods", "random") == 0
    few_prompts(tmp_path, corrupted="{b} and {b} went")
    capsys.readouterr()
    assert nodesieve(*command, "--methods", "weight_magnitude,random") == 2
    assert f"in '{out / 'random-0'}': expected the train examples that the run was made with" in capsys.readouterr().err
    assert not (out / "weight_magnitude-0").exists()


def test_methods_side_by_side(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out, options = tmp_path / "compared", tmp_path / "options.yaml"
    options.write_text("\n".join(f"{name}: {str(value).lower()}" for name, value in QUICK.items()))
    command = ["compare", "--model", model_directory, "--task", few_prompts(tmp_path), "--budget", 0.1, "--config", options, "--out", out]
    assert nodesieve(*command, "--methods", "random,greedy") == 0
    text = capsys.readouterr().out
    assert "smallest circuit" in text
    assert "as a ranking" in text
    assert "…" not in text  # nothing is cut, though lines of a method each would not fit
    assert "compactness, leaves" in text
    found = json.loads((out / "compare.json").read_text())
    assert [(row["method"], row["seed"]) for row in found["rows"]] == [("random", 0), ("greedy", 0)]
    for row in found["rows"]:
        assert row["passes"]["forward"] > 0
        assert row["test"] == json.loads((out / f"{row['method']}-0" / "metrics.json").read_text())["circuit"]["test"]
        assert len(row["curve"]["leaves"]["points"]) == len(row["curve"]["parts"]["points"]) == 10
    page = (out / "compare.html").read_text()
    assert page.count("<svg") == 2
    assert "· seed 0" in page
    assert not re.search(r"""(src|href)=["']?http|url\(http|@import""", page.replace('xlink:href="#', ""))
    made, curve = (out / "random-0" / "metrics.json").stat().st_mtime_ns, out / "random-0" / "size_curve.json"
    measured = json.loads(curve.read_text())
    curve.write_text(json.dumps({**measured, "scores": "others", "leaves": None}))
    assert nodesieve(*command, "--methods", "random,weight_magnitude", "--quiet") == 0
    assert json.loads(curve.read_text()) == measured  # of other scores, so measured again
    assert (out / "random-0" / "metrics.json").stat().st_mtime_ns == made
    assert len(json.loads((out / "compare.json").read_text())["rows"]) == 2
    monkeypatch.chdir(tmp_path)
    assert nodesieve(*command[:-2], "--methods", "random", "--levels", "head,mlp_neuron") == 0
    assert ns.load_run(tmp_path / "runs" / f"compare-{model_directory.name}-few" / "random-0").scores.levels == ("head", "mlp_neuron")
    assert nodesieve(*command, "--methods", "random", "--polish") == 2
    assert "polish = True" in capsys.readouterr().err
    assert nodesieve(*command[:3], "--task", "nope", "--methods", "random", "--out", tmp_path / "refused") == 2
    assert not (tmp_path / "refused").exists()
    _change_weights(out / "random-0")
    assert nodesieve(*command, "--methods", "random,weight_magnitude", "--quiet") == 2  # nothing to make, and yet no comparison
    assert "expected runs of the same weights" in capsys.readouterr().err
    _change_weights(out / "weight_magnitude-0")
    (out / "random-0" / "report.html").unlink()  # as where it was stopped while that was drawn
    assert nodesieve(*command, "--methods", "random,weight_magnitude", "--quiet") == 0  # nothing else to make
    assert (out / "random-0" / "report.html").is_file()
    assert nodesieve(*command, "--methods", "random,fisher") == 2
    assert "that the run in" in capsys.readouterr().err
    (out / "random-0" / "controls-few-test-mean.json").write_text("{}")
    for name in ("circuit.safetensors", "size_curve.json", "controls-few-test-mean.json"):
        assert nodesieve("report", out / "random-0", "--out", out / "random-0" / name) == 2
    assert "another file than those of a run" in capsys.readouterr().err
    curve.unlink()
    assert nodesieve(*command, "--methods", "random,weight_magnitude", "--quiet") == 2  # nor would the curve be of the same weights
    assert "that the run in" in capsys.readouterr().err
    assert not (out / "fisher-0").exists()
    assert nodesieve(*command, "--methods", "rnadom") == 2
    assert "--methods expects names among" in capsys.readouterr().err
    for more, methods, message in (
        (["--levels", "mlp_neuron"], "random,greedy", "method greedy expects levels with some of head, mlp_block, got mlp_neuron"),
        (["--levels", "mlp_neuron"], "random,coarse", "method coarse expects levels"),
        (["--levels", "embedding"], "random,sieve", "expected levels other than the embedding"),
        ([], "multigranular,random", "expected options that ask every method for the same"),
    ):
        if not more:
            options.write_text(options.read_text() + "\ncontroller: target_size")
        assert nodesieve(*command[:-1], tmp_path / "planned", "--methods", methods, *more) == 2
        assert message in capsys.readouterr().err
    options.write_text(options.read_text().removesuffix("\ncontroller: target_size"))
    bare = write_rows(
        tmp_path / "bare.jsonl", ({"clean": row["clean"], "answers": row["answers"]} for row in map(row_of_names, "abcdefghijkl", "bcdefghijklm"))
    )
    for methods, part in (("random,gate_gradient", "distractors"), ("random,activation_difference", "corrupted")):
        assert nodesieve(*command[:3], "--task", bare, "--out", tmp_path / "planned", "--methods", methods) == 2
        assert f"expects {part} in every training example" in capsys.readouterr().err
    options.write_text(options.read_text() + "\nmax_minutes: 10")
    assert nodesieve(*command[:-1], tmp_path / "planned", "--methods", "sieve,random") == 2
    assert "max_minutes expects method sieve" in capsys.readouterr().err
    assert not (tmp_path / "planned").exists()  # not even the first was begun


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_comparison_goes_on(model_directory: Path, tmp_path: Path, number: signal.Signals) -> None:
    out, options = tmp_path / "compared", tmp_path / "options.yaml"
    options.write_text("\n".join(f"{name}: {str(value).lower()}" for name, value in {**QUICK, "steps": 3000}.items()))
    command = [sys.executable, "-m", "nodesieve", "compare", "--model", str(model_directory), "--methods", "nested", "--out", str(out)]
    command += ["--config", str(options)]

    def heed_interrupts() -> None:
        """Even where the tests run in the background of a shell, which has its children ignore them."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def stopped_after(steps: int) -> list[dict[str, Any]]:
        """The command, stopped once the run has gone so far -> its history by then."""
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=heed_interrupts
        ) as process:
            deadline = time.monotonic() + 120
            while (not history(out / "nested-0") or history(out / "nested-0")[-1]["step"] < steps) and time.monotonic() < deadline:
                time.sleep(0.2)
            process.send_signal(number)  # to it alone: the run is told by it
            said = process.communicate(timeout=60)[1]
        assert process.returncode == 130
        assert b"the same command goes on" in said
        assert b"discover --resume" in said  # the run itself had the time to stop as it should
        assert not (out / "nested-0" / "metrics.json").exists()
        return history(out / "nested-0")

    first = stopped_after(1)
    second = stopped_after(first[-1]["step"] + 1)
    assert second[: len(first)] == first  # gone on with, not begun anew
    assert len(second) > len(first)
    assert not (out / "compare.json").exists()


def history(run: Path) -> list[dict[str, Any]]:
    file = run / "history.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def test_after_the_last_seed_comes_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int]] = []
    monkeypatch.setattr("nodesieve.stability.refuse_changed_inputs", lambda *_, **__: None)
    monkeypatch.setattr("nodesieve.stability.load_run", lambda place: place)
    monkeypatch.setattr("nodesieve.stability.ensure_run", lambda place, config, **_: asked.append((place.name, config.seed, config.seed_of_data)))
    last = SEEDS - 1
    repeat(SimpleNamespace(config=make_config({"seed": last})), tmp_path, count=2)  # type: ignore[arg-type]
    assert asked == [("seed-0", 0, last), ("seed-1", 1, last)]
