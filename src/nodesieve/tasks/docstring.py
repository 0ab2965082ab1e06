"""Docstrings (after Heimersheim and Janiak 2023): which argument does the next `:param` describe?

The function takes four arguments after self; two are described, and the third is to come. In the corrupted prompt signature and
descriptions name other arguments, none in both places, so that nothing says which one comes.
"""

from __future__ import annotations

import random

from nodesieve.tasks.base import Builtin, Example, IsToken, Pools
from nodesieve.tasks.words import ARGUMENTS, EVENTS, OBJECTS, PLACES

SIGNATURE = "def {function}(self, {a}, {b}, {c}, {d}):\n"
TEMPLATES = (
    SIGNATURE + '    """{title} {function}\n\n    :param {e}: {one} {title}\n    :param {f}: {two} {title}\n    :param',
    SIGNATURE + '    """The {title} of the {function}.\n\n    :param {e}: the {one}\n    :param {f}: the {two}\n    :param',
)


def pools(is_token: IsToken) -> Pools:
    nouns = dict.fromkeys((*OBJECTS, *PLACES, *EVENTS))
    return {
        "argument": [word for word in dict.fromkeys(ARGUMENTS) if is_token(" " + word)],
        "noun": [word for word in nouns if is_token(" " + word) and word not in ARGUMENTS],
    }


def example(rng: random.Random, words: Pools, is_token: IsToken) -> Example:
    arguments = rng.sample(words["argument"], 10)
    function, title, one, two = rng.sample(words["noun"], 4)
    template = rng.choice(TEMPLATES)

    def prompt(signature: list[str], described: list[str]) -> str:
        a, b, c, d = signature
        e, f = described
        return template.format(function=function, title=title, one=one, two=two, a=a, b=b, c=c, d=d, e=e, f=f)

    a, b, c, d = arguments[:4]
    return Example(
        clean=prompt([a, b, c, d], [a, b]),
        corrupted=prompt(arguments[4:8], arguments[8:]),
        answers=(" " + c,),
        distractors=(" " + a, " " + b, " " + d),
    )


DOCSTRING = Builtin(
    name="docstring", description="docstring: the next argument to be described", pools=pools, example=example, fewest={"argument": 10}
)
