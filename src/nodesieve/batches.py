"""Encoded data: prompts as left-padded token ids, answers as token ids, and how they are cut into batches.

Left padding puts the answer position last for every example, so that one slice of the logits serves a whole batch; positions are
counted from the first real token. Nothing here knows what a task is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """input_ids and attention_mask, both (B, T), padded on the left."""

    input_ids: Tensor
    attention_mask: Tensor

    @property
    def position_ids(self) -> Tensor:
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    @staticmethod
    def pad(rows: Sequence[Sequence[int]], *, pad_id: int, device: torch.device | str) -> Tokens:
        length = max(map(len, rows))
        ids = [[pad_id] * (length - len(row)) + list(row) for row in rows]
        mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
        return Tokens(input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device))


@dataclass(frozen=True, kw_only=True)
class EncodedExample:
    """Token ids of one example. `answers` and `distractors` hold each string's first token."""

    clean: tuple[int, ...]
    corrupted: tuple[int, ...] | None
    answers: tuple[int, ...]
    distractors: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some examples of a split. `index` (B,) says which; `answers` and `distractors` are their token ids, one tuple an example."""

    index: Tensor
    clean: Tokens
    corrupted: Tokens | None
    answers: tuple[tuple[int, ...], ...]
    distractors: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Split:
    """All encoded examples of one split, on one device."""

    examples: tuple[EncodedExample, ...]
    pad_id: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def has_corrupted(self) -> bool:
        return all(example.corrupted is not None for example in self.examples)

    def batch(self, index: Sequence[int]) -> Batch:
        rows = [self.examples[i] for i in index]
        corrupted = [row.corrupted for row in rows if row.corrupted is not None]
        return Batch(
            index=torch.tensor(list(index), device=self.device),
            clean=Tokens.pad([row.clean for row in rows], pad_id=self.pad_id, device=self.device),
            corrupted=Tokens.pad(corrupted, pad_id=self.pad_id, device=self.device) if self.has_corrupted else None,
            answers=tuple(row.answers for row in rows),
            distractors=tuple(row.distractors for row in rows),
        )

    def batches(self, size: int, *, first: int | None = None) -> Iterator[Batch]:
        """Every example once, in order; with `first`, only so many."""
        end = len(self) if first is None else min(first, len(self))
        for start in range(0, end, size):
            yield self.batch(range(start, min(start + size, end)))

    def training_batch(self, step: int, size: int, seed: int) -> Batch:
        """The batch of training step `step`: a function of step and seed alone, so that a resumed run needs no loader state.

        Epoch after epoch every example comes once, in an order drawn anew for each epoch.
        """
        size = min(size, len(self))
        per_epoch = len(self) // size
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(mix(seed, epoch)))
        return self.batch(order[place * size : (place + 1) * size].tolist())


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers, so that neighbouring seeds and steps share no stream."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = ((state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & 0x7FFFFFFFFFFFFFFF
