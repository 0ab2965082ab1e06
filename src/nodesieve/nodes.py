"""The nodes of a decoder: their shapes, and how they nest.

1. A `NodeSpace` is a model's sizes: the shape of each level's gates, which of them exist, and their names.
2. `with_ancestors` applies the hierarchy: a node's value times its ancestors'.
3. `closed` makes levels agree: what has no parent or nothing below it goes.
4. `place_gates` multiplies the gates of all levels into what the places of a model need.

Legend of shapes: L layers, H query heads a layer, K dimensions a head, F hidden neurons of an MLP, E experts of a layer that routes,
D residual width, B examples (`...` stands for leading dimensions, B or none).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nodesieve.levels import LEVELS

LevelTensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class NodeSpace:
    """The sizes of one model, and with them every node that it has.

    A layer has hidden neurons or experts: `expert_layers` names those that have experts. Gates have a row for every layer all the same; the
    rows of a level that a layer does not have stand for no node.
    """

    layers: int
    heads: int
    head_dim: int
    neurons: int
    width: int
    experts: int = 0
    expert_layers: frozenset[int] = frozenset()
    embeddings: int = 1

    def __str__(self) -> str:
        hidden = [f"{self.neurons} neurons"] * (self.neurons > 0) + [f"{self.experts} experts"] * (self.experts > 0)
        return f"{self.layers} layers of {self.heads} heads of {self.head_dim} and {' or '.join(hidden)}, width {self.width}"

    def shape(self, level: str) -> tuple[int, ...]:
        """Shape of one level's gates, e.g. (L, H, K) for `head_dim`."""
        return tuple(getattr(self, dim) for dim in LEVELS[level].dims)

    def present(self, level: str) -> Tensor:
        """Which entries of a level's gates stand for a node, bool (*shape(level))."""
        mask = torch.ones(self.shape(level), dtype=torch.bool)
        if level in ("mlp_neuron", "expert"):
            mask[[(layer in self.expert_layers) != (level == "expert") for layer in range(self.layers)]] = False
        return mask

    def count(self, level: str) -> int:
        return int(self.present(level).sum())

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels that this model has."""
        return tuple(level for level in LEVELS if self.count(level))

    @property
    def place_widths(self) -> dict[str, int]:
        """How many entries each place of a layer has, by its name in `nodesieve.ablations.Activations`; experts have none of their own."""
        return {"heads": self.heads * self.head_dim, "attention_write": self.width, "neurons": self.neurons, "mlp_write": self.width}

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


def closed(own: Mapping[str, Tensor]) -> LevelTensors:
    """The hierarchy made consistent, idempotent: of masks, which nodes stay if those not in `own` go; of scores, up to which threshold each stays.

    Bottom-up, a node goes where a group of what it needs has nothing left (`Level.needs`); top-down, with its parent. Minima are "and", maxima "or".
    """
    out = dict(own)
    for name in reversed(list(LEVELS)):
        for group in LEVELS[name].needs:
            below = torch.cat([out[child].reshape(*own[name].shape, -1) for child in group], -1)
            out[name] = torch.minimum(out[name], below.amax(-1))
    for name, level in LEVELS.items():
        if level.parent is not None:
            out[name] = torch.minimum(out[name], up_to(out[name], out[level.parent]))
    return out


@dataclass(frozen=True, kw_only=True)
class PlaceGates:
    """What multiplies the places of a model, from the gates of all levels.

    heads: (..., L, H*K) input of the attention output projection. attention_write: (..., L, 1). neurons: (..., L, F) input of
    the MLP down projection. experts: (..., L, E). mlp_write: (..., L, D). embedding: (..., 1).
    """

    heads: Tensor
    attention_write: Tensor
    neurons: Tensor
    experts: Tensor
    mlp_write: Tensor
    embedding: Tensor


def place_gates(gates: Mapping[str, Tensor]) -> PlaceGates:
    """Multiply the levels that meet at one place; two gates in a row on the same activation are their product there."""
    layer = gates["layer"]
    return PlaceGates(
        heads=(gates["head"].unsqueeze(-1) * gates["head_dim"]).flatten(-2),
        attention_write=(layer * gates["attention_block"]).unsqueeze(-1),
        neurons=gates["mlp_neuron"],
        experts=gates["expert"],
        mlp_write=(layer * gates["mlp_block"]).unsqueeze(-1) * gates["mlp_output"],
        embedding=gates["embedding"],
    )
