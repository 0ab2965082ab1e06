"""What a closed node holds instead of its own activation: one class an ablation.

- `counterfactual`: what the same place holds when the frozen model reads the corrupted prompt.
- `mean`: one vector a place, the average over the training split's corrupted prompts (clean ones where there are none); padding and
  the first position, which many models use as a sink, are left out.
- `zero`: nothing.

An ablation is built once from the training split and then asked for values batch by batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from nodesieve.batches import Batch, Split, Tokens
from nodesieve.errors import UserError
from nodesieve.prefix import Prefix

LAYER_PLACES = ("heads", "attention_write", "neurons", "mlp_write")
WRITES = ("attention_write", "mlp_write")


@dataclass(frozen=True, kw_only=True)
class Routed:
    """What the experts of one layer were asked: `hidden` (B * T, D), the chosen experts `index` (B * T, k) and their `weights` (B * T, k).

    An expert's place is its routing weight times its output, zero where it is not chosen. The sum over experts, each times a gate, is the same
    call with the gates in the weights, so that no tensor of all experts' outputs is ever held.
    """

    experts: nn.Module
    hidden: Tensor
    index: Tensor
    weights: Tensor
    rows: int

    def gated(self, z: Tensor) -> Tensor:
        """The routing weights times each chosen expert's gate: z (E,) or (B, 1, E) -> (B * T, k)."""
        positions = len(self.hidden) // self.rows
        each = z.expand(self.rows, positions, z.shape[-1]).reshape(-1, z.shape[-1])
        return self.weights * each.gather(1, self.index).to(self.weights.dtype)

    def write(self, weights: Tensor) -> Tensor:
        """The experts' summed output with other weights, (B * T, k) -> (B * T, D); past the hooks."""
        written: Tensor = self.experts.forward(self.hidden, self.index, weights)
        return written

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Every expert's place, (B, T, E, D): for checks, and for the mean ablation, which needs it once."""
        stacked = self.experts.get_parameter("down_proj")  # (E, D, I)
        out = self.hidden.new_zeros(len(self.hidden), len(stacked), self.hidden.shape[-1])
        for expert in range(len(stacked)):
            row, choice = (self.index == expert).nonzero(as_tuple=True)
            if len(row):
                own = self.index[row, choice].unsqueeze(1), self.weights[row, choice].unsqueeze(1)
                out[row, expert] = self.experts.forward(self.hidden[row], *own).to(out.dtype)
        return out.reshape(self.rows, -1, *out.shape[1:])


@dataclass(kw_only=True)
class Activations:
    """What the places hold. Each tensor broadcasts against (B, T, size of the place).

    `heads` and the writes have an entry for every layer; `neurons` and `experts` have the layers that they are in. What experts hold is
    either a call to repeat, or a tensor that broadcasts against (B, T, E, D).
    """

    embedding: Tensor | None = None
    heads: Mapping[int, Tensor] = field(default_factory=dict)
    attention_write: Mapping[int, Tensor] = field(default_factory=dict)
    neurons: Mapping[int, Tensor] = field(default_factory=dict)
    experts: Mapping[int, Routed | Tensor] = field(default_factory=dict)
    mlp_write: Mapping[int, Tensor] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> Activations:
        return Activations(
            embedding=None if self.embedding is None else function(self.embedding),
            experts={layer: function(x.dense() if isinstance(x, Routed) else x) for layer, x in self.experts.items()},
            **{place: {layer: function(x) for layer, x in getattr(self, place).items()} for place in LAYER_PLACES},
        )

    def tensors(self) -> list[Tensor]:
        first = [] if self.embedding is None else [self.embedding]
        experts = [x for x in self.experts.values() if isinstance(x, Tensor)]
        return [*first, *experts, *(x for place in LAYER_PLACES for x in getattr(self, place).values())]


class Recorder:
    """Collects what the places hold: `edit` and `route` are for the hooks at them, and change nothing."""

    def __init__(self) -> None:
        self.seen = Activations()

    def edit(self, place: str, layer: int, x: Tensor) -> Tensor:
        if place == "embedding":
            self.seen.embedding = x
        else:
            self._add(place, layer, x)
        return x.clone() if place in WRITES else x  # Falcon adds to a write in place

    def route(self, layer: int, routed: Routed) -> tuple[Tensor, None]:
        self._add("experts", layer, routed)
        return routed.weights, None

    def _add(self, place: str, layer: int, held: Tensor | Routed) -> None:
        getattr(self.seen, place)[layer] = held


@dataclass(frozen=True, kw_only=True)
class Corrupted:
    """The corrupted prompts, for what closed nodes hold to be computed from layer by layer, when it is asked for.

    Attributes:
        keep: is given what each layer's places hold, and gives back what gates are to find there.
        held: what a layer's places hold from some position on, where that is known and need not be computed: (layer, position) -> that layer's.
        prefix: gives keys and values of the positions before anything differs, where these are known, too.
    """

    tokens: Tokens
    keep: Callable[[int, Activations], Activations] | None = None
    held: Callable[[int, int], Activations] | None = None
    prefix: Callable[[], Prefix | None] | None = None


Record = Callable[[Tokens], Activations]


class Ablation(ABC):
    """Built from what the model holds on prompts, and the training split.

    Attributes:
        aligned: does it need a corrupted prompt for each clean one, alike position by position?
        averaged: does it hold an average over the training split, so that it needs the run's own?
    """

    name: ClassVar[str]
    aligned: ClassVar[bool] = False
    averaged: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, record: Record, train: Split) -> None: ...

    @abstractmethod
    def values(self, batch: Batch) -> Activations | Corrupted:
        """What closed nodes hold in a batch: constants, or the prompts that they are to be computed from."""


class Counterfactual(Ablation):
    name = "counterfactual"
    aligned = True

    def __init__(self, record: Record, train: Split) -> None:
        """Each batch has its own; that no example lacks a corrupted prompt is seen when examples are encoded."""

    def values(self, batch: Batch) -> Corrupted:
        assert batch.corrupted is not None
        return Corrupted(tokens=batch.corrupted)


def doubled(x: Tensor) -> Tensor:
    """In float64, on the CPU where the device (Apple's GPUs) has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


MEAN_EXAMPLES = 2048  # at most, the training split's own first


class Mean(Ablation):
    name = "mean"
    averaged = True

    def __init__(self, record: Record, train: Split) -> None:
        total: Activations | None = None
        count, like = 0, torch.empty(0)
        for batch in train.batches(16, first=MEAN_EXAMPLES):
            tokens = batch.corrupted or batch.clean
            counted = tokens.attention_mask.bool() & (tokens.position_ids > 0)
            held = record(tokens)
            like = held.heads[0]
            summed = held.map(lambda x, keep=counted: doubled(x[keep]).sum(0))  # type: ignore[misc]
            count += int(counted.sum())
            if total is None:
                total = summed
            else:
                for old, new in zip(total.tensors(), summed.tensors(), strict=True):
                    old += new
        if total is None or count == 0:
            raise UserError("--ablation mean expects training prompts of two tokens or more, got none; use zero")
        self._mean = total.map(lambda x: (x / count).to(like))

    def values(self, batch: Batch) -> Activations:
        return self._mean


class Zero(Ablation):
    name = "zero"

    def __init__(self, record: Record, train: Split) -> None:
        self._zeros = record(train.batch([0]).clean).map(lambda x: torch.zeros_like(x[0, 0]))

    def values(self, batch: Batch) -> Activations:
        return self._zeros


ABLATIONS: dict[str, type[Ablation]] = {kind.name: kind for kind in (Counterfactual, Mean, Zero)}
