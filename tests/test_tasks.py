"""Built-in tasks and task files."""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from conftest import word_tokenizer
from nodesieve.errors import UserError
from nodesieve.tasks import BUILTINS, words
from nodesieve.tasks.base import SPLITS, Example, build
from nodesieve.tasks.encode import encode
from nodesieve.tasks.load import load_task
from nodesieve.tasks.readers import read_task

NAMES = {*words.FEMALE_NAMES, *words.MALE_NAMES, *words.FURTHER_NAMES}
PAIRED = {word for pair in (*words.NUMBERED, *words.CAPITALS) for word in pair.split("/")}
NOUNS = {*words.PLACES, *words.OBJECTS, *words.EVENTS, *words.ROLES, *words.ARGUMENTS, *PAIRED}


def words_of(examples: Sequence[Example], among: set[str]) -> set[str]:
    return {word for example in examples for text in (example.clean, example.corrupted or "") for word in re.findall(r"\w+", text)} & among


@pytest.mark.parametrize("name", BUILTINS)
def test_splits_have_the_right_sizes_and_share_no_words(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    task = load_task(name, tokenizer)
    assert {split: len(examples) for split, examples in task.splits.items()} == {"train": 512, "validation": 512, "test": 200}
    assert len(load_task(name, tokenizer, validation_size=200).splits["validation"]) == 200
    template_words = words_of(tuple(Example(clean=t, corrupted=None, answers=(), distractors=()) for t in templates(name)), NOUNS)
    parts = {**task.splits, "train": (*task.splits["train"], *task.redrawn)}
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        for among in (NAMES, NOUNS - template_words):
            assert not words_of(parts[first], among) & words_of(parts[second], among)
        assert not set(parts[first]) & set(parts[second])
    assert len(set(parts["train"])) == len(parts["train"]) > 512


def test_only_redrawn_examples_know_the_further_names() -> None:
    task = load_task("ioi", word_tokenizer())
    further = {*words.FURTHER_NAMES} - {*words.FEMALE_NAMES, *words.MALE_NAMES}
    assert words_of(task.redrawn, further)
    assert not any(words_of(examples, further) for examples in task.splits.values())


@pytest.mark.parametrize("name", BUILTINS)
@pytest.mark.parametrize("count", [8, 19, 21, 24, 30, 49, 79])
def test_a_tokenizer_of_few_words_gives_a_task_or_one_line_that_says_so(name: str, count: int) -> None:
    """Never a traceback: examples take several words of a kind from their split's."""
    few = replace(BUILTINS[name], pools=lambda is_token: {kind: found[:count] for kind, found in BUILTINS[name].pools(is_token).items()})
    with suppress(UserError):
        build(few, is_token=lambda text, after="": True, seed=0, sizes=dict.fromkeys(SPLITS, 4))


@pytest.mark.parametrize(("split", "message"), [("train", "fewer with --train-size"), ("validation", "--validation-size"), ("test", "a JSONL file")])
def test_too_few_examples_are_said_with_what_helps(split: str, message: str) -> None:
    always = Example(clean="a", corrupted="b", answers=(" c",), distractors=(" d",))
    builtin = replace(BUILTINS["ioi"], example=lambda rng, words, is_token: always)
    with pytest.raises(UserError, match=message):
        build(builtin, is_token=lambda text, after="": True, seed=0, sizes={**dict.fromkeys(SPLITS, 1), split: 2})


def templates(name: str) -> tuple[str, ...]:
    return tuple(re.sub(r"\{\w+\}", "", template) for template in importlib.import_module(f"nodesieve.tasks.{name}").TEMPLATES)


@pytest.mark.parametrize("name", BUILTINS)
def test_the_same_seed_gives_the_same_task_and_another_seed_another(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert load_task(name, tokenizer, seed=1) == load_task(name, tokenizer, seed=1)
    assert load_task(name, tokenizer, seed=1) != load_task(name, tokenizer, seed=2)


@pytest.mark.parametrize("name", BUILTINS)
def test_clean_and_corrupted_prompts_have_the_same_length(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(load_task(name, tokenizer, train_size=100), tokenizer, aligned=True, device=torch.device("cpu"))
    assert encoded.skipped == {split: {"unequal_length": 0} for split in SPLITS}
    assert all(len(e.clean) == len(e.corrupted or ()) for split in SPLITS for e in encoded[split].examples)  # type: ignore[index]


def test_ioi_says_the_subject_twice_and_asks_for_the_other() -> None:
    example = load_task("ioi", word_tokenizer()).splits["test"][0]
    (answer,), (distractor,) = example.answers, example.distractors
    pieces = example.clean.replace(",", "").replace(".", "").split()
    assert answer.startswith(" ")
    assert pieces.count(distractor.strip()) == 2
    assert pieces.count(answer.strip()) == 1
    assert not {answer.strip(), distractor.strip()} & set((example.corrupted or "").replace(",", "").replace(".", "").split())


def test_greater_than_by_digit_counts_an_equal_digit_neither_way(tokenizer: PreTrainedTokenizerFast) -> None:
    for example in load_task("greater_than", tokenizer).splits["test"]:
        assert example.corrupted is not None
        differing = [(a, b) for a, b in zip(example.clean, example.corrupted, strict=True) if a != b]
        assert {b for _, b in differing} <= {"0", "1"}
        tens = next(int(w.strip(",.")) for w in example.clean.split() if w.strip(",.").isdigit() and len(w.strip(",.")) == 4) // 10 % 10
        assert set(example.answers) == {str(d) for d in range(tens + 1, 10)}
        assert set(example.distractors) == {str(d) for d in range(tens)}


def test_greater_than_with_two_digit_tokens_counts_whole_years() -> None:
    import random

    from nodesieve.tasks.greater_than import GREATER_THAN

    def is_token(text: str, after: str = "") -> bool:
        return after != " 19" and after + text not in (" 1840", " 1850")  # these years are one token each

    rng = random.Random(0)
    drawn = [GREATER_THAN.example(rng, {"event": ["war"]}, is_token) for _ in range(300)]
    found = [example for example in drawn if example is not None]
    assert 200 < len(found) < 300
    for example in found:
        endings = (*example.answers, *example.distractors)
        assert all(len(ending) == 2 for ending in endings)
        assert min(example.answers) > max(example.distractors)
        century = example.clean[-2:]
        assert century != "19"
        assert len(endings) == (96 if century == "18" else 98)
        assert century != "18" or not {"40", "50"} & {*endings}
        start = max(example.distractors)
        assert f"{century}{start}" in example.clean
        gap = 2 if century == "18" and {f"{int(start) - 1}", f"{int(start) + 1}"} & {"40", "50"} else 1
        assert int(example.answers[0]) - int(start) <= gap  # the two that cutoff_sharpness compares lie on both sides of the start
        assert 0 < int(start) - int(example.distractors[-1]) <= gap
    with pytest.raises(UserError, match="expects a tokenizer that writes a year as"):
        GREATER_THAN.pools(lambda text, after="": not after)


# Without the tags of a format, which mean something; Hypothesis draws what stands in the source, too.
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=12).filter(
    lambda text: bool(text.strip()) and "predict>" not in text
)


def without_answers(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "distractors": [text for text in row["distractors"] if text not in row["answers"]]}


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "clean": TEXT,
            "corrupted": TEXT,
            "answers": st.lists(TEXT, min_size=1, max_size=3, unique=True),
            "distractors": st.lists(TEXT, max_size=2, unique=True),
        }
    ).map(without_answers),
    min_size=10,
    max_size=25,
    unique_by=lambda row: row["clean"],
)
# A row as each format can hold it, and how it is written.
Rows = list[dict[str, Any]]


