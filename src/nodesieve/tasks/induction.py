"""Induction: a list of words begins again, and goes on as it did before. The corrupted list was another one, so nothing says what comes."""

from __future__ import annotations

import random

from nodesieve.tasks.base import Builtin, Example, IsToken, Pools
from nodesieve.tasks.words import EVENTS, OBJECTS, PLACES, ROLES

LENGTH = 8  # words of the list
SHOWN = (2, 3, 4, 5)  # how many of them are said again
TEMPLATES = ("Here is a list: {first}. Here it is again: {again}", "Remember:{first}. Repeat:{again}")


def pools(is_token: IsToken) -> Pools:
    return {"word": [word for word in dict.fromkeys((*OBJECTS, *PLACES, *ROLES, *EVENTS)) if is_token(" " + word)]}


def example(rng: random.Random, words: Pools, is_token: IsToken) -> Example:
    drawn = rng.sample(words["word"], 2 * LENGTH)
    own, other = drawn[:LENGTH], drawn[LENGTH:]
    template, shown = rng.choice(TEMPLATES), rng.choice(SHOWN)
    again = "".join(" " + word for word in own[:shown]).removeprefix(" " if ": {again}" in template else "")
    first, other_first = ("".join(" " + word for word in row).removeprefix(" " if ": {first}" in template else "") for row in (own, other))
    return Example(
        clean=template.format(first=first, again=again),
        corrupted=template.format(first=other_first, again=again),
        answers=(" " + own[shown],),
        distractors=(" " + rng.choice([word for place, word in enumerate(own) if place > shown]),),
    )


INDUCTION = Builtin(
    name="induction", description="induction: a list of words that begins again", pools=pools, example=example, fewest={"word": 2 * LENGTH}
)
