"""Closing the hierarchy, counting, scores and selection: on circuits small enough to work out by hand, and on random ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_model
from nodesieve.architectures import ParameterShapes, resolve
from nodesieve.circuit import Circuit, count_parameters
from nodesieve.levels import LEAVES, LEVELS
from nodesieve.nodes import NodeSpace
from nodesieve.scores import Scores, raise_ancestors
from nodesieve.select import select_budget, select_size

SPACE = NodeSpace(layers=2, heads=2, head_dim=3, neurons=4, width=5)
MIXED = NodeSpace(layers=2, heads=2, head_dim=3, neurons=4, width=5, experts=3, expert_layers=frozenset({1}))


def masks(value: bool = True) -> dict[str, torch.Tensor]:
    return {level: torch.full(SPACE.shape(level), value) for level in LEVELS}


@st.composite
def random_masks(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    share = draw(st.floats(0.0, 1.0))
    return {level: torch.rand(SPACE.shape(level), generator=generator) < share for level in LEVELS}


def test_a_closed_parent_closes_its_children() -> None:
    kept = masks()
    kept["layer"][0] = False
    closed = Circuit.of(kept, SPACE).masks
    for level in LEVELS:
        if level != "embedding":
            assert not closed[level][0].any()
            assert closed[level][1].all()
    assert closed["embedding"].all()


def test_a_parent_without_children_closes_up_to_the_layer() -> None:
    kept = masks()
    kept["head_dim"][0] = False
    kept["mlp_output"][0] = False
    closed = Circuit.of(kept, SPACE).masks
    assert not closed["head"][0].any()
    assert not closed["attention_block"][0]
    assert not closed["mlp_block"][0]
    assert not closed["mlp_neuron"][0].any()
    assert not closed["layer"][0]
    assert closed["layer"][1]


@settings(max_examples=60, deadline=None)
@given(random_masks())
def test_closing_is_idempotent_and_only_closes(kept: dict[str, torch.Tensor]) -> None:
    once = Circuit.of(kept, SPACE).masks
    twice = Circuit.of(once, SPACE).masks
    assert all(torch.equal(once[level], twice[level]) for level in LEVELS)
    assert all(not (once[level] & ~kept[level]).any() for level in LEVELS)


@settings(max_examples=60, deadline=None)
@given(random_masks())
def test_in_a_closed_circuit_every_kept_node_has_kept_parents_and_children(kept: dict[str, torch.Tensor]) -> None:
    closed = Circuit.of(kept, SPACE).masks
    assert torch.equal(closed["head"], closed["head_dim"].any(-1))
    assert torch.equal(closed["attention_block"], closed["head"].any(-1))
    assert torch.equal(closed["mlp_block"], closed["mlp_neuron"].any(-1))
    assert torch.equal(closed["mlp_block"], closed["mlp_output"].any(-1))
    assert torch.equal(closed["layer"], closed["attention_block"] | closed["mlp_block"])


def test_a_layer_has_neurons_or_experts() -> None:
    assert SPACE.levels == tuple(level for level in LEVELS if level != "expert")
    assert (MIXED.count("mlp_neuron"), MIXED.count("expert")) == (4, 3)
    whole = Circuit.whole(MIXED)
    assert whole.size == 1
    assert not whole.masks["mlp_neuron"][1].any()
    assert not whole.masks["expert"][0].any()
    without = Circuit.of({**whole.masks, "expert": torch.zeros(2, 3, dtype=torch.bool)}, MIXED)
    assert without.masks["mlp_block"].tolist() == [True, False]
    assert without.size == (12 + 4) / (12 + 4 + 3)


def test_names_are_canonical() -> None:
    assert SPACE.name("head_dim", (1, 0, 2)) == "head_dim.1.0.2"
    assert SPACE.name("layer", (1,)) == "layer.1"
    assert SPACE.name("embedding", (0,)) == "embedding"


def test_parameters_of_a_circuit_worked_out_by_hand() -> None:
    architecture = resolve(tiny_model("llama"))  # width 32, 4 heads of 8, 2 key groups, 48 neurons, no biases
    nodes = architecture.nodes
    kept = {level: torch.zeros(nodes.shape(level), dtype=torch.bool) for level in LEVELS}
    for level in ("layer", "attention_block", "mlp_block"):
        kept[level][0] = True
    kept["head"][0, :2] = True  # two query heads of one key group
    kept["head_dim"][0, 0, 3] = True
    kept["head_dim"][0, 1, [3, 4]] = True
    kept["mlp_neuron"][0, :5] = True
    kept["mlp_output"][0, :7] = True
    queries, keys = 2 * 8 * 32, 8 * 32
    values, projection = 2 * 32, 3 * 32  # dimensions 3 and 4 of the shared V; three columns of O
    assert count_parameters(Circuit.of(kept, nodes), architecture).kept == queries + keys + values + projection + 5 * 2 * 32 + 5 * 7


def test_biases_are_counted() -> None:
    shapes: ParameterShapes = resolve(tiny_model("gpt2")).parameters
    assert shapes.query_per_head == 8 * 33
    assert shapes.projection_bias == 32
    assert shapes.input_per_neuron == 33
    assert shapes.output_bias


def ranked(values: list[float]) -> Scores:
    """Scores of the leaves of SPACE in order; ancestors raised."""
    own = {level: torch.zeros(SPACE.shape(level)) for level in LEVELS}
    flat = torch.tensor(values)
    own["head_dim"] = flat[:12].reshape(SPACE.shape("head_dim"))
    own["mlp_neuron"] = flat[12:].reshape(SPACE.shape("mlp_neuron"))
    own["mlp_output"] = torch.full(SPACE.shape("mlp_output"), 100.0)
    return Scores(values=raise_ancestors(own), nodes=SPACE, levels=tuple(level for level in LEVELS if level != "embedding"))


def test_scores_are_known_by_all_that_a_ranking_goes_by() -> None:
    own = ranked([float(i) for i in range(1, 21)])
    zeros, ones = ({"head": torch.full(SPACE.shape("head"), value)} for value in (0.0, 1.0))
    others = [replace(own, levels=own.levels[:-1]), replace(own, values={**own.values, **ones}), *(replace(own, wholes=x) for x in (zeros, ones))]
    assert len({scores.fingerprint for scores in (own, *others)}) == 5
    assert replace(own, values={**own.values, "embedding": torch.ones(1)}).fingerprint == own.fingerprint  # which has no gates


def loss_of_size(circuits: object) -> list[torch.Tensor]:
    return [torch.full((50,), 1 - circuit.size) for circuit in circuits]  # type: ignore[attr-defined]


def test_a_size_is_the_largest_circuit_within_it() -> None:
    scores = ranked([float(i) for i in range(1, 21)])
    selection = select_size(scores, loss_of_size, keep=0.5, budget=0.9)
    assert selection.circuit.size == 0.5
    assert {level: selection.circuit.kept(level) for level in LEAVES} == {"head_dim": 2, "mlp_neuron": 8, "expert": 0}
    assert select_size(scores, loss_of_size, keep=0.01, budget=0.9).circuit.size == 0
    assert select_size(scores, loss_of_size, keep=1.0, budget=0.9).circuit.size == 1


def test_a_size_is_kept_to_where_wholes_go_between_leaves() -> None:
    scores = ranked([float(i) for i in range(1, 21)])
    blocks = torch.where(torch.arange(SPACE.layers) == 0, 50.5, 50.25)  # above all leaves
    own = replace(scores, values={**scores.values, "mlp_block": blocks, "mlp_neuron": torch.ones(SPACE.shape("mlp_neuron"))})
    without_neurons = replace(own, levels=("attention_block", "mlp_block", "head", "head_dim"))
    hidden = SPACE.count("mlp_neuron") / 20
    for keep, size in ((1.0, 1.0), (hidden, hidden), (hidden - 0.01, hidden / 2), (0.01, 0.0)):
        assert select_size(without_neurons, loss_of_size, keep=keep, budget=0.9).circuit.size == pytest.approx(size)
    assert select_budget(without_neurons, loss_of_size, budget=1.01 - hidden / 2).circuit.size == pytest.approx(hidden / 2)


@pytest.mark.parametrize("budget", [0.04, 0.32, 0.52, 0.97])
def test_the_budget_gives_the_smallest_circuit_within_it(budget: float) -> None:
    selection = select_budget(ranked([float(i) for i in range(1, 21)]), loss_of_size, budget=budget)
    assert selection.met
    assert selection.circuit.size == pytest.approx(math.ceil((1 - budget) * 20) / 20)


@pytest.mark.parametrize("threshold", [0.5, 6.0, 9.0, 10.0, 11.0, 19.0])
def test_where_a_method_draws_its_own_line_the_smallest_circuit_is_the_same(threshold: float) -> None:
    drawn = replace(ranked([float(i) for i in range(1, 21)]), threshold=threshold)
    assert select_budget(drawn, loss_of_size, budget=0.52).circuit.size == 0.5


def test_a_line_at_the_budget_is_where_the_search_begins() -> None:
    looked: list[float] = []

    def look(circuits: Sequence[Circuit]) -> list[torch.Tensor]:
        looked.extend(circuit.size for circuit in circuits)
        return loss_of_size(circuits)

    selection = select_budget(replace(ranked([float(i) for i in range(1, 21)]), threshold=10.0), loss_of_size, look=look, budget=0.52)
    assert selection.circuit.size == 0.5
    assert looked == [0.5]


def test_a_budget_that_nothing_meets_is_said_not_to_be_met() -> None:
    selection = select_budget(ranked([float(i) for i in range(1, 21)]), lambda circuits: [torch.full((50,), 2.0) for _ in circuits], budget=0.5)
    assert not selection.met


def test_where_nothing_meets_the_budget_it_is_the_circuit_of_lowest_kl() -> None:
    selection = select_budget(ranked([float(i) for i in range(1, 21)]), lambda circuits: [2 + kl for kl in loss_of_size(circuits)], budget=0.5)
    assert not selection.met
    assert (selection.circuit.size, selection.kl) == (1, 2)


def test_the_budget_is_held_against_the_upper_end_and_not_the_mean() -> None:
    def uncertain(circuits: Sequence[Circuit]) -> list[torch.Tensor]:
        return [kl + torch.tensor([-0.1, 0.1]).repeat(25) for kl in loss_of_size(circuits)]

    scores = ranked([float(i) for i in range(1, 21)])
    selection = select_budget(scores, uncertain, budget=0.51)
    assert selection.circuit.size == pytest.approx(0.55)  # a mean of 0.5 has its upper end at 0.52
    assert selection.kl < 0.5 < selection.kl_upper + 0.05
    assert not select_size(scores, uncertain, keep=0.5, budget=0.51).met


def test_of_two_readings_of_the_scores_the_better_is_taken() -> None:
    def without_the_last(circuits: Sequence[Circuit]) -> list[torch.Tensor]:
        return [torch.full((50,), 1.0 - bool(circuit.masks["mlp_neuron"][1, 3]) * circuit.size) for circuit in circuits]

    rising, falling = ranked([float(i) for i in range(1, 21)]), ranked([float(i) for i in range(20, 0, -1)])
    for scores in (replace(rising, other=falling), replace(falling, other=rising)):
        assert select_size(scores, without_the_last, keep=0.5, budget=0.9).scores.values["mlp_neuron"][1, 3] == 20
        assert select_budget(scores, without_the_last, budget=0.52).circuit.size == 0.5


def test_levels_that_were_not_scored_are_kept_wherever_their_ancestors_are() -> None:
    values = {level: torch.zeros(SPACE.shape(level)) for level in LEVELS}
    values["head"][0, 0] = 1.0
    circuit = Scores(values=values, nodes=SPACE, levels=("head",)).circuit(0.5)
    assert circuit.names("head") == ["head.0.0"]
    assert circuit.kept("head_dim") == 3
    assert circuit.kept("attention_block") == 1
    assert circuit.kept("mlp_neuron") == 8


def test_what_a_method_had_on_its_way_is_taken_where_it_is_smaller() -> None:
    rising, falling = ranked([float(i) for i in range(1, 21)]), ranked([float(i) for i in range(20, 0, -1)])

    def measure(circuits: Sequence[Circuit]) -> list[torch.Tensor]:  # the first leaf is needed
        return [torch.full((50,), 0.0 if bool(circuit.masks["head_dim"][0, 0, 0]) else 1.0) for circuit in circuits]

    chosen = select_budget(replace(rising, earlier=replace(falling, threshold=15.5)), measure, budget=0.5)
    assert chosen.circuit.size == 5 / 20


def test_biases_and_experts_of_part_of_a_model_are_counted() -> None:
    def fewer(name: str, **closed: list[list[int]]) -> int:
        architecture = resolve(tiny_model(name))
        gone = {level: torch.tensor(index) for level, index in closed.items()}
        count = count_parameters(Circuit.whole(architecture.nodes).without(gone), architecture)
        return count.total - count.kept

    width, neurons, experts = 32, 48, 4
    assert fewer("gpt2", attention_block=[[0]]) == 4 * (width * width + width)
    assert fewer("gpt2", mlp_output=[[1, 0]]) == neurons + 1
    assert fewer("mixtral", expert=[[0, 1]]) == 3 * width * neurons
    assert fewer("mixtral", mlp_output=[[1, 0]]) == experts * neurons
    assert fewer("mixtral", mlp_block=[[2]]) == experts * width + experts * 3 * width * neurons
