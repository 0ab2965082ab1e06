"""Tiny models of each family, with random weights, and a tokenizer of whole words: all tests but the slow ones run on these."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from nodesieve.batches import Tokens
from nodesieve.gated_model import GatedModel
from nodesieve.models import LoadedModel
from nodesieve.tasks import words

torch.set_num_threads(1)  # tiny models are faster on one thread, and leave the other to whoever runs beside

VOCABULARY = 97
TINY = {
    "gpt2": GPT2Config(n_layer=3, n_head=4, n_embd=32, n_positions=64, vocab_size=VOCABULARY, resid_pdrop=0.1),
    "gpt_neox": GPTNeoXConfig(
        num_hidden_layers=3, num_attention_heads=4, hidden_size=32, intermediate_size=64, vocab_size=VOCABULARY, max_position_embeddings=64
    ),
    "llama": LlamaConfig(
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=32,
        intermediate_size=48,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    ),
}


def tiny_model(family: str, *, vocabulary: int = VOCABULARY, seed: int = 0) -> PreTrainedModel:
    """A random model of the family, with weights large enough that every node matters."""
    config = type(TINY[family]).from_dict({**TINY[family].to_dict(), "vocab_size": vocabulary})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
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


@pytest.fixture(params=sorted(TINY))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def gated(family: str) -> GatedModel:
    return GatedModel(tiny_model(family))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the built-in tasks is one token, and so is each digit."""
    return word_tokenizer()


def word_tokenizer() -> PreTrainedTokenizerFast:
    texts = " ".join(value for name in dir(words) if name.isupper() for value in [" ".join(getattr(words, name))])
    from nodesieve.tasks import gendered_pronoun, greater_than, ioi

    for module in (ioi, greater_than, gendered_pronoun):
        texts += " " + " ".join(module.TEMPLATES)
    pieces = {piece for word in texts.split() for piece in (word, word.strip(".,"))} | set("0123456789.,'") | {"he", "she", "t", "isn", "wasn"}
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
