"""Forward hooks at the five places of a model, for as long as a `with` block lasts, also when the model raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nodesieve.ablations import Routed
from nodesieve.architectures import LayerPlaces

# (place, layer, activation) -> what takes its place; `place` is a field of Activations.
Edit = Callable[[str, int, Tensor], Tensor]
# (layer, what its experts are asked) -> (the routing weights to ask with, what to add to the answer)
Route = Callable[[int, Routed], tuple[Tensor, Tensor | None]]


@contextmanager
def hooked(
    places: Sequence[LayerPlaces],
    edit: Edit,
    route: Route,
    *,
    rows: int,
    layers: Sequence[int] | None = None,
    embedding: bool = True,
    answer_alone: bool = False,
) -> Iterator[None]:
    """Watch or change the places of all layers, or of some; `embedding`: the residual stream that enters layer 0 too.

    Args:
        rows: examples of the batch; some MLPs see its positions as rows.
        answer_alone: the last layer projects and runs its MLP at the last position only; what it writes there is added to all positions, of which
            only that one is read.
    """

    def unflattened(place: str, layer: int, x: Tensor) -> Tensor:
        """Some MLPs see a batch's positions as rows, (B * T, size)."""
        return edit(place, layer, x) if x.dim() == 3 else edit(place, layer, x.reshape(rows, -1, x.shape[-1])).flatten(0, 1)

    with ExitStack() as stack:

        def on_input(module: nn.Module, place: str, layer: int) -> None:
            hook = module.register_forward_pre_hook(lambda _m, args, kwargs: _edit_input(args, kwargs, place, layer, unflattened), with_kwargs=True)
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

        if answer_alone and (layers is None or len(places) - 1 in layers):
            for module in (places[-1].attention_projection, *places[-1].mlp_inputs):
                stack.callback(module.register_forward_pre_hook(_last_position).remove)
        if embedding:
            on_input(places[0].layer, "embedding", 0)
        for number in range(len(places)) if layers is None else layers:
            at = places[number]
            on_input(at.attention_projection, "heads", number)
            on_output(at.attention_write, "attention_write", number)
            if at.mlp_projection is not None:
                on_input(at.mlp_projection, "neurons", number)
            if at.experts is not None:
                on_experts(at.experts, number)
            on_output(at.mlp_write, "mlp_write", number)
        yield


@contextmanager
def forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward pass for a module; one that the module itself had been given before (as accelerate does) comes back afterwards."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before


@contextmanager
def handing_out(modules: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Each module returns what is given for it, whatever enters."""

    def handed(output: Any, *_args: Any, **_kwargs: Any) -> Any:
        return output

    with ExitStack() as stack:
        for module, output in zip(modules, outputs, strict=True):
            stack.enter_context(forward_as(module, partial(handed, output)))
        yield


@contextmanager
def listening(modules: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """What each module returned, in the order in which they were called."""
    heard: list[Any] = []
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(lambda _module, _args, output: heard.append(output)).remove)
        yield heard


def checkpointed(forward: Callable[..., Any], again: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
    """`forward` computed again in the backward pass, inside `again()`, since by then what was around it is gone."""
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), again()))


def _last_position(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Contiguous, since torch multiplies a strided slice as B matrices, with as many copies of the weights."""
    return (args[0][:, -1:].contiguous(), *args[1:]) if args[0].dim() == 3 else args


def _edit_input(args: tuple[Any, ...], kwargs: dict[str, Any], place: str, layer: int, edit: Edit) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (edit(place, layer, args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": edit(place, layer, kwargs["hidden_states"])}


def _edit_output(output: Any, place: str, layer: int, edit: Edit) -> Any:
    if isinstance(output, tuple):
        return (edit(place, layer, output[0]), *output[1:])
    return edit(place, layer, output)
