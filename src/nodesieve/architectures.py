"""Where the five places are in a model: by its family's row, or by its structure.

A gate needs to see five tensors: the residual stream that enters layer 0, the input of each attention output projection, the input of
each MLP down projection, and the two residual writes of each layer. A row of `nodesieve.families` says by module path where they are (and where
the query, key, value and MLP input weights are, for counting parameters); `resolve` looks the paths up in a model and reads the sizes
off the weights. A model without a row is read by `guess`, by names and shapes.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nodesieve.errors import UserError
from nodesieve.families import FAMILIES, Family
from nodesieve.nodes import NodeSpace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class LayerPlaces:
    """The modules of one layer at which gates act: two inputs and two outputs; and norms of the stream itself, which have no gate.

    A layer that routes has `experts` and no `mlp_projection`, any other the reverse.
    """

    layer: nn.Module
    attention_projection: nn.Module
    mlp_projection: nn.Module | None
    experts: nn.Module | None
    attention_write: nn.Module
    mlp_write: nn.Module
    qkv: tuple[nn.Module, ...]
    mlp_inputs: tuple[nn.Module, ...]
    norms_after_sum: tuple[nn.Module, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ParameterShapes:
    """What one node of each kind costs in weights and biases; see `nodesieve.circuit.count_parameters`."""

    query_per_head: int
    key_per_group: int
    value_per_dim: int
    projection_per_dim: int
    projection_bias: int
    input_per_neuron: int
    output_bias: bool
    groups: int
    expert_inputs: int = 0
    expert_neurons: int = 0
    router: int = 0


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family's row, found in one model."""

    family: Family
    places: tuple[LayerPlaces, ...]
    nodes: NodeSpace
    parameters: ParameterShapes


class MissingModule(UserError):
    """A model has no module where its family's row says."""


def resolve(model: PreTrainedModel) -> Architecture:
    """Find the five places of a model whose family has a row.

    Raises:
        UserError: the family has no row, or the model does not look as its row says.
    """
    model_type = model.config.model_type
    family = next((row for row in FAMILIES if model_type in row.model_types), None)
    if family is None:
        raise unknown_family(model_type)
    return locate(model, family)


def is_known(model: PreTrainedModel) -> bool:
    return any(model.config.model_type in row.model_types for row in FAMILIES)


def unknown_family(model_type: str) -> UserError:
    known = sorted(name for row in FAMILIES for name in row.model_types)
    near = difflib.get_close_matches(model_type, known, n=3, cutoff=0.5)
    nearest = f"nearest: {', '.join(near)}; all: " if near else ""
    return UserError(
        f"expected a model of a known family ({nearest}{', '.join(known)}), got {model_type!r}, which does not fit by structure either; "
        "add a row of module paths to FAMILIES in nodesieve/families.py"
    )


def locate(model: PreTrainedModel, family: Family) -> Architecture:
    """Find the places of `family` in `model`.

    Raises:
        UserError: the model does not look as the row says.
    """
    model_type = model.config.model_type
    layers = list(_at(model, family.layers, family))
    if len(set(layers)) < len(layers):
        raise UserError(f"expected layers of {model_type} that are modules of their own, got {len(layers)} that are {len(set(layers))}")
    places = tuple(
        LayerPlaces(
            layer=layer,
            attention_projection=_at(layer, family.attention_projection, family),
            mlp_projection=None if _experts(layer, family) else _at(layer, family.mlp_projection, family),
            experts=_experts(layer, family),
            attention_write=_at(layer, family.attention_write or family.attention_projection, family),
            mlp_write=_at(layer, family.mlp_write or family.mlp_projection, family),
            qkv=tuple(_at(layer, path, family) for path in family.qkv),
            mlp_inputs=() if _experts(layer, family) else tuple(_at(layer, path, family) for path in family.mlp_inputs),
            norms_after_sum=tuple(_at(layer, path, family) for path in family.norms_after_sum) if _norms_after_sum(model, family) else (),
        )
        for layer in layers
    )
    heads = model.config.get_text_config().num_attention_heads
    (attention_in, width), *others = {in_out(place.attention_projection) for place in places}
    neurons = {in_out(place.mlp_projection)[0] for place in places if place.mlp_projection is not None}
    experts = {_expert_shape(place.experts) for place in places if place.experts is not None}
    if others or len(neurons) > 1 or len(experts) > 1 or attention_in % heads:
        raise UserError(
            f"expected every layer of {model_type} to have {heads} equal heads and one MLP width, got attention inputs "
            f"{sorted({in_out(p.attention_projection)[0] for p in places})}, MLP widths {sorted(neurons)} and experts {sorted(experts)}"
        )
    nodes = NodeSpace(
        layers=len(places),
        heads=heads,
        head_dim=attention_in // heads,
        neurons=max(neurons, default=0),
        width=width,
        experts=max(experts)[0] if experts else 0,
        expert_layers=frozenset(number for number, place in enumerate(places) if place.experts is not None),
    )
    return Architecture(family=family, places=places, nodes=nodes, parameters=_parameter_shapes(places, family, nodes))


