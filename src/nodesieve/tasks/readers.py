"""Task files: one reader a format, chosen by what a file holds, not by its name.

A reader says whether it knows a text by its beginning, and turns the text into `Row`s. To add a format, add a reader to `READERS`.
Files are read as UTF-8; every error names its line.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodesieve.errors import UserError
from nodesieve.tasks.base import Example, Task
from nodesieve.tasks.rows import Row, corrupted_in, name_in, names_of, row_of, split_of, task_of_rows, text_under, texts_under

MAX_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Reader:
    """`knows(text)`: is this of my format, going by how it begins? `read(text, path)`: its rows."""

    name: str
    knows: Callable[[str], bool]
    read: Callable[[str, str], Iterable[Row]]


def read_task(path: str | Path, *, seed: int) -> Task:
    """Read a file of prompts.

    A file without splits is deduplicated and cut 60/20/20 by `seed`; one with splits may lack those that are not needed, so that a file of
    test examples alone can be evaluated on.

    Raises:
        UserError: the file cannot be read or is not as its format says, with the line where it went wrong.
    """
    where = Path(path)
    text = _text_of(where)
    if not text.strip():
        raise UserError(f"expected examples, got an empty file: {str(path)!r}")
    reader = next((reader for reader in READERS if reader.knows(text)), None)
    if reader is None:
        known = "; ".join(reader.name for reader in READERS)
        raise UserError(f"{path}, line 1: expected one of these formats: {known}; got {text.lstrip()[:80].splitlines()[0]!r}")
    return task_of_rows(where.stem, reader.read(text, str(path)), source=str(path), seed=seed)


def _text_of(path: Path) -> str:
    if path.is_dir():
        raise UserError(f"expected a file of prompts, got the directory {str(path)!r}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"expected a file of at most {MAX_BYTES // 2**20} MiB, got {path.stat().st_size // 2**20} MiB: {str(path)!r}")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"expected UTF-8 text in {str(path)!r}, got the byte {error.object[error.start]:#04x} at offset {error.start}") from error
    except OSError as error:
        raise UserError(f"expected a file of prompts, could not read {str(path)!r}: {error.strerror}") from error


# JSON lines: ours, and Edge Pruning's, whose one key "clean" holds the answer in a tag


def _read_lines(text: str, path: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(text), start=1):
        if not line.strip():
            continue
        at = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{at}: expected a JSON object, got {line[:60]!r} ({error})") from error
        if not isinstance(row, Mapping):
            raise UserError(f"{at}: expected a JSON object, got {type(row).__name__}")
        if "answers" in row and _is_tagged(row):
            raise UserError(f"{at}: expected answers under 'answers' or in a <predict> tag, got both")
        if not _is_tagged(row) and "<predict>" in str(row.get(name_in(row, "corrupted"))):
            raise UserError(f"{at}: expected a <predict> tag in 'clean', too, got one in {name_in(row, 'corrupted')!r} alone")
        yield _tagged_row(row, at) if _is_tagged(row) else row_of(row, at)


_TAG = re.compile(r"<predict>(.*?)</predict>", re.DOTALL)


def _is_tagged(row: Any) -> bool:
    return isinstance(row, Mapping) and isinstance(row.get("clean"), str) and "<predict>" in row["clean"]


def _tagged_row(row: Mapping[str, Any], at: str) -> Row:
    """`1 + 2 = <predict>3</predict>`: the prompt ends before the tag, and the space there belongs to the answer."""
    clean = text_under(row, "clean", at)
    tags = _TAG.findall(clean)
    if len(tags) != 1 or not tags[0].strip():
        raise UserError(f"{at}: expected one <predict>answer</predict> in 'clean', got {clean[:60]!r}")
    prompt, space = _before_tag(clean)
    corrupted = corrupted_in(row, at)
    wrong = _TAG.findall(corrupted or "")
    told = (space + wrong[0],) if len(wrong) == 1 and wrong[0] != tags[0] else ()
    return Row(
        example=Example(
            clean=prompt,
            corrupted=None if corrupted is None else _before_tag(corrupted)[0],
            answers=(space + tags[0],),
            distractors=texts_under(row, name_in(row, "distractors"), at, required=False) or told,
        ),
        split=split_of(row, at),
        at=at,
    )


def _before_tag(text: str) -> tuple[str, str]:
    before = text.partition("<predict>")[0]
    return before.rstrip(" "), " " if before.endswith(" ") else ""


# JSON with prompts in a list (auto-circuit)


def _read_prompts(text: str, path: str) -> Iterator[Row]:
    """Element by element, so that an error can say on which line it is."""
    start = re.search(r'"prompts"\s*:\s*\[', text)
    if start is None:
        raise UserError(f'{path}, line 1: expected {{"prompts": [...]}}, got no such list')
    decoder, place = json.JSONDecoder(), start.end()
    while True:
        place = _skip(text, place)
        at = f"{path}, line {text.count(chr(10), 0, place) + 1}"
        if text[place : place + 1] == "]":
            return
        try:
            row, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{at}: expected a JSON object, got {text[place : place + 60]!r} ({error})") from error
        if not isinstance(row, Mapping):
            raise UserError(f"{at}: expected a JSON object in 'prompts', got {type(row).__name__}")
        yield row_of(row, at)


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n,":
        place += 1
    return place


# CSV with token ids (EAP-IG) or text

SHOWN = 200  # characters of a header that is refused
CSV_COLUMNS: dict[str, tuple[str, ...]] = {  # of answers, and of distractors beside them
    "correct_idx": ("incorrect_idx",),
    "clean_answer_idx": ("corrupted_answer_idx",),
    **dict.fromkeys(names_of("answers"), names_of("distractors")),
}


def _read_csv(text: str, path: str) -> Iterator[Row]:
    body = text.lstrip()
    above = len(_lines(text[: len(text) - len(body)])) - 1  # empty lines before the header
    reader = csv.DictReader(io.StringIO(body, newline=""), strict=True)
    try:
        header = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        good = next((name for name in CSV_COLUMNS if name in header), None)
        if good is None:
            got = ", ".join(map(repr, header))  # a quote out of place makes the lines below it part of a column's name
            shown = got if len(got) <= SHOWN else f"{got[:SHOWN]}..."
            raise UserError(f"{path}, line {1 + above}: expected a column among {', '.join(CSV_COLUMNS)}, got {shown}")
        bad = next((name for name in CSV_COLUMNS[good] if name in header), "")
        others = [name for names in CSV_COLUMNS.values() for name in names if name in header]
        if others and not bad:
            raise UserError(f"{path}, line {1 + above}: expected {' or '.join(CSV_COLUMNS[good])} beside {good}, got {others[0]!r}")
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{path}, line {1 + above}: expected each column once, got {twice!r} twice")
        for record in reader:
            line = above + reader.line_num
            at = f"{path}, line {line}"
            if None in record or None in record.values():
                raise UserError(f"{at}: expected {len(header)} fields, got {'more' if None in record else 'fewer'}")
            row = {
                "clean": record["clean"],
                "corrupted": next((record[name] for name in names_of("corrupted") if record.get(name)), None),
                "answers": _cell(record[good], good, at),
                "distractors": _cell(record[bad], bad, at) if record.get(bad) else None,
                "split": record.get("split") or None,
            }
            yield row_of(row, at)
    except csv.Error as error:
        raise UserError(f"{path}, line {above + reader.line_num + 1}: expected CSV, got {error}") from error


def _cell(text: str, column: str, at: str) -> Any:
    """A token id or a list of them, or the text of an answer; under a name in the plural a JSON list of such texts, too."""
    ids, listed = column.endswith("_idx"), column.endswith("s") and text.strip().startswith("[") and text.strip().endswith("]")
    if not ids and not listed:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    values = value if isinstance(value, list) else [value]
    if ids and not (values and all(isinstance(item, int) and not isinstance(item, bool) for item in values)):
        raise UserError(f"{at}: expected a token id under {column!r}, got {text[:40]!r}")
    if listed and not all(isinstance(item, str) for item in values):
        raise UserError(f'{at}: expected text or a JSON list such as [" he", " she"] under {column!r}, got {text[:40]!r}')
    return values


def _lines(text: str) -> list[str]:
    """At ends of lines alone: `splitlines` cuts at some characters that JSON strings may hold, too."""
    return re.split(r"\r\n|\n|\r", text)


def _first_object(text: str) -> Any:
    """The JSON value on the first line that holds anything; None if it is not JSON."""
    try:
        return json.loads(_lines(text.lstrip())[0])
    except (ValueError, RecursionError):
        return None


def _is_lines(text: str) -> bool:
    row = _first_object(text)
    if row is None and not _is_prompts(text):  # meant to be: the reader says where the line goes wrong
        return re.match(r'\{\s*"(clean|answers)"', text.lstrip()) is not None
    return isinstance(row, dict) and ("answers" in row or "clean" in row)


def _is_prompts(text: str) -> bool:
    return text.lstrip().startswith("{") and re.search(r'"prompts"\s*:\s*\[', text) is not None


def _is_csv(text: str) -> bool:
    header = [name.strip(' "') for name in _lines(text.lstrip())[0].split(",")]
    return "clean" in header and len(header) > 1


READERS: tuple[Reader, ...] = (
    Reader(
        name='JSONL, {"clean": ..., "corrupted": ..., "answers": [...], "distractors": [...]} a line, or "clean": "... <predict>answer</predict>"',
        knows=_is_lines,
        read=_read_lines,
    ),
    Reader(name='JSON, {"prompts": [{"clean", "corrupt", "answers", "wrong_answers"}, ...]}', knows=_is_prompts, read=_read_prompts),
    Reader(name="CSV, clean,corrupted and correct_idx,incorrect_idx or answer,distractor", knows=_is_csv, read=_read_csv),
)
