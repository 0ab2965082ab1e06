"""Text -> token ids: a `Task` and a tokenizer -> one `Split` a split, with an account of what was left out.

Prompts are encoded as the tokenizer does by default (a BOS token where it adds one), or as a user's turn of its chat template. An answer counts
by its first token, or by all of them: then each further token makes an example of its own, whose prompts go on with the tokens before it. Under
the counterfactual ablation clean and corrupted prompts are compared position by position, so pairs of different token length are left
out, counted and shown, or refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch

from nodesieve.batches import EncodedExample, PaddingSide, Split
from nodesieve.errors import UserError
from nodesieve.tasks.base import SPLITS, Answer, Example, SplitName, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Unequal = Literal["skip", "error"]
AnswerTokens = Literal["first", "all"]
# Before chat templates that write the date: a run is to have the same prompts on any day.
ON_ONE_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
CHUNK = 4096  # texts given to the tokenizer at once


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How prompts and answers become token ids; the options of the same names say what each is."""

    unequal: Unequal = "skip"
    answer_tokens: AnswerTokens = "first"
    chat_template: bool = False
    padding_side: PaddingSide = "left"


@dataclass(frozen=True, kw_only=True)
class EncodedTask:
    """A task ready to run: splits of token ids, what was left out of each and why, and the first examples as the model sees them."""

    name: str
    splits: dict[str, Split]
    metrics: tuple[str, ...]
    skipped: dict[str, dict[str, int]]
    shown: tuple[str, ...]
    left_out: dict[str, str]  # one pair of each split that was skipped for its lengths
    source: str = ""  # as in `Task`

    def __getitem__(self, split: SplitName) -> Split:
        return self.splits[split]


def is_one_token(tokenizer: PreTrainedTokenizerBase, text: str, after: str = "") -> bool:
    """`IsToken` for a tokenizer."""
    ids = going_on(tokenizer, text)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        return False
    return not after or going_on(tokenizer, after + text) == going_on(tokenizer, after) + ids


def going_on(tokenizer: PreTrainedTokenizerBase, text: str, before: str = "") -> list[int]:
    """Token ids of a text that goes on from another one.

    Some tokenizers (Llama 2's, Mistral's, Phi-3's) put a space of their own before whatever they are given, which is not there within a text. So it
    is read behind a letter, or, where it does not begin with a space, at the start of a line; alone only if the two run together into other tokens.

    Args:
        before: what it goes on from, where that is known.
    """
    before = before or ("a" if text[:1].isspace() else "\n")
    start, both, alone = (list[int](ids) for ids in tokenizer([before, before + text, text], add_special_tokens=False)["input_ids"])
    return both[len(start) :] if both[: len(start)] == start else alone


def encode(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    aligned: bool,
    device: torch.device,
    context: int | None = None,
    vocabulary: int | None = None,
    needed: Sequence[SplitName] = SPLITS,
    encoding: Encoding | None = None,
) -> EncodedTask:
    """Encode the splits that are needed.

    Args:
        aligned: corrupted prompts are needed, of as many tokens as the clean ones, as by the counterfactual ablation: pairs of different length are
            left out.
        context: the longest prompt that the model reads, in tokens.
        vocabulary: how many tokens the model knows; by default as many as the tokenizer does.

    Raises:
        UserError: an example cannot be scored, or too few are left.
    """
    encoding = encoding or Encoding()
    known = vocabulary or len(tokenizer)
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None and i < known), 0)  # any will do: it is masked
    encoder = _Encoder(tokenizer, encoding, context=context, vocabulary=known)
    splits: dict[str, Split] = {}
    skipped: dict[str, dict[str, int]] = {}
    left_out: dict[str, str] = {}
    for name in needed:
        kept = []
        unequal = 0
        for example, pieces in encoder.examples((*task.splits[name], *(task.redrawn if name == "train" else ()))):
            first = pieces[0]
            if aligned and first.corrupted is None:
                raise UserError(
                    "--ablation counterfactual expects a corrupted prompt for every example, "
                    f"got some without in the {name} split, e.g. {example.clean!r}; use mean or zero"
                )
            if aligned and first.corrupted is not None and len(first.corrupted) != len(first.clean):
                if encoding.unequal == "error":
                    raise UserError(
                        f"expected clean and corrupted prompts of the same token length, got {len(first.clean)} and {len(first.corrupted)} for "
                        f"{example.clean!r} / {example.corrupted!r}; leave such pairs out with --unequal skip, or use --ablation mean"
                    )
                unequal += 1
                left_out.setdefault(name, f"{example.clean!r} / {example.corrupted!r}")
            else:
                kept += pieces
        if len(kept) < 2:
            why = f"; {unequal} pairs have prompts of different token length, e.g. {left_out[name]}" if unequal else ""
            raise UserError(f"task {task.name} expects at least 2 {name} examples, got {len(kept)}{why}")
        skipped[name] = {"unequal_length": unequal}
        splits[name] = Split(examples=tuple(kept), pad_id=pad_id, device=device, padding_side=encoding.padding_side)
    return EncodedTask(
        name=task.name,
        source=task.source,
        splits=splits,
        metrics=task.metrics,
        skipped=skipped,
        shown=tuple(encoder.show(example) for example in splits["validation" if "validation" in needed else needed[-1]].examples[:3]),
        left_out=left_out,
    )


