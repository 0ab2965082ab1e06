"""The same numbers with fewer tensors kept for the backward pass. For learning; measuring leaves the model as it is, to the bit.

- Activation functions that transformers writes out in Python, each in one operation, which keeps one tensor and not six.
- Gated MLPs, down(act(gate(x)) * up(x)): the product keeps gate(x) and up(x), and computes act again in the backward pass instead of keeping it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nodesieve.hooks import forward_as

_TANH_GELU = partial(functional.gelu, approximate="tanh")
IN_ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "NewGELUActivation": _TANH_GELU,
    "FastGELUActivation": _TANH_GELU,
    "AccurateGELUActivation": _TANH_GELU,
    "QuickGELUActivation": lambda x: functional.silu(1.702 * x) / 1.702,
}
GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")  # what a gated MLP's modules are called, in all families that have three


def written_out(module: nn.Module) -> bool:
    return type(module).__name__ in IN_ONE


def is_gated(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in GATED)


@contextmanager
def in_one(activations: list[nn.Module], gated: list[nn.Module]) -> Iterator[None]:
    """Inside, these modules compute as above."""
    with ExitStack() as stack:
        for module in activations:
            stack.enter_context(forward_as(module, IN_ONE[type(module).__name__]))
        for module in gated:
            stack.enter_context(forward_as(module, partial(_gated_mlp, module)))
        yield


def _gated_mlp(mlp: Any, x: Tensor) -> Tensor:
    written: Tensor = mlp.down_proj(_Product.apply(mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn))  # type: ignore[no-untyped-call]
    return written


class _Product(torch.autograd.Function):
    """act(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.act(gate)
        (to_gate,) = torch.autograd.grad(activated, gate, grad * up)
        return to_gate, grad * activated.detach(), None
