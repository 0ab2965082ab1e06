"""A model whose circuit is known because it was written by hand.

Prompts are "x y ?". The sign of x decides the answer; the sign of y decides nothing. Two mechanisms stand side by side: one carries the
sign of x to the answer, the other carries the sign of y to residual dimensions that the unembedding does not read. One large constant
makes up nearly all of every norm, so the mechanisms do not touch through the norms.

Residual dimensions: 0 sign of x, 1 sign of y, 2 and 3 those signs carried to the last position, 4 the answer, 5 and 6 the other mechanism's
results, 7 "I am an x", 8 "I am a y", 9 "I am the question", 10 always LEVEL.
"""

from __future__ import annotations

import itertools
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nodesieve.circuit import Circuit
from nodesieve.models import LoadedModel
from nodesieve.nodes import NodeSpace
from nodesieve.tasks.base import Example, Task

LEVEL = 30.0
RMS = LEVEL / 12**0.5  # what the norms divide by, but for a fraction of a percent
WIDTH, HEADS, HEAD_DIM, NEURONS, LAYERS = 12, 3, 4, 8, 2
X = [f"x{i}" for i in range(12)]  # even ones are positive
Y = [f"y{i}" for i in range(12)]
PLANTED = {
    "layer": {(0,), (1,)},
    "attention_block": {(0,)},
    "mlp_block": {(1,)},
    "head": {(0, 0)},
    "head_dim": {(0, 0, 0), (0, 0, 2)},
    "mlp_neuron": {(1, 3), (1, 6)},
    "mlp_output": {(1, 4)},
}


def blank_model(*, width: int, heads: int, neurons: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Two layers whose weights are 0 but for the norms', and a tokenizer of the words."""
    words = ["[UNK]", "[PAD]", "?", "yes", "no", *X, *Y]
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_DIM,
        intermediate_size=neurons,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.zero_()
    return model, tokenizer


def planted_model() -> LoadedModel:
    model, tokenizer = blank_model(width=WIDTH, heads=HEADS, neurons=NEURONS)
    vocabulary = tokenizer.get_vocab()
    embedding = model.model.embed_tokens.weight
    embedding[:, 10] = LEVEL
    for kind, sign_at, kind_at in ((X, 0, 7), (Y, 1, 8)):
        for i, word in enumerate(kind):
            embedding[vocabulary[word], sign_at] = 1 if i % 2 == 0 else -1
            embedding[vocabulary[word], kind_at] = 1
    embedding[vocabulary["?"], 9] = 1

    first, second = model.model.layers
    _copy_sign(first.self_attn, head=0, dims=(0, 2), source=0, wanted=7, target=2)
    _copy_sign(first.self_attn, head=1, dims=(0, 1), source=1, wanted=8, target=3)
    _pass_sign(first.mlp, neurons=(1, 2), source=3, target=5)
    _pass_sign(second.mlp, neurons=(3, 6), source=2, target=4)
    _pass_sign(second.mlp, neurons=(5,), source=5, target=6)
    model.lm_head.weight[vocabulary["yes"], 4] = 2 * RMS
    model.lm_head.weight[vocabulary["no"], 4] = -2 * RMS
    return LoadedModel(id="planted", revision=None, model=model, tokenizer=tokenizer)


def _copy_sign(attention: torch.nn.Module, *, head: int, dims: tuple[int, int], source: int, wanted: int, target: int) -> None:
    """The question attends to the token that is `wanted` and writes its sign to `target`. Dimensions 1 and 3 hardly rotate."""
    offset = head * HEAD_DIM
    attention.q_proj.weight[offset + 1, 9] = 7 * RMS
    attention.k_proj.weight[offset + 1, wanted] = 7 * RMS
    for dim in dims:
        attention.v_proj.weight[offset + dim, source] = 0.5 * RMS
        attention.o_proj.weight[target, offset + dim] = 1


def _pass_sign(mlp: torch.nn.Module, *, neurons: tuple[int, ...], source: int, target: int) -> None:
    for neuron in neurons:
        mlp.gate_proj.weight[neuron, 10] = 2 * RMS / LEVEL  # open at every position
        mlp.up_proj.weight[neuron, source] = RMS
        mlp.down_proj.weight[target, neuron] = 1 / len(neurons)


def planted_task(seed: int = 0, *, about: int = 0) -> Task:
    """Clean and corrupted prompts differ in both signs; the answer is that of the first word, or of the second with `about` 1."""
    rng = random.Random(seed)
    examples = []
    for (i, x), (j, y) in itertools.product(enumerate(X), enumerate(Y)):
        other_x, other_y = rng.choice([w for k, w in enumerate(X) if k % 2 != i % 2]), rng.choice([w for k, w in enumerate(Y) if k % 2 != j % 2])
        right, wrong = ("yes", "no") if (i, j)[about] % 2 == 0 else ("no", "yes")
        examples.append(Example(clean=f"{x} {y} ?", corrupted=f"{other_x} {other_y} ?", answers=(right,), distractors=(wrong,)))
    rng.shuffle(examples)
    return Task(name="planted", splits={"train": tuple(examples[:80]), "validation": tuple(examples[80:112]), "test": tuple(examples[112:])})


def kept(circuit: Circuit, level: str) -> set[tuple[int, ...]]:
    return {tuple(index) for index in circuit.masks[level].nonzero().tolist()}


def all_nodes(nodes: NodeSpace, level: str) -> list[tuple[int, ...]]:
    return [tuple(index) for index in torch.ones(nodes.shape(level)).nonzero().tolist()]
