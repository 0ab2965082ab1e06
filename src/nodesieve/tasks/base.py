"""What a task is: clean and corrupted prompts with answers, in three splits that share no words.

A built-in task is one file with a `Builtin` in it: the pools of words that it draws from, and a function that writes one example. `build`
cuts every pool 60/20/20, so that no name or noun of one split is ever seen in another, and draws examples from each part.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from nodesieve.errors import UserError

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
_T = TypeVar("_T")
SPLIT_SHARES = (0.6, 0.2, 0.2)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One pair of prompts. `answers` and `distractors` are continuations, leading space included; a prompt may lack a counterpart."""

    clean: str
    corrupted: str | None
    answers: tuple[str, ...]
    distractors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Examples by split. `metrics` names what is measured beside the metrics of every task."""

    name: str
    splits: Mapping[str, tuple[Example, ...]]
    metrics: tuple[str, ...] = ()


Pools = Mapping[str, Sequence[str]]
IsToken = Callable[[str], bool]


@dataclass(frozen=True, kw_only=True)
class Builtin:
    """A built-in task.

    Attributes:
        pools: takes `is_token` (is this text one token for the tokenizer at hand?) and gives words by kind; each is cut into splits.
        example: draws one example from the pools of one split. May return None for a draw that makes no valid example.
        metrics: what is measured beside the metrics of every task.
    """

    name: str
    description: str
    pools: Callable[[IsToken], Pools]
    example: Callable[[random.Random, Pools, IsToken], Example | None]
    metrics: tuple[str, ...] = ()


def build(builtin: Builtin, *, is_token: IsToken, seed: int, sizes: Mapping[str, int]) -> Task:
    """Draw `sizes[split]` different examples for each split; the same for the same seed and tokenizer on every machine.

    Raises:
        UserError: the tokenizer leaves too few words.
    """
    rng = random.Random(f"{builtin.name}/{seed}")
    parts: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    for kind, words in builtin.pools(is_token).items():
        unique = list(dict.fromkeys(words))
        rng.shuffle(unique)
        for split, part in zip(SPLITS, cut(unique), strict=True):
            if len(part) < 4:
                raise UserError(
                    f"task {builtin.name} expects at least 20 words of kind {kind!r} that are one token each, got {len(unique)}; "
                    "give your own prompts as a JSONL file"
                )
            parts[split][kind] = list(part)
    splits: dict[str, tuple[Example, ...]] = {}
    for split in SPLITS:
        examples: dict[Example, None] = {}
        for _ in range(100 * sizes[split] + 1000):
            if len(examples) == sizes[split]:
                break
            example = builtin.example(rng, parts[split], is_token)
            if example is not None:
                examples[example] = None
        if len(examples) < sizes[split]:
            raise UserError(
                f"task {builtin.name} expects {sizes[split]} different {split} examples, got {len(examples)}; ask for fewer with --train-size"
            )
        splits[split] = tuple(examples)
    return Task(name=builtin.name, splits=splits, metrics=builtin.metrics)


def cut(items: Sequence[_T]) -> tuple[Sequence[_T], Sequence[_T], Sequence[_T]]:
    """Cut a sequence 60/20/20."""
    first = round(len(items) * SPLIT_SHARES[0])
    second = first + round(len(items) * SPLIT_SHARES[1])
    return items[:first], items[first:second], items[second:]
