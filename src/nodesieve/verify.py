"""Is a model gated as it must be? Checks by running it on random tokens; what `nodesieve check-model` prints.

Open gates give the original logits bit for bit; closing everything, the embedding too, gives the corrupted run's; closing one node of
each fine level changes the logits; a closed layer under zero ablation is a skipped layer; gradients reach every gate; no hook is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nodesieve.ablations import Activations
from nodesieve.batches import Tokens
from nodesieve.gated_model import GatedModel
from nodesieve.levels import LEVELS

PLACE_OF = {"head": "heads", "head_dim": "heads", "mlp_neuron": "neurons", "mlp_output": "mlp_write"}


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    passed: bool
    detail: str = ""


def verify(model: GatedModel, *, length: int = 8, seed: int = 0) -> Iterator[Check]:
    """Run every check; each is yielded as it is done."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    clean, corrupted = (_random_tokens(vocabulary, length, generator, model.device) for _ in range(2))
    hooks_before = _hooks(model)
    original, other = model.logits(clean), model.logits(corrupted)
    ablation = model.record(corrupted)
    opened, closed = (model.nodes.full(value, device=model.device) for value in (1.0, 0.0))

    with torch.no_grad():
        same = model.gated_logits(clean, opened, ablation)
        yield Check(name="open gates give the original logits, bit for bit", passed=torch.equal(same, original), detail=_gap(same, original))
        swapped = model.gated_logits(clean, closed, ablation)
        yield Check(
            name="everything closed, the embedding too, gives the corrupted run", passed=torch.equal(swapped, other), detail=_gap(swapped, other)
        )
        own = model.record(clean)
        for level, place in PLACE_OF.items():
            index = _largest_difference(own, ablation, place, model.nodes.shape(level))
            gates = {**opened, level: opened[level].clone()}
            gates[level][index] = 0
            changed = model.gated_logits(clean, gates, ablation)
            name = model.nodes.name(level, index)
            yield Check(name=f"closing one {level} ({name}) changes the logits", passed=not torch.equal(changed, original), detail="nothing changed")
        zeros = ablation.map(lambda x: torch.zeros_like(x[0, 0]))
        gates = {**opened, "layer": opened["layer"].clone()}
        gates["layer"][0] = 0
        skipped, without = model.gated_logits(clean, gates, zeros), _without_first_layer(model, clean)
        yield Check(
            name="a closed layer under zero ablation is a skipped layer",
            passed=torch.allclose(skipped, without, atol=1e-4),
            detail=_gap(skipped, without),
        )

    half = {level: (opened[level] * 0.5).requires_grad_(True) for level in LEVELS}
    model.gated_logits(clean, half, ablation).square().sum().backward()  # type: ignore[no-untyped-call]
    for level, gate in half.items():
        gradient = gate.grad
        reached = gradient is not None and bool(torch.isfinite(gradient).all()) and bool((gradient != 0).any())
        yield Check(name=f"gradients reach {level}", passed=reached, detail="the gradient is missing, zero or not finite")
    yield Check(name="no hook is left behind", passed=_hooks(model) == hooks_before, detail="the model has more hooks than before")


def _random_tokens(vocabulary: int, length: int, generator: torch.Generator, device: torch.device) -> Tokens:
    ids = torch.randint(vocabulary, (2, length), generator=generator).to(device)
    return Tokens(input_ids=ids, attention_mask=torch.ones_like(ids))


def _largest_difference(own: Activations, ablation: Activations, place: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The node of a level whose activation differs most from its ablation value at the last position."""
    differences = torch.stack([(x - a)[:, -1].abs().amax(0) for x, a in zip(getattr(own, place), getattr(ablation, place), strict=True)])
    by_node = differences.reshape(*shape, -1).amax(-1)
    return tuple(int(i) for i in torch.unravel_index(by_node.argmax(), shape))


def _without_first_layer(model: GatedModel, tokens: Tokens) -> Tensor:
    """Logits with layer 0 passing its input on untouched."""
    layer = model.architecture.places[0].layer
    kept: list[Tensor] = []

    def remember(_module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        kept.append(args[0] if args else kwargs["hidden_states"])

    def skip(_module: object, _args: object, output: object) -> object:
        return (kept[-1], *output[1:]) if isinstance(output, tuple) else kept[-1]

    handles = [layer.register_forward_pre_hook(remember, with_kwargs=True), layer.register_forward_hook(skip)]
    try:
        return model.logits(tokens)
    finally:
        for handle in handles:
            handle.remove()


def _hooks(model: GatedModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.model.modules())


def _gap(got: Tensor, expected: Tensor) -> str:
    return f"largest difference {float((got - expected).abs().max()):.3g}"
