"""Polishing: what the circuit can do without goes, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nodesieve.circuit import Circuit
from nodesieve.config import DiscoverConfig, make_config
from nodesieve.discovery import discover
from nodesieve.errors import UserError
from nodesieve.journal import SCORING, Journal, State
from nodesieve.levels import DEFAULT_LEVELS, LEVELS
from nodesieve.metrics import upper_bound
from nodesieve.polish import _Polisher, polish
from nodesieve.problem import Problem, make_problem
from nodesieve.run import RunJournal
from nodesieve.scores import Scores
from nodesieve.select import Selection
from planted import PLANTED, planted_model, planted_task

BUDGET = 0.1
CONFIG = make_config({"kl_budget": BUDGET, "batch_size": 8})


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(planted_model(), planted_task(), DiscoverConfig())


def selected(problem: Problem, circuit: Circuit, levels: tuple[str, ...] = DEFAULT_LEVELS) -> Selection:
    scores = Scores(values={level: torch.ones(problem.nodes.shape(level)) for level in LEVELS}, nodes=problem.nodes, levels=levels)
    (kl,) = problem.losses([circuit], "validation")
    upper = upper_bound(kl)
    return Selection(circuit=circuit, scores=scores, threshold=0.5, kl=float(kl.mean()), kl_upper=upper, met=upper <= BUDGET)


def test_from_the_whole_model_down_to_the_plant(problem: Problem) -> None:
    polished, _ = polish(problem, selected(problem, Circuit.whole(problem.nodes)), CONFIG, Journal())
    assert {level: {tuple(index) for index in polished.circuit.masks[level].nonzero().tolist()} for level in PLANTED} == PLANTED
    assert polished.met
    assert polished.kl_upper <= BUDGET
    (kl,) = problem.losses([polished.circuit], "validation")
    assert polished.kl == pytest.approx(float(kl.mean()))


def test_what_is_minimal_already_stays_as_it_is(problem: Problem) -> None:
    masks = {level: torch.zeros(problem.nodes.shape(level), dtype=torch.bool) for level in LEVELS}
    for level, indices in PLANTED.items():
        for index in indices:
            masks[level][index] = True
    circuit = Circuit.of(masks, problem.nodes)
    assert polish(problem, selected(problem, circuit), CONFIG, Journal())[0].circuit.fingerprint == circuit.fingerprint


def test_what_the_circuit_lacks_comes_back_and_what_it_does_not_need_goes(problem: Problem) -> None:
    missing = torch.tensor([sorted(PLANTED["mlp_neuron"])[0]])
    selection = selected(problem, Circuit.whole(problem.nodes).without({"mlp_neuron": missing}))
    polisher = _Polisher(problem, selection, CONFIG, Journal())
    levels = ["head_dim", "mlp_neuron", "mlp_output", "head"]
    polisher.ask(levels)
    opened, closed = polisher._changed(levels, 0.0, 0.02), polisher._changed(levels, 0.5, 0.0)
    assert opened.masks["mlp_neuron"][tuple(missing[0])]
    assert not closed.masks["mlp_neuron"][tuple(missing[0])]
    assert closed.kept("mlp_neuron") < selection.circuit.kept("mlp_neuron")
    for level, indices in PLANTED.items():
        assert all(closed.masks[level][index] for index in indices if (level, index) != ("mlp_neuron", tuple(missing[0].tolist())))


def test_a_head_too_large_for_a_round_bars_nothing_behind_it(problem: Problem) -> None:
    polisher = _Polisher(problem, selected(problem, Circuit.whole(problem.nodes)), CONFIG, Journal())
    polisher.ask(["head", "head_dim"])
    polisher.known.gradient["head"].fill_(1e6)  # by far the cheapest
    before, childless = polisher.now.circuit, ("head_dim", "mlp_neuron", "mlp_output")
    share = 1.5 / sum(before.kept(level) for level in childless)
    closed = polisher._changed(["head", "head_dim"], share, 0.0)
    assert closed.kept("head") == before.kept("head")
    assert closed.kept("head_dim") == before.kept("head_dim") - 2


def test_where_gradients_say_nothing_scores_do(problem: Problem) -> None:
    selection = selected(problem, Circuit.whole(problem.nodes))
    neurons = torch.randperm(problem.nodes.count("mlp_neuron"), generator=torch.Generator().manual_seed(0))
    values = {**selection.scores.values, "mlp_neuron": neurons.reshape(problem.nodes.shape("mlp_neuron")).float()}
    polisher = _Polisher(problem, replace(selection, scores=replace(selection.scores, values=values)), CONFIG, Journal())
    polisher.ask(["mlp_neuron"])
    for known in (polisher.known.gradient, polisher.known.fisher):
        known["mlp_neuron"].zero_()
    gone = ~polisher._changed(["mlp_neuron"], 0.1, 0.0).masks["mlp_neuron"]
    assert gone.sum() > 1
    assert values["mlp_neuron"][gone].max() < values["mlp_neuron"][~gone].min()


def test_a_stopped_polish_stops(problem: Problem) -> None:
    with pytest.raises(KeyboardInterrupt):
        polish(problem, selected(problem, Circuit.whole(problem.nodes)), CONFIG, Journal(stopping=True))


def test_a_polish_that_was_stopped_goes_on_as_if_it_had_not_been(problem: Problem, tmp_path: Path) -> None:
    selection = selected(problem, Circuit.whole(problem.nodes))

    class StoppedAfter(RunJournal):
        def save(self, state: State, *, part: str = SCORING) -> None:
            super().save(state, part=part)
            if state.numbers["round"] == 2:
                raise KeyboardInterrupt

    class Sizes(RunJournal):
        def __init__(self, directory: Path) -> None:
            super().__init__(directory)
            self.taken: list[str] = []

        def say(self, text: str) -> None:
            self.taken.append(text)

    (tmp_path / "whole").mkdir()
    through = Sizes(tmp_path / "whole")
    whole, _ = polish(problem, selection, CONFIG, through)
    with pytest.raises(KeyboardInterrupt):
        polish(problem, selection, CONFIG, StoppedAfter(tmp_path))
    rest = Sizes(tmp_path)
    resumed, seconds = polish(problem, selection, CONFIG, rest)
    assert resumed.circuit.fingerprint == whole.circuit.fingerprint
    assert 0 < len(rest.taken) < len(through.taken)
    assert rest.taken == through.taken[-len(rest.taken) :]
    assert seconds > 0


def test_levels_that_were_not_scored_are_left_alone(problem: Problem) -> None:
    polished, _ = polish(problem, selected(problem, Circuit.whole(problem.nodes), levels=("head",)), CONFIG, Journal())
    assert {tuple(index) for index in polished.circuit.masks["head"].nonzero().tolist()} == PLANTED["head"]
    assert polished.circuit.kept("mlp_neuron") == problem.nodes.count("mlp_neuron")


def test_a_circuit_over_the_budget_comes_back_as_it_is(problem: Problem) -> None:
    selection = replace(selected(problem, Circuit.whole(problem.nodes)), met=False)
    assert polish(problem, selection, CONFIG, Journal())[0] is selection


def test_a_run_says_what_there_was_before() -> None:
    config = make_config({"kl_budget": BUDGET, "method": "activation_difference", "polish": True, "batch_size": 8})
    run = discover(planted_model(), planted_task(), config)
    assert run.circuit.size <= run.metrics["unpolished"]["size"]
    assert {level: {tuple(index) for index in run.circuit.masks[level].nonzero().tolist()} for level in PLANTED} == PLANTED


def test_a_size_and_polishing_exclude_each_other() -> None:
    with pytest.raises(UserError, match="polish closes nodes within the KL budget"):
        make_config({"polish": True, "keep": 0.1})
