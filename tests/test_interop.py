"""Circuits in other tools' files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import tiny_model
from nodesieve.circuit import Circuit
from nodesieve.errors import UserError
from nodesieve.gated_model import GatedModel
from nodesieve.interop import read_mib, to_mib
from nodesieve.levels import DEFAULT_LEVELS, LEVELS
from nodesieve.nodes import NodeSpace
from nodesieve.scores import Scores, standing
from nodesieve.verify import is_parallel

NODES = NodeSpace(layers=2, heads=2, head_dim=2, neurons=3, width=4)


def scores(levels: tuple[str, ...] = ("layer", "attention_block", "mlp_block", "head")) -> Scores:
    values = {level: torch.ones(NODES.shape(level)) for level in LEVELS}
    values["head"] = torch.tensor([[3.0, -1.0], [2.0, 4.0]])
    values["attention_block"] = torch.tensor([2.5, 3.0])
    values["mlp_block"] = torch.tensor([0.5, -2.0])
    values["layer"] = torch.tensor([5.0, 2.5])
    return Scores(values=values, nodes=NODES, levels=levels, threshold=0.0)


def test_the_file_is_as_the_benchmark_reads_it(tmp_path: Path) -> None:
    circuit = scores().circuit(0.0)
    content = to_mib(circuit, scores(), parallel=False)
    assert content == {
        "cfg": {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 4},
        "nodes": {
            "input": {"in_graph": True},
            "a0.h0": {"in_graph": True, "score": 4.5},  # 2 more than where the node closes: the lowest, m1's -2, is raised to 0
            "a0.h1": {"in_graph": False, "score": 1.0},
            "m0": {"in_graph": True, "score": 2.5},
            "a1.h0": {"in_graph": True, "score": 4.0},
            "a1.h1": {"in_graph": True, "score": 4.5},
            "m1": {"in_graph": False, "score": 0.0},
        },
        "edges": {},
    }
    path = tmp_path / "circuit.json"
    path.write_text(json.dumps(content))
    read = read_mib(path)
    assert (read.layers, read.heads, read.width, read.parallel) == (2, 2, 4, False)
    assert all(torch.equal(read.in_graph[level], circuit.masks[level]) for level in read.in_graph)
    assert read.scores["head"].tolist() == [[4.5, 1.0], [4.0, 4.5]]
    closed = Circuit.of({**circuit.masks, "embedding": torch.zeros(1)}, NODES)
    path.write_text(json.dumps(to_mib(closed, scores(), parallel=True)))
    assert json.loads(path.read_text())["nodes"]["input"] == {"in_graph": False}
    assert read_mib(path).parallel


def test_scores_that_are_none_below_0_are_left_as_they_are() -> None:
    values = {level: value.abs() + 1 for level, value in scores().values.items()}
    nodes = to_mib(Circuit.whole(NODES), replace(scores(), values=values), parallel=False)["nodes"]
    assert [nodes[name]["score"] for name in ("a0.h1", "m0")] == [2.0, 1.5]


def test_without_scores_of_wholes_a_node_is_in_the_graph_where_its_score_is_above_the_line() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = Scores(values={level: torch.randn(NODES.shape(level), generator=generator) for level in LEVELS}, nodes=NODES, levels=DEFAULT_LEVELS)
    for line in (-1.0, -0.5, 0.0):
        nodes = to_mib(drawn.circuit(line), drawn, parallel=False)["nodes"]
        lowest = min(0.0, *(float(standing(drawn)[level].min()) for level in ("head", "mlp_block")))
        assert all(node["in_graph"] == (node["score"] + lowest > line) for name, node in nodes.items() if name != "input")
        assert min(node["score"] for name, node in nodes.items() if name != "input") >= 0  # by size as by sign
    wholes = {"head": torch.arange(4.0).reshape(2, 2), "mlp_block": torch.tensor([7.0, 8.0])}
    nodes = to_mib(drawn.circuit(0.0), replace(drawn, wholes=wholes), parallel=False)["nodes"]
    assert [nodes[name]["score"] for name in ("a0.h1", "a1.h0", "m1")] == [1.0, 2.0, 8.0]


@pytest.mark.parametrize("level", ["head_dim", "mlp_neuron"])
def test_scores_of_finer_levels_of_one_kind_are_refused(level: str) -> None:
    with pytest.raises(UserError, match="expects scores of heads and of MLP blocks"):
        to_mib(scores((level,)).circuit(0.0), scores((level,)), parallel=False)


CFG = '"n_heads": 1, "d_model": 2, "parallel_attn_mlp": false}'


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "{}", "no JSON"),
        f'{{"cfg": {{"n_layers": 1, {CFG}, "nodes": {{"b0": {{}}}}}}',
        f'{{"cfg": {{"n_layers": 1, {CFG}, "nodes": {{"m0": {{"in_graph": "false"}}}}}}',
        f'{{"cfg": {{"n_layers": 1, {CFG}, "nodes": {{"m1": {{"in_graph": true}}}}}}',
        f'{{"cfg": {{"n_layers": -1, {CFG}, "nodes": {{}}}}',
        f'{{"cfg": {{"n_layers": 1e999, {CFG}, "nodes": {{}}}}',
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "circuit.json"
    path.write_text(content)
    with pytest.raises(UserError, match="expected") as caught:
        read_mib(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="could not read"):
        read_mib(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("llama", False),
        ("gpt2", False),
        ("gptj", True),
        ("phi", True),
        ("gpt_neox", True),
        ("gpt_neox-sequential", False),
        ("falcon-7b", True),
        ("mixtral", False),
    ],
)
def test_parallel_blocks_are_seen(name: str, parallel: bool) -> None:
    assert is_parallel(GatedModel(tiny_model(name))) == parallel
