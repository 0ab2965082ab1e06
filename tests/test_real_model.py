"""On the real model: it loads from its package, the gates fit it, and it does the built-in tasks. Run with `make test-slow`."""

from __future__ import annotations

import pytest
import torch

import nodesieve as ns
from nodesieve.config import make_config
from nodesieve.evaluation import evaluate_circuit
from nodesieve.gated_model import GatedModel
from nodesieve.models import LoadedModel
from nodesieve.nodes import NodeSpace
from nodesieve.problem import make_problem
from nodesieve.verify import verify

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm() -> LoadedModel:
    return ns.load_model("smollm2-135m")


def test_its_nodes_are_those_of_the_paper_s_count(smollm: LoadedModel) -> None:
    assert GatedModel(smollm.model).nodes == NodeSpace(layers=30, heads=9, head_dim=64, neurons=1536, width=576)


def test_the_gates_fit(smollm: LoadedModel) -> None:
    assert [check.name for check in verify(GatedModel(smollm.model)) if not check.passed] == []


@pytest.mark.parametrize(("name", "accuracy"), [("ioi", 0.97), ("greater_than", 0.9), ("gendered_pronoun", 0.97)])
def test_it_does_the_tasks(smollm: LoadedModel, name: str, accuracy: float) -> None:
    problem = make_problem(smollm, ns.load_task(name, smollm.tokenizer), ns.DiscoverConfig(), splits=("test",))
    everything = ns.Circuit.whole(problem.nodes)
    evaluation = evaluate_circuit(problem, everything)
    assert evaluation.full["test"]["accuracy"] >= accuracy
    assert evaluation.circuit["test"]["kl"] == 0
    assert evaluation.ablated["test"]["kl"] > 0.5


def test_a_short_run_closes_most_heads_at_a_low_kl(smollm: LoadedModel) -> None:
    run = ns.discover(smollm, ns.load_task("ioi", smollm.tokenizer, redraws=0), make_config({"steps": 50, "kl_budget": 0.5}))
    assert run.metrics["budget"]["met"]
    assert run.metrics["nodes"]["head"]["kept"] < 135
    assert run.metrics["circuit"]["test"]["kl"] < 0.6
    assert torch.is_tensor(run.circuit.masks["head"])
