"""The nodes of a decoder: their shapes, how they nest, and one flat index over all of them.

1. A `NodeSpace` is a model's sizes. It turns a flat vector (one number a node) into one tensor a level and back, and names nodes.
2. `with_ancestors` applies the hierarchy: a node's value times its ancestors'.
3. `place_gates` multiplies the gates of all levels into what the five places of a model need.

Legend of shapes: L layers, H query heads a layer, K dimensions a head, F hidden neurons of an MLP, D residual width,
N all nodes, B examples (`...` stands for leading dimensions, B or none).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from nodesieve.levels import LEAVES, LEVELS

LevelTensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class NodeSpace:
    """The sizes of one model, and with them every node that it has."""

    layers: int
    heads: int
    head_dim: int
    neurons: int
    width: int
    embeddings: int = 1

    def shape(self, level: str) -> tuple[int, ...]:
        """Shape of one level's gates, e.g. (L, H, K) for `head_dim`."""
        return tuple(getattr(self, dim) for dim in LEVELS[level].dims)

    def count(self, level: str) -> int:
        return prod(self.shape(level))

    @property
    def total(self) -> int:
        """N: nodes of all levels together, the embedding among them."""
        return sum(self.count(level) for level in LEVELS)

    @property
    def leaves(self) -> int:
        """What a circuit's size is a share of: all head dimensions and MLP neurons."""
        return sum(self.count(level) for level in LEAVES)

    def split(self, flat: Tensor) -> LevelTensors:
        """(..., N) -> one view a level, of shape (..., *shape(level)), in the order of `LEVELS`."""
        if flat.shape[-1] != self.total:
            raise ValueError(f"expected one number for each of {self.total} nodes, got a last dimension of {flat.shape[-1]}")
        parts = torch.split(flat, [self.count(level) for level in LEVELS], dim=-1)
        return {level: part.reshape(*flat.shape[:-1], *self.shape(level)) for level, part in zip(LEVELS, parts, strict=True)}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One tensor a level, each (*shape(level)) -> (N,). The inverse of `split`."""
        return torch.cat([tensors[level].reshape(-1) for level in LEVELS])

    def name(self, level: str, index: tuple[int, ...]) -> str:
        """Canonical name of a node: `head_dim.5.3.12`, or plainly `embedding`."""
        return level if level == "embedding" else ".".join([level, *map(str, index)])

    def full(self, value: float, *, device: torch.device | str = "cpu") -> LevelTensors:
        """A tensor a level, all of one value: 1.0 leaves every gate open, 0.0 closes every one."""
        return {level: torch.full(self.shape(level), value, device=device) for level in LEVELS}


def up_to(child: Tensor, parent: Tensor) -> Tensor:
    """View `parent` with trailing dimensions of 1, so that it broadcasts over its children."""
    return parent.reshape(*parent.shape, *[1] * (child.dim() - parent.dim()))


def with_ancestors(gates: Mapping[str, Tensor]) -> LevelTensors:
    """Each node's value times its ancestors': for probabilities, that of being reached; for masks, that of being kept."""
    out: LevelTensors = {}
    for name, level in LEVELS.items():  # parents come before children in LEVELS
        own = gates[name]
        out[name] = own if level.parent is None else own * up_to(own, out[level.parent])
    return out


@dataclass(frozen=True, kw_only=True)
class PlaceGates:
    """What multiplies the five places of a model, from the gates of all levels.

    heads: (..., L, H*K) input of the attention output projection. attention_write: (..., L, 1). neurons: (..., L, F) input of
    the MLP down projection. mlp_write: (..., L, D). embedding: (..., 1).
    """

    heads: Tensor
    attention_write: Tensor
    neurons: Tensor
    mlp_write: Tensor
    embedding: Tensor


def place_gates(gates: Mapping[str, Tensor]) -> PlaceGates:
    """Multiply the levels that meet at one place; two gates in a row on the same activation are their product there."""
    layer = gates["layer"]
    return PlaceGates(
        heads=(gates["head"].unsqueeze(-1) * gates["head_dim"]).flatten(-2),
        attention_write=(layer * gates["attention_block"]).unsqueeze(-1),
        neurons=gates["mlp_neuron"],
        mlp_write=(layer * gates["mlp_block"]).unsqueeze(-1) * gates["mlp_output"],
        embedding=gates["embedding"],
    )
