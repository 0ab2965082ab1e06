"""Is a model gated as it must be? Checks by running it on random tokens; what `nodesieve check-model` prints.

Open gates give the original logits bit for bit; closing everything, the embedding too, gives the corrupted run's; padding in front of a prompt
changes nothing; the two writes of a layer are what it adds to the residual stream; closing all leaves of the blocks closes the blocks; closing one
node of each fine level changes the logits; a closed layer under zero ablation is a skipped layer; gradients reach every gate; no hook is left.
Where nothing of a layer is left, as in checkpoints of circuits, its gates need do nothing.

`gate` is how a model is taken into use: one of a known family after the first checks, any other only if a reading of its structure passes
all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from nodesieve.ablations import Activations, Corrupted, Routed
from nodesieve.architectures import MissingModule, as_linear, guess, is_known, unknown_family
from nodesieve.batches import Tokens
from nodesieve.errors import DOES_NOT_FIT, Trying, UnknownFamilyWarning, UserError
from nodesieve.families import MISREAD
from nodesieve.gated_model import GatedModel
from nodesieve.levels import LEVELS, nearest
from nodesieve.nodes import up_to

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLACE_OF = {"head": "heads", "head_dim": "heads", "mlp_neuron": "neurons", "expert": "experts", "mlp_output": "mlp_write"}
LENGTH, PADS = 8, 3  # of prompts of random tokens, and in front of them
TINY = 1e-30
PROJECTION_OF = {"heads": "attention_projection", "neurons": "mlp_projection"}
WRITE_OF = {"attention_block": "attention_write", "mlp_block": "mlp_write"}
BLOCK_OF = {("head_dim",): "attention_block", ("mlp_neuron", "expert"): "mlp_block"}


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    passed: bool
    detail: str = ""


def gate(model: PreTrainedModel) -> GatedModel:
    """A model with gates that have been seen to work.

    Raises:
        UserError: the family's row does not fit, or there is none, and no reading of the model's structure passes all checks.
    """
    model_type, missing = model.config.model_type, None
    if model_type in MISREAD:
        raise UserError(f"models of type {model_type} are not supported: {MISREAD[model_type]}")
    if is_known(model):
        try:
            return _by_its_row(model)
        except MissingModule as error:  # another model of that name, perhaps, with code of its own
            missing = error
        except (UserError, torch.OutOfMemoryError):
            raise
        except DOES_NOT_FIT as error:
            raise UserError(f"could not run this model of {model_type} with gates where its family's row says: {error!r}") from error
    for architecture in guess(model):
        gated = GatedModel(model, architecture)
        if _passes(gated):
            row = architecture.family
            writes = [row.attention_write or row.attention_projection, row.mlp_write or row.mlp_projection]
            warnings.warn(
                f"model family {model_type!r} is not known{' as it is here' if missing else ''}; its structure was read as "
                f"{row.attention_projection}, {row.mlp_projection}, written by {' and '.join(writes)} in {row.layers}, and passed every check",
                UnknownFamilyWarning,
                stacklevel=2,
            )
            return gated
    raise missing or unknown_family(model_type)


def _by_its_row(model: PreTrainedModel) -> GatedModel:
    gated = GatedModel(model)
    failed = next((check for check in quick_checks(gated) if not check.passed), None)
    if failed is not None:
        raise UserError(f"expected of {model.config.model_type}: {failed.name}; got: {failed.detail}. `nodesieve check-model` says more")
    return gated


def _passes(model: GatedModel) -> bool:
    with Trying():  # a place may not be what it seems
        return all(check.passed for check in verify(model))
    return False


def quick_checks(model: GatedModel) -> Iterator[Check]:
    """The four that cost ten short forward passes."""
    return islice(verify(model), 4)


def verify(model: GatedModel) -> Iterator[Check]:
    """Run every check; each is yielded as it is done."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    clean, corrupted = (_random_tokens(vocabulary, generator, model.device) for _ in range(2))
    original, other = model.logits(clean), model.logits(corrupted)
    hooks_before = _hooks(model)  # on its first pass, transformers may hang in some of its own
    ablation = model.record(corrupted)
    opened, closed = (model.nodes.full(value, device=model.device) for value in (1.0, 0.0))

    with torch.no_grad():
        same = model.gated_logits(clean, opened, ablation)
        yield Check(name="open gates give the original logits, bit for bit", passed=torch.equal(same, original), detail=_gap(same, original))
        swapped, advanced = (model.gated_logits(clean, closed, values) for values in (ablation, Corrupted(tokens=corrupted)))
        yield Check(
            name="everything closed, the embedding too, gives the corrupted run",
            passed=torch.equal(swapped, other) and model.agree(advanced, other),
            detail=f"{_gap(swapped, other)}, {_gap(advanced, other)} where the corrupted prompts advance layer by layer beside the clean ones",
        )
        yield _padding_is_nothing(model, clean)
        yield _writes_add_up(model, clean)
        own = model.record(clean)
        alive = {block: _differing(getattr(own, write), getattr(ablation, write)) for block, write in WRITE_OF.items()}
        alive["layer"] = torch.stack(list(alive.values())).any(0)
        for level, place in PLACE_OF.items():
            if level not in model.nodes.levels:
                continue
            index = _largest_difference(model, own, ablation, place, model.nodes.shape(level))
            if index is None:
                yield Check(name=f"closing one {level} changes the logits (not checked: none of them does anything)", passed=True)
                continue
            gates = {**opened, level: opened[level].clone()}
            gates[level][index] = 0
            changed = model.gated_logits(clean, gates, ablation)
            name = model.nodes.name(level, index)
            yield Check(name=f"closing one {level} ({name}) changes the logits", passed=not torch.equal(changed, original), detail="nothing changed")
        for inside, block in BLOCK_OF.items():
            levels = [level for level in inside if level in model.nodes.levels]
            within = model.gated_logits(clean, {**opened, **{level: closed[level] for level in levels}}, ablation)
            whole = model.gated_logits(clean, {**opened, block: closed[block]}, ablation)
            yield Check(
                name=f"closing every {' and '.join(levels)} closes every {block}",
                passed=torch.allclose(within, whole, atol=1e-3, rtol=1e-3),
                detail=_gap(within, whole) + "; part of the block is not gated",
            )
        zeros = ablation.map(lambda x: torch.zeros_like(x[0, 0]))
        gates = {**opened, "layer": opened["layer"].clone()}
        gates["layer"][0] = 0
        skipped, without = model.gated_logits(clean, gates, zeros), _without_first_layer(model, clean)
        norms = model.architecture.places[0].norms_after_sum
        yield Check(
            name=f"a closed layer under zero ablation {'applies only its norms of the stream' if norms else 'is a skipped layer'}",
            passed=torch.allclose(skipped, without, atol=1e-4),
            detail=_gap(skipped, without),
        )

    half = {level: (opened[level] * 0.5).requires_grad_(True) for level in LEVELS}
    # Of a loss as learning has, whose gradients 16 bits can hold: of one token's log p.
    functional.log_softmax(model.gated_logits(clean, half, ablation), -1)[:, 0].sum().backward()  # type: ignore[no-untyped-call]
    for level in model.nodes.levels:
        gradient = half[level].grad
        there, upon = model.nodes.present(level), nearest(level, alive)
        if upon is not None:
            there &= up_to(there, alive[upon])
        reached = gradient is not None and bool(torch.isfinite(gradient).all()) and _in_every_layer(gradient != 0, there)
        yield Check(name=f"gradients reach {level}", passed=reached, detail="the gradient is missing, zero or not finite")
    yield Check(name="no hook is left behind", passed=_hooks(model) == hooks_before, detail="the model has more hooks than before")


