"""Loaded models: how weights are known again."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny_model
from nodesieve.models import weights_fingerprint


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_the_fingerprint_sees_any_value_of_any_parameter(name: str) -> None:
    model = tiny_model(name)
    whole, generator = weights_fingerprint(model), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        values, place = parameter.detach().view(-1), int(torch.randint(parameter.numel(), (), generator=generator))
        before = values[place].clone()
        values[place] += 1
        assert weights_fingerprint(model) != whole
        values[place] = before
    assert weights_fingerprint(model) == whole


def test_the_fingerprint_sees_in_which_parameter_values_are() -> None:
    model = tiny_model("llama")
    whole, (first, second) = weights_fingerprint(model), (model.model.layers[i].mlp.down_proj.weight.data for i in (0, 1))
    swapped = first.clone()
    first.copy_(second)
    second.copy_(swapped)
    assert weights_fingerprint(model) != whole


def test_the_fingerprint_is_the_same_in_both_dtypes() -> None:
    model = tiny_model("llama")
    assert weights_fingerprint(model) == weights_fingerprint(model.to(torch.bfloat16))
