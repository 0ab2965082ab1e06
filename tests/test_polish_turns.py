"""Single turns of polishing: what they may take, by which examples, and what they try."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from nodesieve.circuit import Circuit
from nodesieve.config import make_config
from nodesieve.discovery import discover
from nodesieve.journal import Journal
from nodesieve.polish import _Polisher, _Stage, polish
from nodesieve.problem import Problem
from nodesieve.tasks.base import SplitName
from planted import planted_model, planted_task
from test_polish import BUDGET, CONFIG, Additive, polisher_of, selected


@pytest.mark.parametrize(("last", "upper"), [(9.0, None), (0.0, 9.0)])
def test_polishing_takes_nothing_that_all_of_the_split_or_its_prompts_refuse(problem: Problem, last: float, upper: float | None) -> None:
    class Late(Additive):
        def measured(self, circuits: Sequence[Circuit], split: SplitName) -> list[torch.Tensor]:
            return [torch.cat([torch.zeros(128), torch.full((64,), last)]) for _ in circuits]

        def upper_bound(self, kl: torch.Tensor) -> float:
            return float(kl.max()) if upper is None else upper

    whole = Circuit.whole(problem.nodes)
    polisher = _Polisher(Late(problem, head=0.0, neuron=0.0), selected(problem, whole), CONFIG)
    assert not polisher._taken(whole, limit=math.inf)


def test_nothing_above_the_limit_is_taken(problem: Problem) -> None:
    whole = Circuit.whole(problem.nodes)
    polisher = _Polisher(Additive(problem, head=0.0, neuron=0.0), selected(problem, whole), CONFIG)
    assert polisher._taken(whole, limit=0.0)
    assert not polisher._taken(whole, limit=-1e-9)


@pytest.mark.parametrize(("spending", "gone"), [(False, 0), (True, 5)])
def test_the_first_stages_close_what_costs_nothing(problem: Problem, spending: bool, gone: int) -> None:
    additive, whole = Additive(problem, head=0.019, neuron=0.0), Circuit.whole(problem.nodes)
    polisher = _Polisher(additive, selected(additive, whole, levels=("head",)), CONFIG)
    assert polisher.go_through(_Stage(levels=("head",), share=None, spending=spending), Journal(), until=math.inf) == bool(gone)
    assert whole.kept("head") - polisher.now.circuit.kept("head") == gone


def test_a_head_that_helps_on_looks_alone_does_not_come_back(problem: Problem) -> None:
    class Constant(Additive):
        def measured(self, circuits: Sequence[Circuit], split: SplitName) -> list[torch.Tensor]:
            return [torch.full((8,), 0.5) for _ in circuits]

    circuit = Circuit.whole(problem.nodes).without({"head": torch.tensor([[0, 0]])})
    constant = Constant(problem, head=0.5, neuron=0.0)
    polisher = polisher_of(constant, selected(constant, circuit))
    assert not polisher.reopen(Journal(), until=math.inf)
    assert polisher.now.circuit.fingerprint == circuit.fingerprint


def test_a_head_comes_back_where_more_can_go_for_it(problem: Problem) -> None:
    class OneCheapHead(Additive):
        def losses(self, circuits: Sequence[Circuit], split: SplitName, *, first: int | None = None, **how: Any) -> list[torch.Tensor]:
            heads = [(~circuit.masks["head"]).float() for circuit in circuits]
            cost = torch.full((2, 3), 1.0)
            cost[0, 0] = 0.05
            gone = [16 - circuit.kept("mlp_neuron") for circuit in circuits]
            return [torch.full((first or 8,), float((closed * cost).sum()) + 0.008 * n) for closed, n in zip(heads, gone, strict=True)]

    some = OneCheapHead(problem, head=0.0, neuron=0.0)
    start = Circuit.whole(problem.nodes).without({"head": torch.tensor([[0, 0]])})
    polished, _ = polish(some, selected(some, start, levels=("head", "mlp_neuron")), CONFIG, Journal())
    assert (polished.circuit.kept("head"), polished.circuit.kept("mlp_neuron")) == (6, 4)


def test_of_each_layer_those_that_score_lowest_are_tried(problem: Problem) -> None:
    selection = selected(problem, Circuit.whole(problem.nodes), levels=("mlp_neuron",))
    values = {**selection.scores.values, "mlp_neuron": torch.rand(problem.nodes.shape("mlp_neuron"), generator=torch.Generator().manual_seed(0))}
    polisher = polisher_of(problem, replace(selection, scores=replace(selection.scores, values=values)))
    for layer, (_, index) in enumerate(polisher._lowest("mlp_neuron", 1 / 2)):
        assert {tuple(i) for i in index.tolist()} == {(layer, i) for i in values["mlp_neuron"][layer].argsort()[:4].tolist()}


def test_what_there_was_before_polishing_is_what_there_is_without() -> None:
    options = {"kl_budget": BUDGET, "method": "random", "batch_size": 8}
    run, plain = (discover(planted_model(), planted_task(), make_config({**options, "polish": polish})) for polish in (True, False))
    assert run.circuit.size < run.metrics["unpolished"]["size"] == plain.circuit.size
    assert run.metrics["unpolished"]["nodes"] == {level: part["kept"] for level, part in plain.metrics["nodes"].items()}
