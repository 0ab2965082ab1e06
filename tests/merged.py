"""Two models with a mechanism each, merged block-diagonally, so that the circuit of a task is known down to the neuron.

Both parts answer "what is the sign of my word?" at the question mark, each about a word of its own in the prompt "x y ?". The `early` part carries
the sign to the question by attention in layer 0 and turns it into the answer by neurons of layer 1; the `late` part works on it by neurons of layer
0, at the word, and carries the result by attention in layer 1. Only the part that the task asks about is read by the unembedding. Parts are equally
wide and have equally large constants, which make up nearly all of every norm, so that a norm over both is each part's own. Heads, head dimensions,
neurons and residual dimensions are put in an order drawn by the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from nodesieve.models import LoadedModel
from planted import HEAD_DIM, LEVEL, X, Y, blank_model

Part = Literal["early", "late"]
WIDTH, HEADS, NEURONS = 8, 2, 4  # of a part
RMS = LEVEL / WIDTH**0.5
SIGN, CARRIED, ANSWER, IS_WORD, IS_QUESTION, CONSTANT = range(6)  # residual dimensions of a part
QUERY = 1  # the head dimension that attends; it hardly rotates


@dataclass(frozen=True, kw_only=True)
class Merged:
    loaded: LoadedModel
    planted: dict[str, set[tuple[int, ...]]]


def merged(task: Part, *, seed: int, copies: int) -> Merged:
    """`copies`: head dimensions, and neurons, that share the work."""
    generator = torch.Generator().manual_seed(seed)

    def order(count: int) -> list[int]:
        return torch.randperm(count, generator=generator).tolist()

    model, tokenizer = blank_model(width=2 * WIDTH, heads=2 * HEADS, neurons=2 * NEURONS)
    vocabulary = tokenizer.get_vocab()
    residual, heads, neurons = order(2 * WIDTH), order(2 * HEADS), order(2 * NEURONS)
    planted: dict[str, set[tuple[int, ...]]] = {}
    parts: tuple[tuple[Part, list[str]], ...] = (("early", X), ("late", Y))
    for number, (part, kind) in enumerate(parts):
        at = residual[number * WIDTH : (number + 1) * WIDTH]
        embedding = model.model.embed_tokens.weight
        embedding[:, at[CONSTANT]] = LEVEL
        embedding[vocabulary["?"], at[IS_QUESTION]] = 1
        for i, word in enumerate(kind):
            embedding[vocabulary[word], at[SIGN]] = 1 if i % 2 == 0 else -1
            embedding[vocabulary[word], at[IS_WORD]] = 1
        head = heads[number * HEADS]
        dims = [dim for dim in order(HEAD_DIM) if dim != QUERY][:copies]
        own = neurons[number * NEURONS :][:copies]
        attends, computes = (0, 1) if part == "early" else (1, 0)
        from_attention = (SIGN, CARRIED) if part == "early" else (CARRIED, ANSWER)
        from_neurons = (CARRIED, ANSWER) if part == "early" else (SIGN, CARRIED)
        attention, mlp = model.model.layers[attends].self_attn, model.model.layers[computes].mlp
        offset = head * HEAD_DIM
        attention.q_proj.weight[offset + QUERY, at[IS_QUESTION]] = 7 * RMS
        attention.k_proj.weight[offset + QUERY, at[IS_WORD]] = 7 * RMS
        for dim in dims:
            attention.v_proj.weight[offset + dim, at[from_attention[0]]] = RMS / copies
            attention.o_proj.weight[at[from_attention[1]], offset + dim] = 1
        for neuron in own:
            mlp.gate_proj.weight[neuron, at[CONSTANT]] = 2 * RMS / LEVEL  # open at every position
            mlp.up_proj.weight[neuron, at[from_neurons[0]]] = RMS
            mlp.down_proj.weight[at[from_neurons[1]], neuron] = 1 / copies
        if part == task:
            model.lm_head.weight[vocabulary["yes"], at[ANSWER]] = 3 * RMS
            model.lm_head.weight[vocabulary["no"], at[ANSWER]] = -3 * RMS
            planted = {
                "layer": {(0,), (1,)},
                "attention_block": {(attends,)},
                "mlp_block": {(computes,)},
                "head": {(attends, head)},
                "head_dim": {(attends, head, dim) for dim in dims},
                "mlp_neuron": {(computes, neuron) for neuron in own},
                "mlp_output": {(computes, at[from_neurons[1]])},
            }
    return Merged(loaded=LoadedModel(id=f"merged-{task}", revision=None, model=model, tokenizer=tokenizer), planted=planted)
