"""Encoded data: prompts as padded token ids, answers as token ids, and how they are cut into batches.

Padding on the left puts the answer position last for every example, so that one slice of the logits serves a whole batch; padding on the
right is there for models that want it. Either way positions count from the first real token, and clean and corrupted prompts have
attention masks of their own. Nothing here knows what a task is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

PaddingSide = Literal["left", "right"]
WASTE = 0.25  # share of padding in randomly drawn training batches above which examples of like length are put together


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """input_ids and attention_mask, both (B, T), padded on one side."""

    input_ids: Tensor
    attention_mask: Tensor

    @property
    def position_ids(self) -> Tensor:
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    @property
    def last(self) -> Tensor:
        """(B,) the place of each row's last real token."""
        places = torch.arange(self.attention_mask.shape[1], device=self.attention_mask.device)
        return (self.attention_mask * places).amax(-1)

    @staticmethod
    def pad(rows: Sequence[Sequence[int]], *, pad_id: int, device: torch.device | str, side: PaddingSide = "left") -> Tokens:
        ids = torch.full((len(rows), max(map(len, rows))), pad_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            real = slice(-len(row), None) if side == "left" else slice(len(row))
            ids[i, real] = torch.tensor(row)
            mask[i, real] = 1
        return Tokens(input_ids=ids.to(device), attention_mask=mask.to(device))


@dataclass(frozen=True, kw_only=True)
class EncodedExample:
    """Token ids of one example. `answers` and `distractors` hold one token each: that at the answer position.

    `prompt` numbers the prompt that it was made of: all tokens of an answer may be asked for.
    """

    clean: tuple[int, ...]
    corrupted: tuple[int, ...] | None
    answers: tuple[int, ...]
    distractors: tuple[int, ...]
    prompt: int = field(repr=False)


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
    padding_side: PaddingSide = "left"

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def has_corrupted(self) -> bool:
        return all(example.corrupted is not None for example in self.examples)

    @property
    def prompts(self) -> tuple[int, ...]:
        """Of which prompt each example is: examples of the same one are no independent draws."""
        return tuple(example.prompt for example in self.examples)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the token ids of all examples, in order."""
        return hashlib.sha256(repr(self.examples).encode()).hexdigest()

    def batch(self, index: Sequence[int]) -> Batch:
        rows = [self.examples[i] for i in index]
        corrupted = [row.corrupted for row in rows if row.corrupted is not None]
        return Batch(
            index=torch.tensor(list(index), device=self.device),
            clean=self._pad([row.clean for row in rows]),
            corrupted=self._pad(corrupted) if self.has_corrupted else None,
            answers=tuple(row.answers for row in rows),
            distractors=tuple(row.distractors for row in rows),
        )

    def _pad(self, rows: Sequence[Sequence[int]]) -> Tokens:
        return Tokens.pad(rows, pad_id=self.pad_id, device=self.device, side=self.padding_side)

    def batches(self, size: int, *, first: int | None = None, skip: int = 0) -> Iterator[Batch]:
        """Every example once, or the first so many, less some at the start, in batches of like length; `Batch.index` says which they are."""
        yield from self.batches_of(range(skip, len(self) if first is None else min(first, len(self))), size)

    def batches_of(self, index: Iterable[int], size: int) -> Iterator[Batch]:
        """These examples, in batches of like length."""
        order = sorted(index, key=self._length)
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size])

    def _length(self, i: int) -> int:
        return len(self.examples[i].clean)

    def training_batch(self, step: int, size: int, seed: int) -> Batch:
        """The batch of training step `step`: a function of step and seed alone, so that a resumed run needs no loader state.

        Epoch after epoch every example comes once, in an order drawn anew for each epoch. Batches are mixed, unless lengths differ so much
        that padding would make up more than `WASTE` of them; then like goes with like, and the batches come in an order drawn anew.
        """
        size = min(size, len(self))
        per_epoch = len(self) // size
        epoch, place = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(mix(seed, epoch))
        order = torch.randperm(len(self), generator=generator).tolist()
        if self._is_uneven(size):
            chosen = sorted(order[: per_epoch * size], key=self._length)  # stable: equal lengths stay in the order drawn
            place = int(torch.randperm(per_epoch, generator=generator)[place])
            order = chosen
        return self.batch(order[place * size : (place + 1) * size])

    def _is_uneven(self, size: int) -> bool:
        """Would batches in the order of the file be padded by more than `WASTE`?"""
        rows = [self._length(i) for i in range(min(len(self), 64 * size))]
        padded = sum(len(rows[start : start + size]) * max(rows[start : start + size]) for start in range(0, len(rows), size))
        return padded > 0 and 1 - sum(rows) / padded > WASTE


def order_of(batches: Sequence[Batch]) -> Tensor:
    """Takes results from the order of `batches` back to that of the examples."""
    return torch.cat([batch.index for batch in batches]).argsort()


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers, so that neighbouring seeds and steps share no stream."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = ((state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & 0x7FFFFFFFFFFFFFFF
