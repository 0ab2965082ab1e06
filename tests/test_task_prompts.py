"""What the prompts of each built-in task say and what is right after them; corrupted ones differ in what decides the answer."""

from __future__ import annotations

import re

from conftest import word_tokenizer
from nodesieve.tasks.base import Example
from nodesieve.tasks.load import load_task
from nodesieve.tasks.words import CAPITALS, FEMALE_NAMES, MALE_NAMES, NUMBERED


def drawn(name: str) -> list[Example]:
    """Of all splits."""
    task = load_task(name, word_tokenizer(), train_size=64, validation_size=64)
    return [example for examples in task.splits.values() for example in examples]


def words(text: str | None) -> list[str]:
    return re.findall(r"\w+", text or "")


def test_ioi_names_the_subject_twice_and_its_corrupted_prompts_three_others_once() -> None:
    names, first = {*FEMALE_NAMES, *MALE_NAMES}, set()
    for example in drawn("ioi"):
        own, others = ([word for word in words(text) if word in names] for text in (example.clean, example.corrupted))
        (indirect,), (subject,) = ([str(answer).strip() for answer in part] for part in (example.answers, example.distractors))
        assert sorted(own) == sorted([indirect, subject, subject])
        assert own[2] == subject
        assert len({*others} - {*own}) == len(others) == 3
        first.add(own[0] == subject)
    assert first == {True, False}  # ABBA and BABA


def test_gendered_pronoun_has_names_of_either_gender() -> None:
    for example in drawn("gendered_pronoun"):
        for text, pronoun in ((example.clean, example.answers), (example.corrupted, example.distractors)):
            female = {*words(text)} & {*FEMALE_NAMES} - {*MALE_NAMES}
            assert bool(female) == (pronoun == (" she",))


def test_capital_city_asks_for_a_country_s_capital() -> None:
    for example in drawn("capital_city"):
        for text, (capital,) in ((example.clean, example.answers), (example.corrupted, example.distractors)):
            assert {f"{word}/{str(capital).strip()}" for word in words(text)} & {*CAPITALS}


def test_subject_verb_agreement_goes_by_the_number_of_its_subject() -> None:
    several = {pair.split("/")[1] for pair in NUMBERED}
    for example in drawn("subject_verb_agreement"):
        plural = {*words(example.clean)} & several
        assert example.answers == ((" are", " were", " have") if plural else (" is", " was", " has"))
        assert bool(plural) != bool({*words(example.corrupted)} & several)
        assert not {*example.answers} & {*example.distractors}


def test_docstring_asks_for_the_argument_after_those_described() -> None:
    def parts(text: str | None) -> tuple[list[str], list[str]]:
        (signature,) = re.findall(r"\(self, (.*)\)", text or "")
        return signature.split(", "), re.findall(r":param (\w+):", text or "")

    for example in drawn("docstring"):
        (arguments, described), (others, described_there) = parts(example.clean), parts(example.corrupted)
        assert described == arguments[:2]
        assert example.answers == (f" {arguments[2]}",)
        assert {*example.distractors} == {f" {word}" for word in (*arguments[:2], arguments[3])}
        assert not {*others} & {*described_there}
        assert not {*arguments} & {*others, *described_there}


def test_induction_asks_for_the_word_after_those_said_again() -> None:
    def parts(text: str | None) -> list[list[str]]:
        begun = (text or "").removeprefix("Here is a list:").removeprefix("Remember:")
        return [words(part) for part in re.split(r"\. (?:Here it is again|Repeat):", begun)]

    for example in drawn("induction"):
        (said, again), (others, as_well) = parts(example.clean), parts(example.corrupted)
        assert said[: len(again)] == again == as_well
        assert example.answers == (f" {said[len(again)]}",)
        assert str(example.distractors[0]).strip() in said[len(again) + 1 :]
        assert not {*said} & {*others}
