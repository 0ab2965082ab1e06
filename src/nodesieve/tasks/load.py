"""A task by name or file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nodesieve.errors import UserError
from nodesieve.tasks import BUILTINS
from nodesieve.tasks.base import Task, build
from nodesieve.tasks.encode import is_one_token
from nodesieve.tasks.readers import read_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN_SIZE, VALIDATION_SIZE, TEST_SIZE, REDRAWS = 512, 200, 200, 15


def load_task(name: str, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, train_size: int = TRAIN_SIZE, redraws: int = REDRAWS) -> Task:
    """A built-in task, or the task in a file.

    Args:
        name: one of `nodesieve.tasks.BUILTINS`, or the path of a file that a reader in `nodesieve.tasks.readers` knows.
        tokenizer: built-in tasks keep to words that are one token for it.
        seed: draws the examples of a built-in task, and cuts a file without splits.
        train_size: training examples of a built-in task.
        redraws: how many further training examples, with other words of the training pools, a built-in task gives for each of them.

    Raises:
        UserError: there is no such task or file, or the file cannot be used.
    """
    if name in BUILTINS:
        sizes = {"train": train_size, "validation": VALIDATION_SIZE, "test": TEST_SIZE}
        return build(BUILTINS[name], is_token=lambda text: is_one_token(tokenizer, text), seed=seed, sizes=sizes, redraws=redraws)
    if not Path(name).exists():
        raise UserError(f"expected a built-in task ({', '.join(BUILTINS)}) or a file, found neither under {name!r}")
    return read_task(name, seed=seed)
