"""Built-in tasks and task files."""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from conftest import word_tokenizer
from nodesieve.batches import EncodedExample, Split
from nodesieve.errors import UserError
from nodesieve.tasks import BUILTINS, words
from nodesieve.tasks.base import SPLITS, Example, Task
from nodesieve.tasks.encode import Encoding, encode, is_one_token
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
    with pytest.raises(UserError, match="expects a tokenizer that writes a year as"):
        GREATER_THAN.pools(lambda text, after="": not after)


def test_pairs_of_different_length_are_left_out_counted_and_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    good = Example(clean="While Mary gave", corrupted="While John gave", answers=(" Mary",), distractors=(" John",))
    bad = Example(clean="While Mary gave", corrupted="While John and Mary gave", answers=(" Mary",), distractors=(" John",))
    splits = dict.fromkeys(SPLITS, (good, good, bad))
    encoded = encode(Task(name="t", splits=splits), tokenizer, aligned=True, device=torch.device("cpu"))
    assert encoded.skipped == {split: {"unequal_length": 1} for split in SPLITS}
    assert encoded.left_out == dict.fromkeys(SPLITS, "'While Mary gave' / 'While John and Mary gave'")
    assert len(encode(Task(name="t", splits=splits), tokenizer, aligned=False, device=torch.device("cpu"))["test"]) == 3
    with pytest.raises(UserError, match=r"different token length, e\.g\. 'While Mary gave'"):
        encode(Task(name="t", splits=dict.fromkeys(SPLITS, (bad, bad))), tokenizer, aligned=True, device=torch.device("cpu"))


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=12).filter(str.strip)


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
        ('clean,corrupted,"answer,distractor\na,b,x,"\n', r"got 'clean', 'corrupted', 'answer,distractor\\na,b,x,'$"),
        ('clean,corrupted,"' + 50 * "answer\n" + '"\n', r"got 'clean', .{185,195}\.\.\.$"),
        ('{"clean": "1 + 2 = <predict></predict>", "corrupted": "x"}\n', "line 1: expected one <predict>answer</predict>"),
        ('{"clean": "\\ud800", "answers": ["x"]}\n', "half a surrogate pair"),
        ('{"clean": "a", "answers": ["\\ud800"]}\n', "under 'answers' .* half a surrogate pair"),
        ("clean,corrupted,answer,clean\na,b,x,c\n", "line 1: expected each column once, got 'clean' twice"),
        ('{"clean": "a", "answers": ["x", 3]}\n', "expected text or token ids under 'answers', got both"),
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


def test_records_with_columns_of_other_names_and_datasets_by_split(tokenizer: PreTrainedTokenizerFast) -> None:
    records = [{"prompt": f"p{i}", "other": f"q{i}", "target": " Mary", "wrong": " John"} for i in range(20)]
    columns = {"clean": "prompt", "corrupted": "other", "answers": "target", "distractors": "wrong"}
    task = load_task(records, tokenizer, columns=columns)
    assert sum(map(len, task.splits.values())) == 20
    by_split = {"train": records[:5], "validation": records[5:9], "test": records[9:]}
    assert [len(load_task(by_split, tokenizer, columns=columns).splits[split]) for split in SPLITS] == [5, 4, 11]
    with pytest.raises(UserError, match="record 1: expected a column 'question'"):
        load_task(records, tokenizer, columns={**columns, "clean": "question"})
    with pytest.raises(UserError, match="columns expects keys among"):
        load_task(records, tokenizer, columns={"answer": "target"})


def one_task(*examples: Example) -> Task:
    return Task(name="t", splits=dict.fromkeys(SPLITS, examples))


GAVE = Example(clean="While Mary gave", corrupted="While John gave", answers=(" Mary",), distractors=(" John",))


def test_unequal_lengths_may_be_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    bad = Example(clean="While Mary gave", corrupted="While John and Mary gave", answers=(" Mary",), distractors=(" John",))
    with pytest.raises(UserError, match="expected clean and corrupted prompts of the same token length, got 3 and 5"):
        encode(one_task(GAVE, bad), tokenizer, aligned=True, device=torch.device("cpu"), encoding=Encoding(unequal="error"))


def test_a_word_that_the_tokenizer_does_not_know_is_no_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert is_one_token(tokenizer, " Mary")
    assert tokenizer("Marysville", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]
    assert not is_one_token(tokenizer, " Marysville")


def test_ids_outside_the_vocabulary_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    bad = Example(clean="While Mary gave", corrupted="While John gave", answers=(10**6,), distractors=(3,))
    with pytest.raises(UserError, match=r"expected token ids from 0 to .* got 1000000 .* another tokenizer"):
        encode(one_task(GAVE, bad), tokenizer, aligned=True, device=torch.device("cpu"))


def test_answers_of_several_tokens_count_by_the_first_or_by_each(tokenizer: PreTrainedTokenizerFast) -> None:
    example = Example(clean="While Mary and", corrupted="While John and", answers=(" Mary and John",), distractors=(" John and Mary",))
    mary, and_, john = tokenizer("Mary and John")["input_ids"]
    first = encode(one_task(example, GAVE), tokenizer, aligned=True, device=torch.device("cpu"))["test"].examples
    assert [e.answers for e in first] == [(mary,), (mary,)]
    every = encode(one_task(example, GAVE), tokenizer, aligned=True, device=torch.device("cpu"), encoding=Encoding(answer_tokens="all"))[
        "test"
    ].examples
    assert [e.answers for e in every] == [(mary,), (and_,), (john,), (mary,)]
    assert [e.prompt for e in every] == [0, 0, 0, 1]
    assert [e.distractors for e in every] == [(john,), (), (), (john,)]
    assert every[2].clean[-2:] == (every[2].corrupted or ())[-2:] == (mary, and_)


