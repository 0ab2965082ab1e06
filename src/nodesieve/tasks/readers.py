"""Task files: one reader a format, chosen by what a file holds, not by its name.

A reader says whether it knows the first line of a file, and turns the file's lines into `Row`s. To add a format, add a reader to `READERS`.
Files are read as UTF-8; every error names its line.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodesieve.errors import UserError
from nodesieve.tasks.base import SPLITS, Example, Task, cut

MAX_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example of a file, with the line that it came from and its split, if the file says."""

    example: Example
    split: str | None
    line: int


@dataclass(frozen=True, kw_only=True)
class Reader:
    """`knows(first line)`: is this file of my format? `read(lines, path)`: its rows."""

    name: str
    knows: Callable[[str], bool]
    read: Callable[[list[str], str], Iterable[Row]]


def read_task(path: str | Path, *, seed: int) -> Task:
    """Read a file of prompts.

    A file without splits is deduplicated and cut 60/20/20 by `seed`; one with splits may lack those that are not needed, so that a file of
    test examples alone can be evaluated on.

    Raises:
        UserError: the file cannot be read or is not as its format says, with the line where it went wrong.
    """
    where = Path(path)
    lines = _lines(where)
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise UserError(f"expected examples, got an empty file: {str(path)!r}")
    reader = next((reader for reader in READERS if reader.knows(first)), None)
    if reader is None:
        known = "; ".join(reader.name for reader in READERS)
        raise UserError(f"{path}, line 1: expected one of these formats: {known}; got {first[:80]!r}")
    rows = list(reader.read(lines, str(path)))
    return Task(name=where.stem, splits=_split(rows, str(path), seed))


def _lines(path: Path) -> list[str]:
    if path.is_dir():
        raise UserError(f"expected a file of prompts, got the directory {str(path)!r}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"expected a file of at most {MAX_BYTES // 2**20} MiB, got {path.stat().st_size // 2**20} MiB: {str(path)!r}")
        return path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"expected UTF-8 text in {str(path)!r}, got the byte {error.object[error.start]:#04x} at offset {error.start}") from error
    except OSError as error:
        raise UserError(f"expected a file of prompts, could not read {str(path)!r}: {error.strerror}") from error


def _split(rows: list[Row], path: str, seed: int) -> dict[str, tuple[Example, ...]]:
    unnamed = [row for row in rows if row.split is None]
    if unnamed and len(unnamed) < len(rows):
        raise UserError(f"{path}, line {unnamed[0].line}: expected a split in every example or in none, got one without")
    if not unnamed:
        splits: dict[str, tuple[Example, ...]] = {split: tuple(row.example for row in rows if row.split == split) for split in SPLITS}
        seen: dict[Example, str] = {}
        for row in rows:
            assert row.split is not None
            if seen.setdefault(row.example, row.split) != row.split:
                raise UserError(f"{path}, line {row.line}: expected no example in two splits, got one that is in {seen[row.example]} too")
        return splits
    unique = list(dict.fromkeys(row.example for row in rows))
    if len(unique) < 10:
        raise UserError(f"{path}: expected at least 10 different examples to cut into {', '.join(SPLITS)}, got {len(unique)}")
    random.Random(f"split/{seed}").shuffle(unique)
    return {split: tuple(part) for split, part in zip(SPLITS, cut(unique), strict=True)}


def _read_native(lines: list[str], path: str) -> Iterable[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        at = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{at}: expected a JSON object, got {line[:60]!r} ({error})") from error
        if not isinstance(row, Mapping):
            raise UserError(f"{at}: expected a JSON object, got {type(row).__name__}")
        yield Row(
            example=Example(
                clean=_text(row, "clean", at),
                corrupted=_text(row, "corrupted", at) if row.get("corrupted") is not None else None,
                answers=_texts(row, "answers", at, required=True),
                distractors=_texts(row, "distractors", at, required=False),
            ),
            split=_split_name(row, at),
            line=number,
        )


def _text(row: Mapping[str, Any], key: str, at: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{at}: expected text under {key!r}, got {'nothing' if key not in row else repr(value)[:60]}")
    return value


def _texts(row: Mapping[str, Any], key: str, at: str, *, required: bool) -> tuple[str, ...]:
    value = row.get(key)
    if value is None and not required:
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) and item != "" for item in values) or (required and not values):
        raise UserError(f"{at}: expected a list of strings under {key!r}, none empty, got {'nothing' if key not in row else repr(value)[:60]}")
    return tuple(dict.fromkeys(values))


def _split_name(row: Mapping[str, Any], at: str) -> str | None:
    value = row.get("split")
    if value is not None and value not in SPLITS:
        raise UserError(f"{at}: expected a split of {', '.join(SPLITS)}, got {value!r}")
    return value


def _is_native(first: str) -> bool:
    try:
        row = json.loads(first)
    except ValueError:
        return False
    return isinstance(row, dict) and ("answers" in row or "clean" in row)


READERS: tuple[Reader, ...] = (
    Reader(name='JSONL, {"clean": ..., "corrupted": ..., "answers": [...], "distractors": [...]} a line', knows=_is_native, read=_read_native),
)
