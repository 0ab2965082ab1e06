"""A circuit as a checkpoint that transformers reads by itself: the weights of what is closed are gone, and what closed nodes hold is in the biases.

1. `without_closed` copies the model and takes the closed nodes out of its weights. With a for what closed entries of a projection's input hold,
   projection(x) = live columns of the weight (x) + (bias + closed columns (a)); what is closed behind the projection is a row of zeros, with what it
   holds as bias. That takes constants: the zero and the mean ablation have them, corrupted prompts do not.
2. Where that leaves heads or hidden neurons idle in every layer, all layers are made as narrow as the widest of them needs, if the family's config
   has words for it, which is found out by trying. It has none for layers of different widths.
3. `export` writes it, reads it again, and compares what it says with the gated model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nodesieve.ablations import Activations, Routed, doubled
from nodesieve.architectures import Architecture, LayerPlaces, as_linear, locate
from nodesieve.batches import Tokens
from nodesieve.circuit import Circuit
from nodesieve.errors import Trying, UserError
from nodesieve.files import replacing
from nodesieve.gated_model import GatedModel
from nodesieve.nodes import PlaceGates, place_gates
from nodesieve.problem import Problem
from nodesieve.shrink import columns_of, in_each_part, live_first, rows_of, spread
from nodesieve.weights import Quiet, write_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BIASES = (
    "attention_bias",
    "attention_out_bias",
    "mlp_bias",
    "use_bias",
    "bias",
    "enable_bias",
)  # what configs call the choice of biases for projections
NEURONS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "shared_intermediate_size")  # and the number of hidden neurons of a layer
HEADS, GROUPS, HEAD_DIM = "num_attention_heads", "num_key_value_heads", "head_dim"
COMPARED = 32  # test examples that are read through what was written
Changed = Mapping[str, Tensor | None]  # weight and bias of a module, None where it has none


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written: parameters of the model and of the checkpoint, and the largest difference of a logit to the gated model's."""

    parameters: int
    parameters_before: int
    difference: float


def export(problem: Problem, tokenizer: PreTrainedTokenizerBase, circuit: Circuit, out: Path, *, beside: Mapping[str, str]) -> Exported:
    """Write the circuit as a checkpoint into a new directory, whole or not at all.

    Args:
        problem: the run's, under an ablation by constants.
        beside: further files, content by name.

    Raises:
        UserError: the ablation has no constants, the model has no place for them, `out` cannot be made, or what was written says something else.
    """
    held = problem.ablation.values(problem.task["test"].batch([0]))
    if not isinstance(held, Activations):
        raise UserError(f"--format hf expects an ablation by constants, mean or zero, got {problem.ablation_name}")
    model = without_closed(problem.model, circuit, held)
    try:
        with replacing(out) as scratch:
            try:
                scratch.mkdir()
            except OSError as error:
                raise UserError(f"OUT expects a directory that can be made, could not make {str(out)!r}: {error.strerror}") from error
            try:
                write_checkpoint(scratch, model, tokenizer)
            except NotImplementedError as error:  # as of weights that are quantised
                kind = model.config.model_type
                raise UserError(f"--format hf expects a model that transformers can write, it cannot write this {kind}: {error}") from error
            with Quiet():
                again = type(model).from_pretrained(scratch, dtype=model.dtype, use_safetensors=True)
            for name, content in beside.items():
                (scratch / name).write_text(content, "utf-8")
            difference = _difference(again.to(problem.model.device).eval(), problem, circuit)
    except OSError as error:
        raise UserError(f"OUT expects a directory that is new or empty, could not write {str(out)!r}: {error.strerror}") from error
    return Exported(parameters=_count(model), parameters_before=_count(problem.model.model), difference=difference)


def _difference(alone: PreTrainedModel, problem: Problem, circuit: Circuit) -> float:
    """How far the logits of the checkpoint are from those of the gated model.

    Raises:
        UserError: farther than two ways to the same.
    """
    both = [(logits, _logits(alone, problem.model, batch.clean)) for batch, (logits,) in problem.circuit_logits([circuit], "test", first=COMPARED)]
    gated, found = (torch.cat(logits) for logits in zip(*both, strict=True))
    difference = float((found - gated).abs().max())
    if not problem.model.agree(found, gated):
        raise UserError(f"expected the checkpoint to say what the gated model does, got logits that differ by {difference:.3g}; nothing was written")
    return difference


