"""Baselines without gradients."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from nodesieve.config import make_config
from nodesieve.discovery import discover
from nodesieve.errors import UserError
from nodesieve.journal import Journal
from nodesieve.levels import LEAVES
from nodesieve.methods import METHODS
from nodesieve.metrics import logit_difference
from planted import planted_model, planted_task
from test_cache import config, make_problem


@pytest.mark.parametrize("method", ["random", "weight_magnitude", "activation_difference"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_scores_rank_every_leaf_and_circuits_of_any_size_can_be_cut(method: str, name: str) -> None:
    problem = make_problem(name)
    scores = METHODS[method](problem, make_config({"method": method}), Journal())
    leaves = torch.cat([scores.values[level][problem.nodes.present(level)] for level in LEAVES])
    assert len(leaves.unique()) > 0.9 * len(leaves)
    middle = scores.circuit(float(leaves.median()))
    assert 0.3 < middle.size < 0.6


def test_weight_magnitude_is_the_norm_of_what_a_node_writes_with() -> None:
    for name in ("llama", "gpt2"):  # (out, in) and (in, out)
        problem = make_problem(name)
        places = problem.model.architecture.places[1]
        scores = METHODS["weight_magnitude"](problem, make_config({}), Journal()).values
        for neuron in (0, 3):
            one = torch.zeros(1, problem.nodes.neurons)
            one[0, neuron] = 1
            assert places.mlp_projection is not None
            written = places.mlp_projection(one) - places.mlp_projection(torch.zeros_like(one))
            torch.testing.assert_close(scores["mlp_neuron"][1, neuron], written.detach().norm(), rtol=1e-4, atol=1e-5)
        one = torch.zeros(1, problem.nodes.heads * problem.nodes.head_dim)
        one[0, 2 * problem.nodes.head_dim + 5] = 1
        written = places.attention_projection(one) - places.attention_projection(torch.zeros_like(one))
        torch.testing.assert_close(scores["head_dim"][1, 2, 5], written.detach().norm(), rtol=1e-4, atol=1e-5)


def test_activation_difference_is_how_far_prompts_differ_times_what_a_node_writes_with() -> None:
    problem = make_problem()
    scores, written = (METHODS[method](problem, make_config({}), Journal()).values for method in ("activation_difference", "weight_magnitude"))
    batches = [problem.task["train"].batch([i]) for i in range(6)]  # one at a time, without padding
    pairs = [(problem.model.record(batch.clean).neurons[1], problem.model.record(batch.corrupted).neurons[1]) for batch in batches]  # type: ignore[arg-type]
    apart = torch.cat([(clean - corrupted)[0].abs() for clean, corrupted in pairs]).mean(0)
    torch.testing.assert_close(scores["mlp_neuron"][1], apart * written["mlp_neuron"][1])


@pytest.mark.parametrize(("method", "drawn"), [("random", True), ("uniform_gradient", True), ("fisher", True), ("gate_gradient", False)])
def test_what_is_drawn_goes_by_the_seed(method: str, drawn: bool) -> None:
    problem = make_problem()
    first, again, other = (METHODS[method](problem, make_config({"seed": seed}), Journal()).values["head_dim"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert torch.equal(first, other) != drawn


def test_attributions_are_read_by_size_and_with_their_sign() -> None:
    scores = METHODS["gate_gradient"](make_problem(), make_config({}), Journal())
    assert scores.other is not None
    signed = scores.other.values["mlp_neuron"]
    assert (signed < 0).any()
    assert torch.equal(scores.values["mlp_neuron"], signed.abs())


@pytest.mark.parametrize(("method", "part", "nothing"), [("gate_gradient", "distractors", ()), ("activation_difference", "corrupted", None)])
def test_an_example_without_what_a_method_needs_is_refused(method: str, part: str, nothing: Any) -> None:
    task = planted_task()
    first, *others = task.splits["train"]
    lacking = replace(task, splits={**task.splits, "train": (*others, replace(first, **{part: nothing}))})
    for ablation in ("mean", "counterfactual"):
        with pytest.raises(UserError, match=f"method {method} expects {part} in every training example, got some without"):
            discover(planted_model(), lacking, make_config({"method": method, "ablation": ablation}))


def test_further_tokens_of_an_answer_have_no_distractors() -> None:
    task = planted_task()
    longer = {split: [replace(example, answers=(f"{example.answers[0]} ?",)) for example in examples] for split, examples in task.splits.items()}
    options = {"answer_tokens": "all", "ablation": "mean", "force": True}
    for more, what in (({"method": "gate_gradient"}, "method gate_gradient"), ({"method": "sieve", "task_weight": 0.1}, "--task-weight")):
        with pytest.raises(UserError, match=rf"{what} expects distractors .*, got some without \(as the further tokens of an answer are"):
            discover(planted_model(), replace(task, splits=longer), make_config({**options, **more}))


def test_what_one_example_in_many_lacks_is_said_before_the_first_step() -> None:
    task = planted_task()
    first, *others = task.splits["train"]
    lacking = replace(task, splits={**task.splits, "train": (*others, replace(first, distractors=()))})
    journal = Journal()
    with pytest.raises(UserError, match="--task-weight expects distractors in every training example, got some without; add them, or set it to 0"):
        discover(planted_model(), lacking, make_config({"method": "multigranular", "task_weight": 1.0}), journal=journal)
    assert not journal.history


def test_gates_are_integrated_over_the_middles_of_equal_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[METHODS["gate_gradient_ig"].__module__], "_scores", lambda _, __, ___, *levels: levels)
    levels: Any = METHODS["gate_gradient_ig"](make_problem(), make_config({}), Journal())
    assert [float(level(1, torch.Generator())) for level in levels] == [(2 * i + 1) / 16 for i in range(8)]


@pytest.mark.parametrize("method", ["weight_magnitude", "activation_difference"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_heads_and_mlps_as_wholes_are_worth_what_is_in_them(method: str, name: str) -> None:
    problem = make_problem(name)
    scores = METHODS[method](problem, make_config({"method": method}), Journal())
    assert scores.wholes is not None
    inside = {"head": scores.values["head_dim"].sum(-1), "mlp_block": scores.values["mlp_neuron"].sum(-1) + scores.values["expert"].sum(-1)}
    for level, expected in inside.items():
        torch.testing.assert_close(scores.wholes[level], expected)
        assert (expected > 0).all()


@pytest.mark.parametrize("method", ["weight_magnitude", "activation_difference", "gate_gradient"])
def test_mlps_of_which_outputs_alone_have_gates_are_worth_their_outputs(method: str) -> None:
    scores = METHODS[method](make_problem(), make_config({"method": method, "levels": "head_dim,mlp_output"}), Journal())
    assert scores.wholes is not None
    outputs = (scores if scores.other is None else scores.other).values["mlp_output"].sum(-1)
    torch.testing.assert_close(scores.wholes["mlp_block"], outputs if scores.other is None else outputs.abs())
    assert len(scores.wholes["mlp_block"].unique()) > 1


@pytest.mark.parametrize("method", ["weight_magnitude", "activation_difference"])
def test_what_has_no_measure_of_the_embedding_leaves_it_open(method: str) -> None:
    options = {"method": method, "levels": "head_dim,mlp_neuron,embedding"}
    run = discover(planted_model(), planted_task(), make_config({**options, "kl_budget": 0.1, "polish": False}))
    assert run.scores.levels == ("head_dim", "mlp_neuron")
    assert run.circuit.size < 1
    with pytest.raises(UserError, match=f"method {method} expects levels with some of layer, .*, got embedding"):
        make_config({**options, "levels": "embedding"})


@pytest.mark.parametrize("levels", ["mlp_block,mlp_neuron", "mlp_block,expert"])
@pytest.mark.parametrize("method", ["gate_gradient", "fisher", "weight_magnitude", "activation_difference", "nested"])
def test_blocks_with_nothing_of_what_has_gates_do_not_go_first(method: str, levels: str) -> None:
    """Of a model in which one layer has neurons and the others have experts."""
    problem = make_problem("qwen3_moe-mixed")
    scores = METHODS[method](problem, config(method=method, levels=levels, steps=1), Journal())
    if method == "nested":
        assert "mlp_block" not in scores.levels
    else:
        assert bool((scores.values["mlp_block"] > 0).all())


def test_nothing_differs_where_prompts_are_the_same() -> None:
    problem = make_problem(same=7)
    scores = METHODS["activation_difference"](problem, make_config({}), Journal()).values
    assert all(float(scores[level].abs().max()) == 0 for level in ("head_dim", "mlp_neuron"))
    apart = METHODS["activation_difference"](make_problem(), make_config({}), Journal()).values
    assert float(apart["mlp_neuron"].min()) > 0


def test_attributions_with_their_sign_are_how_the_logit_difference_falls_as_a_gate_closes() -> None:
    problem = make_problem()
    scores = METHODS["gate_gradient"](problem, make_config({"learning_dtype": "float32"}), Journal())
    assert scores.other is not None
    signed = scores.other.values["mlp_neuron"]
    batch = problem.task["train"].batch(range(6))

    def mean(gate: float, index: tuple[int, int]) -> float:
        gates = problem.nodes.full(1.0)
        gates["mlp_neuron"][index] = gate
        with torch.no_grad():
            return float(logit_difference(problem.model.gated_logits(batch.clean, gates, problem.ablation.values(batch)), batch).double().mean())

    for flat in (signed.argmax(), signed.argmin()):
        index = tuple(int(i) for i in torch.unravel_index(flat, signed.shape))
        slope = (mean(1.0, index) - mean(0.9, index)) / 0.1  # type: ignore[arg-type]
        assert slope == pytest.approx(float(signed[index]), rel=0.2)
