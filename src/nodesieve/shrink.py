"""Closed heads and hidden neurons leave the computation: the weights that lead to them and from them are cut out for gated passes.

A closed node still writes what it holds. All of that is in what the projection makes of the corrupted activations, so with x - a for the live nodes,

    projection(z * x + (1 - z) * a) = live columns of the projection (z * (x - a)) + projection(a),

and projection(a) is the corrupted write, which is there anyway (for one vector a place, it is computed). This needs the write to be the projection's
own output, with no norm between. What can be cut, and how the query, key and value rows of a head lie, is found out by trying: `find_cutter`
keeps what gives the same logits as gates of 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nodesieve.ablations import Activations
from nodesieve.architectures import Architecture, LayerPlaces, in_out
from nodesieve.errors import Trying
from nodesieve.nodes import LevelTensors

WORTH_IT = 0.95  # share of live nodes of a layer above which its weights are left whole
WORTH_IT_ONCE = 0.8  # the same for weights that are cut for one pass
MULTIPLE = 64  # live neurons of a layer are rounded up to one of these: odd sizes are slow to multiply and leave holes in memory
# (live heads (n,), heads, groups of keys and values, dimensions a head) -> rows of each query, key and value projection
Rows = Callable[[Tensor, int, int, int], list[Tensor]]


def _separate(live: Tensor, heads: int, groups: int, dim: int) -> list[Tensor]:
    """Three projections; each live head gets its group's keys and values to itself."""
    own, group = spread(live, dim), spread(live // (heads // groups), dim)
    return [own, group, group]


def _in_blocks(live: Tensor, heads: int, groups: int, dim: int) -> list[Tensor]:
    """One projection, all queries first, then all keys, then all values."""
    query, key, value = _separate(live, heads, groups, dim)
    return [torch.cat([query, heads * dim + key, (heads + groups) * dim + value])]


def _by_head(live: Tensor, heads: int, groups: int, dim: int) -> list[Tensor]:
    """One projection, each head's query, key and value together."""
    return [spread(live, 3 * dim)]


def spread(blocks: Tensor, size: int) -> Tensor:
    """Block numbers (n,) -> the rows in them (n * size,)."""
    return (blocks.unsqueeze(1) * size + torch.arange(size, device=blocks.device)).flatten()


LAYOUTS: tuple[Rows, ...] = (_separate, _in_blocks, _by_head)


@dataclass(frozen=True, kw_only=True)
class Cutter:
    """What can be cut in one model: hidden neurons or not, heads in one of the layouts or not."""

    architecture: Architecture
    neurons: bool
    heads: Rows | None

    def cut(self, live_heads: Tensor, live_neurons: Tensor, *, keep: bool = True) -> Shrunk:
        """`live_heads` bool (L, H), `live_neurons` bool (L, F); `keep` as for `Shrunk`."""
        return Shrunk(self, live_heads.cpu(), live_neurons.cpu(), keep=keep)


class Shrunk:
    """Cut weights of every layer in which enough is closed to pay for it.

    Args:
        keep: hold the cut weights, to use them often; else they are made anew whenever a layer runs, which takes no memory.

    Attributes:
        live: by place, then by layer, the entries of the place that are computed, None where it is whole.
        live_heads, live_neurons: what it was made from, bool (L, H) and (L, F), on the CPU, where asking them is free.
    """

    def __init__(self, cutter: Cutter, live_heads: Tensor, live_neurons: Tensor, *, keep: bool) -> None:
        nodes = cutter.architecture.nodes
        self.live_heads, self.live_neurons = live_heads, live_neurons
        self._cutter, self._places = cutter, cutter.architecture.places
        self._heads: list[Tensor | None] = []
        self._groups: list[Tensor | None] = []
        self._inside: set[int] = set()
        self.live: dict[str, list[Tensor | None]] = {"heads": [], "neurons": []}
        most, groups = WORTH_IT if keep else WORTH_IT_ONCE, cutter.architecture.parameters.groups
        device = self._places[0].attention_projection.get_parameter("weight").device
        for number, places in enumerate(self._places):
            possible = cutter.heads is not None and places.attention_write is places.attention_projection
            heads = _kept(live_heads[number], most, device) if possible else None
            # Each head would get keys and values of its own: from here on that costs more than it saves.
            if heads is not None and 2 * len(heads) >= nodes.heads + groups:
                heads = None
            self._heads.append(heads)
            self._groups.append(None if heads is None else heads // (nodes.heads // groups))
            self.live["heads"].append(None if heads is None else spread(heads, nodes.head_dim))
            possible = cutter.neurons and places.mlp_projection is not None and places.mlp_write is places.mlp_projection
            multiple = MULTIPLE if nodes.neurons >= 16 * MULTIPLE else 1
            self.live["neurons"].append(_kept(live_neurons[number], most, device, multiple=multiple) if possible else None)
        self._swaps = [self._cut(number) for number in range(nodes.layers)] if keep else None

    def _cut(self, number: int) -> list[_Swap]:
        """The weights of a layer that take the place of its own."""
        places, nodes, swaps = self._places[number], self._cutter.architecture.nodes, []
        heads, entries, neurons = self._heads[number], self.live["heads"][number], self.live["neurons"][number]
        if heads is not None and entries is not None and self._cutter.heads is not None:
            rows = self._cutter.heads(heads, nodes.heads, self._cutter.architecture.parameters.groups, nodes.head_dim)
            swaps += [rows_of(module, chosen) for module, chosen in zip(places.qkv, rows, strict=True)]
            swaps += [columns_of(places.attention_projection, entries), _sizes(places, len(heads), nodes.head_dim)]
        if neurons is not None and places.mlp_projection is not None:
            swaps += [rows_of(module, in_each_part(module, neurons, nodes.neurons)) for module in places.mlp_inputs]
            swaps.append(columns_of(places.mlp_projection, neurons))
        return swaps

    @contextmanager
    def layers(self, numbers: Sequence[int], values: Activations) -> Iterator[None]:
        """Inside, these layers run on their cut weights, and their projections add what closed nodes write."""
        with ExitStack() as stack:
            for number in numbers:
                places = self._places[number]
                for place, projection in (("heads", places.attention_projection), ("neurons", places.mlp_projection)):
                    if projection is not None and self.live[place][number] is not None:
                        closed = _closed_write(projection, place, number, values)
                        hook = projection.register_forward_hook(lambda _m, _args, out, closed=closed: closed(out), prepend=True)
                        stack.callback(hook.remove)
                for swap in self._cut(number) if self._swaps is None else self._swaps[number]:
                    stack.enter_context(swap.made())
                self._inside.add(number)
                stack.callback(self._inside.discard, number)
            yield

    def same_at(self, layer: int, other: Shrunk) -> bool:
        """Whether both leave the same of a layer."""
        own, its = (self.live_heads, self.live_neurons), (other.live_heads, other.live_neurons)
        return (self._swaps is None) == (other._swaps is None) and all(torch.equal(a[layer], b[layer]) for a, b in zip(own, its, strict=True))

    def groups_in_use(self, layer: int) -> Tensor | None:
        """Which group of keys and values each head of a layer has now: None outside `layers`, and where heads are whole."""
        return self._groups[layer] if layer in self._inside else None


@dataclass(frozen=True, kw_only=True)
class _Swap:
    """Parameters and plain attributes of a module, to be put in the place of its own."""

    module: nn.Module
    parameters: dict[str, nn.Parameter | None]
    attributes: dict[str, Any]

    @contextmanager
    def made(self) -> Iterator[None]:
        parameters = {name: self.module._parameters[name] for name in self.parameters}
        attributes = {name: getattr(self.module, name) for name in self.attributes}
        try:
            self.module._parameters.update(self.parameters)
            self.module.__dict__.update(self.attributes)
            yield
        finally:
            self.module._parameters.update(parameters)
            self.module.__dict__.update(attributes)


def _kept(live: Tensor, most: float, device: torch.device, *, multiple: int = 1) -> Tensor | None:
    """The live entries, and as many others as make their number a multiple, one at least, on `device`; None where that is more than a share of
    `most`."""
    wanted = max(1, -(-int(live.sum()) // multiple)) * multiple
    if wanted > most * len(live):
        return None
    return live_first(live, wanted).to(device)


def live_first(live: Tensor, count: int) -> Tensor:
    """Places of the live entries, bool (n,), and of as many others as make `count`: (count,), in order."""
    return live.int().argsort(descending=True, stable=True)[:count].sort().values


def rows_of(module: nn.Module, rows: Tensor) -> _Swap:
    weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
    linear = isinstance(module, nn.Linear)
    return _Swap(
        module=module,
        parameters={"weight": _frozen(weight[rows] if linear else weight[:, rows]), "bias": None if bias is None else _frozen(bias[rows])},
        attributes={} if linear else {"nf": len(rows)},  # GPT-2's Conv1D stores (in, out), and how many come out
    )


def columns_of(module: nn.Module, columns: Tensor) -> _Swap:
    """Without its bias, which is in what the closed nodes write."""
    weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
    cut = weight[:, columns] if isinstance(module, nn.Linear) else weight[columns]
    return _Swap(module=module, parameters={"weight": _frozen(cut), "bias": None if bias is None else _frozen(torch.zeros_like(bias))}, attributes={})


def _frozen(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.detach().contiguous(), requires_grad=False)


def in_each_part(module: nn.Module, neurons: Tensor, count: int) -> Tensor:
    """Rows of the neurons in a projection to them, or in one that makes several numbers for each, all of the first kind first."""
    _, outputs = in_out(module)
    return torch.cat([part * count + neurons for part in range(outputs // count)])


def _sizes(places: LayerPlaces, heads: int, dim: int) -> _Swap:
    """Numbers of heads that attention modules keep as attributes."""
    known = {"num_heads": heads, "num_attention_heads": heads, "num_key_value_heads": heads, "num_key_value_groups": 1, "split_size": heads * dim}
    attention = next(module for module in places.layer.modules() if places.attention_projection in module.children())
    return _Swap(module=attention, parameters={}, attributes={name: value for name, value in known.items() if name in attention.__dict__})


def _closed_write(projection: nn.Module, place: str, layer: int, values: Activations) -> Callable[[Tensor], Tensor]:
    """Adds what the projection makes of what closed nodes hold."""
    held, writes = (values.heads, values.attention_write) if place == "heads" else (values.neurons, values.mlp_write)
    if isinstance(held, dict) and held[layer].dim() == 1:  # one vector for all prompts
        constant: Tensor = projection.forward(held[layer].unsqueeze(0))
        return lambda out: out + constant.reshape(-1)
    return lambda out: out + (writes[layer][:, -out.shape[1] :] if out.dim() == 3 else writes[layer].reshape(out.shape))


# (gates, cut weights or none) -> logits of some prompts
Trial = Callable[[LevelTensors, Shrunk | None], Tensor]
CLOSING = 0.25  # of what closing does to the logits: how far cutting may be from it at most, whatever the dtype rounds


def find_cutter(architecture: Architecture, logits: Trial, *, tolerance: float) -> Cutter:
    """Find out what can be cut in a model: what gives the same logits as gates of 0, to `tolerance` times their standard deviation.

    Of several layouts that of the smallest difference: where logits have much in common whatever the prompt, 16 bits leave little between them.
    """
    generator = torch.Generator().manual_seed(0)
    gates = architecture.nodes.full(1.0)
    for level in ("head", "head_dim", "mlp_neuron"):  # what is above them stays open, so that they count in full
        gates[level] = 0.5 + torch.rand(gates[level].shape, generator=generator) / 2
    live_heads, live_neurons = (torch.rand(gates[level].shape, generator=generator) > 0.5 for level in ("head", "mlp_neuron"))
    live_heads[:, 0], live_heads[:, -1] = False, True  # some of each in every layer
    all_heads, all_neurons = torch.ones_like(live_heads), torch.ones_like(live_neurons)
    whole = logits(gates, None)

    def difference(heads: Tensor, neurons: Tensor, attempt: Cutter) -> float:
        """In standard deviations of the logits; infinite where that is too much."""
        z = {**gates, "head": gates["head"] * heads, "mlp_neuron": gates["mlp_neuron"] * neurons}
        masked = logits(z, None)
        with Trying():  # a layout that does not fit
            found = (logits(z, attempt.cut(heads, neurons)) - masked).abs().max()
            if found <= tolerance * masked.std() and found <= CLOSING * (masked - whole).abs().max():
                return float(found / masked.std())
        return math.inf

    neurons = difference(all_heads, live_neurons, Cutter(architecture=architecture, neurons=True, heads=None)) < math.inf
    layouts = [rows for rows in LAYOUTS if len(architecture.places[0].qkv) == (3 if rows is _separate else 1)]
    differences = {rows: difference(live_heads, all_neurons, Cutter(architecture=architecture, neurons=False, heads=rows)) for rows in layouts}
    fits = [rows for rows in layouts if differences[rows] < math.inf]
    return Cutter(architecture=architecture, neurons=neurons, heads=min(fits, key=differences.__getitem__, default=None))