def _experts(layer: nn.Module, family: Family) -> nn.Module | None:
    if not family.experts:
        return None
    try:
        found = layer.get_submodule(family.experts)
    except AttributeError:
        return None  # a dense layer among layers that route
    return found


def _expert_shape(experts: nn.Module) -> tuple[int, int]:
    """(experts, hidden neurons of each), from the stacked down projection (E, D, I)."""
    count, _, hidden = experts.get_parameter("down_proj").shape
    return count, hidden


def _norms_after_sum(model: PreTrainedModel, family: Family) -> bool:
    if family.norms_after_sum_if is None:
        return bool(family.norms_after_sum)
    option, value = family.norms_after_sum_if
    return bool(family.norms_after_sum) and getattr(model.config, option, None) == value


def _parameter_shapes(places: Sequence[LayerPlaces], family: Family, nodes: NodeSpace) -> ParameterShapes:
    """Read off the weights, so that fused and grouped projections need no rule of their own."""
    layer = places[0].layer
    dense = next((place.layer for place in places if place.experts is None), None)
    routing = next((place for place in places if place.experts is not None), None)
    qkv = places[0].qkv
    mlp_inputs = next((place.mlp_inputs for place in places if place.experts is None), ())
    keys_and_values = sum(in_out(module)[1] for module in qkv) - nodes.heads * nodes.head_dim
    groups, rest = divmod(keys_and_values, 2 * nodes.head_dim)
    if rest or groups < 1 or nodes.heads % groups:
        raise UserError(
            f"expected keys and values of {nodes.head_dim} dimensions for a divisor of {nodes.heads} heads in {', '.join(family.qkv)}, "
            f"got {keys_and_values} outputs beside the queries'; latent or uneven attention is not supported"
        )
    per_input = nodes.width + all(_has_bias(module) for module in qkv)
    return ParameterShapes(
        query_per_head=nodes.head_dim * per_input,
        key_per_group=nodes.head_dim * per_input,
        value_per_dim=per_input,
        projection_per_dim=nodes.width,
        projection_bias=nodes.width * _has_bias(_at(layer, family.attention_projection, family)),
        input_per_neuron=sum(in_out(module)[1] // nodes.neurons * (nodes.width + _has_bias(module)) for module in mlp_inputs),
        output_bias=dense is not None and _has_bias(_at(dense, family.mlp_projection, family)),
        groups=groups,
        **({} if routing is None else _expert_costs(routing)),
    )


def _expert_costs(place: LayerPlaces) -> dict[str, int]:
    """Weights of one expert but for its down projection, its neurons, and all other weights of the MLP: the router's."""
    assert place.experts is not None
    count, hidden = _expert_shape(place.experts)
    of_experts = sum(p.numel() for p in place.experts.parameters())
    down = place.experts.get_parameter("down_proj").numel()
    router = sum(p.numel() for p in place.mlp_write.parameters()) - of_experts
    return {"expert_inputs": (of_experts - down) // count, "expert_neurons": hidden, "router": router}


_ATTENTION = re.compile(r"(^|[._])(self_?)?(attn|attention)([._]|$)", re.IGNORECASE)
_ATTENTION_PROJECTION = re.compile(r"(^|\.)(o_proj|out_proj|c_proj|dense|proj|proj_out|wo|output)$")
_MLP_PROJECTION = re.compile(r"(^|\.)(down_proj|c_proj|out_proj|fc2|fc_out|dense_4h_to_h|linear2|w2|wo|down|proj_out|output)$")
_NORM_AFTER_ATTENTION = re.compile(r"post_?(self_?)?(attn|attention)\w*norm", re.IGNORECASE)
_NORM_AFTER_MLP = re.compile(r"post_?(mlp|ffn|ff|feed_?forward)\w*norm", re.IGNORECASE)


def guess(model: PreTrainedModel) -> Iterator[Architecture]:
    """Ways to read a model without a row, by names and shapes, the likeliest first. Only `nodesieve.verify` can tell whether one is right."""
    stacks = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) and "." in path]
    for path, stack in sorted(stacks, key=lambda item: -len(item[1])):
        found = {name: module for name, module in stack[0].named_modules() if _is_projection(module)}
        attention = {name: module for name, module in found.items() if _ATTENTION.search(name.rpartition(".")[0])}
        mlp = {name: module for name, module in found.items() if name not in attention}
        norms = [name for name, _ in stack[0].named_children()]
        for out, down in itertools.product(_matching(attention, _ATTENTION_PROJECTION), _matching(mlp, _MLP_PROJECTION)):
            width = in_out(attention[out])[1]
            plain = Family(
                model_types=(model.config.model_type,),
                layers=path,
                attention_projection=out,
                mlp_projection=down,
                qkv=tuple(sorted((name for name in attention if name != out), key=lambda name: "qkv".find(name.rpartition(".")[2][0]))),
                mlp_inputs=tuple(name for name, module in mlp.items() if name != down and in_out(module)[0] == width),
            )
            writes = [
                (after_attention, after_mlp)
                for after_attention in filter(_NORM_AFTER_ATTENTION.search, norms)
                for after_mlp in filter(_NORM_AFTER_MLP.search, norms)
            ]
            rows = [*(replace(plain, attention_write=a, mlp_write=m) for a, m in writes), plain]
            for row in rows:
                with contextlib.suppress(UserError, ValueError, AttributeError):  # this reading does not fit; the next one may
                    yield locate(model, row)


