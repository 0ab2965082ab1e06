"""Positions that come before anything differs: read once, without gradients, and from then on only as keys and values.

Where clean and corrupted prompts begin with the same tokens, what their places hold there is equal, whatever the gates.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from nodesieve.batches import Tokens

WORTH_IT = 0.25  # share of positions below which reading them twice costs less than another pass


class Cut(Protocol):
    """Weights without what is closed."""

    def groups_in_use(self, layer: int) -> Tensor | None: ...


class Prefix(DynamicCache):  # type: ignore[misc]
    """Keys and values of the first positions. Passes that go on from there add nothing to it, so that any number of them can."""

    shrunk: Collection[Cut] = ()  # of all passes that go on from here, one of which is at work at a time
    read = False

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Prefix:
        """From what `tensors` gives."""
        prefix = cls()
        for layer, (keys, values) in enumerate(zip(tensors[::2], tensors[1::2], strict=True)):
            prefix.update(keys, values, layer)
        prefix.read = True
        return prefix

    def tensors(self) -> list[Tensor]:
        """Keys and values, (B, groups, positions, size of a head), of each layer."""
        return [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.read:
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return keys, values
        kept = self.layers[layer_idx]
        keys, values = kept.keys, kept.values
        groups = next((groups for shrunk in self.shrunk if (groups := shrunk.groups_in_use(layer_idx)) is not None), None)
        if groups is not None:
            keys, values = keys.index_select(1, groups), values.index_select(1, groups)
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


def common_start(clean: Tokens, corrupted: Tokens) -> int:
    """How many leading positions of a batch are the same in both, all answers coming later; 0 where that saves too little."""
    if clean.input_ids.shape != corrupted.input_ids.shape:
        return 0
    differs = (clean.input_ids != corrupted.input_ids) | (clean.attention_mask != corrupted.attention_mask)
    first = int(differs.any(0).int().argmax()) if bool(differs.any()) else 0
    start = min(first, int(clean.last.min()))
    return start if start >= WORTH_IT * clean.input_ids.shape[1] else 0


def reads_alike(config: PreTrainedConfig, start: int, length: int) -> bool:
    """Has a prompt of `length` the keys in its first `start` positions that these have alone? Not where it is beyond what LongRoPE rotates by the
    factors of short prompts, and they are not."""
    words = config.get_text_config()
    own = getattr(words, "rope_parameters", None) or {}  # of all layers, or by their kind
    long = [way for way in (own, *own.values()) if isinstance(way, Mapping) and way.get("rope_type") == "longrope"]
    return not any(start <= (way.get("original_max_position_embeddings") or words.max_position_embeddings) < length for way in long)
