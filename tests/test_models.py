"""Loaded models: from files or from memory, and how weights are known again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import nodesieve as ns
from command_line import FEW, QUICK, nodesieve
from conftest import tiny_model
from nodesieve.config import make_config
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


def test_a_model_in_memory_is_taken_as_it_is(model_directory: Path, tmp_path: Path) -> None:
    """What is written of the run finds it again on disk."""
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.bfloat16).train()
    loaded = ns.load_model(model, AutoTokenizer.from_pretrained(model_directory))
    assert loaded.model is model
    model.config._commit_hash = "c0ffee"
    assert ns.load_model(model, loaded.tokenizer).asked is None  # of a directory there is one version only
    model.config._name_or_path = "org/model"
    assert ns.load_model(model, loaded.tokenizer).asked == "c0ffee"
    assert not model.training
    assert loaded.fingerprint == ns.load_model(model_directory, dtype=torch.bfloat16, device=torch.device("cpu")).fingerprint
    run = ns.discover(loaded, ns.load_task("ioi", loaded.tokenizer, **FEW), make_config({**QUICK, "method": "random"}))
    assert (run.config.model, run.config.dtype) == (str(model_directory), "bfloat16")
    run.save(tmp_path / "run")
    assert nodesieve("evaluate", tmp_path / "run") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "expected a model in memory without revision, device, dtype and trust_remote_code"),
        ({"tokenizer": None}, "expected the tokenizer of a model in memory beside it, got NoneType"),
        ({"name": torch.nn.Linear(2, 2)}, "expected a model's name, or a causal LM of transformers, got Linear"),
        ({"name": tiny_model("llama").base_model}, "expected a model's name, or a causal LM of transformers, got LlamaModel"),
        ({"name": tiny_model("llama").double()}, "expected weights of one dtype of float32, bfloat16, float16, got float64"),
        ({"name": tiny_model("llama").to("meta")}, "expected weights on one device, got meta"),
        ({"name": "smollm2-135m"}, "expected no tokenizer, since 'smollm2-135m' brings its own"),
        ({"name": "smollm2-135m", "dtype": "int8"}, "expected a dtype of float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_what_cannot_be_taken_is_refused(options: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ns.UserError, match=message):
        ns.load_model(**{"name": tiny_model("llama"), "tokenizer": tokenizer, **options})
