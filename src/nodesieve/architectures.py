"""Where the five places are in each model family: one row of data a family.

A gate needs to see five tensors: the residual stream that enters layer 0, the input of each attention output projection, the input of
each MLP down projection, and the two residual writes of each layer. A `Family` says by module path where they are (and where the query,
key, value and MLP input weights are, for counting parameters); `resolve` looks the paths up in a model and reads the sizes
off the weights. To add a family, add a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from nodesieve.errors import UserError
from nodesieve.nodes import NodeSpace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Family:
    """Module paths, `layers` from the model and the rest from one layer. A write is the output of the module named."""

    model_types: tuple[str, ...]
    layers: str
    attention_projection: str
    mlp_projection: str
    attention_write: str
    mlp_write: str
    qkv: tuple[str, ...]
    mlp_inputs: tuple[str, ...]


_LLAMA_LIKE = ("llama", "mistral", "qwen2")

FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=("gpt2",),
        layers="transformer.h",
        attention_projection="attn.c_proj",
        mlp_projection="mlp.c_proj",
        attention_write="attn.c_proj",
        mlp_write="mlp.c_proj",
        qkv=("attn.c_attn",),
        mlp_inputs=("mlp.c_fc",),
    ),
    Family(
        model_types=("gpt_neox",),
        layers="gpt_neox.layers",
        attention_projection="attention.dense",
        mlp_projection="mlp.dense_4h_to_h",
        attention_write="attention.dense",
        mlp_write="mlp.dense_4h_to_h",
        qkv=("attention.query_key_value",),
        mlp_inputs=("mlp.dense_h_to_4h",),
    ),
    Family(
        model_types=_LLAMA_LIKE,
        layers="model.layers",
        attention_projection="self_attn.o_proj",
        mlp_projection="mlp.down_proj",
        attention_write="self_attn.o_proj",
        mlp_write="mlp.down_proj",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        mlp_inputs=("mlp.gate_proj", "mlp.up_proj"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class LayerPlaces:
    """The modules of one layer at which gates act: two inputs and two outputs."""

    layer: nn.Module
    attention_projection: nn.Module
    mlp_projection: nn.Module
    attention_write: nn.Module
    mlp_write: nn.Module


@dataclass(frozen=True, kw_only=True)
class ParameterShapes:
    """What one node of each kind costs in weights and biases; see `nodesieve.circuit.parameter_counts`."""

    query_per_head: int
    key_per_group: int
    value_per_dim: int
    projection_per_dim: int
    projection_bias: int
    input_per_neuron: int
    output_bias: bool
    groups: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family's row, found in one model."""

    family: Family
    places: tuple[LayerPlaces, ...]
    nodes: NodeSpace
    parameters: ParameterShapes


def resolve(model: PreTrainedModel) -> Architecture:
    """Find the five places of `model`.

    Raises:
        UserError: the family has no row, or the model does not look as its row says.
    """
    model_type = model.config.model_type
    family = next((row for row in FAMILIES if model_type in row.model_types), None)
    if family is None:
        known = ", ".join(sorted(name for row in FAMILIES for name in row.model_types))
        raise UserError(f"expected a model of a known family ({known}), got {model_type!r}; add a row to nodesieve/architectures.py")
    layers = list(_at(model, family.layers, family))
    places = tuple(
        LayerPlaces(
            layer=layer,
            attention_projection=_at(layer, family.attention_projection, family),
            mlp_projection=_at(layer, family.mlp_projection, family),
            attention_write=_at(layer, family.attention_write, family),
            mlp_write=_at(layer, family.mlp_write, family),
        )
        for layer in layers
    )
    heads = model.config.num_attention_heads
    groups = getattr(model.config, "num_key_value_heads", None) or heads
    (attention_in, width), *others = {_in_out(place.attention_projection) for place in places}
    (neurons, _), *other_mlps = {_in_out(place.mlp_projection) for place in places}
    if others or other_mlps or attention_in % heads:
        raise UserError(
            f"expected every layer of {model_type} to have {heads} equal heads and one MLP width, got attention inputs "
            f"{sorted({_in_out(p.attention_projection)[0] for p in places})} and MLP widths {sorted({_in_out(p.mlp_projection)[0] for p in places})}"
        )
    nodes = NodeSpace(layers=len(places), heads=heads, head_dim=attention_in // heads, neurons=neurons, width=width)
    return Architecture(family=family, places=places, nodes=nodes, parameters=_parameter_shapes(layers[0], family, nodes, groups))


def _parameter_shapes(layer: nn.Module, family: Family, nodes: NodeSpace, groups: int) -> ParameterShapes:
    qkv_bias = all(_has_bias(_at(layer, path, family)) for path in family.qkv)
    mlp_inputs = [_at(layer, path, family) for path in family.mlp_inputs]
    per_input = nodes.width + qkv_bias
    return ParameterShapes(
        query_per_head=nodes.head_dim * per_input,
        key_per_group=nodes.head_dim * per_input,
        value_per_dim=per_input,
        projection_per_dim=nodes.width,
        projection_bias=nodes.width * _has_bias(_at(layer, family.attention_projection, family)),
        input_per_neuron=sum(nodes.width + _has_bias(module) for module in mlp_inputs),
        output_bias=_has_bias(_at(layer, family.mlp_projection, family)),
        groups=groups,
    )


def _at(module: nn.Module, path: str, family: Family) -> Any:
    for name in path.split("."):
        if not hasattr(module, name):
            raise UserError(
                f"expected a {'/'.join(family.model_types)} model to have a module at {path!r}, got {type(module).__name__} without {name!r}; "
                "its row in nodesieve/architectures.py does not fit this version of the model"
            )
        module = getattr(module, name)
    return module


def _has_bias(module: nn.Module) -> bool:
    return getattr(module, "bias", None) is not None


def _in_out(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a projection: `nn.Linear` stores (out, in), GPT-2's Conv1D (in, out)."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)
