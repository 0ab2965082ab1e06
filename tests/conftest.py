"""Tiny models of each family, with random weights, and a tokenizer of whole words: all tests but the slow ones run on these."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import signal
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

import nodesieve.tasks
from nodesieve.batches import Tokens
from nodesieve.config import DiscoverConfig
from nodesieve.families import FAMILIES
from nodesieve.gated_model import GatedModel
from nodesieve.models import LoadedModel
from nodesieve.problem import Problem, make_problem
from nodesieve.tasks import words
from planted import planted_model, planted_task

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell: tests that press Ctrl-C want it heard
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tiny models are faster on one thread, and leave the other to whoever runs beside

VOCABULARY = 97
FAMILIES_IN_DEPTH = ("gpt2", "gpt_neox", "llama")
MODEL_TYPES = tuple(sorted(name for row in FAMILIES for name in row.model_types))

# What makes a config small, under all the names that families have for it; a config takes those that it knows.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "sliding_window"), 64),
    "head_dim": 8,
    "rotary_dim": 4,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    **dict.fromkeys(("num_experts", "num_local_experts"), 4),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Models of one family that are built differently: (model type, options)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-7b": ("falcon", {"multi_query": True, "new_decoder_architecture": False, "parallel_attn": True}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-rw": (
        "falcon",
        {"multi_query": False, "parallel_attn": False, "num_kv_heads": 4, "alibi": True, "new_decoder_architecture": False, "bias": True},
    ),
    "gpt_neo-local": ("gpt_neo", {"attention_types": [[["global", "local", "global"], 1]], "window_size": 4}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "granite-multipliers": (
        "granite",
        {"residual_multiplier": 0.22, "attention_multiplier": 0.3, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    ),
    "gemma2-capped": ("gemma2", {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0}),
    "granitemoehybrid-rope": ("granitemoehybrid", {"position_embedding_type": "rope", "residual_multiplier": 0.3, "attention_multiplier": 0.2}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "opt-unbiased": ("opt", {"enable_bias": False}),
    "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "qwen3_moe-mixed": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
}
NEEDED: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global"], 3]]},
    "granitemoehybrid": {
        "num_local_experts": 0,
        "layer_types": ["attention"] * 3,
        "shared_intermediate_size": 48,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
    },
}


def tiny_config(name: str, *, vocabulary: int = VOCABULARY) -> PreTrainedConfig:
    """A small config of a model type, or of one of `VARIANTS`."""
    model_type, options = VARIANTS.get(name, (name, {}))
    kind = type(AutoConfig.for_model(model_type))
    renamed = kind.attribute_map or {}
    known = set(kind().to_dict())
    small = {renamed.get(key, key): value for key, value in {**SMALL, "vocab_size": vocabulary}.items() if renamed.get(key, key) in known}
    if "vision_config" in known:
        eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
        words = tiny_config(f"{model_type}_text", vocabulary=vocabulary).to_dict()
        small = {"text_config": words, "vision_config": eyes, "mm_tokens_per_image": 4}
    return kind(**{**small, **NEEDED.get(model_type, {}), **options})


def tiny_model(name: str, *, vocabulary: int = VOCABULARY, seed: int = 0) -> PreTrainedModel:
    """A random model of the family, with weights large enough that every node matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, vocabulary=vocabulary))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def random_tokens(rows: int = 3, length: int = 6, *, seed: int = 0, vocabulary: int = VOCABULARY) -> Tokens:
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    return Tokens(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.fixture(params=FAMILIES_IN_DEPTH)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[*MODEL_TYPES, *VARIANTS])
def any_model(request: pytest.FixtureRequest) -> GatedModel:
    """A tiny model of every registered family, and of the ways in which some families are built."""
    return GatedModel(tiny_model(request.param))


@pytest.fixture
def gated(family: str) -> GatedModel:
    return GatedModel(tiny_model(family))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the built-in tasks is one token, and so is each digit."""
    return word_tokenizer()


def word_tokenizer() -> PreTrainedTokenizerFast:
    texts = [" ".join(value) for name, value in vars(words).items() if name.isupper()]
    for module in pkgutil.iter_modules(nodesieve.tasks.__path__, "nodesieve.tasks."):
        texts += getattr(importlib.import_module(module.name), "TEMPLATES", ())
    pieces = set(re.findall(r"\w+|[^\w\s]", " ".join(texts))) | set("0123456789") | {"he", "she", "is", "are", "was", "were", "has", "have"}
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "[PAD]", *sorted(pieces)])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]")


@pytest.fixture(scope="session")
def loaded(tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    """A tiny Llama that speaks the word tokenizer's language."""
    model = tiny_model("llama", vocabulary=len(tokenizer))
    return LoadedModel(id="tiny", revision=None, model=model.requires_grad_(False), tokenizer=tokenizer)


@pytest.fixture(scope="session")
def model_directory(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The like of `loaded` as files."""
    directory = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocabulary=len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def problem() -> Problem:
    """The planted model's task, with default options."""
    return make_problem(planted_model(), planted_task(), DiscoverConfig())
