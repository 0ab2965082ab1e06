"""Indirect object identification (Wang et al., arXiv 2211.00593): "When Mary and John went to the park, John gave a ball to" -> " Mary".

The corrupted prompt has the same template, place and object and three other names, none of them said twice, so that nothing in it
says who is left. Names never start a prompt: each is the token with its leading space. The templates are ones after which a small model
expects a name more than anything else, so that the behaviour, not the rest of the vocabulary, makes up most of the KL.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from nodesieve.tasks.base import Builtin, Example, IsToken, Pools
from nodesieve.tasks.words import FEMALE_NAMES, FURTHER_NAMES, MALE_NAMES, OBJECTS, PLACES

TEMPLATES = (
    "There were two people at the {place}, {a} and {b}. {s} handed a {object} to",
    "Two people named {a} and {b} met at the {place}. {s} gave a {object} to",
    "The two people at the {place} are {a} and {b}. The {object} is passed from {s} to",
    "In the {place}, {a} and {b} are talking about the {object}. {s} says to",
    "Two friends, {a} and {b}, are talking at the {place} about a {object}. {s} gives it to",
    "While {a} and {b} are talking about the {object} at the {place}, {s} says to",
)


def pools(is_token: IsToken) -> Pools:
    return {
        "name": [name for name in (*FEMALE_NAMES, *MALE_NAMES) if is_token(" " + name)],
        "place": [place for place in PLACES if is_token(" " + place)],
        "object": [thing for thing in OBJECTS if is_token(" " + thing)],
    }


def further(is_token: IsToken) -> Pools:
    return {"name": [name for name in FURTHER_NAMES if is_token(" " + name)]}


def example(rng: random.Random, words: Pools, is_token: IsToken, templates: Sequence[str] = TEMPLATES) -> Example:
    template = rng.choice(templates)
    subject, other, *strangers = rng.sample(words["name"], 5)
    a, b = rng.choice([(subject, other), (other, subject)])
    setting = {"place": rng.choice(words["place"]), "object": rng.choice(words["object"])}
    return Example(
        clean=template.format(a=a, b=b, s=subject, **setting),
        corrupted=template.format(a=strangers[0], b=strangers[1], s=strangers[2], **setting),
        answers=(" " + other,),
        distractors=(" " + subject,),
    )


IOI = Builtin(
    name="ioi",
    description="indirect object identification: who received the object?",
    pools=pools,
    example=example,
    further=further,
    fewest={"name": 5},
)
