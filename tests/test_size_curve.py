"""Circuits of ten sizes, and the areas under what they reach."""

from __future__ import annotations

import pytest
import torch

from nodesieve.circuit import Circuit
from nodesieve.config import make_config
from nodesieve.errors import UserError
from nodesieve.journal import Journal
from nodesieve.levels import DEFAULT_LEVELS, LEAVES, LEVELS
from nodesieve.methods import METHODS
from nodesieve.nodes import NodeSpace
from nodesieve.scores import Scores, standing
from nodesieve.size_curve import SHARES, UNITS, areas, compactness, cut, ranking_of, size_curve
from test_cache import make_problem

NODES = NodeSpace(layers=3, heads=4, head_dim=5, neurons=20, width=8)
MIXED = NodeSpace(layers=3, heads=4, head_dim=5, neurons=20, width=8, experts=4, expert_layers=frozenset({1}))


def drawn(nodes: NodeSpace, *, seed: int = 0, levels: tuple[str, ...] = DEFAULT_LEVELS) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    values = {level: torch.randn(nodes.shape(level), generator=generator) for level in LEVELS}
    return Scores(values=values, nodes=nodes, levels=levels)


def test_areas_by_hand() -> None:
    points = [{"share": 0.0, "faithfulness": 0.0}, {"share": 0.5, "faithfulness": 1.2}, {"share": 1.0, "faithfulness": 1.0}]
    # Under faithfulness: 0.5 * (0 + 1.2) / 2 + 0.5 * (1.2 + 1) / 2; between it and 1: 0.5 * (1 + 0.2) / 2 + 0.5 * (0.2 + 0) / 2.
    assert areas(points) == {"cpr": pytest.approx(0.3 + 0.55), "cmd": pytest.approx(0.3 + 0.05)}
    assert areas([*points[:2], {"share": 1.0, "faithfulness": None}]) == {"cpr": None, "cmd": None}


def test_compactness_is_the_smallest_share_within_the_budget() -> None:
    points = [{"share": 0.1, "kl": 0.5}, {"share": 0.2, "kl": 0.2}, {"share": 0.5, "kl": 0.3}, {"share": 1.0, "kl": 0.0}]
    assert compactness(points, 0.25) == 0.2
    assert compactness(points, 0.1) == 1.0


@pytest.mark.parametrize("nodes", [NODES, MIXED])
def test_a_node_stands_where_the_threshold_that_closes_it_is(nodes: NodeSpace) -> None:
    scores = drawn(nodes)
    stands = standing(scores)
    for threshold in (-1.5, -0.5, 0.0, 0.7):
        circuit = scores.circuit(threshold)
        for level in DEFAULT_LEVELS:
            assert torch.equal(circuit.masks[level], stands[level] > threshold), (level, threshold)


@pytest.mark.parametrize("nodes", [NODES, MIXED])
@pytest.mark.parametrize("share", SHARES)
def test_leaves_are_cut_to_size_from_the_top(nodes: NodeSpace, share: float) -> None:
    scores = drawn(nodes)
    circuit = cut(scores, "leaves", share)
    count = int(share * sum(nodes.count(level) for level in LEAVES))
    assert sum(circuit.kept(level) for level in LEAVES) == count
    assert circuit.kept("mlp_output") == nodes.width * circuit.kept("mlp_block")
    if count and share < 1:
        stands = standing(scores)
        kept = torch.cat([stands[level][circuit.masks[level]] for level in LEAVES])
        left = torch.cat([stands[level][nodes.present(level) & ~circuit.masks[level]] for level in LEAVES])
        assert kept.min() >= left.max()


@pytest.mark.parametrize("nodes", [NODES, MIXED])
@pytest.mark.parametrize(("levels", "ranked"), [(("head", "head_dim"), "head_dim"), (("mlp_neuron",), "mlp_neuron")])
def test_leaves_without_gates_are_open_and_not_counted(nodes: NodeSpace, levels: tuple[str, ...], ranked: str) -> None:
    scores = drawn(nodes, levels=levels)
    for share in SHARES:
        circuit = cut(scores, "leaves", share)
        assert circuit.kept(ranked) == int(share * nodes.count(ranked))
        assert all(circuit.kept(level) == nodes.count(level) for level in LEAVES if level != ranked and nodes.count(level))