def one_answer(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "answers": row["answers"][:1], "distractors": row["distractors"][:1]}


def with_ids(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "answers": [len(row["clean"])], "distractors": [1000 + len(row["clean"])]}


def tagged(row: dict[str, Any]) -> dict[str, Any]:
    clean, corrupted = ("p" + row[key].replace("<", "").strip() for key in ("clean", "corrupted"))
    return {"clean": clean, "corrupted": corrupted, "answers": [" " + "".join(row["answers"][:1]).replace("<", "") + "x"], "distractors": []}


def write_csv(rows: Rows, good: str, bad: str) -> str:
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(["", "clean", "corrupted", good, bad])
    writer.writerows(
        [i, row["clean"], row["corrupted"], *(cell[0] if cell else "" for cell in (row["answers"], row["distractors"]))] for i, row in enumerate(rows)
    )
    return out.getvalue()


def write_csv_of_lists(rows: Rows) -> str:
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(["clean", " corrupted", "answers ", " distractors"])  # as people space them
    writer.writerows(
        [row["clean"], row["corrupted"], *(json.dumps(row[key], ensure_ascii=False) for key in ("answers", "distractors"))] for row in rows
    )
    return out.getvalue()


def prompts(rows: Rows, indent: int | None) -> str:
    renamed = [{"clean": r["clean"], "corrupt": r["corrupted"], "answers": r["answers"], "wrong_answers": r["distractors"]} for r in rows]
    return json.dumps({"seq_labels": None, "prompts": renamed}, indent=indent, ensure_ascii=False)


