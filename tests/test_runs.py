"""Runs from end to end on tiny models by the Python API: options, what is measured, resuming, reports."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import nodesieve as ns
from command_line import FEW, QUICK, nodesieve
from conftest import FAMILIES_IN_DEPTH, tiny_model, word_tokenizer
from nodesieve import config, metrics, models
from nodesieve.config import make_config
from nodesieve.discovery import Interrupted
from nodesieve.errors import UserError
from nodesieve.evaluation import ablated_circuit
from nodesieve.levels import DEFAULT_LEVELS, LEVELS
from nodesieve.method_rows import MethodName
from nodesieve.methods import METHODS
from nodesieve.models import LoadedModel, model_of
from nodesieve.problem import make_problem
from nodesieve.report.page import render
from nodesieve.run import RunJournal
from nodesieve.tasks.base import SPLITS
from nodesieve.tasks.words import FEMALE_NAMES as NAMES
from nodesieve.tasks.words import MALE_NAMES, PLACES
from planted import planted_model, planted_task


def test_the_api_in_ten_lines(loaded: LoadedModel, tmp_path: Path) -> None:
    task = ns.load_task("ioi", loaded.tokenizer, **FEW)
    run = ns.discover(loaded, task, make_config(QUICK))
    run.save(tmp_path)
    again = ns.load_run(tmp_path)
    assert all(torch.equal(run.circuit.masks[level], again.circuit.masks[level]) for level in LEVELS)
    assert all(torch.equal(run.scores.values[level], again.scores.values[level]) for level in DEFAULT_LEVELS)
    assert again.metrics == json.loads(json.dumps(run.metrics))
    assert again.history == json.loads(json.dumps(run.history))
    evaluation = ns.evaluate(loaded, task, again)
    assert evaluation.circuit["test"]["kl"] == pytest.approx(run.metrics["circuit"]["test"]["kl"], abs=1e-6)


@pytest.mark.parametrize("ablation", ["counterfactual", "mean", "zero"])
@pytest.mark.parametrize("family", FAMILIES_IN_DEPTH)
def test_every_family_and_ablation_runs(family: str, ablation: str, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    loaded = LoadedModel(id=family, revision=None, model=tiny_model(family, vocabulary=len(tokenizer)), tokenizer=tokenizer)
    run = ns.discover(loaded, ns.load_task("gendered_pronoun", tokenizer, **FEW), make_config({**QUICK, "steps": 2, "ablation": ablation}))
    assert set(run.metrics["circuit"]) == {"validation", "test"}
    run.save(tmp_path)
    again = ns.load_run(tmp_path)
    assert again.circuit.fingerprint == run.circuit.fingerprint
    assert again.scores.fingerprint == run.scores.fingerprint
    assert again.metrics == json.loads(json.dumps(run.metrics))


@pytest.mark.parametrize(
    "options",
    [
        {"controller": "fixed", "gate_samples": "batch", "estimator": "pathwise"},
        {"controller": "target_size", "target_size": 0.3},
        {"penalty_form": "nested", "task_weight": 0.5},
        {"levels": "head,mlp_neuron,embedding"},
        {"method": "gate_gradient", "keep": 0.1},
        {"method": "coarse"},
        {"method": "activation_difference", "keep": 0.1},
        {"method": "uniform_gradient"},
        {"method": "fisher", "levels": ["head", "mlp_neuron"]},
        {"log_alpha_spread": dict.fromkeys(("head", "head_dim", "mlp_neuron", "mlp_output"), 0.0)},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_way_of_learning_runs(loaded: LoadedModel, options: dict[str, object]) -> None:
    run = ns.discover(loaded, ns.load_task("greater_than", loaded.tokenizer, **FEW), make_config({**QUICK, "validate_every": 2, **options}))
    size = options.get("keep", options.get("target_size"))
    if isinstance(size, float):
        assert size / 2 < run.circuit.size <= size
    assert {"prob_diff", "cutoff_sharpness"} <= set(run.metrics["circuit"]["test"])
    if "levels" in options:
        assert torch.equal(run.circuit.masks["head_dim"].all(-1), run.circuit.masks["head"])


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_what_any_method_finds_is_saved_and_read_again(method: MethodName, keep: float, tmp_path: Path) -> None:
    options = make_config({"method": method, "keep": keep, "steps": 2, "batch_size": 8})
    run = ns.discover(planted_model(), planted_task(), options)
    run.save(tmp_path)
    again = ns.load_run(tmp_path)
    assert again.config == run.config == replace(options, model="planted", task=planted_task().name)
    assert again.circuit.fingerprint == run.circuit.fingerprint
    assert again.threshold == run.threshold > -math.inf
    assert run.scores.circuit(run.threshold).fingerprint == run.circuit.fingerprint
    assert set(again.scores.levels) == set(run.scores.levels) & set(run.circuit.nodes.levels)
    for level in again.scores.levels:
        assert torch.equal(again.scores.values[level], run.scores.values[level])
    for level, value in (run.scores.wholes or {}).items():
        assert again.scores.wholes is not None
        assert torch.equal(again.scores.wholes[level], value)
    if keep == 1.0:
        assert run.circuit.size == 1.0
    page = render([("run", again)])
    assert "<svg" in page
    assert ("KL by step, at several sizes" in page) == (method == "nested")


@pytest.mark.parametrize("ablation", ["counterfactual", "mean", "zero"])
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe-mixed"])
def test_experts_take_the_place_of_neurons(family: str, ablation: str, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    loaded = LoadedModel(id="tiny", revision=None, model=tiny_model(family, vocabulary=len(tokenizer)), tokenizer=tokenizer)
    task = ns.load_task("ioi", tokenizer, **FEW)
    run = ns.discover(loaded, task, make_config({**QUICK, "ablation": ablation, "keep": 0.5}))
    nodes = run.metrics["nodes"]
    dense = 1 if "mixed" in family else 0
    assert nodes["expert"]["total"] == 4 * (3 - dense)
    assert nodes.get("mlp_neuron", {"total": 0})["total"] == 48 * dense
    assert run.circuit.size <= 0.5
    run.save(tmp_path)
    again = ns.load_run(tmp_path)
    assert again.circuit.nodes == run.circuit.nodes
    assert all(torch.equal(again.circuit.masks[level], run.circuit.masks[level]) for level in LEVELS)
    assert ns.evaluate(loaded, task, again).circuit["test"]["kl"] == pytest.approx(run.metrics["circuit"]["test"]["kl"], abs=1e-6)
    assert "<svg" in render([("run", again)])


def test_a_sharded_checkpoint_is_read(loaded: LoadedModel, tmp_path: Path) -> None:
    loaded.model.save_pretrained(tmp_path, max_shard_size="100KB")
    loaded.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = ns.load_model(str(tmp_path)).model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in loaded.model.state_dict().items())


def test_a_model_near_chance_is_refused_unless_forced(loaded: LoadedModel) -> None:
    task = ns.load_task("ioi", loaded.tokenizer, **FEW)
    with pytest.raises(ns.UserError, match=r"expected a full model that does the task, got an accuracy of 0\.\d\d on 256 .*--force goes on"):
        ns.discover(loaded, task, make_config({**QUICK, "force": False}))


def test_examples_without_distractors_do_not_hide_that_a_model_is_near_chance(loaded: LoadedModel) -> None:
    task = ns.load_task("ioi", loaded.tokenizer, **FEW)
    some = {split: [replace(example, distractors=()) if i % 3 == 0 else example for i, example in enumerate(task.splits[split])] for split in SPLITS}
    with pytest.raises(ns.UserError, match="expected a full model that does the task"):
        ns.discover(loaded, replace(task, splits=some), make_config({**QUICK, "force": False}))


def test_a_run_says_which_model_and_task_it_was_given(loaded: LoadedModel, tmp_path: Path) -> None:
    """Whatever the options say: what is written has to find both again."""
    task = ns.load_task("gendered_pronoun", loaded.tokenizer, **FEW)
    run = ns.discover(loaded, task, make_config({**QUICK, "method": "random"}))
    run.save(tmp_path)
    again = ns.load_run(tmp_path)
    assert (again.config.model, again.config.task) == (loaded.id, "gendered_pronoun")
    assert (again.description["model"]["id"], again.description["task"]) == (loaded.id, "gendered_pronoun")
    other = ns.load_task("gendered_pronoun", loaded.tokenizer, **FEW, seed=1)  # whose test names the run may have learned from
    with pytest.raises(ns.UserError, match="expected the test examples that the run was made with"):
        ns.evaluate(loaded, other, again)


def test_a_tokenizer_of_another_model_is_refused(loaded: LoadedModel) -> None:
    small = replace(loaded, model=tiny_model("llama", vocabulary=20))
    with pytest.raises(ns.UserError, match="expected a tokenizer of the model's 20 tokens"):
        ns.discover(small, ns.load_task("ioi", loaded.tokenizer, **FEW), make_config(QUICK))


def test_whatever_a_circuit_is_measured_on_the_mean_is_that_of_the_run(loaded: LoadedModel) -> None:
    task = ns.load_task("ioi", loaded.tokenizer, **FEW)
    run = ns.discover(loaded, task, make_config({**QUICK, "method": "random", "ablation": "mean", "train_size": 32}))
    other = ns.load_task("gendered_pronoun", loaded.tokenizer, **FEW).splits["train"]
    for train in ((), other):
        elsewhere = replace(task, source="file.jsonl", splits={"train": train, "validation": (), "test": task.splits["test"]}, redrawn=())
        kl = ns.evaluate(loaded, elsewhere, run).circuit["test"]["kl"]
        assert kl == pytest.approx(run.metrics["circuit"]["test"]["kl"], rel=1e-5)
    gone = replace(run, config=replace(run.config, task="gone.jsonl"))
    with pytest.raises(ns.UserError, match=r"a mean over the run's own training examples: expected a built-in task .* under 'gone.jsonl'"):
        ns.evaluate(loaded, elsewhere, gone)


def test_the_mean_is_of_the_examples_that_the_run_had(loaded: LoadedModel) -> None:
    task = ns.load_task("ioi", loaded.tokenizer, **FEW)
    run = ns.discover(loaded, task, make_config({**QUICK, "method": "random", "ablation": "mean", "train_size": 32}))
    fewer = replace(task, splits={**task.splits, "train": task.splits["train"][1:]})
    with pytest.raises(ns.UserError, match="expected the train examples that the run was made with"):
        ns.evaluate(loaded, fewer, run)
    zero = [ns.evaluate(loaded, data, run, ablation="zero").circuit["test"]["kl"] for data in (fewer, task)]
    assert zero[0] == pytest.approx(zero[1]) != pytest.approx(run.metrics["circuit"]["test"]["kl"])


def test_only_correct_keeps_what_the_full_model_gets_right(loaded: LoadedModel) -> None:
    task = ns.load_task("gendered_pronoun", loaded.tokenizer, **FEW)
    run = ns.discover(loaded, task, make_config({**QUICK, "only_correct": True, "force": False, "kl_budget": 0.01}))
    assert run.metrics["full"]["test"]["accuracy"] == run.metrics["full"]["validation"]["accuracy"] == 1
    counts = run.description["examples"]["splits"]
    assert counts["test"]["used"] + counts["test"]["skipped_full_model_wrong"] == 200
    assert 0 < counts["test"]["used"] < 200


@pytest.mark.parametrize("method", ["coarse", "greedy", "nested", "sieve"])
def test_a_run_says_which_levels_were_scored(loaded: LoadedModel, tmp_path: Path, method: MethodName) -> None:
    ns.discover(loaded, ns.load_task("ioi", loaded.tokenizer, **FEW), make_config({**QUICK, "method": method})).save(tmp_path)
    said = json.loads((tmp_path / "circuit.json").read_text())
    expected = {
        "coarse": ["layer", "attention_block", "mlp_block", "head"],
        "greedy": ["mlp_block", "head"],
        "nested": ["layer", "attention_block", "mlp_block", "head", "head_dim", "mlp_neuron"],
        "sieve": [level for level in DEFAULT_LEVELS if level != "expert"],
    }
    assert said["levels"] == list(said["thresholds"]) == expected[method]
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert bool(rows) == (method != "greedy")
    assert all({"step", "loss", "kl", "penalty", "open", "lambda", "seconds"} <= set(row) for row in rows)


def test_low_memory_learns_the_same(loaded: LoadedModel) -> None:
    task = ns.load_task("ioi", loaded.tokenizer, **FEW)
    runs = [ns.discover(loaded, task, make_config({**QUICK, "memory": memory, "polish": True})) for memory in ("default", "low")]
    assert [row["loss"] for row in runs[0].history] == pytest.approx([row["loss"] for row in runs[1].history], abs=1e-5)


def test_padding_on_the_right_measures_what_padding_on_the_left_does(loaded: LoadedModel) -> None:
    task = ns.load_task("ioi", loaded.tokenizer, **FEW)
    left, right = (make_problem(loaded, task, make_config({"force": True, "padding_side": side})) for side in ("left", "right"))
    circuit = ablated_circuit(left)
    torch.testing.assert_close(left.full_logits("test"), right.full_logits("test"))
    torch.testing.assert_close(left.losses([circuit], "test")[0], right.losses([circuit], "test")[0])


def test_records_of_another_name_are_other_data(
    loaded: LoadedModel, model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def task(first: int, **name: str) -> ns.Task:
        prompts = [(f"Then {name} went to the", f"Then {other} went to the") for name, other in pairwise(NAMES[first : first + 21])]
        records = [{"clean": clean, "corrupted": corrupted, "answers": " park"} for clean, corrupted in prompts]
        return ns.load_task(records, loaded.tokenizer, **name)

    own = replace(loaded, id=str(model_directory))
    run = ns.discover(own, task(0), make_config({**QUICK, "method": "random", "keep": 0.5}))
    assert ns.evaluate(own, task(0), run).circuit["test"]["kl"] == run.metrics["circuit"]["test"]["kl"]
    assert ns.evaluate(own, task(30, name="others"), run).circuit["test"]["kl"] > 0
    with pytest.raises(ns.UserError, match="expected the test examples that the run was made with in 'records'"):
        ns.evaluate(own, task(30), run)
    with pytest.raises(ns.UserError, match="name expects records"):
        ns.load_task("ioi", loaded.tokenizer, name="others")
    out = tmp_path / "[bold]run[/x]"  # no markup
    run.save(out)
    for command in (["evaluate", out], ["stability", out, "--seeds", 1]):
        assert nodesieve(*command) == 2
        assert "found on records in Python (records)" in capsys.readouterr().err
    assert nodesieve("evaluate", out, "--task", "gendered_pronoun") == 0
    assert "[bold]run[/x] on gendered_pronoun" in "".join(capsys.readouterr().out.splitlines())


def test_clean_prompts_alone_are_enough_for_mean_and_zero(loaded: LoadedModel) -> None:
    records = [{"clean": f"Then {name} went to the {place}", "answers": " park"} for name in NAMES[:20] for place in PLACES[:2]]
    task = ns.load_task(records, loaded.tokenizer)
    for ablation in ("mean", "zero"):
        run = ns.discover(loaded, task, make_config({**QUICK, "ablation": ablation, "force": False, "kl_budget": 0.1}))
        assert run.metrics["circuit"]["test"]["logit_diff"] is None
        assert 0 <= run.metrics["circuit"]["test"]["kl"] < run.metrics["ablated"]["test"]["kl"]
        other = ns.load_task("ioi", loaded.tokenizer, **FEW)
        near_chance = ns.evaluate(loaded, other, run, own=task)  # which to find a circuit for is refused
        assert near_chance.full["test"]["accuracy"] < 0.8
    with pytest.raises(ns.UserError, match="expects a corrupted prompt for every example"):
        ns.discover(loaded, task, make_config(QUICK))


def test_one_test_example_without_a_corrupted_prompt_is_told_before_any_work(loaded: LoadedModel) -> None:
    prompts = [(f"Then {name} went to the", f"Then {other} went to the") for name, other in pairwise(NAMES[:40])]
    records = [{"clean": clean, "corrupted": corrupted, "answers": " park"} for clean, corrupted in prompts]
    records = [{**record, "split": ("train", "validation", "test")[i % 3]} for i, record in enumerate(records)]
    del next(record for record in records if record["split"] == "test")["corrupted"]
    with pytest.raises(ns.UserError, match="got some without in the test split"):
        make_problem(loaded, ns.load_task(records, loaded.tokenizer), make_config(QUICK))


def test_answers_over_all_their_tokens_and_further_metrics(loaded: LoadedModel) -> None:
    records = [
        {"clean": f"{a} and {b} went to", "corrupted": f"{b} and {a} went to", "answers": f" {a} and {b}", "distractors": f" {b} and {a}"}
        for a, b in pairwise(NAMES[:30])
    ]
    options = {**QUICK, "answer_tokens": "all", "metrics": ["prob_diff"]}
    task = ns.load_task(records, loaded.tokenizer)
    run = ns.discover(loaded, task, make_config(options))
    assert run.metrics["circuit"]["test"]["prob_diff"] is not None
    assert run.metrics["circuit"]["test"]["logit_diff"] is not None
    problem = make_problem(loaded, task, make_config(options))
    (kl,) = problem.losses([run.circuit], "validation")
    prompts = [i // 3 for i in range(len(kl))]
    assert run.metrics["budget"]["validation_kl_upper"] == pytest.approx(metrics.upper_bound(kl, prompts=prompts), abs=1e-5)
    assert run.metrics["budget"]["validation_kl_upper"] != pytest.approx(metrics.upper_bound(kl), abs=1e-5)
    (kl,) = problem.losses([run.circuit], "test")
    apart, together = (
        metrics.Resamples(of_prompt).means(kl.double()).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
        for of_prompt in (range(len(kl)), [i // 3 for i in range(len(kl))])
    )
    interval = ns.evaluate(loaded, task, run).intervals["test"]["kl"]
    assert interval == pytest.approx(together, abs=1e-5)
    assert interval != pytest.approx(apart, abs=1e-5)


def test_the_names_of_further_metrics_are_known_without_torch() -> None:
    assert set(config.EXTRA_METRICS) == set(metrics.EXTRA_METRICS)


def test_learning_in_another_dtype_leaves_the_model_and_its_measurements_as_they_were(loaded: LoadedModel) -> None:
    problem = make_problem(loaded, ns.load_task("ioi", loaded.tokenizer, **FEW), ns.DiscoverConfig(force=True))
    before = problem.full_logits("validation")
    learner = problem.in_dtype(torch.bfloat16)
    assert learner.model.model.dtype == torch.bfloat16
    assert problem.model.model.dtype == torch.float32
    assert problem.in_dtype(torch.float32) is problem
    learner.full_logits("validation")
    batch = problem.task["validation"].batch(range(4))
    torch.testing.assert_close(problem.model.logits(batch.clean), before[:4])  # bfloat16 is off by a hundredth


@pytest.mark.parametrize(("options", "found"), [({}, "bfloat16"), ({"kl_budget": 0.001}, "float32"), ({"learning_dtype": "float16"}, "float16")])
def test_gates_are_learned_in_bfloat16_where_the_machine_has_it_and_the_budget_is_not_fine(
    options: dict[str, Any], found: str, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = make_config(options)
    monkeypatch.setattr(models, "_has_bfloat16", lambda device: True)
    assert models.learning_dtype(asked, loaded.model) == getattr(torch, found)
    monkeypatch.setattr(models, "_has_bfloat16", lambda device: False)
    assert models.learning_dtype(asked, loaded.model) == (torch.float32 if found == "bfloat16" else getattr(torch, found))


@pytest.mark.parametrize(
    ("method", "steps", "stop", "rows"),
    [("multigranular", 12, 5, 5), ("hybrid", 12, 5, 5), ("hybrid", 12, 7, 7), ("hybrid", 50, 31, 30), ("hybrid", 50, 40, 31)],
    ids=["gates alone", "gates", "the last of the gates", "the first round", "the second round"],
)
def test_resumed_is_the_same_as_uninterrupted(loaded: LoadedModel, tmp_path: Path, method: str, steps: int, stop: int, rows: int) -> None:
    task = ns.load_task("ioi", loaded.tokenizer, **{**FEW, "redraws": 6})  # none comes twice: what is remembered of a prompt is rounded
    config = make_config({**QUICK, "steps": steps, "method": method, "kl_budget": 1.0, "gates_share": 0.6})

    class StopAfter(RunJournal):
        def progress(self, step: int, total: int, **facts: float) -> None:
            self.stopping = self.stopping or (step, total) == (stop, steps)

    whole = ns.discover(loaded, task, config)
    with pytest.raises(Interrupted) as caught:
        ns.discover(loaded, task, config, journal=StopAfter(tmp_path))
    assert len(caught.value.run.history) == rows
    resumed = ns.discover(loaded, task, config, journal=RunJournal(tmp_path))
    assert all(torch.equal(whole.scores.values[level], resumed.scores.values[level]) for level in LEVELS)
    assert all(torch.equal(whole.circuit.masks[level], resumed.circuit.masks[level]) for level in LEVELS)
    assert [row["loss"] for row in whole.history] == [row["loss"] for row in resumed.history]


def test_text_from_data_is_escaped_in_the_report(loaded: LoadedModel) -> None:
    task = ns.load_task("ioi", loaded.tokenizer, **FEW)
    run = ns.discover(loaded, task, make_config(QUICK))
    run.description["examples"]["shown"][0] = "<script>alert(1)</script>"  # type: ignore[index]
    run.description["loss"] = '"><script>alert(1)</script> of $x_$y'  # type: ignore[index]
    page = render([("<b>name</b>", run)])
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<b>name" not in page
    assert page.count("<svg") == 3
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace("http://creativecommons.org", "")


def test_gradients_that_a_notebook_has_switched_off_are_taken_all_the_same(loaded: LoadedModel) -> None:
    task, options = ns.load_task("ioi", loaded.tokenizer, **FEW), make_config({**QUICK, "method": "fisher"})
    usual = ns.discover(loaded, task, options).circuit.fingerprint
    with torch.set_grad_enabled(False):
        assert ns.discover(loaded, task, options).circuit.fingerprint == usual
    with torch.inference_mode():
        assert ns.discover(loaded, task, options).circuit.fingerprint == usual


@pytest.mark.parametrize("splits", ["test", ("tset",), ()])
def test_splits_that_are_none_are_refused(loaded: LoadedModel, splits: Any) -> None:
    task = ns.load_task("ioi", loaded.tokenizer, **FEW)
    run = ns.discover(loaded, task, make_config({**QUICK, "method": "random"}))
    with pytest.raises(UserError, match="expected splits as a list of some of train, validation, test, got"):
        ns.evaluate(loaded, task, run, splits=splits)


def test_what_is_no_run_no_ablation_and_no_loss_is_refused(loaded: LoadedModel) -> None:
    task, options = ns.load_task("ioi", loaded.tokenizer, **FEW), make_config({**QUICK, "method": "random"})
    run = ns.discover(loaded, task, options)
    given: tuple[tuple[Any, dict[str, Any], str], ...] = (
        (run, {"ablation": "foo"}, "ablation expects one of .*, got 'foo'"),
        ("runs/one", {}, "evaluate expects a run from discover or load_run, got str"),
        (task, {}, "evaluate expects a run from discover or load_run, got Task"),
    )
    for what, more, message in given:
        with pytest.raises(UserError, match=message):
            ns.evaluate(loaded, task, what, **more)
    with pytest.raises(UserError, match="discover expects a loss that can be called, got int"):
        ns.discover(loaded, task, options, loss=3)  # type: ignore[arg-type]


def test_a_revision_is_of_the_model_that_it_was_given_for(model_directory: Path) -> None:
    config = make_config({"model": "someone/model", "revision": "abc", "method": "random"})
    assert model_of(config, model=str(model_directory)).revision is None
    assert config.changed({"model": str(model_directory)}).revision is None
    assert config.changed({"seed": 1}).revision == "abc"
    with pytest.raises(UserError, match="expected a model directory"):
        model_of(config, model="")


def test_the_budget_is_held_against_all_of_validation_data_by_prompts(loaded: LoadedModel) -> None:
    """More of it than looks ask for, three pairs for each prompt."""

    def rows(split: str, names: Sequence[str], others: Sequence[str]) -> list[dict[str, str]]:
        pairs = [(a, b, other) for a, b in pairwise(names) for other in others]
        return [{"clean": f"{a} and {b} went", "corrupted": f"{other} and {b} went", "answers": f" {a}", "split": split} for a, b, other in pairs]

    parts = {"train": NAMES[:12], "validation": NAMES[12:73], "test": NAMES[73:90]}
    records = [row for split, names in parts.items() for row in rows(split, names, MALE_NAMES[:3])]
    task, options = ns.load_task(records, loaded.tokenizer), make_config({**QUICK, "method": "random", "kl_budget": 0.05})
    run = ns.discover(loaded, task, options)
    problem = make_problem(loaded, task, options)
    (kl,) = problem.losses([run.circuit], "validation")
    assert len(kl) == 180
    assert 0 < run.circuit.size < 1
    told = run.metrics["budget"]["validation_kl_upper"]
    assert told == pytest.approx(problem.upper_bound(kl), rel=1e-3)
    assert all(told != pytest.approx(other, rel=1e-3) for other in (metrics.upper_bound(kl), problem.upper_bound(kl[:128])))
