"""What a closed node holds instead of its own activation: one class an ablation.

- `counterfactual`: what the same place holds when the frozen model reads the corrupted prompt.
- `mean`: one vector a place, the average over the training split's corrupted prompts (clean ones where there are none); padding and
  the first position, which many models use as a sink, are left out.
- `zero`: nothing.

An ablation is built once from the training split and then asked for values batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from nodesieve.batches import Batch, Split, Tokens
from nodesieve.errors import UserError

LAYER_PLACES = ("heads", "attention_write", "neurons", "mlp_write")


@dataclass(kw_only=True)
class Activations:
    """What the five places hold. Each tensor broadcasts against (B, T, size of the place); the lists have one entry a layer."""

    embedding: Tensor | None = None
    heads: list[Tensor] = field(default_factory=list)
    attention_write: list[Tensor] = field(default_factory=list)
    neurons: list[Tensor] = field(default_factory=list)
    mlp_write: list[Tensor] = field(default_factory=list)

    def map(self, function: Callable[[Tensor], Tensor]) -> Activations:
        return Activations(
            embedding=None if self.embedding is None else function(self.embedding),
            heads=[function(x) for x in self.heads],
            attention_write=[function(x) for x in self.attention_write],
            neurons=[function(x) for x in self.neurons],
            mlp_write=[function(x) for x in self.mlp_write],
        )

    def tensors(self) -> list[Tensor]:
        first = [] if self.embedding is None else [self.embedding]
        return [*first, *self.heads, *self.attention_write, *self.neurons, *self.mlp_write]


Record = Callable[[Tokens], Activations]


class Ablation(Protocol):
    name: str

    def values(self, batch: Batch) -> Activations: ...


class Counterfactual:
    name = "counterfactual"

    def __init__(self, record: Record, train: Split) -> None:
        if not train.has_corrupted:
            raise UserError("--ablation counterfactual expects a corrupted prompt for every example, got some without; use mean or zero")
        self._record = record

    def values(self, batch: Batch) -> Activations:
        if batch.corrupted is None:
            raise UserError("--ablation counterfactual expects a corrupted prompt for every example, got some without; use mean or zero")
        return self._record(batch.corrupted)


MEAN_EXAMPLES = 2048  # at most, the training split's own first


class Mean:
    name = "mean"

    def __init__(self, record: Record, train: Split) -> None:
        total: Activations | None = None
        count = 0
        for batch in train.batches(16, first=MEAN_EXAMPLES):
            tokens = batch.corrupted or batch.clean
            counted = tokens.attention_mask.bool() & (tokens.position_ids > 0)
            summed = record(tokens).map(lambda x, keep=counted: x[keep].double().sum(0))  # type: ignore[misc]
            count += int(counted.sum())
            if total is None:
                total = summed
            else:
                for old, new in zip(total.tensors(), summed.tensors(), strict=True):
                    old += new
        if total is None or count == 0:
            raise UserError("--ablation mean expects training prompts of two tokens or more, got none; use zero")
        dtype = record(train.batch([0]).clean).heads[0].dtype
        self._mean = total.map(lambda x: (x / count).to(dtype))

    def values(self, batch: Batch) -> Activations:
        return self._mean


class Zero:
    name = "zero"

    def __init__(self, record: Record, train: Split) -> None:
        self._zeros = record(train.batch([0]).clean).map(lambda x: torch.zeros_like(x[0, 0]))

    def values(self, batch: Batch) -> Activations:
        return self._zeros


ABLATIONS: dict[str, Callable[[Record, Split], Ablation]] = {kind.name: kind for kind in (Counterfactual, Mean, Zero)}
