"""A tiny Llama as a GGUF file: it says what it said before, is converted once, and is refused where the file is damaged."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, RopeScalingType
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import nodesieve as ns
from command_line import nodesieve
from conftest import random_tokens, tiny_model
from nodesieve.weights import CONVERSION, _read_gguf, cache_directory

BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
WORDS = ["<|endoftext|>", *sorted(ByteLevel.alphabet()), "Ġd"]


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    without: Iterable[str] = (),
    merge: str = "Ġ d",
    more: Mapping[str, int] = MappingProxyType({}),
    scaling: float | None = None,
    family: str = "llama",
) -> None:
    """The model's weights under the names, and in the order of rotary dimensions, that GGUF files of Llamas have."""
    config: Any = model.config
    writer = GGUFWriter(path, family)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if scaling is not None:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3] + [1] * (len(WORDS) - 1))
    writer.add_token_merges([merge])
    writer.add_eos_token_id(0)
    names = OUTSIDE | {f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for i in range(config.num_hidden_layers) for ours, theirs in BLOCK.items()}
    for ours, theirs in names.items():
        if ours in without:
            continue
        for kind, parameter in model.get_submodule(ours).named_parameters():
            weight = parameter.detach()
            if theirs.endswith(("attn_q", "attn_k")) and family == "llama":
                weight = weight.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
            writer.add_tensor(f"{theirs}.{kind}", weight.numpy())
    for name, size in more.items():
        writer.add_tensor(name, np.ones(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    monkeypatch.setenv("NODESIEVE_CACHE", str(tmp_path / "cache"))
    return tiny_model("llama", vocabulary=len(WORDS))


@torch.no_grad()
def test_a_gguf_file_says_what_the_model_did_and_is_converted_once(model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, model)
    loaded = ns.load_model(str(file))
    tokens = random_tokens(vocabulary=len(WORDS))
    torch.testing.assert_close(loaded.model(**vars(tokens)).logits, model(**vars(tokens)).logits)
    assert loaded.tokenizer.convert_ids_to_tokens(loaded.tokenizer("a dog")["input_ids"]) == ["a", "Ġd", "o", "g"]
    assert (loaded.revision or "").startswith("sha256:")
    monkeypatch.setattr("nodesieve.weights._read_gguf", None)  # a second conversion would fail
    again = ns.load_model(str(file))
    assert again.revision == loaded.revision
    (kept,) = (tmp_path / "cache" / "converted").iterdir()
    assert kept.name == f"tiny-{str(loaded.revision).removeprefix('sha256:')}-{CONVERSION}"
    assert len({path.stat().st_mode for path in kept.iterdir()}) == 1  # weights are as readable as the rest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"without": ["model.layers.1.mlp.up_proj"]}, "expected all weights of the model in .*, found none for model.layers.1.mlp.up_proj.weight"),
        ({"more": {"rope_freqs.weight": 4}}, "it took 39,[0-9]+ of its 39,[0-9]+ numbers from"),
        ({"more": {"blk.0.attn_q.bias": 32}}, "it took 39,[0-9]+ of its 39,[0-9]+ numbers from"),
        ({"scaling": 4.0}, "it took no scaling of positions .linear. from .*; use the checkpoint that it was made from"),
        ({"merge": "Ġ d o"}, "could not convert .*, expected a GGUF file that transformers reads"),
        ({"share": 0.5}, "could not convert .*, expected a GGUF file that transformers reads"),
        ({"share": 0.01}, "could not convert .*, expected a GGUF file that transformers reads"),
    ],
)
def test_a_damaged_gguf_file_is_refused_and_nothing_kept(
    damage: dict[str, Any], message: str, model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    share = damage.get("share", 1.0)
    file = tmp_path / "tiny.gguf"
    write_gguf(file, model, **{name: value for name, value in damage.items() if name != "share"})
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    assert nodesieve("check-model", file) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert not (tmp_path / "cache").exists()


def test_of_two_that_convert_at_once_the_first_to_be_done_is_kept(model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may be reading it."""
    file = tmp_path / "tiny.gguf"
    write_gguf(file, model)

    def meanwhile(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        monkeypatch.undo()
        monkeypatch.setenv("NODESIEVE_CACHE", str(tmp_path / "cache"))
        found = _read_gguf(path)
        kept.append(Path(ns.load_model(str(file)).model.name_or_path).stat().st_ino)
        return found

    kept: list[int] = []
    monkeypatch.setattr("nodesieve.weights._read_gguf", meanwhile)
    assert [Path(ns.load_model(str(file)).model.name_or_path).stat().st_ino] == kept
    assert len(list((tmp_path / "cache" / "converted").iterdir())) == 1


def test_what_is_converted_is_kept_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NODESIEVE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == Path.home() / ".cache" / "nodesieve"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_directory() == Path("/caches/nodesieve")
    monkeypatch.setenv("NODESIEVE_CACHE", "/own")
    assert cache_directory() == Path("/own")


def test_where_nothing_can_be_kept_that_is_said(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tmp_path / "tiny.gguf", model)
    monkeypatch.setenv("NODESIEVE_CACHE", str(tmp_path / "tiny.gguf"))  # a file, in which nothing can be made
    assert nodesieve("check-model", tmp_path / "tiny.gguf") == 2
    assert "could not write" in capsys.readouterr().err


def test_frequencies_that_transformers_does_not_read_are_an_error(model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other: Any = tiny_model("stablelm", vocabulary=len(WORDS))
    other.config.rope_parameters["rope_theta"] = 5e5
    write_gguf(tmp_path / "tiny.gguf", other, family="stablelm")
    assert nodesieve("check-model", tmp_path / "tiny.gguf") == 2
    assert "another base of rotary frequencies than 500000" in capsys.readouterr().err
