"""Rows: examples as data gives them, one after another, with the place that each came from; and the task that they make.

A row is checked here whatever it was read from. `task_from_records` is the way in for data that is in Python already.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodesieve.errors import UserError
from nodesieve.tasks.base import SPLITS, Answer, Example, Task, cut

Records = Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]]
MAX_EXAMPLES = 200_000
SYNONYMS = {"corrupted": ("corrupt",), "answers": ("answer",), "distractors": ("distractor", "wrong_answers")}  # as data calls them, too
RECORDS = "records"  # what a task made of them comes from; a name of its own goes behind it


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example, with its split, if the data says, and where it came from, for messages: the file and line, or the name and number of a record."""

    example: Example
    split: str | None
    at: str


def row_of(record: Mapping[str, Any], at: str) -> Row:
    """The row in a record with `clean` and `answers`, maybe `corrupted`, `distractors` and `split`; UserError, with `at`, where it is none."""
    answers = texts_under(record, name_in(record, "answers"), at, required=True)
    distractors = texts_under(record, name_in(record, "distractors"), at, required=False)
    both = [answer for answer in answers if answer in distractors]
    if both:
        raise UserError(f"{at}: expected answers that are no distractors, got {both[0]!r} among both")
    return Row(
        example=Example(
            clean=text_under(record, "clean", at),
            corrupted=corrupted_in(record, at),
            answers=answers,
            distractors=distractors,
        ),
        split=split_of(record, at),
        at=at,
    )


def names_of(key: str) -> tuple[str, ...]:
    """What is read under `key`: it, and what data calls it, too."""
    return (key, *SYNONYMS.get(key, ()))


def name_in(record: Mapping[str, Any], key: str) -> str:
    """Under which name a record holds what is read under `key`, or `key` where it holds nothing."""
    return next((name for name in names_of(key) if record.get(name) is not None), key)


def corrupted_in(record: Mapping[str, Any], at: str) -> str | None:
    """The corrupted prompt of a record, if it has one."""
    name = name_in(record, "corrupted")
    return text_under(record, name, at) if record.get(name) is not None else None


