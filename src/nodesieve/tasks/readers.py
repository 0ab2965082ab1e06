"""Task files: one reader a format, chosen by what a file holds, not by its name.

A reader says whether it knows a text by its beginning, and turns the text into `Row`s. To add a format, add a reader to `READERS`.
Files are read as UTF-8; every error names its line.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodesieve.errors import UserError
from nodesieve.tasks.base import SPLITS, Answer, Example, Task, cut

Records = Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]]
MAX_BYTES = 2**30
MAX_EXAMPLES = 200_000


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example, with its split, if the data says, and where it came from, for messages: the file and line, or the name and number of a record."""

    example: Example
    split: str | None
    at: str


@dataclass(frozen=True, kw_only=True)
class Reader:
    """`knows(text)`: is this of my format, going by how it begins? `read(text, path)`: its rows."""

    name: str
    knows: Callable[[str], bool]
    read: Callable[[str, str], Iterable[Row]]


RECORDS = "records"  # what a task made of them comes from; a name of its own goes behind it


def refuse_records(source: str) -> None:
    """Raise UserError where a run was found on records in Python, which no file holds."""
    if (source == RECORDS or source.startswith(f"{RECORDS}:")) and not Path(source).exists():
        raise UserError(
            f"expected prompts in a file, got a run that was found on records in Python ({source}), which it does not keep: evaluate takes others "
            "with --task FILE, for anything else write the records to a file and find the circuit with that"
        )


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
    return _task(where.stem, _limited(reader.read(text, str(path)), str(path)), path=str(path), seed=seed)


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
                plain = {key: record[renamed.get(key, key)] for key in known if renamed.get(key, key) in record}
                yield _row(plain if split is None else {**plain, "split": split}, at)

    return _task(name, _limited(rows(), name), path=name if name == RECORDS else f"{RECORDS}:{name}", seed=seed)


def _task(name: str, rows: list[Row], *, path: str, seed: int) -> Task:
    splits = split_rows(rows, path, seed)
    return Task(name=name, source=path, splits=splits, duplicates=len(rows) - sum(map(len, splits.values())))


def split_rows(rows: list[Row], path: str, seed: int) -> dict[str, tuple[Example, ...]]:
    """By the splits that the rows name, or 60/20/20 by `seed` where none does."""
    unnamed = [row for row in rows if row.split is None]
    if unnamed and len(unnamed) < len(rows):
        raise UserError(f"{unnamed[0].at}: expected a split in every example or in none, got one without")
    if rows and not unnamed:
        splits: dict[str, tuple[Example, ...]] = {split: tuple(row.example for row in rows if row.split == split) for split in SPLITS}
        seen: dict[str, str] = {}
        for row in rows:
            assert row.split is not None
            clean = row.example.clean
            if seen.setdefault(clean, row.split) != row.split:
                raise UserError(f"{row.at}: expected no prompt in two splits, got one that is in {seen[clean]} too: {clean[:60]!r}")
        return splits
    of_prompt: dict[str, list[Example]] = {}  # in one split, all of them
    for example in dict.fromkeys(row.example for row in rows):
        of_prompt.setdefault(example.clean, []).append(example)
    if len(of_prompt) < 10:
        raise UserError(f"{path}: expected at least 10 different prompts to cut into {', '.join(SPLITS)}, got {len(of_prompt)}")
    prompts = list(of_prompt.values())
    random.Random(f"split/{seed}").shuffle(prompts)
    return {split: tuple(example for examples in part for example in examples) for split, part in zip(SPLITS, cut(prompts), strict=True)}


def _limited(rows: Iterable[Row], path: str) -> list[Row]:
    found: list[Row] = []
    for row in rows:
        found.append(row)
        if len(found) > MAX_EXAMPLES:
            raise UserError(
                f"{path}: expected at most {MAX_EXAMPLES:,} examples, got more; a circuit needs some hundreds: take a random sample, "
                "e.g. with `shuf -n 10000`"
            )
    return found


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
        if not _is_tagged(row) and "<predict>" in str(row.get("corrupted")):
            raise UserError(f"{at}: expected a <predict> tag in 'clean', too, got one in 'corrupted' alone")
        yield _tagged_row(row, at) if _is_tagged(row) else _row(row, at)


