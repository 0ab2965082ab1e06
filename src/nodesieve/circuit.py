"""A circuit: which nodes are kept, closed; counting nodes and parameters.

Closing makes the levels agree. Top-down: a closed parent closes its children. Bottom-up: a head with no open dimension closes, an
attention block with no open head, an MLP block with no open neuron and no open expert or with no open output, a layer with neither block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nodesieve.architectures import Architecture
from nodesieve.errors import UserError
from nodesieve.levels import CHILDLESS, LEAVES, LEVELS
from nodesieve.nodes import LevelTensors, NodeSpace, closed


@dataclass(frozen=True, kw_only=True)
class Circuit:
    """Which nodes of a model are kept. Build it with `Circuit.of`, which closes it.

    Attributes:
        masks: a boolean tensor for every level of `nodesieve.levels.LEVELS`, (*nodes.shape(level)); of levels that the model has not, empty.
        nodes: the sizes of the model.
    """

    masks: LevelTensors
    nodes: NodeSpace

    @staticmethod
    def of(kept: Mapping[str, Tensor], nodes: NodeSpace) -> Circuit:
        """From masks of all levels, each (*nodes.shape(level)), closed: nodes go whose parent or whose children are all closed."""
        return Circuit(masks=closed({level: kept[level].bool() & nodes.present(level) for level in LEVELS}), nodes=nodes)

    @staticmethod
    def whole(nodes: NodeSpace) -> Circuit:
        """Every node."""
        return Circuit(masks={level: nodes.present(level) for level in LEVELS}, nodes=nodes)

    def without(self, closed: Mapping[str, Tensor]) -> Circuit:
        """Less some nodes, closed again. `closed`: by level, their indices, (n, dimensions of the level)."""
        masks = dict(self.masks)
        for level, index in closed.items():
            masks[level] = masks[level].clone()
            masks[level][tuple(index.unbind(-1))] = False
        return Circuit.of(masks, self.nodes)

    def gates(self, *, device: torch.device | str = "cpu") -> LevelTensors:
        """The masks as gates of 0.0 and 1.0."""
        return {level: mask.float().to(device) for level, mask in self.masks.items()}

    def kept(self, level: str) -> int:
        """How many nodes of a level."""
        return int(self.masks[level].sum())

    @property
    def size(self) -> float:
        """Kept leaves / all leaves."""
        return sum(self.kept(level) for level in LEAVES) / sum(self.nodes.count(level) for level in LEAVES)

    @property
    def childless(self) -> int:
        """How many nodes without children are kept, MLP outputs among them, which `size` does not count."""
        return sum(self.kept(level) for level in CHILDLESS)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the masks: two circuits have the same one iff they keep the same nodes."""
        digest = hashlib.sha256()
        for level in LEVELS:
            digest.update(bytes(self.masks[level].flatten().byte().tolist()))
        return digest.hexdigest()

    def names(self, level: str) -> list[str]:
        """Canonical names of the kept nodes of one level, in order."""
        return [self.nodes.name(level, tuple(index)) for index in self.masks[level].nonzero().tolist()]


@dataclass(frozen=True, kw_only=True)
class Count:
    kept: int
    total: int


def count_nodes(circuit: Circuit) -> dict[str, Count]:
    """Kept nodes of each level that the model has."""
    return {level: Count(kept=circuit.kept(level), total=circuit.nodes.count(level)) for level in circuit.nodes.levels}


def count_parameters(circuit: Circuit, architecture: Architecture) -> Count:
    """Attention and MLP weights and biases that the kept nodes need, by the model's real shapes.

    For a kept head_dim its column of V and row of O; for a kept head its Q, and its K once for all query heads that share it; for a kept
    neuron its row in each input matrix and its entries of the down projection on kept outputs; for a kept expert the same for all its neurons, and
    for the MLP block around it the router. Norms and embeddings do not count.
    """
    return Count(kept=_parameters(circuit, architecture), total=_parameters(Circuit.whole(circuit.nodes), architecture))


def _parameters(circuit: Circuit, architecture: Architecture) -> int:
    costs, nodes = architecture.parameters, architecture.nodes
    heads, dims = circuit.masks["head"], circuit.masks["head_dim"]  # (L, H), (L, H, K)
    groups = heads.reshape(nodes.layers, costs.groups, -1).any(-1)  # (L, G): key heads that a kept query head reads
    value_dims = dims.reshape(nodes.layers, costs.groups, -1, nodes.head_dim).any(2)  # (L, G, K)
    attention = (
        int(heads.sum()) * costs.query_per_head
        + int(groups.sum()) * costs.key_per_group
        + int(value_dims.sum()) * costs.value_per_dim
        + int(dims.sum()) * costs.projection_per_dim
        + circuit.kept("attention_block") * costs.projection_bias
    )
    neurons, outputs = circuit.masks["mlp_neuron"].sum(-1), circuit.masks["mlp_output"].sum(-1)  # (L,), (L,)
    mlp = int(neurons.sum()) * costs.input_per_neuron + int((neurons * outputs).sum()) + int(outputs.sum()) * costs.output_bias
    if not costs.expert_neurons:
        return attention + mlp
    experts = circuit.masks["expert"].sum(-1)  # (L,)
    routed = int(experts.sum()) * costs.expert_inputs + costs.expert_neurons * int((experts * outputs).sum())
    return attention + mlp + routed + int((experts > 0).sum()) * costs.router


def refuse_other_nodes(circuit: Circuit, nodes: NodeSpace) -> None:
    """Raise UserError where the circuit is of a model with other nodes."""
    if circuit.nodes != nodes:
        raise UserError(f"expected a circuit of this model, which has {nodes}, got one of a model that has {circuit.nodes}")
