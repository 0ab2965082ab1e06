"""Fewer tensors kept for the backward pass, the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from conftest import random_tokens, tiny_model
from nodesieve.ablations import Corrupted
from nodesieve.gated_model import GatedModel
from nodesieve.in_one import _Product
from nodesieve.levels import LEVELS

# Llama, and families whose gated MLPs have another activation function or parts of their own
FAMILIES = ("llama", "gemma", "gemma2", "qwen2", "mixtral", "apertus", "gpt2")


@pytest.mark.parametrize("act", [functional.silu, functional.gelu, lambda x: functional.gelu(x, approximate="tanh"), torch.relu])
def test_the_product_has_the_derivatives_of_its_parts(act: Callable[[Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: _Product.apply(g, u, act), (gate, up))


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_the_model_as_it_is_written(name: str) -> None:
    clean, corrupted = random_tokens(seed=1), random_tokens(seed=2)
    found = []
    for plainly in (True, False):
        gated = GatedModel(tiny_model(name))
        if plainly:
            gated._gated_mlps = []
        gates = {level: torch.full((3, *gated.nodes.shape(level)), 0.7, requires_grad=True) for level in LEVELS}
        logits = gated.gated_logits(clean, gates, Corrupted(tokens=corrupted))
        logits.log_softmax(-1)[:, 3].sum().backward()
        found.append([logits.detach(), *(gates[level].grad for level in gated.nodes.levels)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_llama_s_mlps_are_taken_and_gpt2_has_none() -> None:
    assert GatedModel(tiny_model("llama"))._multiplies_plainly
    assert len(GatedModel(tiny_model("llama"))._gated_mlps) == 3
    assert GatedModel(tiny_model("gpt2"))._gated_mlps == []


def test_an_mlp_that_does_more_is_left_as_it_is() -> None:
    model = tiny_model("llama")
    gated = GatedModel(model)
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x) + 0.5 * x
    assert not gated._multiplies_plainly
    assert isinstance(mlp, nn.Module)
