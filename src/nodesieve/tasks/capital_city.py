"""Capital cities: "The capital of France is the city of" -> " Paris". The corrupted prompt names another country, whose capital is the distractor."""

from __future__ import annotations

import random

from nodesieve.tasks.base import Builtin, Example, IsToken, Pools
from nodesieve.tasks.words import CAPITALS

TEMPLATES = (
    "The capital of {country} is the city of",
    "The capital city of {country} is called",
    "Question: what is the capital of {country}? Answer:",
    "The government of {country} sits in its capital,",
    "We flew to {country} and landed in its capital,",
    "Everyone knows that the capital of {country} is",
    "The embassy in {country} is of course in the capital,",
    "She moved to {country} and found a flat in the capital,",
    "On the map of {country}, a star marks its capital,",
    "The king of {country} once lived in the capital,",
    "My friend from {country} grew up in the capital,",
    "The largest museum in {country} is in its capital,",
)


def pools(is_token: IsToken) -> Pools:
    return {"country": [pair for pair in CAPITALS if all(is_token(" " + name) for name in pair.split("/"))]}


def example(rng: random.Random, words: Pools, is_token: IsToken) -> Example:
    (country, capital), (other, other_capital) = (pair.split("/") for pair in rng.sample(words["country"], 2))
    template = rng.choice(TEMPLATES)
    return Example(
        clean=template.format(country=country),
        corrupted=template.format(country=other),
        answers=(" " + capital,),
        distractors=(" " + other_capital,),
    )


CAPITAL_CITY = Builtin(name="capital_city", description="factual recall: the capital of a country", pools=pools, example=example)