def _matching(modules: Mapping[str, nn.Module], pattern: re.Pattern[str]) -> list[str]:
    return [name for name in modules if pattern.search(name)]


def _is_projection(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and _is_linear(module)


def _at(module: nn.Module, path: str, family: Family) -> Any:
    for name in path.split("."):
        if module is None:
            raise MissingModule(
                f"expected a {'/'.join(family.model_types)} model with a module at {path!r} in every layer, got one whose layers are not alike, as "
                "where another kind of block (Mamba's) stands in for attention; such models are not supported"
            )
        if not hasattr(module, name):
            raise MissingModule(
                f"expected a {'/'.join(family.model_types)} model to have a module at {path!r}, got {type(module).__name__} without {name!r}; "
                "its row in nodesieve/families.py does not fit this version of the model"
            )
        module = getattr(module, name)
    return module


def _has_bias(module: nn.Module) -> bool:
    return getattr(module, "bias", None) is not None


def _is_linear(module: nn.Module) -> bool:
    """Is it one of the two kinds of projections that transformers has?"""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def in_out(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a projection."""
    outputs, inputs = as_linear(module).shape
    return inputs, outputs


def as_linear(module: nn.Module) -> Tensor:
    """A projection's weight as (outputs, inputs): `nn.Linear` stores it so, GPT-2's Conv1D the other way round.

    Raises:
        UserError: it is neither, as where an adapter is wrapped around one.
    """
    if not _is_linear(module):
        raise UserError(
            f"expected projections that are nn.Linear or Conv1D, got {type(module).__name__}; merge adapters, and use weights that are not quantised"
        )
    weight = module.get_parameter("weight")
    return weight if isinstance(module, nn.Linear) else weight.T
