"""Subject-verb agreement across another noun: "The keys near the castle" -> " are". The corrupted subject has the other number."""

from __future__ import annotations

import random

from nodesieve.tasks.base import Builtin, Example, IsToken, Pools
from nodesieve.tasks.words import NUMBERED, PLACES

TEMPLATES = (
    "The {subject} near the {place}",
    "The {subject} behind the {place}",
    "I know that the {subject} from the {place}",
    "She said that the {subject} at the {place}",
    "It seems to me that the {subject} in front of the {place}",
    "Today the {subject} beside the {place}",
)
SINGULAR, PLURAL = (" is", " was", " has"), (" are", " were", " have")


def pools(is_token: IsToken) -> Pools:
    pairs = [pair for pair in NUMBERED if all(is_token(" " + noun) for noun in pair.split("/"))]
    used = {noun for pair in pairs for noun in pair.split("/")}
    return {"subject": pairs, "place": [place for place in PLACES if is_token(" " + place) and place not in used]}


def example(rng: random.Random, words: Pools, is_token: IsToken) -> Example:
    singular, plural = rng.choice(words["subject"]).split("/")
    (clean, answers), (corrupted, distractors) = rng.sample([(singular, SINGULAR), (plural, PLURAL)], 2)
    template, place = rng.choice(TEMPLATES), rng.choice(words["place"])
    return Example(
        clean=template.format(subject=clean, place=place),
        corrupted=template.format(subject=corrupted, place=place),
        answers=answers,
        distractors=distractors,
    )


SUBJECT_VERB_AGREEMENT = Builtin(
    name="subject_verb_agreement",
    description="subject-verb agreement across another noun: is or are?",
    pools=pools,
    example=example,
)
