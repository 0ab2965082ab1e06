"""A frozen Hugging Face model with a gate at every node.

Hooks sit at five places: the residual stream that enters layer 0, the input of each attention output projection, each attention write,
the input of each MLP down projection, each MLP write; where a layer routes, its experts take the place of the down projection. `record`
reads what they hold; `gated_logits` replaces it by z * x + (1 - z) * a, computed as `torch.lerp(a, x, z)`, which is exact at z = 0 and z = 1.
The hooks live inside a `with` block and are gone after it, also when the model raises; the model's training mode and `requires_grad` flags
are put back as they were.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nodesieve.ablations import LAYER_PLACES, Activations, Routed
from nodesieve.architectures import Architecture, resolve
from nodesieve.batches import Tokens
from nodesieve.nodes import NodeSpace, PlaceGates, place_gates

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WRITTEN_OUT = ("NewGELUActivation", "FastGELUActivation", "QuickGELUActivation", "AccurateGELUActivation", "ReLUSquaredActivation")
WRITES = ("attention_write", "mlp_write")

# (place, layer, activation) -> what takes its place; `place` is a field of Activations and PlaceGates.
Edit = Callable[[str, int, Tensor], Tensor]
# (layer, what its experts are asked) -> (the routing weights to ask with, what to add to the answer)
Route = Callable[[int, Routed], tuple[Tensor, Tensor | None]]


class GatedModel:
    """Runs `model` plainly, recorded or gated; always returns logits at the answer position only.

    Args:
        model: a causal LM. It is not changed.
        architecture: where its places are; by default what its family's row in `nodesieve.architectures` says.

    Raises:
        UserError: no architecture is given and the family has no row.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture | None = None) -> None:
        self.model = model
        self.architecture: Architecture = architecture or resolve(model)
        self._takes = frozenset(inspect.signature(model.forward).parameters)

    @property
    def nodes(self) -> NodeSpace:
        return self.architecture.nodes

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @torch.no_grad()
    def logits(self, tokens: Tokens) -> Tensor:
        """The model as it is: logits at each prompt's last token, (B, V) in float32 (float64 for a float64 model)."""
        with self._frozen():
            return self._run(tokens)

    @torch.no_grad()
    def record(self, tokens: Tokens) -> Activations:
        """What the five places hold when the model reads `tokens`; each (B, T, size of the place)."""
        seen = Activations()

        def keep(place: str, layer: int, x: Tensor) -> Tensor:
            if place == "embedding":
                seen.embedding = x
            else:
                getattr(seen, place)[layer] = x
            return x.clone() if place in WRITES else x  # Falcon adds to a write in place

        def keep_routed(layer: int, routed: Routed) -> tuple[Tensor, None]:
            seen.experts[layer] = routed
            return routed.weights, None

        with self._frozen(), self._hooked(keep, keep_routed, rows=len(tokens.input_ids)):
            self._run(tokens)
        return seen

    def gated_logits(self, tokens: Tokens, gates: Mapping[str, Tensor], ablation: Activations, *, recompute: bool = False) -> Tensor:
        """Logits at each prompt's last token with every node gated, (B, V) in float32; gradients flow to `gates`.

        Args:
            tokens: the clean prompts, (B, T).
            gates: a tensor in [0, 1] for each level, (*shape(level)) for one gate a node, or (B, *shape(level)) for one an example.
            ablation: what closed nodes hold; each tensor broadcasts against (B, T, size of the place).
            recompute: keep only what enters each layer for the backward pass, and compute the layer again there (Chen et al., arXiv 1604.06174).
        """
        at = place_gates(gates)
        # One unbind a place: its backward stacks once, where indexing layer by layer would add up L tensors of all layers.
        by_place = {place: getattr(at, place).to(self.model.dtype).unbind(-2) for place in LAYER_PLACES}
        by_place["embedding"] = (at.embedding.to(self.model.dtype),)

        def gate(place: str, layer: int, x: Tensor) -> Tensor:
            z = by_place[place][layer]
            a = ablation.embedding if place == "embedding" else getattr(ablation, place)[layer]
            assert a is not None
            return torch.lerp(a, x, z.unsqueeze(1) if z.dim() == 2 else z)  # z is (B, 1, size) or (size,)

        of_experts = at.experts.unbind(-2)

        def gate_routed(layer: int, routed: Routed) -> tuple[Tensor, Tensor | None]:
            z, a = of_experts[layer], ablation.experts[layer]
            z = z.unsqueeze(1) if z.dim() == 2 else z
            if isinstance(a, Routed):
                return routed.gated(z), a.write(a.gated(1 - z))
            closed = ((1 - z).to(a.dtype) @ a).expand(routed.rows, -1, -1) if z.dim() == 3 else (1 - z).to(a.dtype) @ a
            return routed.gated(z), closed.expand(routed.rows, len(routed.hidden) // routed.rows, -1).flatten(0, 1)

        def hooked(layers: Sequence[int] | None = None) -> AbstractContextManager[None]:
            return self._hooked(gate, gate_routed, rows=len(tokens.input_ids), layers=layers, skip=_always_open(at))

        with self._frozen(), hooked():
            if not torch.is_grad_enabled():
                return self._run(tokens)
            with self._recomputed(hooked) if recompute else self._recomputed_activations():
                return self._run(tokens)

    def _run(self, tokens: Tokens) -> Tensor:
        """Logits at each row's last real token; the vocabulary projection is asked for no more positions than hold one."""
        last = tokens.last
        wanted = torch.unique(last)
        width = tokens.input_ids.shape[1]
        whole = len(wanted) == 1 and int(wanted) == width - 1  # always so under left padding
        options: dict[str, Any] = {
            "logits_to_keep": 1 if whole else wanted,
            "position_ids": tokens.position_ids,  # models with ALiBi take none
        }
        with ExitStack() as stack:
            head = self.model.get_output_embeddings()
            # The last position is a strided slice, which torch would multiply as B separate matrices: 10% of a step on a CPU.
            stack.callback(head.register_forward_pre_hook(lambda _module, inputs: (inputs[0].contiguous(), *inputs[1:])).remove)
            logits = self.model(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                use_cache=False,
                **{name: value for name, value in options.items() if name in self._takes},
            ).logits
        if whole:
            answer: Tensor = logits[:, -1]
        else:
            at = torch.searchsorted(wanted, last) if logits.shape[1] == len(wanted) else last
            answer = logits[torch.arange(len(last), device=last.device), at]
        return answer.to(torch.promote_types(answer.dtype, torch.float32))

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        training = [m for m in self.model.modules() if m.training]
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            for module in training:
                module.training = False
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
            for module in training:
                module.training = True

    @contextmanager
    def _recomputed(self, hooked: Callable[[Sequence[int]], AbstractContextManager[None]]) -> Iterator[None]:
        """Each layer's forward as a checkpoint. By the time that a layer is computed again the hooks are gone, so it brings its own."""

        def contexts(number: int) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self._frozen_and(hooked([number]))

        with ExitStack() as stack:
            for number, places in enumerate(self.architecture.places):
                layer = places.layer
                own = partial(contexts, number)
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, context_fn=own)
                stack.callback(layer.__dict__.pop, "forward")
            yield

    @contextmanager
    def _recomputed_activations(self) -> Iterator[None]:
        """Activation functions that are written out in Python keep a tensor for each of their operations; computed again they keep one."""
        with ExitStack() as stack:
            for places in self.architecture.places:
                for module in places.layer.modules():
                    if type(module).__name__ in WRITTEN_OUT:
                        module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
                        stack.callback(module.__dict__.pop, "forward")
            yield

    @contextmanager
    def _frozen_and(self, other: AbstractContextManager[None]) -> Iterator[None]:
        with self._frozen(), other:
            yield

    @contextmanager
    def _hooked(
        self, edit: Edit, route: Route, *, rows: int, layers: Sequence[int] | None = None, skip: frozenset[str] = frozenset()
    ) -> Iterator[None]:
        """Watch or change the places of all layers, or of some. The stream that enters layer 0 is seen from outside the layer."""

        def unflattened(place: str, layer: int, x: Tensor) -> Tensor:
            """Some MLPs see a batch's positions as rows, (B * T, size)."""
            return edit(place, layer, x) if x.dim() == 3 else edit(place, layer, x.reshape(rows, -1, x.shape[-1])).flatten(0, 1)

        with ExitStack() as stack:

            def on_input(module: nn.Module, place: str, layer: int) -> None:
                hook = module.register_forward_pre_hook(
                    lambda _m, args, kwargs: _edit_input(args, kwargs, place, layer, unflattened), with_kwargs=True
                )
                stack.callback(hook.remove)

            def on_output(module: nn.Module, place: str, layer: int) -> None:
                hook = module.register_forward_hook(lambda _m, _args, out: _edit_output(out, place, layer, unflattened))
                stack.callback(hook.remove)

            def on_experts(module: nn.Module, layer: int) -> None:
                written: list[Tensor | None] = []

                def before(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                    hidden, index, weights = args
                    changed, extra = route(layer, Routed(experts=module, hidden=hidden, index=index, weights=weights, rows=rows))
                    written.append(extra)
                    return hidden, index, changed

                def after(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
                    extra = written.pop()
                    return output if extra is None else output + extra

                stack.callback(module.register_forward_pre_hook(before).remove)
                stack.callback(module.register_forward_hook(after).remove)

            if layers is None and "embedding" not in skip:
                on_input(self.architecture.places[0].layer, "embedding", 0)
            for number in range(self.nodes.layers) if layers is None else layers:
                places = self.architecture.places[number]
                on_input(places.attention_projection, "heads", number)
                on_output(places.attention_write, "attention_write", number)
                if places.mlp_projection is not None:
                    on_input(places.mlp_projection, "neurons", number)
                if places.experts is not None:
                    on_experts(places.experts, number)
                on_output(places.mlp_write, "mlp_write", number)
            yield


def _always_open(at: PlaceGates) -> frozenset[str]:
    """The embedding's hook is left out while its gate is a constant 1, so that no gradient has to reach layer 0's input."""
    z = at.embedding
    return frozenset({"embedding"}) if not z.requires_grad and bool((z == 1).all()) else frozenset()


def _edit_input(args: tuple[Any, ...], kwargs: dict[str, Any], place: str, layer: int, edit: Edit) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (edit(place, layer, args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": edit(place, layer, kwargs["hidden_states"])}


def _edit_output(output: Any, place: str, layer: int, edit: Edit) -> Any:
    if isinstance(output, tuple):
        return (edit(place, layer, output[0]), *output[1:])
    return edit(place, layer, output)
