"""What a task is: clean and corrupted prompts with answers, in three splits that share no words.

A built-in task is one file with a `Builtin` in it: the pools of words that it draws from, and a function that writes one example. `build`
cuts every pool 60/20/20, so that no name or noun of one split is ever seen in another, and draws examples from each part.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from nodesieve.errors import UserError

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
Answer = str | int
_T = TypeVar("_T")
SPLIT_SHARES = (0.6, 0.2, 0.2)
FEWEST = 4  # words of a kind that a split has at least


@dataclass(frozen=True, kw_only=True)
class Example:
    """One pair of prompts; a prompt may lack a counterpart.

    `answers` and `distractors` are continuations, leading space included, or token ids of the tokenizer that the file was made for.
    """

    clean: str
    corrupted: str | None
    answers: tuple[Answer, ...]
    distractors: tuple[Answer, ...]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Examples by split.

    Attributes:
        source: what `--task` finds it by: a built-in task's name or a file's path.
        metrics: what is measured beside the metrics of every task.
        duplicates: how many examples were left out for being there twice.
        drawn: the options by which `load_task` drew its examples, as a config names them.
        redrawn: further training examples, drawn from the words of the training split and others, none of them in another split. A circuit
            fits the words that it was learned on, so a built-in task gives more of them, and of their combinations, than its training split.
    """

    name: str
    splits: Mapping[str, Sequence[Example]]
    source: str = ""
    metrics: tuple[str, ...] = ()
    redrawn: tuple[Example, ...] = ()
    duplicates: int = 0
    drawn: Mapping[str, int] = field(default_factory=dict)

    @property
    def place(self) -> str | None:
        """Of a task from a file, the hexadecimal SHA-256 of its whole path, which says nothing of whose it is."""
        return hashlib.sha256(str(Path(self.source).resolve()).encode()).hexdigest() if Path(self.source).is_file() else None

    def is_from(self, source: str) -> bool:
        """Is this where the task comes from, be a file's path written in another way?"""
        return Path(self.source).resolve() == Path(source).resolve()

    @property
    def fingerprints(self) -> dict[str, str]:
        """By split, the hexadecimal SHA-256 of its examples, in order."""
        parts = {split: (*examples, *(self.redrawn if split == "train" else ())) for split, examples in self.splits.items()}
        return {split: hashlib.sha256(repr(examples).encode("utf-8", "surrogatepass")).hexdigest() for split, examples in parts.items()}

    @property
    def looked_at(self) -> set[str]:
        """Marks of the prompts that a search and its choices look at, but for the thousands that a built-in task draws anew."""
        return {mark_of(example) for split in ("train", "validation") for example in self.splits.get(split, ())}


def mark_of(example: Example) -> str:
    """By which a prompt is known again: the first 40 bits of its SHA-256, hexadecimal."""
    return hashlib.sha256(example.clean.encode("utf-8", "surrogatepass")).hexdigest()[:10]


Pools = Mapping[str, Sequence[str]]


class IsToken(Protocol):
    """Is a text one token for the tokenizer at hand? And does it stay one where it stands `after` another text?"""

    def __call__(self, text: str, after: str = "") -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Builtin:
    """A built-in task.

    Attributes:
        pools: takes `is_token` and gives words by kind; each is cut into splits.
        example: draws one example from the pools of one split. May return None for a draw that makes no valid example.
        metrics: what is measured beside the metrics of every task.
        further: words by kind that only `Task.redrawn` is drawn from, beside the training split's own.
        fewest: how many words of a kind an example takes from its split's, where that is more than `FEWEST`.
    """

    name: str
    description: str
    pools: Callable[[IsToken], Pools]
    example: Callable[[random.Random, Pools, IsToken], Example | None]
    metrics: tuple[str, ...] = ()
    further: Callable[[IsToken], Pools] = lambda is_token: {}
    fewest: Mapping[str, int] = field(default_factory=dict)


def build(builtin: Builtin, *, is_token: IsToken, seed: int, sizes: Mapping[str, int], redraws: int = 0) -> Task:
    """Draw `sizes[split]` different examples for each split; the same for the same seed and tokenizer on every machine.

    With `redraws`, the training words and the task's further ones are drawn from so many times more, for `Task.redrawn`; fewer where the
    words run out.

    Raises:
        UserError: the tokenizer leaves too few words.
    """
    rng = random.Random(f"{builtin.name}/{seed}")
    parts: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS}
    for kind, words in builtin.pools(is_token).items():
        unique = list(dict.fromkeys(words))
        rng.shuffle(unique)
        for split, part in zip(SPLITS, cut(unique), strict=True):
            fewest = builtin.fewest.get(kind, FEWEST)
            if len(part) < fewest:
                raise UserError(
                    f"task {builtin.name} expects at least {5 * fewest} words of kind {kind!r} that are one token each, got {len(unique)}; "
                    "give your own prompts as a JSONL file"
                )
            parts[split][kind] = list(part)
    splits: dict[str, tuple[Example, ...]] = {}
    for split in SPLITS:
        splits[split] = _draw(builtin, rng, parts[split], is_token, count=sizes[split], but=())
        if len(splits[split]) < sizes[split]:
            raise UserError(
                f"task {builtin.name} expects {sizes[split]} different {split} examples, got {len(splits[split])}; "
                + ("give your own prompts as a JSONL file" if split == "test" else f"ask for fewer with --{split}-size")
            )
    widened = _widened(parts, builtin.further(is_token))
    redrawn = _draw(builtin, rng, widened, is_token, count=redraws * sizes["train"], but=splits["train"])
    return Task(name=builtin.name, source=builtin.name, splits=splits, metrics=builtin.metrics, redrawn=redrawn)


def _widened(parts: Mapping[str, Pools], further: Pools) -> Pools:
    """The training words with `further` ones, less those of any split."""
    taken = {kind: {word for part in parts.values() for word in part[kind]} for kind in parts["train"]}
    return {kind: [*words, *(word for word in further.get(kind, ()) if word not in taken[kind])] for kind, words in parts["train"].items()}


def _draw(builtin: Builtin, rng: random.Random, pools: Pools, is_token: IsToken, *, count: int, but: Sequence[Example]) -> tuple[Example, ...]:
    """Up to `count` different examples, none of them in `but`."""
    found = dict.fromkeys(but)
    for _ in range(20 * count + 1000):
        if len(found) >= len(but) + count:
            break
        example = builtin.example(rng, pools, is_token)
        if example is not None:
            found[example] = None
    return tuple(found)[len(but) :]


def cut(items: Sequence[_T]) -> tuple[Sequence[_T], Sequence[_T], Sequence[_T]]:
    """Cut a sequence 60/20/20."""
    first = round(len(items) * SPLIT_SHARES[0])
    second = first + round(len(items) * SPLIT_SHARES[1])
    return items[:first], items[first:second], items[second:]