def test_a_space_that_is_a_token_of_its_own_belongs_to_the_prompt() -> None:
    raw = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "_": 2, "3": 3, "5": 4}, unk_token="[UNK]"))
    raw.normalizer = normalizers.Replace(" ", "_")
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Replace("_", " ")
    digits = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
    example = Example(clean="a a", corrupted="aaa", answers=(" 3",), distractors=(" 5",))
    found = encode(one_task(example, example), digits, aligned=True, device=torch.device("cpu"))["test"].examples[0]
    assert (found.clean, found.corrupted, found.answers, found.distractors) == ((1, 2, 1, 2), (1, 1, 1, 2), (3,), (4,))


def with_a_space_before_each_text() -> PreTrainedTokenizerFast:
    """As Llama 2's, Mistral's and Phi-3's."""
    words = {word: number for number, word in enumerate(("[UNK]", "</s>", "_", "_to", "_Mary", "_John", "_17", "4", "2", "\n"))}
    merges = [("_", "t"), ("_t", "o"), ("_", "M"), ("_M", "a"), ("_Ma", "r"), ("_Mar", "y"), ("_", "J"), ("_J", "o"), ("_Jo", "h"), ("_Joh", "n")]
    merges += [("_", "1"), ("_1", "7")]
    for left, right in merges:
        for piece in (left, right, left + right):
            words.setdefault(piece, len(words))
    raw = Tokenizer(models.BPE(words, merges, unk_token="[UNK]"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
    raw.decoder = decoders.Replace("_", " ")
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", eos_token="</s>")


@pytest.mark.parametrize(("clean", "answer", "distractor"), [("Mary to", " Mary", " John"), ("to 17", "4", "2"), ("to 17", " 4", " 2")])
def test_answers_are_read_as_they_go_on_from_the_prompt(clean: str, answer: str, distractor: str) -> None:
    tokenizer = with_a_space_before_each_text()
    example = Example(clean=clean, corrupted=clean, answers=(answer,), distractors=(distractor,))
    found = encode(one_task(example, example), tokenizer, aligned=True, device=torch.device("cpu"))["test"].examples[0]
    assert list(found.clean + found.answers) == tokenizer(clean + answer)["input_ids"]
    assert list(found.clean + found.distractors) == tokenizer(clean + distractor)["input_ids"]


def test_built_in_tasks_count_words_as_they_go_on_from_others() -> None:
    tokenizer = with_a_space_before_each_text()
    assert [is_one_token(tokenizer, text) for text in (" Mary", "4", "42", " 4", "Mary")] == [True, True, False, False, False]


def test_padding_is_a_token_of_the_model(tokenizer: PreTrainedTokenizerFast) -> None:
    """A token added for padding alone has no embedding."""
    assert tokenizer.pad_token_id == 1
    for vocabulary, pad_id in ((len(tokenizer), 1), (1, 0)):
        example = Example(clean="[UNK]", corrupted="[UNK]", answers=(0,), distractors=())
        split = encode(one_task(example, example), tokenizer, aligned=True, device=torch.device("cpu"), vocabulary=vocabulary)["test"]
        assert split.pad_id == pad_id


def test_what_a_tokenizer_puts_behind_a_prompt_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    """After an end of the text there is nothing to say."""
    closing = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), unk_token="[UNK]", pad_token="[PAD]")
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(single="[PAD] $A [PAD] [PAD]", special_tokens=[("[PAD]", 1)])
    found = encode(one_task(GAVE, GAVE), closing, aligned=True, device=torch.device("cpu"))["test"].examples[0]
    assert list(found.clean) == [1, *tokenizer(GAVE.clean)["input_ids"]]


def test_prompts_can_go_through_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="expects a tokenizer with a chat template"):
        encode(one_task(GAVE, GAVE), tokenizer, aligned=True, device=torch.device("cpu"), encoding=Encoding(chat_template=True))
    chatty = word_tokenizer()
    chatty.chat_template = "{% for m in messages %}( {{ m.content }} ){% endfor %}{% if add_generation_prompt %} :{% endif %}"
    found = encode(one_task(GAVE, GAVE), chatty, aligned=True, device=torch.device("cpu"), encoding=Encoding(chat_template=True))["test"].examples[0]
    assert chatty.decode(list(found.clean)) == "( While Mary gave ) :"


def test_prompts_beyond_the_context_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="expected prompts of at most 2 tokens"):
        encode(one_task(GAVE, GAVE), tokenizer, aligned=True, device=torch.device("cpu"), context=2)


def test_batches_hold_like_lengths_and_say_which_they_are() -> None:
    rows = tuple(EncodedExample(clean=(1,) * n, corrupted=None, answers=(0,), distractors=(), prompt=i) for i, n in enumerate((9, 2, 8, 3, 9, 2)))
    split = Split(examples=rows, pad_id=0, device=torch.device("cpu"), padding_side="right")
    batches = list(split.batches(2))
    assert [batch.index.tolist() for batch in batches] == [[1, 5], [3, 2], [0, 4]]
    assert batches[1].clean.attention_mask.tolist() == [[1] * 3 + [0] * 5, [1] * 8]
    assert batches[1].clean.last.tolist() == [2, 7]
    drawn = [split.training_batch(step, 2, seed=0).index.tolist() for step in range(3)]
    assert sorted(i for index in drawn for i in index) == list(range(6))
    assert all(abs(len(rows[a].clean) - len(rows[b].clean)) <= 5 for a, b in drawn)