@torch.no_grad()
def without_closed(model: GatedModel, circuit: Circuit, held: Activations) -> PreTrainedModel:
    """A copy of the model that says by itself what the gated one does with the circuit's gates; as narrow as that allows.

    Args:
        held: what closed nodes hold, a vector for each place of a layer.

    Raises:
        UserError: the embedding is closed, or the model has no place for what closed nodes hold.
    """
    if not bool(circuit.masks["embedding"].all()):
        raise UserError("--format hf expects a circuit with the embedding, got one without; find it again without the level embedding")
    at = place_gates({level: mask.to(model.device) for level, mask in circuit.masks.items()})
    folded = copy.deepcopy(model.model)
    try:
        _fold(locate(folded, model.architecture.family), at, held)
    except _NoBias as missing:
        try:
            folded = _with_biases(model.model)
            _fold(locate(folded, model.architecture.family), at, held)
        except (_NoBias, ValueError):
            raise UserError(
                f"--format hf under the mean ablation expects projections with biases, to hold what closed nodes hold, got none in {missing} "
                f"(model type {model.model.config.model_type}); take --ablation zero"
            ) from None
    return _narrowed(model, folded, circuit)


class _NoBias(Exception):
    """A projection would have to hold a constant, and has no bias."""


def _fold(architecture: Architecture, at: PlaceGates, held: Activations) -> None:
    for layer, places in enumerate(architecture.places):
        written = at.attention_write[layer].expand(architecture.nodes.width)
        _fold_projection(places.attention_projection, at.heads[layer], held.heads[layer])
        _close_write(places.attention_write, places.attention_projection, written, held.attention_write[layer])
        if places.mlp_projection is not None:
            _fold_projection(places.mlp_projection, at.neurons[layer], held.neurons[layer])
            _close_write(places.mlp_write, places.mlp_projection, at.mlp_write[layer], held.mlp_write[layer])
        else:
            _fold_experts(places, at.experts[layer], at.mlp_write[layer], held, layer)


def _fold_projection(projection: nn.Module, live: Tensor, held: Tensor) -> None:
    """Entries of the projection's input (N,) that are closed, and what they hold."""
    weight = as_linear(projection)
    _add_bias(projection, doubled(weight[:, ~live]) @ doubled(held[~live]))
    weight[:, ~live] = 0


def _close_write(write: nn.Module, projection: nn.Module, live: Tensor, held: Tensor) -> None:
    """Entries of what is written (D,) that are closed, and what they hold."""
    if bool(live.all()):
        return
    if any(module is projection for module in write.modules()):  # itself, or the MLP that ends with it
        as_linear(projection)[~live] = 0
        bias = projection._parameters.get("bias")
        if bias is not None:
            bias[~live] = 0
        _add_bias(projection, doubled(held.masked_fill(live, 0)))
    else:
        _close_norm(write, live, held)


def _close_norm(norm: nn.Module, live: Tensor, held: Tensor) -> None:
    """A norm between projection and stream: a weight that silences the closed entries, found by trying, since some families add 1; and its bias."""
    weight, bias = norm.get_parameter("weight"), norm._parameters.get("bias")
    if bias is not None:
        bias[~live] = held[~live].to(bias.dtype)
    stream = torch.randn(4, len(live), device=weight.device, dtype=weight.dtype)
    for silent in (0.0, -1.0):
        weight[~live] = silent
        if torch.equal(norm(stream)[:, ~live], held[~live].to(weight.dtype).expand(4, -1)):
            return
    raise _NoBias(f"the {type(norm).__name__} behind a projection")


def _fold_experts(places: LayerPlaces, live: Tensor, written: Tensor, held: Activations, layer: int) -> None:
    own = held.experts[layer]
    constants = [own.dense() if isinstance(own, Routed) else own, held.mlp_write[layer]]
    if any(bool(x.any()) for x in constants) and not bool(live.all() and written.all()):
        raise _NoBias("the experts")
    assert places.experts is not None
    down = places.experts.get_parameter("down_proj")  # (E, D, I)
    down[~live] = 0
    down[:, ~written] = 0


def _add_bias(projection: nn.Module, x: Tensor) -> None:
    bias = projection._parameters.get("bias")
    if bias is not None:
        bias.add_(x.to(bias))
    elif bool(x.any()):
        raise _NoBias(f"a {type(projection).__name__}")