def _in_every_layer(found: Tensor, present: Tensor) -> bool:
    """Is there something in every layer that has nodes of the level? (L, ...), (L, ...)"""
    rows = found.flatten(1).any(-1) if found.dim() > 1 else found
    expected = present.flatten(1).any(-1) if present.dim() > 1 else present
    return bool((rows.cpu() | ~expected).all())


def _random_tokens(vocabulary: int, generator: torch.Generator, device: torch.device) -> Tokens:
    ids = torch.randint(vocabulary, (2, LENGTH), generator=generator).to(device)
    return Tokens(input_ids=ids, attention_mask=torch.ones_like(ids))


def _differing(own: Mapping[int, Tensor], ablation: Mapping[int, Tensor]) -> Tensor:
    """In which layers a write is not the same for both prompts, (L,): a layer of which nothing is left writes what it always does."""
    return torch.tensor([bool((own[layer] != ablation[layer]).any()) for layer in sorted(own)])


def _largest_difference(model: GatedModel, own: Activations, ablation: Activations, place: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The node of a level whose activation differs most from its ablation value at the last position, of those that the projection behind them
    heeds, more or less; None where none does."""
    by_layer: dict[int, Tensor] = {}
    for layer, x in getattr(own, place).items():
        a = getattr(ablation, place)[layer]
        x, a = (value.dense() if isinstance(value, Routed) else value for value in (x, a))
        difference = (x - a)[:, -1].abs().amax(0)
        projection = getattr(model.architecture.places[layer], PROJECTION_OF[place]) if place in PROJECTION_OF else None
        if projection is not None:
            difference = difference * as_linear(projection).norm(dim=0)
        by_layer[layer] = difference.reshape(*shape[1:], -1).amax(-1)
    layer = max(by_layer, key=lambda layer: float(by_layer[layer].max()))
    if not by_layer[layer].any():
        return None
    return (layer, *(int(i) for i in torch.unravel_index(by_layer[layer].argmax(), shape[1:])))


def _padding_is_nothing(model: GatedModel, tokens: Tokens) -> Check:
    """Prompts are padded in front, so their positions must go by the mask. Where experts are chosen in 16 bits, one rounding may choose another."""
    name = "padding in front of a prompt changes nothing"
    if model.architecture.nodes.experts and model.model.dtype.itemsize < 4:
        return Check(name=f"{name} (not checked: experts in 16 bits)", passed=True)
    ids, mask = tokens.input_ids[:1], tokens.attention_mask[:1]
    alone = model.logits(Tokens(input_ids=ids, attention_mask=mask))
    padded = model.logits(Tokens(input_ids=torch.cat([ids[:, :PADS], ids], -1), attention_mask=functional.pad(mask, (PADS, 0))))
    return Check(name=name, passed=model.agree(padded, alone), detail=_gap(padded, alone) + "; does its forward take position_ids?")


def _writes_add_up(model: GatedModel, tokens: Tokens) -> Check:
    """Each layer adds its two writes, times one number, to what enters it, but for what two sums are rounded by: a share of the stream, which in 16
    bits may be more than is added. Where a norm follows the sum there is nothing to compare."""
    name = "the two writes of a layer are what it adds to the residual stream"
    if model.architecture.places[0].norms_after_sum:
        return Check(name=f"{name} (not checked: this model normalises the stream itself)", passed=True)
    ends: list[list[Tensor]] = [[] for _ in model.architecture.places]
    with ExitStack() as stack:
        for layer, own in enumerate(ends):
            stack.enter_context(_on_layer(model, own.append, own.append, layer=layer))
        seen = model.record(tokens)
    errors = []
    for layer, (before, after) in enumerate(ends):
        added, written = after.float() - before.float(), (seen.attention_write[layer] + seen.mlp_write[layer]).float()
        factor = (added * written).sum() / written.square().sum().clamp(min=TINY)
        beyond = (added - factor * written).norm() - torch.finfo(after.dtype).eps * after.float().norm()
        errors.append(float(beyond.clamp(min=0) / added.norm().clamp(min=TINY)))  # 0 where a layer writes nothing
    worst = max(errors)
    return Check(name=name, passed=worst < 0.01, detail=f"{100 * worst:.2g}% of it comes from elsewhere in layer {errors.index(worst)}")


def _without_first_layer(model: GatedModel, tokens: Tokens) -> Tensor:
    """Logits with layer 0 passing its input on untouched, but for norms of the stream itself."""
    kept: list[Tensor] = []

    def skip(_output: Tensor) -> Tensor:
        x = kept[-1]
        for norm in model.architecture.places[0].norms_after_sum:
            x = norm(x)
        return x

    with _on_layer(model, lambda x: kept.append(x), skip):
        return model.logits(tokens)


def _on_layer(model: GatedModel, on_input: Callable[[Tensor], None], on_output: Callable[[Tensor], Tensor | None], *, layer: int = 0) -> ExitStack:
    """Watch what enters a layer, and watch or replace what leaves it, while the context is open."""
    module = model.architecture.places[layer].layer

    def before(_module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        on_input(args[0] if args else kwargs["hidden_states"])

    def after(_module: object, _args: object, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        new = on_output(first)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    stack = ExitStack()
    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(module.register_forward_hook(after).remove)
    return stack


def _hooks(model: GatedModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.model.modules())


def _gap(got: Tensor, expected: Tensor) -> str:
    return f"largest difference {float((got - expected).abs().max()):.3g}"


def is_parallel(model: GatedModel) -> bool:
    """Do the attention and the MLP of a layer read the same stream? Seen by silencing layer 0's attention and looking at what its MLP writes."""

    def silence(_module: object, _args: object, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    tokens = _random_tokens(vocabulary, torch.Generator().manual_seed(0), model.device)
    before = model.record(tokens).mlp_write[0]
    hook = model.architecture.places[0].attention_write.register_forward_hook(silence)
    try:
        return torch.equal(before, model.record(tokens).mlp_write[0])
    finally:
        hook.remove()
