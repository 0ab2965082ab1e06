"""Baselines without gradients."""

from __future__ import annotations

import pytest
import torch

from nodesieve.config import make_config
from nodesieve.journal import Journal
from nodesieve.levels import LEAVES
from nodesieve.methods import METHODS
from test_cache import make_problem


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


def test_nothing_differs_where_prompts_are_the_same() -> None:
    problem = make_problem(same=7)
    scores = METHODS["activation_difference"](problem, make_config({}), Journal()).values
    assert all(float(scores[level].abs().max()) == 0 for level in ("head_dim", "mlp_neuron"))
    apart = METHODS["activation_difference"](make_problem(), make_config({}), Journal()).values
    assert float(apart["mlp_neuron"].min()) > 0
