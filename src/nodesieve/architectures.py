"""Where the five places are in each model family: one row of data a family.

A gate needs to see five tensors: the residual stream that enters layer 0, the input of each attention output projection, the input of
each MLP down projection, and the two residual writes of each layer. A `Family` says by module path where they are (and where the query,
key, value and MLP input weights are, for counting parameters); `resolve` looks the paths up in a model and reads the sizes
off the weights. To add a family, add a row. A model without one is read by `guess`, by names and shapes.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from nodesieve.errors import UserError
from nodesieve.nodes import NodeSpace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Family:
    """Module paths, `layers` from the model and the rest from one layer.

    Attributes:
        attention_write: the module whose output is added to the residual stream, the projection itself where not said: a norm after the
            projection, where the family has one. A factor on the way (Granite) does no harm: gating is linear.
        mlp_write: likewise.
        qkv: query, key and value projections, one fused or three.
        mlp_inputs: the matrices from the stream to the hidden neurons: one, a gate and an up projection, or both fused.
        experts: in layers that route to experts, the module that takes (hidden states, indices, weights) of the chosen ones and gives the sum of
            their weighted outputs. Such a layer has no `mlp_projection`, and its write is the MLP's own.
        norms_after_sum: norms of the residual stream itself, applied after a write is added to it; a closed layer still applies them.
        norms_after_sum_if: (option, value) of the config where only some models of the family have them.
    """

    model_types: tuple[str, ...]
    layers: str
    attention_projection: str
    mlp_projection: str
    attention_write: str = ""
    mlp_write: str = ""
    qkv: tuple[str, ...]
    mlp_inputs: tuple[str, ...]
    experts: str = ""
    norms_after_sum: tuple[str, ...] = ()
    norms_after_sum_if: tuple[str, object] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention_write", self.attention_write or self.attention_projection)
        object.__setattr__(self, "mlp_write", self.mlp_write or self.mlp_projection)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_LLAMA = Family(
    model_types=(
        *("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "olmo", "stablelm", "cohere", "cohere2", "granite", "smollm3"),
        *("helium", "ernie4_5", "seed_oss", "hunyuan_v1_dense", "internlm3", "ministral3", "vaultgemma", "granite_swa", "iquestcoder", "bitnet"),
    ),
    layers="model.layers",
    attention_projection="self_attn.o_proj",
    mlp_projection="mlp.down_proj",
    qkv=_QKV,
    mlp_inputs=("mlp.gate_proj", "mlp.up_proj"),
)
_NORM_AFTER = replace(
    _LLAMA,
    model_types=("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4"),
    attention_write="post_attention_layernorm",
    mlp_write="post_feedforward_layernorm",
)
_OPT = Family(
    model_types=("opt",),
    layers="model.decoder.layers",
    attention_projection="self_attn.out_proj",
    mlp_projection="fc2",
    qkv=_QKV,
    mlp_inputs=("fc1",),
    norms_after_sum=("self_attn_layer_norm", "final_layer_norm"),
    norms_after_sum_if=("do_layer_norm_before", False),
)

FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=("gpt2", "gpt_bigcode"),
        layers="transformer.h",
        attention_projection="attn.c_proj",
        mlp_projection="mlp.c_proj",
        qkv=("attn.c_attn",),
        mlp_inputs=("mlp.c_fc",),
    ),
    Family(
        model_types=("gpt_neo",),
        layers="transformer.h",
        attention_projection="attn.attention.out_proj",
        mlp_projection="mlp.c_proj",
        qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        mlp_inputs=("mlp.c_fc",),
    ),
    Family(
        model_types=("gpt_neox",),
        layers="gpt_neox.layers",
        attention_projection="attention.dense",
        mlp_projection="mlp.dense_4h_to_h",
        qkv=("attention.query_key_value",),
        mlp_inputs=("mlp.dense_h_to_4h",),
    ),
    Family(
        model_types=("gptj",),
        layers="transformer.h",
        attention_projection="attn.out_proj",
        mlp_projection="mlp.fc_out",
        qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        mlp_inputs=("mlp.fc_in",),
    ),
    Family(
        model_types=("codegen",),
        layers="transformer.h",
        attention_projection="attn.out_proj",
        mlp_projection="mlp.fc_out",
        qkv=("attn.qkv_proj",),
        mlp_inputs=("mlp.fc_in",),
    ),
    _OPT,
    replace(_OPT, model_types=("xglm",), layers="model.layers", norms_after_sum=()),
    replace(_OPT, model_types=("biogpt",), layers="biogpt.layers", norms_after_sum=()),
    Family(
        model_types=("bloom", "falcon"),  # their blocks return residual plus write; the projections' own outputs are the writes
        layers="transformer.h",
        attention_projection="self_attention.dense",
        mlp_projection="mlp.dense_4h_to_h",
        qkv=("self_attention.query_key_value",),
        mlp_inputs=("mlp.dense_h_to_4h",),
    ),
    Family(
        model_types=("mpt",),
        layers="transformer.blocks",
        attention_projection="attn.out_proj",
        mlp_projection="ffn.down_proj",
        qkv=("attn.Wqkv",),
        mlp_inputs=("ffn.up_proj",),
    ),
    _LLAMA,
    replace(_LLAMA, model_types=("arcee", "apertus", "nemotron", "jais2"), mlp_inputs=("mlp.up_proj",)),
    replace(_LLAMA, model_types=("glm",), mlp_inputs=("mlp.gate_up_proj",)),
    replace(_LLAMA, model_types=("phi3",), qkv=("self_attn.qkv_proj",), mlp_inputs=("mlp.gate_up_proj",)),
    _NORM_AFTER,
    replace(_NORM_AFTER, model_types=("gemma3",), layers="model.language_model.layers"),  # with eyes; the circuit is of the words
    replace(_LLAMA, model_types=("nanochat",), mlp_projection="mlp.fc2", mlp_write="mlp.fc2", mlp_inputs=("mlp.fc1",)),
    replace(_LLAMA, model_types=("mixtral", "qwen3_moe", "olmoe"), mlp_write="mlp", experts="mlp.experts"),
    replace(
        _LLAMA,
        model_types=("glm4",),
        attention_write="post_self_attn_layernorm",
        mlp_write="post_mlp_layernorm",
        mlp_inputs=("mlp.gate_up_proj",),
    ),
    Family(
        model_types=("starcoder2",),
        layers="model.layers",
        attention_projection="self_attn.o_proj",
        mlp_projection="mlp.c_proj",
        qkv=_QKV,
        mlp_inputs=("mlp.c_fc",),
    ),
    Family(
        model_types=("phi",),
        layers="model.layers",
        attention_projection="self_attn.dense",
        mlp_projection="mlp.fc2",
        qkv=_QKV,
        mlp_inputs=("mlp.fc1",),
    ),
    Family(
        model_types=("persimmon",),
        layers="model.layers",
        attention_projection="self_attn.dense",
        mlp_projection="mlp.dense_4h_to_h",
        qkv=("self_attn.query_key_value",),
        mlp_inputs=("mlp.dense_h_to_4h",),
    ),
)


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
        "add a row of module paths to FAMILIES in nodesieve/architectures.py"
    )


def locate(model: PreTrainedModel, family: Family) -> Architecture:
    """Find the places of `family` in `model`.

    Raises:
        UserError: the model does not look as the row says.
    """
    model_type = model.config.model_type
    layers = list(_at(model, family.layers, family))
    places = tuple(
        LayerPlaces(
            layer=layer,
            attention_projection=_at(layer, family.attention_projection, family),
            mlp_projection=None if _experts(layer, family) else _at(layer, family.mlp_projection, family),
            experts=_experts(layer, family),
            attention_write=_at(layer, family.attention_write, family),
            mlp_write=_at(layer, family.mlp_write, family),
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
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and not isinstance(module, nn.Embedding)


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


def in_out(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a projection: `nn.Linear` stores (out, in), GPT-2's Conv1D (in, out)."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)