def _row(row: Mapping[str, Any], at: str) -> Row:
    answers, distractors = _texts(row, "answers", at, required=True), _texts(row, "distractors", at, required=False)
    both = [answer for answer in answers if answer in distractors]
    if both:
        raise UserError(f"{at}: expected answers that are no distractors, got {both[0]!r} among both")
    return Row(
        example=Example(
            clean=_text(row, "clean", at),
            corrupted=_text(row, "corrupted", at) if row.get("corrupted") is not None else None,
            answers=answers,
            distractors=distractors,
        ),
        split=_split_name(row, at),
        at=at,
    )


_TAG = re.compile(r"<predict>(.*?)</predict>", re.DOTALL)


def _is_tagged(row: Any) -> bool:
    return isinstance(row, Mapping) and isinstance(row.get("clean"), str) and "<predict>" in row["clean"]


def _tagged_row(row: Mapping[str, Any], at: str) -> Row:
    """`1 + 2 = <predict>3</predict>`: the prompt ends before the tag, and the space there belongs to the answer."""
    clean = _text(row, "clean", at)
    tags = _TAG.findall(clean)
    if len(tags) != 1 or not tags[0].strip():
        raise UserError(f"{at}: expected one <predict>answer</predict> in 'clean', got {clean[:60]!r}")
    prompt, space = _before_tag(clean)
    corrupted = _text(row, "corrupted", at) if row.get("corrupted") is not None else None
    wrong = _TAG.findall(corrupted or "")
    told = (space + wrong[0],) if len(wrong) == 1 and wrong[0] != tags[0] else ()
    return Row(
        example=Example(
            clean=prompt,
            corrupted=None if corrupted is None else _before_tag(corrupted)[0],
            answers=(space + tags[0],),
            distractors=_texts(row, "distractors", at, required=False) or told,
        ),
        split=_split_name(row, at),
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
        renamed = {"corrupted": row.get("corrupt", row.get("corrupted")), "distractors": row.get("wrong_answers", row.get("distractors"))}
        yield _row({**row, **renamed}, at)


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n,":
        place += 1
    return place


# CSV with token ids (EAP-IG) or text

SHOWN = 200  # characters of a header that is refused
OF_TEXT = ("distractor", "distractors")
CSV_COLUMNS: dict[str, tuple[str, ...]] = {  # of answers, and of distractors beside them
    "correct_idx": ("incorrect_idx",),
    "clean_answer_idx": ("corrupted_answer_idx",),
    "answer": OF_TEXT,
    "answers": OF_TEXT,
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
                "corrupted": record.get("corrupted") or None,
                "answers": _cell(record[good], good, at),
                "distractors": _cell(record[bad], bad, at) if record.get(bad) else None,
                "split": record.get("split") or None,
            }
            yield _row(row, at)
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


def _text(row: Mapping[str, Any], key: str, at: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{at}: expected text under {key!r}, got {'nothing' if key not in row else repr(value)[:60]}")
    _refuse_half_characters(value, key, at)
    return value


def _refuse_half_characters(text: str, key: str, at: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{at}: expected text under {key!r} that can be written as UTF-8, got half a surrogate pair")


def _texts(row: Mapping[str, Any], key: str, at: str, *, required: bool) -> tuple[Answer, ...]:
    value = row.get(key)
    if value is None and not required:
        return ()
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    good = all((isinstance(item, str) and item.strip()) or (isinstance(item, int) and not isinstance(item, bool)) for item in values)
    if not good or (required and not values):
        raise UserError(
            f"{at}: expected an answer or a list of them under {key!r}, none empty, got {'nothing' if key not in row else repr(value)[:60]}"
        )
    if len({type(item) for item in values}) > 1:
        raise UserError(f"{at}: expected text or token ids under {key!r}, got both")
    for item in values:
        if isinstance(item, str):
            _refuse_half_characters(item, key, at)
    return tuple(dict.fromkeys(values))


def _split_name(row: Mapping[str, Any], at: str) -> str | None:
    value = row.get("split")
    if value is not None and value not in SPLITS:
        raise UserError(f"{at}: expected a split of {', '.join(SPLITS)}, got {value!r}")
    return value


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
