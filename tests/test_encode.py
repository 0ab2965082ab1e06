"""Text -> token ids: what is left out, how answers and prompts become tokens, how they are batched."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from conftest import tiny_model, word_tokenizer
from nodesieve.batches import EncodedExample, Split
from nodesieve.config import make_config
from nodesieve.errors import UserError
from nodesieve.models import LoadedModel
from nodesieve.problem import _resampled, make_problem
from nodesieve.tasks.base import SPLITS, Example, Task
from nodesieve.tasks.encode import Encoding, _Encoder, encode, is_one_token
from nodesieve.tasks.load import load_task
from planted import planted_model, planted_task


def one_task(*examples: Example) -> Task:
    return Task(name="t", splits=dict.fromkeys(SPLITS, examples))


GAVE = Example(clean="While Mary gave", corrupted="While John gave", answers=(" Mary",), distractors=(" John",))


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


def test_unequal_lengths_may_be_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    bad = Example(clean="While Mary gave", corrupted="While John and Mary gave", answers=(" Mary",), distractors=(" John",))
    with pytest.raises(UserError, match="expected clean and corrupted prompts of the same token length, got 3 and 5"):
        encode(one_task(GAVE, bad), tokenizer, aligned=True, device=torch.device("cpu"), encoding=Encoding(unequal="error"))


def test_a_word_that_the_tokenizer_does_not_know_is_no_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert is_one_token(tokenizer, " Mary")
    assert tokenizer("Marysville", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]
    assert not is_one_token(tokenizer, " Marysville")


def test_answers_that_the_tokenizer_does_not_know_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    bad = Example(clean="While Mary gave", corrupted="While John gave", answers=(" Marysville",), distractors=(" John",))
    with pytest.raises(UserError, match=r"expected answers that the tokenizer knows, got ' Marysville', which it reads as '\[UNK\]'"):
        encode(one_task(GAVE, bad), tokenizer, aligned=True, device=torch.device("cpu"))


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


def test_a_bootstrap_sample_takes_all_tokens_of_an_answer_or_none() -> None:
    def example(number: int) -> EncodedExample:
        return EncodedExample(clean=(number,), corrupted=None, answers=(1,), distractors=(), prompt=number // 3)

    split = Split(examples=tuple(map(example, range(300))), pad_id=0, device=torch.device("cpu"), padding_side="left")
    drawn = _resampled(split, seed=0)
    times = Counter(first for example in drawn.examples for first in example.clean)
    assert len(drawn) == 300
    assert all(times[number] == times[number - number % 3] for number in range(300))
    assert 0.3 < sum(times[number] == 0 for number in range(300)) / 300 < 0.45  # 1 / e


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


@pytest.mark.parametrize(("answer", "distractor"), [(" Mary", " John"), ("4", "2")])
def test_answers_are_read_as_the_models_turn_begins(answer: str, distractor: str) -> None:
    tokenizer = with_a_space_before_each_text()
    tokenizer.chat_template = "{{ messages[0].content + '\n' }}"
    example = Example(clean="Mary to", corrupted="John to", answers=(answer,), distractors=(distractor,))
    chat = Encoding(chat_template=True)
    found = encode(one_task(example, example), tokenizer, aligned=True, device=torch.device("cpu"), encoding=chat)["test"].examples[0]
    for said, tokens in ((answer, found.answers), (distractor, found.distractors)):
        whole = tokenizer("Mary to\n" + said.lstrip(), add_special_tokens=False)["input_ids"]
        assert list(found.clean + tokens) == whole[: len(found.clean) + 1]


def test_templates_that_write_the_date_write_the_same_on_any_day_and_failing_ones_are_refused() -> None:
    chatty = word_tokenizer()
    for template, refused in (("{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}", False), ("{{ raise_exception('no system turn') }}", True)):
        chatty.chat_template = template
        encoder = _Encoder(chatty, Encoding(chat_template=True), context=None, vocabulary=len(chatty))
        with pytest.raises(UserError, match="takes a user's turn alone, got TemplateError: no system turn") if refused else nullcontext():
            assert encoder._as_turns(["Mary"]) == ["26 Jul 2024 Mary"]


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


@pytest.mark.parametrize(("name", "context"), [("mpt", 64), ("gpt2", 64), ("llama", 64), ("bloom", None)])
def test_every_config_s_word_for_the_longest_prompt_is_known(name: str, context: int | None) -> None:
    prompts = [{"clean": "Mary " * length, "corrupted": "John " * length, "split": split} for length, split in enumerate(2 * SPLITS, 70)]
    rows = [{**prompt, "answers": " Mary", "distractors": " John"} for prompt in prompts]
    tokenizer = word_tokenizer()
    loaded = LoadedModel(id=name, revision=None, model=tiny_model(name, vocabulary=len(tokenizer)), tokenizer=tokenizer)
    with pytest.raises(UserError, match=f"expected prompts of at most {context} tokens") if context else nullcontext():
        make_problem(loaded, load_task(rows, tokenizer), make_config({"force": True}))


def test_a_bootstrap_draws_training_prompts_anew_for_each_seed_and_nothing_else() -> None:
    whole, one, again, other = (
        make_problem(planted_model(), planted_task(), make_config(options)).task
        for options in ({}, *({"bootstrap": True, "seed": seed, "data_seed": 0} for seed in (1, 1, 2)))
    )
    drawn = [[example.prompt for example in task["train"].examples] for task in (whole, one, again, other)]
    assert drawn[1] == drawn[2]
    assert len({*map(tuple, drawn)}) == 3
    assert all({*prompts} < {*drawn[0]} and len(prompts) == len(drawn[0]) for prompts in drawn[1:])
    assert all(task[split].examples == whole[split].examples for task in (one, other) for split in ("validation", "test"))
