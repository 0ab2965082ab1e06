"""A task by name, from a file or from records."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodesieve.config import LEAST, REDRAWS, SEEDS, TRAIN_SIZE, VALIDATION_SIZE, DiscoverConfig
from nodesieve.errors import UserError
from nodesieve.tasks import BUILTINS
from nodesieve.tasks.base import Task, build
from nodesieve.tasks.encode import is_one_token
from nodesieve.tasks.readers import read_task
from nodesieve.tasks.rows import RECORDS, Records, refuse_records, task_from_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEST_SIZE = 200


def load_task(
    source: str | Path | Records,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    train_size: int = TRAIN_SIZE,
    validation_size: int = VALIDATION_SIZE,
    redraws: int = REDRAWS,
    columns: Mapping[str, str] | None = None,
    name: str | None = None,
) -> Task:
    """A built-in task, the task in a file, or one made of records.

    Args:
        source: one of `nodesieve.tasks.BUILTINS`; the path of a file that a reader in `nodesieve.tasks.readers` knows; or a list of dicts or a
            Hugging Face `datasets` dataset, by split or not.
        tokenizer: built-in tasks keep to words that are one token for it.
        seed: draws the examples of a built-in task, and cuts data without splits.
        train_size: training examples of a built-in task.
        validation_size: validation examples of a built-in task; the fewer, the wider the interval that has to lie within a KL budget.
        redraws: how many further training examples, with other words of the training pools, a built-in task gives for each of them.
        columns: for records, what `clean`, `corrupted`, `answers`, `distractors` and `split` are called there, e.g. `{"clean": "prompt"}`.
        name: of records, by default "records". Those that a circuit found on others is to be measured on need another.

    Raises:
        UserError: there is no such task or file, or the data cannot be used.
    """
    if not isinstance(source, str | Path | Iterable):
        raise UserError(f"expected a task's name, a file or records, got {source!r}")
    numbers: dict[str, Any] = {"seed": seed, "train_size": train_size, "validation_size": validation_size, "redraws": redraws}
    for option, value in numbers.items():
        if not isinstance(value, Integral) or value < LEAST[option]:
            raise UserError(f"{option} expects a whole number of at least {LEAST[option]}, got {value!r}")
    if seed >= SEEDS:
        raise UserError(f"seed expects a number below {SEEDS}, got {seed}")
    if not isinstance(source, str | Path):
        return task_from_records(source, columns=columns, name=name or RECORDS, seed=seed)
    if columns is not None or name is not None:
        raise UserError(f"{'name' if columns is None else 'columns'} expects records; a file says itself what is what")
    if source in BUILTINS:
        if not callable(tokenizer):
            raise UserError(f"expected the model's tokenizer, such as loaded.tokenizer, got {type(tokenizer).__name__}")
        sizes = {"train": train_size, "validation": validation_size, "test": TEST_SIZE}
        is_token = functools.cache(functools.partial(is_one_token, tokenizer))
        task = build(BUILTINS[str(source)], is_token=is_token, seed=seed, sizes=sizes, redraws=redraws)
        return replace(task, drawn={"data_seed": seed, "train_size": train_size, "validation_size": validation_size, "redraws": redraws})
    refuse_no_task(source)
    return replace(read_task(source, seed=seed), drawn={"data_seed": seed})


def refuse_no_task(source: str | Path) -> None:
    """Raise UserError where there is neither a built-in task of that name nor a file."""
    if source in BUILTINS or (source != "" and Path(source).exists()):
        return
    refuse_records(str(source))
    raise UserError(
        f"expected a built-in task ({', '.join(BUILTINS)}) or a file, found neither under {str(source)!r}"
        + (f" in {str(Path.cwd())!r}" if str(source) and not Path(source).is_absolute() else "")
    )


def task_of(config: DiscoverConfig, tokenizer: PreTrainedTokenizerBase, *, task: str | None = None) -> Task:
    """The task that a run's options name, or another one drawn alike."""
    return load_task(
        config.task if task is None else task,
        tokenizer,
        seed=config.seed_of_data,
        train_size=config.train_size,
        validation_size=config.validation_size,
        redraws=config.redraws,
    )