def test_parts_are_whole_and_go_by_scores_of_wholes_where_there_are_some() -> None:
    whole = {"head": torch.zeros(3, 4), "mlp_block": torch.zeros(3)}
    whole["head"][2, 1] = whole["mlp_block"][0] = 5.0
    base = drawn(NODES)
    scores = Scores(values=base.values, nodes=NODES, levels=base.levels, wholes=whole)
    circuit = cut(scores, "parts", 0.2)  # 3 of 15: the first of equals comes in too
    assert circuit.names("mlp_block") == ["mlp_block.0"]
    assert circuit.names("head") == ["head.0.0", "head.2.1"]
    assert circuit.kept("head_dim") == 2 * 5
    assert circuit.kept("mlp_neuron") == 20
    assert cut(scores, "parts", 1.0).fingerprint == Circuit.whole(NODES).fingerprint
    assert cut(scores, "parts", 0.001).size == 0


@pytest.mark.parametrize(("levels", "ranked"), [(("head", "head_dim"), "head"), (("mlp_neuron",), "mlp_block"), (("mlp_output",), "mlp_block")])
def test_parts_without_gates_are_open_and_not_counted_whatever_they_score(levels: tuple[str, ...], ranked: str) -> None:
    base = drawn(NODES, levels=levels)
    scores = Scores(values=base.values, nodes=NODES, levels=levels, wholes={"head": base.values["head"], "mlp_block": base.values["mlp_block"]})
    for share in SHARES:
        circuit = cut(scores, "parts", share)
        assert circuit.kept(ranked) == int(share * NODES.count(ranked))
        assert all(circuit.kept(level) == NODES.count(level) for level in UNITS["parts"] if level != ranked)


def test_blocks_without_gates_stand_above_all_wholes_beside_blocks_that_have_some() -> None:
    base = drawn(MIXED, levels=("mlp_neuron",))
    scores = Scores(values=base.values, nodes=MIXED, levels=base.levels, wholes={"mlp_block": torch.tensor([2.0, 0.0, 1.0])})
    assert ranking_of(scores, "parts")["mlp_block"].tolist() == [2.0, torch.inf, 1.0]
    for share, kept in ((0.1, ["mlp_block.1"]), (0.5, ["mlp_block.0", "mlp_block.1"]), (1.0, ["mlp_block.0", "mlp_block.1", "mlp_block.2"])):
        assert cut(scores, "parts", share).names("mlp_block") == kept


def test_nothing_to_rank_is_refused() -> None:
    with pytest.raises(UserError, match="expects scores of levels other than the embedding, got embedding"):
        size_curve(make_problem(), drawn(NODES, levels=("embedding",)), budget=0.05)


@pytest.mark.parametrize("method", ["gate_gradient", "random"])
def test_a_curve_ends_at_the_whole_model(method: str) -> None:
    problem = make_problem()
    scores = METHODS[method](problem, make_config({"method": method}), Journal())
    found = size_curve(problem, scores, split="validation", budget=0.05)
    for unit in ("parts", "leaves"):
        points = found[unit]["points"]
        assert [point["share"] for point in points] == list(SHARES)
        total = sum(problem.nodes.count(level) for level in UNITS[unit])
        assert [point["nodes"] for point in points] == [int(share * total) for share in SHARES]
        assert points[-1]["kl"] == pytest.approx(0, abs=1e-6)
        assert points[-1]["faithfulness"] == pytest.approx(1)
        assert points[0]["kl"] > points[-1]["kl"]
        assert found[unit]["compactness"] == compactness(points, 0.05)
        assert {name: found[unit][name] for name in ("cpr", "cmd")} == areas(points)
