"""Text -> token ids: a `Task` and a tokenizer -> one `Split` a split, with an account of what was left out.

Prompts are encoded as the tokenizer does by default (a BOS token where it adds one); an answer counts by its first token. Under the
counterfactual ablation clean and corrupted prompts are compared position by position, so pairs of different token length are
left out, counted and shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nodesieve.batches import EncodedExample, Split
from nodesieve.errors import UserError
from nodesieve.tasks.base import SPLITS, Example, SplitName, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class EncodedTask:
    """A task ready to run: splits of token ids, and what was left out of them."""

    name: str
    splits: dict[str, Split]
    metrics: tuple[str, ...]
    skipped: dict[str, int]
    shown: tuple[str, ...]

    def __getitem__(self, split: SplitName) -> Split:
        return self.splits[split]


def is_one_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return len(_ids(tokenizer, text, special=False)) == 1


def encode(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    aligned: bool,
    device: torch.device,
    context: int | None = None,
    needed: Sequence[SplitName] = SPLITS,
) -> EncodedTask:
    """Encode the splits that are needed.

    Args:
        aligned: leave out pairs of different token length (the counterfactual ablation needs none).
        context: the longest prompt that the model reads, in tokens.

    Raises:
        UserError: an example cannot be scored, or too few are left.
    """
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    splits: dict[str, Split] = {}
    skipped: dict[str, int] = {}
    for name in needed:
        kept = []
        unequal: Example | None = None
        skipped[name] = 0
        for example in (*task.splits[name], *(task.redrawn if name == "train" else ())):
            encoded = _encode_example(example, tokenizer, context=context)
            if aligned and encoded.corrupted is not None and len(encoded.corrupted) != len(encoded.clean):
                skipped[name] += 1
                unequal = unequal or example
            else:
                kept.append(encoded)
        if len(kept) < 2:
            why = f"; {skipped[name]} pairs have prompts of different token length, e.g. {unequal.clean!r} / {unequal.corrupted!r}" if unequal else ""
            raise UserError(f"task {task.name} expects at least 2 {name} examples, got {len(kept)}{why}")
        splits[name] = Split(examples=tuple(kept), pad_id=pad_id, device=device)
    return EncodedTask(
        name=task.name,
        splits=splits,
        metrics=task.metrics,
        skipped=skipped,
        shown=tuple(_show(example) for example in task.splits[needed[-1]][:3]),
    )


def _encode_example(example: Example, tokenizer: PreTrainedTokenizerBase, *, context: int | None) -> EncodedExample:
    clean = _ids(tokenizer, example.clean, special=True)
    corrupted = None if example.corrupted is None else _ids(tokenizer, example.corrupted, special=True)
    answers = _first_tokens(tokenizer, example.answers)
    distractors = _first_tokens(tokenizer, example.distractors)
    if set(answers) & set(distractors):
        raise UserError(
            f"expected answers and distractors that differ in their first token, got answers {example.answers} and distractors "
            f"{example.distractors} for the prompt {example.clean!r}"
        )
    if context is not None and max(len(clean), len(corrupted or ())) > context:
        raise UserError(f"expected prompts of at most {context} tokens (the model's context), got {len(clean)}: {example.clean[:60]!r}...")
    if not clean:
        raise UserError(f"expected a prompt of at least one token, got {example.clean!r}")
    return EncodedExample(clean=clean, corrupted=corrupted, answers=answers, distractors=distractors)


def _first_tokens(tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_ids(tokenizer, text, special=False)[0] for text in texts))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=special)["input_ids"])


def _show(example: Example) -> str:
    wrong = f" not {' '.join(map(repr, example.distractors[:3]))}" if example.distractors else ""
    return f"{example.clean!r} -> {' '.join(map(repr, example.answers[:3]))}{wrong}"
