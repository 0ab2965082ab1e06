"""The sieve: what it keeps, in which order the rest went, and that it goes on where it was stopped."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nodesieve.circuit import Circuit
from nodesieve.config import DiscoverConfig, make_config
from nodesieve.discovery import discover
from nodesieve.errors import UserError
from nodesieve.evaluation import ablated_circuit
from nodesieve.journal import Journal, Stopped
from nodesieve.levels import LEVELS
from nodesieve.methods.looks import Look, Looks
from nodesieve.methods.prices import Candidate, Prices
from nodesieve.methods.sieve import MOST, ROUND, _places, _Round, _Sieve, sieve
from nodesieve.nodes import LevelTensors
from nodesieve.problem import Problem
from nodesieve.run import RunJournal
from planted import PLANTED, kept, planted_model, planted_task

BUDGET = 0.1


def config(**options: Any) -> DiscoverConfig:
    return make_config({"method": "sieve", "kl_budget": BUDGET, "batch_size": 8, "steps": 12 * ROUND, "polish": False, **options})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_alone_it_finds_the_plant(seed: int) -> None:
    run = discover(planted_model(), planted_task(seed), config(seed=seed))
    assert {level: kept(run.circuit, level) for level in PLANTED} == PLANTED
    assert run.metrics["budget"]["met"]
    assert run.metrics["steps"] == run.history[-1]["step"] <= 12 * ROUND


def test_what_is_left_stands_above_0_and_what_went_later_stands_higher(problem: Problem) -> None:
    journal = Journal()
    scores = sieve(problem, config(), journal)
    assert {level: kept(scores.circuit(0.0), level) for level in PLANTED} == PLANTED
    rounds = len(journal.history)
    for number, row in enumerate(journal.history, 1):  # the circuit after each round is cut by the line between it and the next
        circuit = scores.circuit(float(number - rounds))
        assert {level: circuit.kept(level) / problem.nodes.count(level) for level in row["open"]} == row["open"]


def test_the_line_can_be_drawn_inside_a_round(problem: Problem) -> None:
    scores = sieve(problem, config(), Journal())
    lines = torch.cat([scores.values[level].flatten() for level in ("head_dim", "mlp_neuron")]).unique()
    sizes = [scores.circuit(float(line)).size for line in lines]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 20


def test_a_trial_takes_the_heads_that_cost_nothing_and_no_other(problem: Problem) -> None:
    run = _Sieve(problem, config())
    run.looks.begin(run.circuit)
    run.learn(run.ask(_Round(Journal(), run)))
    run.close_heads(_Round(Journal(), run))
    assert kept(run.circuit, "head") == PLANTED["head"]
    assert run.circuit.masks["mlp_neuron"].all()
    assert run.looks.kl == pytest.approx(0.0, abs=0.01 * BUDGET)
    scores = run.scores()
    assert kept(scores.circuit(0.0), "head") == PLANTED["head"]
    assert all(scores.circuit(-1.0).masks[level].all() for level in run.levels)


def test_of_many_heads_those_are_tried_that_would_go_first(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _Sieve(problem, config())
    run.fisher, run.gradient = {"head": torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])}, {"head": torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 2.0]])}
    monkeypatch.setattr(sys.modules[_Sieve.__module__], "TRIED", 4)
    assert run._heads().tolist() == [[0, 0], [0, 2], [1, 1], [1, 2]]


# After a round; within one, which is begun anew; in the trial of heads before the fourth.
@pytest.mark.parametrize(("stop", "told", "rounds"), [(2 * ROUND, 1, 2), (2 * ROUND + 5, 1, 2), (3 * ROUND, 2, 3)])
def test_stopped_it_goes_on_as_if_it_had_not_been(problem: Problem, tmp_path: Path, stop: int, told: int, rounds: int) -> None:
    class Stopping(RunJournal):
        times = 0

        def progress(self, step: int, total: int, **facts: float) -> None:
            self.times += step >= stop
            self.stopping = self.times >= told

    through = Journal()
    whole = sieve(problem, config(), through)
    with pytest.raises(Stopped) as stopped:
        sieve(problem, config(), Stopping(tmp_path))
    assert stopped.value.scores.circuit(0.0).size == through.history[rounds - 1]["validation"]["size"]
    journal = RunJournal(tmp_path)
    again = sieve(problem, config(), journal)
    assert [row["step"] for row in journal.history] == [row["step"] for row in through.history]
    for level in whole.levels:
        assert torch.equal(again.values[level], whole.values[level])


def seen(candidate: Candidate, rise: float, *, doubt: float = 0.0) -> Look:
    return Look(candidate=candidate, kls=torch.zeros(0), start=0, rise=rise, doubt=doubt)


@pytest.fixture
def made_up(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> _Sieve:
    """A share of 0.35, where a share costs what it is, without whole heads, and caution 40 less than all others."""

    def cheapest(run: _Sieve, share: float, caution: float, *, wholes: bool = True) -> Candidate:
        return Candidate(circuit=run.circuit, price=share, chosen={"head": torch.zeros(1), "head_dim": torch.tensor(caution)})

    def at(looks: Looks, one: Candidate, *, turn: int) -> Look:
        return seen(one, one.price * (1 + abs(math.log(float(one.chosen["head_dim"]) / 40))))

    monkeypatch.setattr(_Sieve, "_cheapest", cheapest)
    monkeypatch.setattr(Looks, "at", at)
    run = _Sieve(problem, config())
    run.share = 0.35
    return run


TWICE_OFF = 1 + math.log(2)  # what a share costs, by its price, at half or twice the best caution


@pytest.mark.parametrize(
    ("allowed", "share"),
    [
        (0.9, 0.1 * 4.0),
        (0.35, 0.1 * 2.0),
        (0.15, 0.15 / TWICE_OFF * 1.4),  # the share was too large at the caution of before: first, one that would have fitted
        (0.05, 0.05 / TWICE_OFF * 1.4),
        (0.009, 0.01 * 0.7),
        (0.0009, None),
    ],
)
def test_a_round_takes_the_largest_share_that_may_go_at_the_best_caution(
    made_up: _Sieve, monkeypatch: pytest.MonkeyPatch, allowed: float, share: float | None
) -> None:
    monkeypatch.setattr(Looks, "agree", lambda *_: True)
    made_up.share = 0.1
    made_up._taken(10.0)
    assert made_up.caution == 20.0
    taken = made_up._taken(allowed)
    assert made_up.caution == 40.0
    assert (taken and taken.price) == (share and pytest.approx(share))


@pytest.mark.parametrize(
    ("first", "times", "allowed", "share", "wholes"),
    [
        (0.0, 3.0, 10.0, 0.5, False),
        (0.0, 0.3, 10.0, 0.5, True),
        (0.1, 0.3, 0.17, 0.35 * (0.17 / 0.205) * 0.7, True),
        (0.1, 0.3, 0.14, 0.35 * (0.14 / 0.205) * 0.45, False),
    ],
)
def test_heads_go_as_wholes_where_that_is_cheaper(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, first: float, times: float, allowed: float, share: float, wholes: bool
) -> None:
    """A share with whole heads costs `first` and `times` what the same costs without, which is its price."""

    def cheapest(run: _Sieve, share: float, caution: float, *, wholes: bool = True) -> Candidate:
        return Candidate(circuit=run.circuit, price=share, chosen={"head": torch.tensor(wholes)})

    def at(looks: Looks, one: Candidate, *, turn: int) -> Look:
        return seen(one, first + times * one.price if one.chosen["head"].any() else one.price)

    monkeypatch.setattr(_Sieve, "_cheapest", cheapest)
    monkeypatch.setattr(Looks, "at", at)
    monkeypatch.setattr(Looks, "agree", lambda *_: True)
    taken = _Sieve(problem, config())._taken(allowed)
    assert taken is not None
    assert taken.price == pytest.approx(share)
    assert bool(taken.chosen["head"]) == wholes


def test_each_round_takes_its_looks_in_its_own_turn(made_up: _Sieve, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []

    def at(looks: Looks, one: Candidate, *, turn: int) -> Look:
        turns.append(turn)
        return seen(one, one.price)

    monkeypatch.setattr(Looks, "at", at)
    monkeypatch.setattr(Looks, "agree", lambda *_: True)
    for number in (0, 1, 5):
        made_up.round = number
        made_up._taken(10.0)
        assert set(turns) == {number}
        turns.clear()


def test_without_whole_heads_none_goes(problem: Problem) -> None:
    run = _Sieve(problem, config())
    run.looks.begin(run.circuit)
    run.learn(run.ask(_Round(Journal(), run)))
    assert run._cheapest(0.35, 10.0).chosen["head"].any()
    without = run._cheapest(0.35, 10.0, wholes=False)
    assert not without.chosen["head"].any()
    assert without.chosen["head_dim"].any()


def test_what_all_of_the_split_has_refused_is_not_measured_again(made_up: _Sieve, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[float] = []
    monkeypatch.setattr(Looks, "agree", lambda _, look, most: measured.append(look.candidate.price))
    assert made_up._taken(10.0) is None
    assert measured == pytest.approx([MOST, *(0.35 * times for times in (1.4, 1.0, 0.7, 0.45, 0.25, 0.1))])


@pytest.mark.parametrize(
    ("flat", "most", "asked", "share"),
    [
        (0.0, 0.2, [0.196, 0.126, 0.07], 0.07),  # a fifth of the usual share may cost 0.2 x sqrt(0.2)
        (0.08, 0.1, [0.1277, 0.1065, 0.0906], None),  # the last would do, if it were not so small
    ],
)
def test_near_the_budget_all_of_the_split_settles_what_is_in_doubt(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, flat: float, most: float, asked: list[float], share: float | None
) -> None:
    """Where the usual share is 0.35, shares cost what they are and something `flat`, and first looks are off by up to 0.1."""
    rises: list[float] = []

    def agree(looks: Looks, look: Look, allowed: float) -> bool:
        rises.append(look.rise)
        return look.rise <= allowed

    monkeypatch.setattr(Looks, "near", True)
    monkeypatch.setattr(Looks, "at", lambda looks, one, *, turn: seen(one, flat + one.price, doubt=0.1))
    monkeypatch.setattr(_Sieve, "_cheapest", lambda run, share, *_, **__: Candidate(circuit=run.circuit, price=share, chosen=run.nodes.full(0.0)))
    monkeypatch.setattr(Looks, "agree", agree)
    monkeypatch.setattr(Prices, "total", lambda *_: 1.0)
    taken = _Sieve(problem, config())._taken(most)
    assert rises == pytest.approx(asked, abs=1e-4)
    assert (taken and taken.price) == (share and pytest.approx(share))


def test_rounds_are_planned_for_the_time_there_is(problem: Problem) -> None:
    run = _Sieve(problem, config(max_minutes=10.0, polish=True))
    assert run.planned() == 12  # nothing is known of how long a round takes
    run.round, run.seconds, run.lasted = 2, 110.0, 100.0
    assert run.planned() == 2 + 5  # (0.85 x 600 - 110) s, at 75 s a round
    assert run.last_step == 7 * run.batches < run.config.steps  # what time left is told by
    assert not run.done()
    run.seconds = 420.0
    assert run.done()
    assert _Sieve(problem, config(max_minutes=10.0)).time_left == 600.0


def test_without_time_there_is_one_round_and_no_polishing() -> None:
    run = discover(planted_model(), planted_task(), config(max_minutes=1e-9, polish=True))
    assert run.metrics["steps"] == ROUND
    assert run.metrics["budget"]["met"]
    assert run.metrics["unpolished"]["size"] == run.circuit.size < 1


def test_on_the_way_to_a_size_the_budget_does_not_hold(problem: Problem) -> None:
    size = 2 / sum(problem.nodes.count(level) for level in ("head_dim", "mlp_neuron"))  # half of what the plant has
    run = discover(planted_model(), planted_task(), config(keep=size, polish=None))
    assert 0 < run.circuit.size <= size
    assert not run.metrics["budget"]["met"]


@pytest.mark.parametrize("begun", [False, True])
def test_where_nothing_is_left_it_ends(problem: Problem, begun: bool) -> None:
    journal = Journal()
    scores = sieve(problem, config(kl_budget=100.0), journal, start=ablated_circuit(problem) if begun else None)
    assert (len(journal.history) == 0) == begun
    assert len(journal.history) < 12
    assert all(scores.circuit(0.0).kept(level) == 0 for level in PLANTED)


def test_blocks_alone_go_as_wholes(problem: Problem) -> None:
    scores = sieve(problem, config(levels=["layer", "attention_block", "mlp_block"]), Journal())
    circuit = scores.circuit(0.0)
    assert {level: kept(circuit, level) for level in ("attention_block", "mlp_block")} == {
        level: PLANTED[level] for level in ("attention_block", "mlp_block")
    }
    assert circuit.kept("mlp_neuron") == problem.nodes.neurons


def test_levels_without_a_penalty_are_left_alone(problem: Problem) -> None:
    scores = sieve(problem, config(penalties={"mlp_output": 0.0}), Journal())
    assert "mlp_output" not in scores.levels
    assert scores.circuit(0.0).kept("mlp_output") == problem.nodes.width
    with pytest.raises(UserError, match="expects a level whose penalty is above 0"):
        sieve(problem, config(penalties=dict.fromkeys(LEVELS, 0.0)), Journal())


def test_the_price_of_a_head_is_its_own_and_that_of_its_dimensions(problem: Problem) -> None:
    penalties = {"head": 3.0, "head_dim": 24.0}
    prices = _Sieve(problem, config(penalties=penalties)).prices.each(Circuit.whole(problem.nodes).without({"head_dim": torch.tensor([[0, 0, 1]])}))
    heads, dims = problem.nodes.count("head"), problem.nodes.count("head_dim")
    assert prices["head"][0, 0] == pytest.approx(3 / heads + (problem.nodes.head_dim - 1) * 24 / dims)
    assert prices["head"][0, 1] == pytest.approx(3 / heads + problem.nodes.head_dim * 24 / dims)


def test_no_example_comes_twice_before_all_have_come(problem: Problem) -> None:
    run = _Sieve(problem, config(batch_size=1))
    seen: list[int] = []
    for number in range(len(problem.task["train"]) // ROUND):
        run.round = number
        seen += run._next_examples()
    assert len(set(seen)) == len(seen) > 0.9 * len(problem.task["train"])


def test_a_node_goes_with_what_lies_above_it_or_what_is_left_of_it(problem: Problem) -> None:
    nodes = problem.nodes

    def none() -> LevelTensors:
        return {level: torch.zeros(nodes.shape(level)) for level in LEVELS}

    chosen, gone = none(), {level: torch.zeros(nodes.shape(level), dtype=torch.bool) for level in LEVELS}
    chosen["head"][0, 1], chosen["head_dim"][0, 1, 0], chosen["head_dim"][0, 1, 1] = 0.5, 0.25, 0.75
    chosen["head_dim"][0, 2] = torch.tensor([0.1, 0.2, 0.3, 0.9])
    gone["head"][0, 1:], gone["head_dim"][0, 1:] = True, True
    places = _places(chosen, gone)
    assert places["head"][0, 1:].tolist() == pytest.approx([0.5, 0.9])
    assert places["head_dim"][0, 1].tolist() == pytest.approx([0.25, 0.5, 0.5, 0.5])
    assert places["head_dim"][0, 2].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.9])
