"""Built-in tasks and task files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from conftest import word_tokenizer
from nodesieve.errors import UserError
from nodesieve.tasks import BUILTINS, words
from nodesieve.tasks.base import SPLITS, Example, Task
from nodesieve.tasks.encode import encode
from nodesieve.tasks.load import load_task
from nodesieve.tasks.readers import read_task

NAMES = {*words.FEMALE_NAMES, *words.MALE_NAMES, *words.FURTHER_NAMES}
NOUNS = {*words.PLACES, *words.OBJECTS, *words.EVENTS, *words.ROLES}


def words_of(examples: tuple[Example, ...], among: set[str]) -> set[str]:
    return {word.strip(".,'") for example in examples for text in (example.clean, example.corrupted or "") for word in text.split()} & among


@pytest.mark.parametrize("name", BUILTINS)
def test_splits_have_the_right_sizes_and_share_no_words(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    task = load_task(name, tokenizer)
    assert {split: len(examples) for split, examples in task.splits.items()} == {"train": 512, "validation": 200, "test": 200}
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


def templates(name: str) -> tuple[str, ...]:
    from nodesieve.tasks import gendered_pronoun, greater_than, ioi

    return {"ioi": ioi, "greater_than": greater_than, "gendered_pronoun": gendered_pronoun}[name].TEMPLATES


@pytest.mark.parametrize("name", BUILTINS)
def test_the_same_seed_gives_the_same_task_and_another_seed_another(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert load_task(name, tokenizer, seed=1) == load_task(name, tokenizer, seed=1)
    assert load_task(name, tokenizer, seed=1) != load_task(name, tokenizer, seed=2)


@pytest.mark.parametrize("name", BUILTINS)
def test_clean_and_corrupted_prompts_have_the_same_length(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode(load_task(name, tokenizer, train_size=100), tokenizer, aligned=True, device=torch.device("cpu"))
    assert encoded.skipped == dict.fromkeys(SPLITS, 0)
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

    example = GREATER_THAN.example(random.Random(0), {"event": ["war"]}, lambda text: True)
    assert example is not None
    assert all(len(answer) == 2 for answer in (*example.answers, *example.distractors))
    assert min(example.answers) > max(example.distractors)


def test_pairs_of_different_length_are_left_out_counted_and_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    good = Example(clean="When Mary gave", corrupted="When John gave", answers=(" Mary",), distractors=(" John",))
    bad = Example(clean="When Mary gave", corrupted="When John and Mary gave", answers=(" Mary",), distractors=(" John",))
    splits = dict.fromkeys(SPLITS, (good, good, bad))
    encoded = encode(Task(name="t", splits=splits), tokenizer, aligned=True, device=torch.device("cpu"))
    assert encoded.skipped == dict.fromkeys(SPLITS, 1)
    assert len(encode(Task(name="t", splits=splits), tokenizer, aligned=False, device=torch.device("cpu"))["test"]) == 3
    with pytest.raises(UserError, match=r"different token length, e\.g\. 'When Mary gave'"):
        encode(Task(name="t", splits=dict.fromkeys(SPLITS, (bad, bad))), tokenizer, aligned=True, device=torch.device("cpu"))


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=12).filter(str.strip)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "clean": TEXT,
            "corrupted": TEXT,
            "answers": st.lists(TEXT, min_size=1, max_size=3, unique=True),
            "distractors": st.lists(TEXT, max_size=2, unique=True),
        }
    ),
    min_size=10,
    max_size=25,
    unique_by=lambda row: row["clean"],
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS)
def test_any_valid_file_is_read_back(tmp_path: Path, rows: list[dict[str, object]]) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    task = read_task(file, seed=0)
    read = {example for examples in task.splits.values() for example in examples}
    assert {(e.clean, e.corrupted, e.answers, e.distractors) for e in read} == {
        (r["clean"], r["corrupted"], tuple(r["answers"]), tuple(r["distractors"]))
        for r in rows  # type: ignore[arg-type]
    }
    assert task == read_task(file, seed=0)


GOOD = '{"clean": "a b", "corrupted": "c d", "answers": [" x"], "distractors": [" y"]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "got an empty file"),
        ("hello\n", "line 1: expected one of these formats"),
        (GOOD + '\n{"clean": 3, "answers": ["x"]}\n', r"line 2: expected text under 'clean', got 3"),
        (GOOD + '\n{"answers": ["x"]}\n', r"line 2: expected text under 'clean', got nothing"),
        (GOOD + '\n{"clean": "a", "answers": []}\n', r"line 2: expected a list of strings under 'answers'"),
        (GOOD + '\n{"clean": "a", "answers": [""]}\n', r"line 2: expected a list of strings under 'answers'"),
        (GOOD + "\n[1]\n", "line 2: expected a JSON object, got list"),
        (GOOD + "\n{\n", "line 2: expected a JSON object"),
        (GOOD + '\n{"clean": "a", "answers": ["x"], "split": "dev"}\n', "expected a split of train, validation, test, got 'dev'"),
        (GOOD + '\n{"clean": "a", "answers": ["x"], "split": "test"}\n', "line 1: expected a split in every example or in none"),
        (GOOD, "expected at least 10 different examples"),
    ],
)
def test_bad_files_are_refused_in_one_line_that_says_where(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "task.jsonl"
    file.write_text(content, "utf-8")
    with pytest.raises(UserError, match=message) as caught:
        read_task(file, seed=0)
    assert "\n" not in str(caught.value)


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
    rows.append({**rows[0], "split": "test"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with pytest.raises(UserError, match="line 7: expected no example in two splits"):
        read_task(file, seed=0)
