"""Gendered pronouns (Mathwin et al. 2023): "So Mary is a really good friend, isn't" -> " she". The corrupted name is of the other gender."""

from __future__ import annotations

import random

from nodesieve.tasks.base import Builtin, Example, IsToken, Pools
from nodesieve.tasks.words import FEMALE_NAMES, MALE_NAMES, ROLES

TEMPLATES = (
    "So {name} is a really good {role}, isn't",
    "I think {name} is a great {role}, isn't",
    "Well, {name} was such a nice {role}, wasn't",
    "Everyone says that {name} is the best {role}, and I agree that",
    "We like {name} as a {role} because",
)


def pools(is_token: IsToken) -> Pools:
    both = set(FEMALE_NAMES) & set(MALE_NAMES)
    return {
        "female": [name for name in FEMALE_NAMES if name not in both and is_token(" " + name)],
        "male": [name for name in MALE_NAMES if name not in both and is_token(" " + name)],
        "role": [role for role in ROLES if is_token(" " + role)],
    }


def example(rng: random.Random, words: Pools, is_token: IsToken) -> Example:
    (own, pronoun), (other, other_pronoun) = rng.sample([("female", " she"), ("male", " he")], 2)
    template, role = rng.choice(TEMPLATES), rng.choice(words["role"])
    return Example(
        clean=template.format(name=rng.choice(words[own]), role=role),
        corrupted=template.format(name=rng.choice(words[other]), role=role),
        answers=(pronoun,),
        distractors=(other_pronoun,),
    )


GENDERED_PRONOUN = Builtin(
    name="gendered_pronoun",
    description="gendered pronoun: he or she, after a name",
    pools=pools,
    example=example,
)