FORMATS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], Callable[[Rows], str]]] = {
    "native": (dict, lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)),
    "prompts": (dict, lambda rows: prompts(rows, 2)),
    "prompts on one line": (dict, lambda rows: prompts(rows, None)),
    "csv with ids": (with_ids, lambda rows: write_csv(rows, "correct_idx", "incorrect_idx")),
    "csv with other ids": (with_ids, lambda rows: write_csv(rows, "clean_answer_idx", "corrupted_answer_idx")),
    "csv with text": (one_answer, lambda rows: write_csv(rows, "answer", "distractor")),
    "csv with lists": (dict, write_csv_of_lists),
    "tags": (
        tagged,
        lambda rows: "".join(
            json.dumps({"clean": f"{r['clean']} <predict>{r['answers'][0][1:]}</predict>", "corrupted": r["corrupted"]}) + "\n" for r in rows
        ),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_any_valid_file_is_read_back(tmp_path: Path, name: str, rows: Rows) -> None:
    adapt, write = FORMATS[name]
    rows = [adapt(row) for row in rows]
    file = tmp_path / "task"
    file.write_text(write(rows), "utf-8", newline="")
    expected = {(r["clean"], r["corrupted"], tuple(r["answers"]), tuple(r["distractors"])) for r in rows}
    if len(expected) < 10:
        return
    task = read_task(file, seed=0)
    assert {(e.clean, e.corrupted, e.answers, e.distractors) for examples in task.splits.values() for e in examples} == expected
    assert task == read_task(file, seed=0)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, data=st.data())
def test_a_broken_file_is_read_or_refused_in_one_line(tmp_path: Path, name: str, rows: Rows, data: st.DataObject) -> None:
    adapt, write = FORMATS[name]
    content = write([adapt(row) for row in rows]).encode()
    start = data.draw(st.integers(0, len(content)))
    content = content[:start] + data.draw(st.binary(max_size=6)) + content[start + data.draw(st.integers(0, 20)) :]
    file = tmp_path / "task"
    file.write_bytes(content)
    try:
        read_task(file, seed=0)
    except UserError as error:
        refusal = str(error)
    else:
        refusal = ""
    assert "\n" not in refusal


GOOD = '{"clean": "a b", "corrupted": "c d", "answers": [" x"], "distractors": [" y"]}'


