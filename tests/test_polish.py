"""Polishing: what the circuit can do without goes, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nodesieve.circuit import Circuit
from nodesieve.config import DiscoverConfig, make_config
from nodesieve.errors import UserError
from nodesieve.journal import SCORING, Journal, State
from nodesieve.levels import DEFAULT_LEVELS, LEVELS
from nodesieve.metrics import upper_bound
from nodesieve.parts import Part, cheapest_parts, helpful_parts
from nodesieve.polish import _gain, _Polisher, _Stage, polish
from nodesieve.problem import Problem, make_problem
from nodesieve.run import RunJournal
from nodesieve.scores import Scores
from nodesieve.select import Selection, select_budget
from nodesieve.tasks.base import SplitName
from planted import PLANTED, kept, planted_model, planted_task

BUDGET = 0.1
CONFIG = make_config({"kl_budget": BUDGET, "batch_size": 8})


def selected(problem: Problem, circuit: Circuit, levels: tuple[str, ...] = DEFAULT_LEVELS) -> Selection:
    """A circuit whose nodes all score alike."""
    scores = Scores(values={level: torch.ones(problem.nodes.shape(level)) for level in LEVELS}, nodes=problem.nodes, levels=levels)
    (kl,) = problem.losses([circuit], "validation")
    upper = upper_bound(kl)
    return Selection(circuit=circuit, scores=scores, threshold=0.5, kl=float(kl.mean()), kl_upper=upper, met=upper <= BUDGET)


def test_from_the_whole_model_down_to_the_plant(problem: Problem) -> None:
    polished, _ = polish(problem, selected(problem, Circuit.whole(problem.nodes)), CONFIG, Journal())
    assert {level: kept(polished.circuit, level) for level in PLANTED} == PLANTED
    assert polished.met
    assert polished.kl_upper <= BUDGET
    (kl,) = problem.losses([polished.circuit], "validation")
    assert polished.kl == pytest.approx(float(kl.mean()))


def planted_circuit(problem: Problem) -> Circuit:
    masks = {level: torch.zeros(problem.nodes.shape(level), dtype=torch.bool) for level in LEVELS}
    masks["embedding"][:] = True
    for level, indices in PLANTED.items():
        for index in indices:
            masks[level][index] = True
    return Circuit.of(masks, problem.nodes)


def test_what_is_minimal_already_stays_as_it_is(problem: Problem) -> None:
    selection = selected(problem, planted_circuit(problem))
    assert selection.met
    assert polish(problem, selection, CONFIG, Journal())[0].circuit.fingerprint == selection.circuit.fingerprint


def test_validation_data_alone_says_what_goes() -> None:
    alone = make_problem(planted_model(), planted_task(), DiscoverConfig(), splits=("validation",))
    polished, _ = polish(alone, selected(alone, Circuit.whole(alone.nodes)), CONFIG, Journal())
    assert {level: kept(polished.circuit, level) for level in PLANTED} == PLANTED


def test_a_circuit_that_is_within_the_budget_by_its_mean_alone_is_not_taken(problem: Problem) -> None:
    class Uncertain(Additive):
        def measured(self, circuits: Sequence[Circuit], split: SplitName) -> list[torch.Tensor]:
            return [torch.tensor([0.0, 0.18] * 4) for _ in circuits]

    whole = Circuit.whole(problem.nodes)
    assert not _Polisher(Uncertain(problem, head=0.0, neuron=0.0), selected(problem, whole), CONFIG)._taken(whole, limit=math.inf)


def test_what_goes_with_a_part_is_counted(problem: Problem) -> None:
    some = Circuit.whole(problem.nodes).without({"head_dim": torch.tensor([[0, 1, 0]])})
    dims, width, neurons = problem.nodes.head_dim, problem.nodes.width, problem.nodes.neurons
    expected = {"head": dims - 1, "attention_block": 3 * dims - 1, "mlp_block": neurons + width}
    assert {level: _gain(some, (level, torch.tensor([[0, 1][: some.masks[level].dim()]]))) for level in expected} == expected
    assert _gain(some, ("mlp_neuron", torch.tensor([[0, 1], [0, 2]]))) == 2


def test_a_stopped_polish_stops(problem: Problem) -> None:
    with pytest.raises(KeyboardInterrupt):
        polish(problem, selected(problem, Circuit.whole(problem.nodes)), CONFIG, Journal(stopping=True))


@pytest.mark.parametrize("within", [False, True], ids=["between two stages", "within a stage"])
def test_a_polish_that_was_stopped_goes_on_as_if_it_had_not_been(problem: Problem, tmp_path: Path, within: bool) -> None:
    selection = selected(problem, Circuit.whole(problem.nodes))

    class Noted(RunJournal):
        """What is said and what is kept; stopped once `at` is kept."""

        def __init__(self, directory: Path, *, at: tuple[int, int] | None = None) -> None:
            super().__init__(directory)
            self.at, self.told, self.kept = at, list[str](), list[tuple[int, int]]()

        def say(self, text: str) -> None:
            self.told.append(text)

        def save(self, state: State, *, part: str = SCORING) -> None:
            super().save(replace(state, numbers={**state.numbers, "seconds": 1000.0}), part=part)
            self.kept.append((state.numbers["stage"], state.numbers["turns"]))
            if self.kept[-1] == self.at:
                raise KeyboardInterrupt

    (tmp_path / "whole").mkdir()
    through = Noted(tmp_path / "whole")
    whole, _ = polish(problem, selection, CONFIG, through)
    at = next((stage, turns) for stage, turns in through.kept if (turns > 0) == within and stage > within)
    with pytest.raises(KeyboardInterrupt):
        polish(problem, selection, CONFIG, Noted(tmp_path, at=at))
    rest = Noted(tmp_path)
    resumed, seconds = polish(problem, selection, CONFIG, rest)
    assert resumed.circuit.fingerprint == whole.circuit.fingerprint
    assert rest.kept == through.kept[through.kept.index(at) + 1 :]
    assert 0 < len(rest.told) < len(through.told)
    assert rest.told == through.told[-len(rest.told) :]
    assert seconds > 1000


def planted_without_its_head(problem: Problem) -> tuple[Circuit, tuple[int, int]]:
    ((layer, head),) = PLANTED["head"]
    return planted_circuit(problem).without({"head": torch.tensor([[layer, head]])}), (layer, head)


def polisher_of(problem: Problem, selection: Selection) -> _Polisher:
    return _Polisher(problem, replace(selection, met=True), replace(CONFIG, kl_budget=5.0))


def test_a_head_without_which_the_kl_is_higher_comes_back(problem: Problem) -> None:
    circuit, head = planted_without_its_head(problem)
    polisher = polisher_of(problem, selected(problem, circuit))
    before = polisher.now
    assert polisher.reopen(Journal(), until=math.inf)
    assert polisher.now.circuit.masks["head"][head]
    assert polisher.now.circuit.masks["head"].sum() == before.circuit.masks["head"].sum() + 1  # and no other, of which none does anything
    assert polisher.now.kl < before.kl
    assert polisher.smallest is before  # as long as nothing has gone for it
    assert not polisher.reopen(Journal(), until=math.inf)


@pytest.mark.parametrize(("little", "again"), [(0.01, True), (0.9, False)])
def test_heads_come_back_once_more_where_the_last_time_was_worth_it(
    problem: Problem, little: float, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodesieve.polish.LITTLE", little)
    circuit, _ = planted_without_its_head(problem)
    polisher = polisher_of(problem, selected(problem, circuit))
    polisher._before = replace(polisher.now, circuit=planted_circuit(problem))  # twice as many nodes without children
    assert polisher.smallest is polisher.now
    assert polisher.reopen(Journal(), until=math.inf) == again


def test_a_head_comes_back_as_the_method_had_left_it(problem: Problem) -> None:
    ((layer, head),) = PLANTED["head"]
    some = Circuit.whole(problem.nodes).without({"head_dim": torch.tensor([[layer, head, 0]])})
    polisher = polisher_of(problem, selected(problem, some))
    part = ("head", torch.tensor([[layer, head]]))
    polisher.now = replace(polisher.now, circuit=some.without(dict([part])))
    assert polisher._opened([part]).fingerprint == some.fingerprint
    nothing, _ = planted_without_its_head(problem)
    assert polisher_of(problem, selected(problem, nothing))._opened([part]).masks["head_dim"][layer, head].all()


def test_no_head_comes_back_from_beyond_what_the_search_is_to_stay_within(problem: Problem) -> None:
    circuit, head = planted_without_its_head(problem)
    selection = selected(problem, circuit)
    outer = Circuit.whole(problem.nodes).without({"head": torch.tensor([head])})
    polisher = polisher_of(problem, replace(selection, scores=replace(selection.scores, within=outer)))
    assert list(head) not in polisher._closed_heads().tolist()
    assert len(polisher._closed_heads()) == int((outer.masks["head"] & ~circuit.masks["head"]).sum())


def test_of_many_closed_heads_those_come_back_that_scored_highest(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodesieve.polish.OPENED", 2)
    selection = selected(problem, planted_circuit(problem))
    values = {**selection.scores.values, "head": torch.tensor([[9.0, 1.0, 5.0], [2.0, 3.0, 0.0]])}
    polisher = polisher_of(problem, replace(selection, scores=replace(selection.scores, values=values)))
    assert polisher._closed_heads().tolist() == [[0, 2], [1, 1]]  # the planted one, [0, 0], is open


def test_what_was_before_heads_came_back_is_kept_over_a_stop(problem: Problem) -> None:
    circuit, _ = planted_without_its_head(problem)
    polisher, resumed = (polisher_of(problem, selected(problem, circuit)) for _ in range(2))
    before = polisher.now
    assert polisher.reopen(Journal(), until=math.inf)
    assert resumed.restored(polisher.state(stage=8, turns=2, seconds=1.0)) == (8, 2)
    assert resumed.now.circuit.fingerprint == polisher.now.circuit.fingerprint
    assert resumed.smallest.circuit.fingerprint == before.circuit.fingerprint
    assert resumed.now.kl == polisher.now.kl
    unknown = State(tensors=dict(before.circuit.masks), numbers=polisher.state(stage=8, seconds=1.0).numbers)
    assert polisher_of(problem, selected(problem, circuit)).restored(unknown) == (0, 0)  # begun anew


def test_once_the_time_is_over_nothing_more_is_measured(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    polisher = polisher_of(problem, selected(problem, Circuit.whole(problem.nodes)))
    measured: list[Circuit] = []
    monkeypatch.setattr("nodesieve.polish.time.monotonic", lambda: float(len(measured)))

    def refused(circuit: Circuit, *, limit: float) -> bool:
        measured.append(circuit)
        return False

    monkeypatch.setattr(polisher, "_taken", refused)
    stage = _Stage(levels=("mlp_neuron",), share=0.5, spending=True)
    assert not polisher.go_through(stage, Journal(), until=math.inf)
    assert len(measured) > 2
    measured.clear()
    assert not polisher.go_through(stage, Journal(), until=0.5)
    assert len(measured) == 1


def test_levels_that_were_not_scored_are_left_alone(problem: Problem) -> None:
    polished, _ = polish(problem, selected(problem, Circuit.whole(problem.nodes), levels=("head",)), CONFIG, Journal())
    assert kept(polished.circuit, "head") == PLANTED["head"]
    assert polished.circuit.kept("mlp_neuron") == problem.nodes.count("mlp_neuron")


def test_layers_with_few_nodes_left_are_gone_through_too(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodesieve.polish.SINGLES", 0)
    masks = {level: mask.clone() for level, mask in Circuit.whole(problem.nodes).masks.items()}
    masks["mlp_neuron"][:, 5:] = False
    start = Circuit.of(masks, problem.nodes)
    additive = Additive(problem, head=0.0, neuron=0.019, start=start)
    polished, _ = polish(additive, selected(additive, start, levels=("mlp_neuron",)), CONFIG, Journal())
    assert start.kept("mlp_neuron") - polished.circuit.kept("mlp_neuron") == 5


def test_a_circuit_over_the_budget_comes_back_as_it_is(problem: Problem) -> None:
    selection = replace(selected(problem, Circuit.whole(problem.nodes)), met=False)
    assert polish(problem, selection, CONFIG, Journal())[0] is selection


class Additive(Problem):
    """Closing costs what it costs, whatever else is closed: of each head the same, of each neuron the same; of what `start` keeps."""

    def __init__(self, problem: Problem, *, head: float, neuron: float, start: Circuit | None = None) -> None:
        self.model, self.task, self._head, self._neuron = problem.model, problem.task, head, neuron
        self._start = start or Circuit.whole(problem.nodes)

    def in_dtype(self, dtype: torch.dtype) -> Problem:
        return self

    def losses(self, circuits: Sequence[Circuit], split: SplitName, *, first: int | None = None, **how: Any) -> list[torch.Tensor]:
        closed = [{level: self._start.kept(level) - circuit.kept(level) for level in ("head", "mlp_neuron")} for circuit in circuits]
        return [torch.full((first or 8,), gone["head"] * self._head + gone["mlp_neuron"] * self._neuron) for gone in closed]

    def looks(self, circuits: Sequence[Circuit], split: SplitName, *, first: int | None = None, skip: int = 0) -> list[torch.Tensor]:
        return self.losses(circuits, split, first=first)

    def measured(self, circuits: Sequence[Circuit], split: SplitName) -> list[torch.Tensor]:
        return self.losses(circuits, split)


def test_what_is_cheap_for_what_it_gains_goes_first(problem: Problem) -> None:
    whole = Circuit.whole(problem.nodes)
    head, neuron = (("head", torch.tensor([[0, 0]])), ("mlp_neuron", torch.tensor([[0, 0]])))

    def chosen(gains: Sequence[float] | None) -> list[str]:
        parts: list[Part] = [head, neuron]
        additive = Additive(problem, head=0.02, neuron=0.01)
        return [level for level, _ in cheapest_parts(whole, parts, additive, most=0.025, goes_on=lambda done, total: True, gains=gains)]

    assert chosen([4, 1]) == ["head"]
    assert chosen(None) == ["mlp_neuron"]


@pytest.mark.parametrize("place", [0, 7, 19])
def test_one_misjudged_part_does_not_hold_up_those_behind_it(problem: Problem, place: int) -> None:
    """Of 20 heads all are free on the examples that say in which order they go, one is dear on the next ones."""
    parts: list[Part] = [("head", torch.tensor([[0, head]])) for head in range(20)]

    class Told:
        def looks(self, circuits: Sequence[Any], split: SplitName, *, first: int, skip: int = 0) -> list[torch.Tensor]:
            rows = torch.arange(first)
            return [torch.where(rows >= 32, 10.0 * (place in heads), 0.0) for heads in circuits]

    class Closed(frozenset[int]):
        def without(self, indices: dict[str, torch.Tensor]) -> frozenset[int]:
            return Closed(indices["head"][:, 1].tolist()) if indices else self

    told: Any = Told()
    start: Any = Closed()
    for skipping, count in ((True, 19), (False, place)):
        chosen = cheapest_parts(start, parts, told, most=0.01, goes_on=lambda done, total: True, skipping=skipping)
        assert len(chosen) == count
        assert place not in {int(index[0, 1]) for _, index in chosen}


def test_what_comes_back_has_to_help_beside_the_rest_on_examples_that_did_not_choose_it(problem: Problem) -> None:
    """Head 0 helps on the first 128 examples only, 1 and 2 on all, but 2 hardly beside 1, and 3 only does harm."""
    parts: list[Part] = [("head", torch.tensor([[0, head]])) for head in range(4)]

    class Told:
        task = {"validation": range(300)}  # noqa: RUF012

        def looks(self, circuits: Sequence[Any], split: SplitName, *, first: int, skip: int = 0) -> list[torch.Tensor]:
            assert (skip, first) in ((0, 128), (128, 256))
            return [torch.full((first - skip,), self.kl(heads, chosen_on=skip == 0)) for heads in circuits]

        def kl(self, heads: set[int], *, chosen_on: bool) -> float:
            third = 0.01 if 1 in heads else 0.1
            return 1.0 - 0.3 * (0 in heads and chosen_on) - 0.2 * (1 in heads) - third * (2 in heads) + 0.2 * (3 in heads)

    def opened(chosen: Sequence[Part]) -> Any:
        return {int(index[0, 1]) for _, index in chosen}

    told: Any = Told()
    assert [int(index[0, 1]) for _, index in helpful_parts(parts, opened, told, least=0.05, goes_on=lambda *_: True)] == [1]
    assert [int(index[0, 1]) for _, index in helpful_parts(parts, opened, told, least=0.005, goes_on=lambda *_: True)] == [1, 2]
    assert helpful_parts(parts, opened, told, least=0.05, goes_on=lambda *_: False) == []


@pytest.mark.parametrize(("head", "neuron", "gone"), [(0.03, 1.0, (3, 0)), (0.2, 0.019, (0, 5)), (0.04, 0.015, (2, 1))])
def test_the_budget_is_spent_on_heads_as_on_what_is_finer(problem: Problem, head: float, neuron: float, gone: tuple[int, int]) -> None:
    additive = Additive(problem, head=head, neuron=neuron)
    whole, levels = Circuit.whole(problem.nodes), ("head", "mlp_neuron")
    polished, _ = polish(additive, selected(additive, whole, levels=levels), CONFIG, Journal())
    assert tuple(whole.kept(level) - polished.circuit.kept(level) for level in levels) == gone


@pytest.mark.parametrize(("belief", "gone"), [(1.0, 10), (0.8, 10), (0.65, 10), (0.5, 10), (0.3, 10), (0.1, 10)])
def test_where_looks_promise_too_much_the_budget_is_spent_all_the_same(problem: Problem, belief: float, gone: int) -> None:
    class Deceiving(Additive):
        def looks(self, circuits: Sequence[Circuit], split: SplitName, *, first: int | None = None, skip: int = 0) -> list[torch.Tensor]:
            return [belief * kl for kl in super().looks(circuits, split, first=first)]

    levels = ("mlp_neuron",)
    deceiving = Deceiving(problem, head=0.0, neuron=BUDGET / 10.5)
    whole = Circuit.whole(problem.nodes)
    polished, _ = polish(deceiving, selected(deceiving, whole, levels=levels), CONFIG, Journal())
    assert whole.kept("mlp_neuron") - polished.circuit.kept("mlp_neuron") == gone


def test_where_outputs_alone_have_gates_as_few_as_may_be_are_kept(problem: Problem) -> None:
    """Size, which counts leaves, says nothing there."""
    levels = ("mlp_output",)
    values = {level: torch.zeros(problem.nodes.shape(level)) for level in LEVELS}
    values["mlp_output"] = torch.arange(values["mlp_output"].numel()).reshape(values["mlp_output"].shape) / 100
    values["mlp_output"][1, 4] += 1

    def measure(circuits: Sequence[Circuit]) -> list[torch.Tensor]:
        return problem.measured(circuits, "validation")

    chosen = select_budget(Scores(values=values, nodes=problem.nodes, levels=levels), measure, budget=BUDGET)
    assert kept(chosen.circuit, "mlp_output") == PLANTED["mlp_output"]
    polished, _ = polish(problem, selected(problem, Circuit.whole(problem.nodes), levels=levels), CONFIG, Journal())
    assert kept(polished.circuit, "mlp_output") == PLANTED["mlp_output"]


@pytest.mark.parametrize(("of_leaves", "done"), [(True, True), (False, False)])
def test_turns_are_worth_their_time_by_what_has_gates(problem: Problem, of_leaves: bool, done: bool) -> None:
    stage = _Stage(levels=("mlp_output",), share=1 / 6, spending=True, of_leaves=of_leaves)
    whole = Circuit.whole(problem.nodes)
    assert stage.is_done(whole, whole.without({"mlp_output": torch.tensor([[0, 0]])})) == done


def test_a_size_and_polishing_exclude_each_other() -> None:
    with pytest.raises(UserError, match="polish closes nodes within the KL budget"):
        make_config({"polish": True, "keep": 0.1})