def text_under(record: Mapping[str, Any], key: str, at: str) -> str:
    """What a record holds under a key, or UserError where that is no text."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{at}: expected text under {key!r}, got {'nothing' if key not in record else repr(value)[:60]}")
    _refuse_half_characters(value, key, at)
    return value


def _refuse_half_characters(text: str, key: str, at: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{at}: expected text under {key!r} that can be written as UTF-8, got half a surrogate pair")


def texts_under(record: Mapping[str, Any], key: str, at: str, *, required: bool) -> tuple[Answer, ...]:
    """Answers that a record holds under a key, each once, or UserError where they are none."""
    value = record.get(key)
    if value is None and not required:
        return ()
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    good = all((isinstance(item, str) and item.strip()) or (isinstance(item, int) and not isinstance(item, bool)) for item in values)
    if not good or (required and not values):
        raise UserError(
            f"{at}: expected an answer or a list of them under {key!r}, none empty, got {'nothing' if key not in record else repr(value)[:60]}"
        )
    if len({type(item) for item in values}) > 1:
        raise UserError(f"{at}: expected text or token ids under {key!r}, got both")
    for item in values:
        if isinstance(item, str):
            _refuse_half_characters(item, key, at)
    return tuple(dict.fromkeys(values))


def split_of(record: Mapping[str, Any], at: str) -> str | None:
    """The split that a record names, if it does, or UserError where there is none of that name."""
    value = record.get("split")
    if value is not None and value not in SPLITS:
        raise UserError(f"{at}: expected a split of {', '.join(SPLITS)}, got {value!r}")
    return value


def task_from_records(
    records: Records,
    *,
    columns: Mapping[str, str] | None = None,
    name: str = RECORDS,
    seed: int = 0,
) -> Task:
    """A task from dicts: a list of them, or a Hugging Face `datasets` dataset (or one by split: `train`, `validation`, `test`).

    Args:
        columns: which column of the data holds `clean`, `corrupted`, `answers`, `distractors` or `split`, where it is called otherwise, e.g.
            `{"clean": "prompt", "answers": "target"}`. Answers and distractors are one string (or token id) or a list of them.
        name: of the task. Records of another name are other data, on which a circuit may be measured that was found on these.
        seed: cuts data without splits 60/20/20.

    Raises:
        UserError: a record lacks something, with its number.
    """
    known = ("clean", "corrupted", "answers", "distractors", "split")
    read = (*known, *(name for names in SYNONYMS.values() for name in names))
    renamed = dict(columns or {})
    for key in renamed:
        if key not in known:
            raise UserError(f"columns expects keys among {', '.join(known)}, got {key!r}")
    parts = records.items() if isinstance(records, Mapping) else [(None, records)]

    def rows() -> Iterator[Row]:
        for split, part in parts:
            for number, record in enumerate(part, start=1):
                at = f"{name}, record {number}" if split is None else f"{name}, {split} record {number}"
                if not isinstance(record, Mapping):
                    raise UserError(f"{at}: expected a dict, got {type(record).__name__}")
                missing = [column for column in renamed.values() if column not in record]
                if missing:
                    raise UserError(f"{at}: expected a column {missing[0]!r}, got {', '.join(map(repr, record))}")
                plain = {key: record[renamed.get(key, key)] for key in read if renamed.get(key, key) in record}
                yield row_of(plain if split is None else {**plain, "split": split}, at)

    return task_of_rows(name, rows(), source=name if name == RECORDS else f"{RECORDS}:{name}", seed=seed)


def task_of_rows(name: str, rows: Iterable[Row], *, source: str, seed: int) -> Task:
    """The task that rows make, each example once where no split is named; no more rows are read than a task may have."""
    read: list[Row] = []
    for row in rows:
        read.append(row)
        if len(read) > MAX_EXAMPLES:
            raise UserError(
                f"{source}: expected at most {MAX_EXAMPLES:,} examples, got more; a circuit needs some hundreds: take a random sample, "
                "e.g. with `shuf -n 10000`"
            )
    splits = _split(read, source, seed)
    return Task(name=name, source=source, splits=splits, duplicates=len(read) - sum(map(len, splits.values())))


def _split(rows: Sequence[Row], source: str, seed: int) -> dict[str, tuple[Example, ...]]:
    """By the splits that the rows name, in an order drawn once and for all, or 60/20/20 by `seed` where none does."""
    unnamed = [row for row in rows if row.split is None]
    if unnamed and len(unnamed) < len(rows):
        raise UserError(f"{unnamed[0].at}: expected a split in every example or in none, got one without")
    if rows and not unnamed:
        splits: dict[str, list[Example]] = {split: [row.example for row in rows if row.split == split] for split in SPLITS}
        seen: dict[str, str] = {}
        for row in rows:
            assert row.split is not None
            clean = row.example.clean
            if seen.setdefault(clean, row.split) != row.split:
                raise UserError(f"{row.at}: expected no prompt in two splits, got one that is in {seen[clean]} too: {clean[:60]!r}")
        for split, examples in splits.items():  # files come sorted, and much is judged by the first of them
            random.Random(f"order/{split}").shuffle(examples)
        return {split: tuple(examples) for split, examples in splits.items()}
    of_prompt: dict[str, list[Example]] = {}  # in one split, all of them
    for example in dict.fromkeys(row.example for row in rows):
        of_prompt.setdefault(example.clean, []).append(example)
    if len(of_prompt) < 10:
        raise UserError(f"{source}: expected at least 10 different prompts to cut into {', '.join(SPLITS)}, got {len(of_prompt)}")
    prompts = list(of_prompt.values())
    random.Random(f"split/{seed}").shuffle(prompts)
    return {split: tuple(example for examples in part for example in examples) for split, part in zip(SPLITS, cut(prompts), strict=True)}


def refuse_records(source: str) -> None:
    """Raise UserError where a run was found on records in Python, which no file holds."""
    if (source == RECORDS or source.startswith(f"{RECORDS}:")) and not Path(source).exists():
        raise UserError(
            f"expected prompts in a file, got a run that was found on records in Python ({source}), which it does not keep: evaluate and "
            "export take some with --task FILE (under mean those of the run, or own= in Python), for anything else write the records to a file and "
            "find the circuit with that"
        )
