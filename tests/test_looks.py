"""What the sieve asks of validation data: a few examples far from the budget, near it all of them, and others first in each round."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from nodesieve.circuit import Circuit
from nodesieve.config import DiscoverConfig
from nodesieve.methods.looks import Look, Looks
from nodesieve.methods.prices import Candidate
from nodesieve.problem import Problem, make_problem
from planted import planted_model, planted_task
from test_cache import make_problem as random_problem


def without(problem: Problem, level: str) -> Circuit:
    """The whole model but the first node of a level."""
    index = torch.zeros(1, 2, dtype=torch.long)
    return Circuit.whole(problem.nodes).without({level: index})


def candidate(circuit: Circuit) -> Candidate:
    return Candidate(circuit=circuit, price=1.0, chosen={})


def test_all_of_the_split_is_asked_where_the_budget_is_near_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(planted_model(), planted_task(), DiscoverConfig())
    monkeypatch.setattr(sys.modules[Looks.__module__], "QUICK", 8)
    looks = Looks(problem, DiscoverConfig(kl_budget=0.1))
    whole = Circuit.whole(problem.nodes)
    looks.begin(whole)
    assert len(looks.kls) == 8
    assert looks.at(candidate(whole), turn=0).doubt == 0.0
    looks.begin(without(problem, "head"))  # the planted one
    assert len(looks.kls) == len(problem.task["validation"]) > 8


@pytest.mark.parametrize(("turn", "start"), [(0, 0), (1, 2), (2, 4), (5, 4), (6, 0)])
def test_near_the_budget_each_round_looks_at_other_examples_first(monkeypatch: pytest.MonkeyPatch, turn: int, start: int) -> None:
    problem = random_problem()  # of six examples
    monkeypatch.setattr(sys.modules[Looks.__module__], "QUICK", 2)
    looks = Looks(problem, DiscoverConfig(kl_budget=1e-9))
    looks.begin(without(problem, "head"))
    before = looks.kls
    smaller = without(problem, "head").without({"mlp_neuron": torch.tensor([[0, 0]])})
    (whole,) = problem.looks([smaller], "validation")
    look = looks.at(candidate(smaller), turn=turn)
    torch.testing.assert_close(look.kls, whole[start : start + 2])
    rise = (whole - before)[start : start + 2]
    assert look.rise == pytest.approx(float(rise.mean()), rel=1e-2)
    assert look.doubt == pytest.approx(float(rise.std()) / 2**0.5, rel=1e-2)
    assert not looks.agree(look, math.inf)  # over the budget
    assert torch.equal(looks.kls, before)
    looks.config = DiscoverConfig(keep=0.5)  # to a size, the budget does not hold
    mean = float((whole - before).mean())
    assert not looks.agree(look, mean / 1.3 if mean > 0 else mean * 1.3)
    assert looks.agree(look, abs(mean))
    torch.testing.assert_close(looks.kls, whole)


def test_looks_hold_the_budget_against_the_upper_end(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, spread = random_problem(), torch.tensor([0.0, 0.2] * 3)
    monkeypatch.setattr(sys.modules[Looks.__module__], "QUICK", 2)
    monkeypatch.setattr(Looks, "_measured", lambda looks, circuit, start, stop=None: spread[start:stop])
    whole = Circuit.whole(problem.nodes)
    looks = Looks(problem, DiscoverConfig(kl_budget=0.3))
    looks.begin(whole)
    assert len(looks.kls) == 6  # half of the budget lies above the mean of the first two, and below its upper end
    assert looks.kl_upper == problem.upper_bound(spread) > 0.15 > looks.kl
    looks.config = DiscoverConfig(kl_budget=0.12)
    assert not looks.agree(Look(candidate=candidate(whole), kls=spread[:2], start=0, rise=0.0, doubt=0.0), math.inf)