def _with_biases(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose projections have biases, of 0 where it had none, as far as the family's config can say so."""
    options = {name: True for name in BIASES if hasattr(model.config.get_text_config(), name)}
    return _rebuilt(model, options, model.state_dict())


def _rebuilt(model: PreTrainedModel, options: Mapping[str, Any], state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model of the same class with other options in its config, and these weights; biases that are not among them are 0.

    Raises:
        ValueError: there is no such model, or its config cannot be written.
    """
    config = copy.deepcopy(model.config)
    words = config.get_text_config()
    for name, value in options.items():
        setattr(words, name, value)
    with Quiet():
        _refuse_unwritable(config)
        built: PreTrainedModel = type(model)(config).to(device=model.device, dtype=model.dtype).eval().requires_grad_(False)
    own = built.state_dict()
    missing = [name for name in own if name not in state]
    if any(not name.endswith("bias") for name in missing):
        raise ValueError(f"a {config.model_type} model with {options} has other weights: {missing}")
    built.load_state_dict({**{name: torch.zeros_like(own[name]) for name in missing}, **state})
    built.generation_config = model.generation_config
    return built


def _refuse_unwritable(config: PreTrainedConfig) -> None:
    """Raise ValueError where the family has conditions that the config does not meet: some want the width to be a multiple of the heads."""
    try:
        with TemporaryDirectory() as place:
            config.save_pretrained(place)
    except Exception as error:  # huggingface_hub's own, which is neither
        raise ValueError(str(error)) from error


def _narrowed(model: GatedModel, folded: PreTrainedModel, circuit: Circuit) -> PreTrainedModel:
    """With fewer hidden neurons and heads in every layer, each if that can be said and says the same; else as it is."""
    for narrower in (_fewer_neurons, _fewer_heads):
        architecture = locate(folded, model.architecture.family)
        with Trying():
            attempt = narrower(folded, architecture, circuit, model)
            if attempt is not None and _say_the_same(attempt, folded, model):
                folded = attempt
    return folded


def _fewer_neurons(folded: PreTrainedModel, architecture: Architecture, circuit: Circuit, model: GatedModel) -> PreTrainedModel | None:
    nodes, live = architecture.nodes, circuit.masks["mlp_neuron"]
    count = max(1, int(live.sum(-1).max()))
    if count >= nodes.neurons or nodes.experts:
        return None
    changed: dict[nn.Module, Changed] = {}
    for layer, places in enumerate(architecture.places):
        assert places.mlp_projection is not None
        kept = live_first(live[layer], count)
        changed[places.mlp_projection] = {"weight": columns_of(places.mlp_projection, kept).parameters["weight"]}
        for module in places.mlp_inputs:
            changed[module] = rows_of(module, in_each_part(module, kept, nodes.neurons)).parameters
    words = folded.config.get_text_config()
    sizes = {name: count for name in NEURONS if hasattr(words, name) and getattr(words, name) in (nodes.neurons, None)}  # GPT-2's may be None
    return _rebuilt(folded, sizes, _with(folded, changed))


def _fewer_heads(folded: PreTrainedModel, architecture: Architecture, circuit: Circuit, model: GatedModel) -> PreTrainedModel | None:
    """Each head gets keys and values of its own, so that is worth it only where few are left; and only with head sizes that a config names. Some
    configs want a number of heads that divides the width, so it is the first that can be written of those that are enough."""
    nodes, groups, live = architecture.nodes, architecture.parameters.groups, circuit.masks["head"]
    layout, words = model.cutter.heads, folded.config.get_text_config()
    if layout is None or getattr(words, HEAD_DIM, None) != nodes.head_dim or not hasattr(words, GROUPS):
        return None
    for count in range(max(1, int(live.sum(-1).max())), (nodes.heads + groups + 1) // 2):
        changed: dict[nn.Module, Changed] = {}
        for layer, places in enumerate(architecture.places):
            kept, projection = live_first(live[layer], count), places.attention_projection
            changed[projection] = {"weight": columns_of(projection, spread(kept, nodes.head_dim)).parameters["weight"]}
            for module, rows in zip(places.qkv, layout(kept, nodes.heads, groups, nodes.head_dim), strict=True):
                changed[module] = rows_of(module, rows).parameters
        with contextlib.suppress(ValueError):
            return _rebuilt(folded, {HEADS: count, GROUPS: count}, _with(folded, changed))
    return None


def _with(model: PreTrainedModel, changed: Mapping[nn.Module, Changed]) -> dict[str, Tensor]:
    """The weights of a model, by name, with some in place of its own; a projection that loses inputs keeps its bias."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        state.update({f"{name}.{own}": x for own, x in changed.get(module, {}).items() if x is not None})
    return state


def _say_the_same(a: PreTrainedModel, b: PreTrainedModel, gated: GatedModel) -> bool:
    ids = torch.randint(gated.vocabulary, (2, 8), generator=torch.Generator().manual_seed(0)).to(gated.device)
    tokens = Tokens(input_ids=ids, attention_mask=torch.ones_like(ids))
    first, second = (_logits(model, gated, tokens) for model in (a, b))
    return gated.agree(first, second)


def _logits(model: PreTrainedModel, gated: GatedModel, tokens: Tokens) -> Tensor:
    """Of a model built like the gated one."""
    return GatedModel(model, locate(model, gated.architecture.family)).logits(tokens)


def _count(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())
