"""Greater than (Hanna et al., arXiv 2305.00586): "The war lasted from the year 1732 to the year 17" -> a later year.

Where the tokenizer has two-digit numbers as tokens, the answers are all later two-digit endings and the distractors all earlier ones from
02 on and the start year's own; years that it does not write as a century and such an ending (GPT-2's has " 1946" as one token) are left out.
Where it splits numbers into digits, the next digit is judged: answers are greater than the start year's tens digit, distractors are smaller, and
an equal digit counts neither way. The corrupted prompt starts in the year ..01.
"""

from __future__ import annotations

import random

from nodesieve.errors import UserError
from nodesieve.tasks.base import Builtin, Example, IsToken, Pools
from nodesieve.tasks.words import EVENTS

TEMPLATES = (
    "The {event} lasted from the year {century}{start} to the year {century}",
    "The {event} began in the year {century}{start} and ended in the year {century}",
    "The long {event} went on from {century}{start} until the year {century}",
    "Their {event} started in {century}{start} and was over by the year {century}",
)
CENTURIES = ("11", "12", "13", "14", "15", "16", "17", "18", "19")


def pools(is_token: IsToken) -> Pools:
    if not any(_ends_in(century, "42" if is_token("42") else "4", is_token) for century in CENTURIES):
        raise UserError(
            "task greater_than expects a tokenizer that writes a year as its century and two digits, or digit by digit, got one that groups digits "
            "otherwise; give your own prompts as a JSONL file"
        )
    return {"event": [event for event in EVENTS if is_token(" " + event)]}


def _ends_in(century: str, ending: str, is_token: IsToken) -> bool:
    """Is that how the tokenizer would go on after the century?"""
    return is_token(ending, after=f" {century}")


def example(rng: random.Random, words: Pools, is_token: IsToken) -> Example | None:
    by_digit = not is_token("42")
    template, event, century = rng.choice(TEMPLATES), rng.choice(words["event"]), rng.choice(CENTURIES)
    if by_digit:
        tens = rng.randint(1, 8)
        start = f"{tens}{rng.randint(0, 9)}"
        answers = tuple(str(digit) for digit in range(tens + 1, 10))
        distractors = tuple(str(digit) for digit in range(tens))
    else:
        year = rng.randint(3, 98)
        start = f"{year:02d}"
        endings = [f"{other:02d}" for other in range(2, 100) if _ends_in(century, f"{other:02d}", is_token)]
        if start not in endings or start == endings[-1] or not _ends_in(century, "01", is_token):
            return None
        answers = tuple(ending for ending in endings if ending > start)
        distractors = (start, *(ending for ending in endings if ending < start))  # the last is next to the start, as `cutoff_sharpness` has it
    prompt = template.format(event=event, century=century, start=start)
    return Example(
        clean=prompt,
        corrupted=template.format(event=event, century=century, start="01"),
        answers=answers,
        distractors=distractors,
    )


GREATER_THAN = Builtin(
    name="greater_than",
    description="greater than: a span of years ends after it starts",
    pools=pools,
    example=example,
    metrics=("prob_diff", "cutoff_sharpness"),
)