def test_of_several_names_a_file_s_own_is_read(tmp_path: Path) -> None:
    """As of records: what a name stands for is read where the name itself is not there."""
    file = tmp_path / "task.csv"
    file.write_text("clean,corrupt,corrupted,answer,answers,distractor,distractors,split\na,b,c, d, e, f, g,test\n")
    (example,) = read_task(file, seed=0).splits["test"]
    assert example == Example(clean="a", corrupted="c", answers=(" e",), distractors=(" g",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "got an empty file"),
        ("hello\n", "line 1: expected one of these formats"),
        (GOOD + '\n{"clean": 3, "answers": ["x"]}\n', r"line 2: expected text under 'clean', got 3"),
        (GOOD + '\n{"answers": ["x"]}\n', r"line 2: expected text under 'clean', got nothing"),
        (GOOD + '\n{"clean": "a", "answers": []}\n', r"line 2: expected an answer or a list of them under 'answers'"),
        (GOOD + '\n{"clean": "a", "answers": [""]}\n', r"line 2: expected an answer or a list of them under 'answers'"),
        (GOOD + "\n[1]\n", "line 2: expected a JSON object, got list"),
        (GOOD + "\n{\n", "line 2: expected a JSON object"),
        ('{"clean": "a b", "corrupted": "c d", "answers": [" x"}\n' + GOOD, r"line 1: expected a JSON object, got .*\(Expecting ',' delimiter"),
        ("\n\nclean,corrupted,correct_idx,incorrect_idx\na,b,1,2\na,b,one,2\n", "line 5: expected a token id under 'correct_idx', got 'one'"),
        ('clean,corrupted,correct_idx,incorrect_idx\na,b,1,2\n"a b"x,b,1,2\n', "line 3: expected CSV, got"),
        ('clean,"corrupted"x,correct_idx,incorrect_idx\na,b,1,2\n', "line 1: expected CSV, got"),
        ("\nclean,corrupted,label\na,b,1\n", "line 2: expected a column among correct_idx"),
        (GOOD + '\n{"clean": "a", "answers": ["x"], "split": "dev"}\n', "expected a split of train, validation, test, got 'dev'"),
        (GOOD + '\n{"clean": "a", "answers": ["x"], "split": "test"}\n', "line 1: expected a split in every example or in none"),
        (GOOD, "expected at least 10 different prompts"),
        (
            '{"prompts": [\n{"clean": "a", "corrupt": "b", "answers": ["x"], "wrong_answers": ["x"]}]}',
            "line 2: expected answers that are no distractors",
        ),
        ('{"prompts": [\n\n{"clean": "a"}]}', "line 3: expected an answer or a list of them under 'answers', none empty, got nothing"),
        ('{"prompts": [{"clean": "a", "answers": ["x"]},\n{"clean": ]}', "line 2: expected a JSON object"),
        ("clean,corrupted,correct_idx,incorrect_idx\na,b,1,2\na,b,one,2\n", "line 3: expected a token id under 'correct_idx', got 'one'"),
        ("clean,corrupted,correct_idx,incorrect_idx\na,b,1\n", "line 2: expected 4 fields, got fewer"),
        ("clean,corrupted,label\na,b,1\n", "line 1: expected a column among correct_idx"),
        ("clean,corrupted,correct_idx,distractor\na,b,1,x\n", "line 1: expected incorrect_idx beside correct_idx, got 'distractor'"),
        ("clean,answer,incorrect_idx\na,x,1\n", "line 1: expected distractors or distractor or wrong_answers beside answer, got 'incorrect_idx'"),
        ('clean,corrupted,"answer,distractor\na,b,x,"\n', r"got 'clean', 'corrupted', 'answer,distractor\\na,b,x,'$"),
        ('clean,corrupted,"' + 50 * "answer\n" + '"\n', r"got 'clean', .{185,195}\.\.\.$"),
        ('{"clean": "1 + 2 = <predict></predict>", "corrupted": "x"}\n', "line 1: expected one <predict>answer</predict>"),
        ('{"clean": "\\ud800", "answers": ["x"]}\n', "half a surrogate pair"),
        ('{"clean": "a", "answers": ["\\ud800"]}\n', "under 'answers' .* half a surrogate pair"),
        ("clean,corrupted,answer,clean\na,b,x,c\n", "line 1: expected each column once, got 'clean' twice"),
        ('{"clean": "a <predict>x</predict>", "answers": ["x"]}\n', "expected answers under 'answers' or in a <predict> tag, got both"),
        ("clean,answers\na,\"[' he', ' she']\"\n", "line 2: expected text or a JSON list such as .* under 'answers', got .*he"),
        ("clean,answers\na,[1]\n", "line 2: expected text or a JSON list such as"),
        ('{"clean": "a", "answers": ["x", 3]}\n', "expected text or token ids under 'answers', got both"),
        ('{"clean": "a", "corrupted": "b <predict>y</predict>", "answers": ["x"]}\n', "line 1: expected a <predict> tag in 'clean', too"),
    ],
)
def test_bad_files_are_refused_in_one_line_that_says_where(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text(content, "utf-8")
    with pytest.raises(UserError, match=message) as caught:
        read_task(file, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("clean,corrupted,answer,distractors", "a {i},b, x, y"),
        ("clean,corrupted,answers,distractor", "a {i},b, x, y"),
        (None, '{{"clean": "a {i} <predict>x</predict>", "corrupted": "b", "distractors": [" y"]}}'),
    ],
)
def test_distractors_are_read_under_whichever_name_they_have(tmp_path: Path, header: str | None, row: str) -> None:
    file = tmp_path / "task"
    file.write_text("".join(f"{line}\n" for line in [*([header] if header else []), *(row.format(i=i) for i in range(10))]))
    assert {(e.answers, e.distractors) for e in read_task(file, seed=0).splits["train"]} == {((" x",), (" y",))}


def test_splits_of_a_file_are_put_in_an_order_that_is_drawn(tmp_path: Path) -> None:
    """Files come sorted, and much is judged by the first examples of a split."""
    file = tmp_path / "task.jsonl"
    rows = [{"clean": f"{split} {i}", "answers": [" x" if i < 20 else " y"], "split": split} for split in SPLITS for i in range(40)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    drawn, again = (read_task(file, seed=seed).splits for seed in (0, 1))
    for split in SPLITS:
        assert drawn[split] == again[split]  # so that runs of other seeds are on the same examples
        assert sorted(example.clean for example in drawn[split]) == sorted(row["clean"] for row in rows if row["split"] == split)
        assert 5 <= sum(example.answers == (" x",) for example in drawn[split][:20]) <= 15
    assert [example.clean.split()[1] for example in drawn["train"]] != [example.clean.split()[1] for example in drawn["test"]]


def test_files_that_are_no_text_and_directories_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "task.jsonl"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="expected UTF-8"):
        read_task(file, seed=0)
    with pytest.raises(UserError, match="got the directory"):
        read_task(tmp_path, seed=0)
    with pytest.raises(UserError, match=r"expected a built-in task .* or a file, found neither"):
        load_task("nothing-here", tokenizer)


