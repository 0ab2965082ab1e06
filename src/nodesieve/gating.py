"""Gates where they act: at each place of a model, z * x + (1 - z) * a for what is computed there (x) and what closed nodes hold (a).

It is computed as `torch.lerp(a, x, z)`, which is exact at z = 0 and z = 1. For the backward pass only the difference x - a is kept, where autograd by
itself would keep x, a and z.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nodesieve.ablations import LAYER_PLACES, Activations, Routed
from nodesieve.nodes import place_gates
from nodesieve.shrink import Shrunk


class Gating:
    """One set of gates, ready to act.

    Args:
        gates: a tensor in [0, 1] for each level, (*shape(level)) for one gate a node, or (B, *shape(level)) for one an example.
        dtype: of the model.
        shrunk: weights without nodes whose gates are 0, to run on; see `nodesieve.shrink`.
    """

    def __init__(self, gates: Mapping[str, Tensor], dtype: torch.dtype, shrunk: Shrunk | None = None) -> None:
        at = place_gates(gates)
        self._at_layers = {place: getattr(at, place).to(dtype) for place in (*LAYER_PLACES, "experts")}
        # One unbind a place: its backward stacks once, where indexing layer by layer would add up L tensors of all layers.
        self._z = {place: z.unbind(-2) for place, z in self._at_layers.items()}
        self._z["embedding"] = (at.embedding.to(dtype),)
        self._same: dict[Gating, list[bool]] = {}
        self.shrunk = shrunk
        self._live = {} if shrunk is None else shrunk.live
        self.learns = any(z.requires_grad for z in gates.values())
        # With a constant 1 at the embedding no gradient has to reach layer 0's input.
        self.embedding_open = not at.embedding.requires_grad and bool((at.embedding == 1).all())

    def at(self, place: str, layer: int) -> Tensor:
        """(B, 1, size of the place) or (size of the place,)."""
        z: Tensor = self._z[place][layer]
        return z.unsqueeze(1) if z.dim() == 2 else z

    def same_at(self, layer: int, other: Gating) -> bool:
        """Whether what a layer makes of a stream is the same under both."""
        if other not in self._same:  # all layers at once: each answer from a GPU waits for all that it has been told before
            self._same[other] = self._layers_as_in(other)
        return self._same[other][layer]

    def _layers_as_in(self, other: Gating) -> list[bool]:
        count = len(self._z["heads"])
        if (self.shrunk is None) != (other.shrunk is None) or any(z.shape != other._at_layers[place].shape for place, z in self._at_layers.items()):
            return [False] * count
        places = [(z == other._at_layers[place]).transpose(-2, 0).flatten(1).all(-1) for place, z in self._at_layers.items()]
        same: list[bool] = torch.stack(places).all(0).tolist()
        if self.shrunk is not None and other.shrunk is not None:
            same = [alike and self.shrunk.same_at(layer, other.shrunk) for layer, alike in enumerate(same)]
        return same

    def _live_at(self, place: str, layer: int) -> Tensor | None:
        return self._live[place][layer] if place in self._live else None

    def edit(self, values: Activations, place: str, layer: int, x: Tensor) -> Tensor:
        """x (B, T, size of the place) with its gates; of a shrunk place, z * (x - a) of what is left of it."""
        a = values.embedding if place == "embedding" else getattr(values, place)[layer]
        assert a is not None
        if a.dim() == 3 and a.shape[1] > x.shape[1]:
            a = a[:, -x.shape[1] :]  # where only the last positions are computed
        z = self.at(place, layer)
        live = self._live_at(place, layer)
        if live is not None:
            part: Tensor = _Part.apply(a.index_select(-1, live), x, z.index_select(-1, live))  # type: ignore[no-untyped-call]
            return part
        if torch.is_grad_enabled() and z.requires_grad:
            mixed: Tensor = _Mix.apply(a, x, z)  # type: ignore[no-untyped-call]
            return mixed
        return torch.lerp(a, x, z)

    def route(self, values: Activations, layer: int, routed: Routed) -> tuple[Tensor, Tensor | None]:
        """The routing weights to ask the experts with, and what to add to their answer."""
        z, a = self.at("experts", layer), values.experts[layer]
        if isinstance(a, Routed):
            return routed.gated(z), a.write(a.gated(1 - z))
        closed = ((1 - z).to(a.dtype) @ a).expand(routed.rows, -1, -1) if z.dim() == 3 else (1 - z).to(a.dtype) @ a
        return routed.gated(z), closed.expand(routed.rows, len(routed.hidden) // routed.rows, -1).flatten(0, 1)


class _Part(torch.autograd.Function):
    """z * (x - a)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor, z: Tensor) -> Tensor:
        difference = x - a
        ctx.save_for_backward(difference, z)
        return z * difference

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor]:
        difference, z = ctx.saved_tensors
        to_x = grad * z if ctx.needs_input_grad[1] else None
        return None, to_x, (difference * grad).sum_to_size(z.shape)


class _Mix(_Part):
    """a + z * (x - a), exact at both ends; its derivatives by x and z are those of the part."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(x - a, z)
        return torch.lerp(a, x, z)
