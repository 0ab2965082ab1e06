"""What nodes are worth, so that levels of any size can be weighed against one another; and what goes first, by what closing costs for its price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nodesieve.circuit import Circuit
from nodesieve.levels import LEVELS
from nodesieve.nodes import LevelTensors, NodeSpace
from nodesieve.scores import fold_upwards


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The circuit less some nodes, their price, and the order in which they were chosen: from 0 to 1, (*shape(level)); 0 for all others."""

    circuit: Circuit
    price: float
    chosen: LevelTensors


@dataclass(frozen=True, kw_only=True)
class Prices:
    """A node's own price is its level's penalty divided by the nodes of the level; other levels than `levels` cost nothing."""

    nodes: NodeSpace
    levels: Sequence[str]
    penalties: Mapping[str, float]

    def total(self, circuit: Circuit) -> float:
        return sum(circuit.kept(level) * self._own(level) for level in self.levels)

    def each(self, circuit: Circuit) -> LevelTensors:
        """Of each node with all that lies below it and is kept, (*shape(level))."""
        own = {level: circuit.masks[level] * (self._own(level) if level in self.levels else 0.0) for level in LEVELS}
        return fold_upwards(own, lambda price, below: price + below.sum(-1))

    def order(self, circuit: Circuit, costs: LevelTensors) -> tuple[Tensor, Tensor]:
        """Of all kept nodes, level after level, the price, and their places in the order in which they would go: by cost for the price."""
        start, prices = circuit.masks, self.each(circuit)
        price = torch.cat([prices[level][start[level]] for level in self.levels])
        cost = torch.cat([costs[level][start[level]] for level in self.levels])
        return price, (cost / price).argsort(stable=True)

    def by_level(self, circuit: Circuit, flat: Tensor) -> LevelTensors:
        """One value for each kept node, level after level -> (*shape(level)), 0 for all others."""
        found = {level: torch.zeros(self.nodes.shape(level), dtype=flat.dtype) for level in LEVELS}
        for level, own in zip(self.levels, flat.split([circuit.kept(level) for level in self.levels]), strict=True):  # type: ignore[no-untyped-call]
            found[level][circuit.masks[level]] = own
        return found

    def cheapest(self, circuit: Circuit, costs: LevelTensors, share: float) -> Candidate:
        """The circuit less its cheapest nodes, up to a share of its price; one at least."""
        price, order = self.order(circuit, costs)
        most = (1 + 1e-6) * max(share * self.total(circuit), float(price.min()))
        order = order[price[order] <= most]  # a whole that is too large bars nothing behind it
        order = order[price[order].cumsum(0) <= most]
        ranks = torch.zeros_like(price)
        ranks[order] = torch.arange(1, len(order) + 1) / (len(order) + 1)
        chosen = self.by_level(circuit, ranks)
        left = Circuit.of({level: mask & (chosen[level] == 0) for level, mask in circuit.masks.items()}, self.nodes)
        return self.candidate(circuit, left, chosen)

    def candidate(self, circuit: Circuit, left: Circuit, chosen: LevelTensors) -> Candidate:
        return Candidate(circuit=left, price=self.total(circuit) - self.total(left), chosen=chosen)

    def _own(self, level: str) -> float:
        return self.penalties[level] / self.nodes.count(level)