def _closing_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the tokenizer puts behind a text by default, such as an end of it, after which there would be nothing to say."""
    full, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return next((len(full) - end for end in range(len(full), 0, -1) if full[:end][-len(plain) :] == plain), 0)


class _Encoder:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, *, context: int | None, vocabulary: int) -> None:
        self._tokenizer, self._encoding = tokenizer, encoding
        self._context, self._vocabulary = context, vocabulary
        self._known: dict[Answer, tuple[int, ...]] = {}  # answers repeat much more often than prompts do
        self._closing = _closing_tokens(tokenizer)
        if encoding.chat_template and not getattr(tokenizer, "chat_template", None):
            raise UserError("--chat-template expects a tokenizer with a chat template, got one without")

    def examples(self, examples: Sequence[Example]) -> Iterator[tuple[Example, list[EncodedExample]]]:
        """Each example with its encoded form: one, or one for each token of its answer."""
        numbers: dict[str, int] = {}  # of prompts: what is said of one twice is no further evidence
        for start in range(0, len(examples), CHUNK):
            part = examples[start : start + CHUNK]
            clean = self._prompts([example.clean for example in part])
            corrupted = iter(self._prompts([example.corrupted for example in part if example.corrupted is not None]))
            for example, ids in zip(part, clean, strict=True):
                number = numbers.setdefault(example.clean, len(numbers))
                yield example, self._one(example, number, ids, None if example.corrupted is None else next(corrupted))

    def _one(self, example: Example, number: int, clean: tuple[int, ...], corrupted: tuple[int, ...] | None) -> list[EncodedExample]:
        answers = [self._answer(answer, example) for answer in example.answers]
        distractors = [self._answer(distractor, example) for distractor in example.distractors]
        if self._begin_with_a_lone_space([*answers, *distractors]):
            space = answers[0][:1]
            clean, corrupted = clean + space, None if corrupted is None else corrupted + space
            answers, distractors = [row[1:] for row in answers], [row[1:] for row in distractors]
        wanted, unwanted = ({row[0]: None for row in rows} for rows in (answers, distractors))
        if wanted.keys() & unwanted.keys():
            raise UserError(
                f"expected answers and distractors that differ in their first token, got answers {self._texts(example.answers)} and distractors "
                f"{self._texts(example.distractors)} for the prompt {example.clean!r}"
            )
        if not clean or corrupted == ():
            raise UserError(f"expected prompts of at least one token, got {example.clean!r} / {example.corrupted!r}")
        highest = max(token for row in (clean, corrupted or (), *answers, *distractors) for token in row)
        if highest >= self._vocabulary:
            raise UserError(
                f"expected a tokenizer of the model's {self._vocabulary} tokens, got one that gives token {highest} for {example.clean!r}; is it of "
                "this model?"
            )
        first = EncodedExample(clean=clean, corrupted=corrupted, answers=tuple(wanted), distractors=tuple(unwanted), prompt=number)
        found = [first, *(self._further(first, answers[0]) if self._encoding.answer_tokens == "all" else ())]
        longest = max(len(found[-1].clean), len(found[-1].corrupted or ()))
        if self._context is not None and longest > self._context:
            raise UserError(f"expected prompts of at most {self._context} tokens (the model's context), got {longest}: {example.clean[:60]!r}...")
        return found

    def _begin_with_a_lone_space(self, rows: list[tuple[int, ...]]) -> bool:
        """A space that is a token of its own says nothing yet; it then belongs to the prompt."""
        return len({row[0] for row in rows}) == 1 and all(len(row) > 1 for row in rows) and not self._tokenizer.decode([rows[0][0]]).strip()

    def _further(self, first: EncodedExample, answer: tuple[int, ...]) -> Iterator[EncodedExample]:
        """An example for each token of the answer after its first. Distractors part from the answer at the first one, if they do at all."""
        for place in range(1, len(answer)):
            so_far = answer[:place]
            yield replace(
                first,
                clean=first.clean + so_far,
                corrupted=None if first.corrupted is None else first.corrupted + so_far,
                answers=(answer[place],),
                distractors=(),
            )

    def _prompts(self, texts: list[str]) -> list[tuple[int, ...]]:
        if not texts:
            return []
        if self._encoding.chat_template:
            return [tuple(ids) for ids in self._tokenizer(self._as_turns(texts), add_special_tokens=False)["input_ids"]]
        return [tuple(ids[: len(ids) - self._closing]) for ids in self._tokenizer(texts)["input_ids"]]

    def _as_turns(self, texts: list[str]) -> list[str]:
        """Each as a user's turn, behind which the model's begins; on one day for all, since templates may write the date."""
        turns = [[{"role": "user", "content": text}] for text in texts]
        try:
            template = self._tokenizer.get_chat_template()
            one_day = ON_ONE_DAY * ("strftime_now" in template) + template
            rendered: list[str] = self._tokenizer.apply_chat_template(turns, chat_template=one_day, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program of its own
            raise UserError(f"--chat-template expects a template that takes a user's turn alone, got {type(error).__name__}: {error}") from error
        return rendered

    @cached_property
    def _turn(self) -> str:
        """In chat mode what an answer comes behind, first and without a space; any prompt's ends alike."""
        return self._as_turns(["a"])[0] if self._encoding.chat_template else ""

    def _answer(self, answer: Answer, example: Example) -> tuple[int, ...]:
        if answer not in self._known:
            if isinstance(answer, int):
                if not 0 <= answer < self._vocabulary:
                    raise UserError(
                        f"expected token ids from 0 to {self._vocabulary - 1}, this model's vocabulary, got {answer} for {example.clean!r}; "
                        "the file was made for another tokenizer"
                    )
                self._known[answer] = (answer,)
            else:
                ids = going_on(self._tokenizer, answer.lstrip(" ") if self._turn else answer, before=self._turn)
                self._known[answer] = tuple(ids)
                if not self._known[answer]:
                    raise UserError(f"expected answers of at least one token, got {answer!r} for the prompt {example.clean!r}")
                unknown = self._tokenizer.unk_token
                if unknown is not None and self._tokenizer.unk_token_id in ids and unknown not in answer:
                    raise UserError(f"expected answers that the tokenizer knows, got {answer!r}, which it reads as {unknown!r}")
        return self._known[answer]

    def _texts(self, answers: tuple[Answer, ...]) -> tuple[str, ...]:
        return tuple(self._tokenizer.decode([answer]) if isinstance(answer, int) else answer for answer in answers)

    def show(self, example: EncodedExample) -> str:
        """An example as the model sees it: prompt and answers decoded from their tokens."""
        answers, distractors = ([self._tokenizer.decode([token]) for token in tokens[:3]] for tokens in (example.answers, example.distractors))
        wrong = f" not {' '.join(map(repr, distractors))}" if distractors else ""
        return f"{self._tokenizer.decode(list(example.clean))!r} -> {' '.join(map(repr, answers))}{wrong}"