def test_given_splits_are_kept_and_may_not_overlap(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    rows = [{"clean": f"{split} {i}", "answers": ["x"], "split": split} for split in SPLITS for i in range(2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert {split: len(examples) for split, examples in read_task(file, seed=0).splits.items()} == dict.fromkeys(SPLITS, 2)
    rows.append({**rows[0], "answers": ["y"], "split": "test"})  # another example of a prompt
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with pytest.raises(UserError, match="line 7: expected no prompt in two splits, got one that is in train too: 'train 0'"):
        read_task(file, seed=0)


def test_examples_of_one_prompt_come_into_one_split(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    rows = [{"clean": f"prompt {i}", "corrupted": f"{i} {j}", "answers": ["x"]} for j in range(5) for i in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    splits = read_task(file, seed=0).splits
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 30, "validation": 10, "test": 10}
    assert sum(len({example.clean for example in examples}) for examples in splits.values()) == 10


LINE = {"clean": "1 + 2 =", "corrupted": "1 + 4 =", "answers": ["3"], "distractors": ["5"]}


def test_a_million_lines_are_refused_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text((json.dumps(LINE) + "\n") * 1_000_000, "utf-8")
    with pytest.raises(UserError, match=r"expected at most 200,000 examples.*random sample"):
        read_task(file, seed=0)


def test_names_that_one_shape_has_are_read_in_all(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"clean": f"p{i}", "corrupt": f"q{i}", "answer": " Mary", "wrong_answers": " John"} for i in range(12)]
    table = "clean,corrupt,answer,wrong_answers\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    texts = ("".join(json.dumps(row) + "\n" for row in rows), json.dumps({"prompts": rows}), table)
    tasks = [load_task(rows, tokenizer)]
    for number, text in enumerate(texts):
        (tmp_path / str(number)).write_text(text)
        tasks.append(load_task(tmp_path / str(number), tokenizer))
    examples = [{example for part in task.splits.values() for example in part} for task in tasks]
    assert examples[0] == {Example(clean=f"p{i}", corrupted=f"q{i}", answers=(" Mary",), distractors=(" John",)) for i in range(12)}
    assert all(found == examples[0] for found in examples[1:])
    both = load_task([{**row, "distractors": " Ann", "distractor": " Bob"} for row in rows], tokenizer)  # the name itself comes first
    assert both.splits["test"][0].distractors == (" Ann",)


def test_records_with_columns_of_other_names_and_datasets_by_split(tokenizer: PreTrainedTokenizerFast) -> None:
    records = [{"prompt": f"p{i}", "other": f"q{i}", "target": " Mary", "wrong": " John"} for i in range(20)]
    columns = {"clean": "prompt", "corrupted": "other", "answers": "target", "distractors": "wrong"}
    task = load_task(records, tokenizer, columns=columns)
    assert sum(map(len, task.splits.values())) == 20
    by_split = {"train": records[:5], "validation": records[5:9], "test": records[9:]}
    assert [len(load_task(by_split, tokenizer, columns=columns).splits[split]) for split in SPLITS] == [5, 4, 11]
    with pytest.raises(UserError, match="record 1: expected a column 'question'"):
        load_task(records, tokenizer, columns={**columns, "clean": "question"})
    with pytest.raises(UserError, match="records, validation record 1: expected no prompt in two splits, got one that is in train too"):
        load_task({**by_split, "validation": records[:4]}, tokenizer, columns=columns)
    with pytest.raises(UserError, match="expected a task's name, a file or records, got 5"):
        load_task(5, tokenizer)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="train_size expects a whole number of at least 2, got 1"):
        load_task("ioi", tokenizer, train_size=1)
    with pytest.raises(UserError, match="seed expects a whole number of at least 0, got 'a'"):
        load_task("ioi", tokenizer, seed="a")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"expected the model's tokenizer, such as loaded\.tokenizer, got NoneType"):
        load_task("ioi", None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="seed expects a number below 2147483648, got 2147483648"):
        load_task("ioi", tokenizer, seed=2**31)
    with pytest.raises(UserError, match="columns expects keys among"):
        load_task(records, tokenizer, columns={"answer": "target"})
