"""Which parts of a circuit can go, found by closing them: each alone, then as many of the cheapest together as may. And which had better come back.

What closing a part does is measured on a few validation examples, as a difference to the circuit as it is: on the same examples that varies far
less than either KL. Parts that lie in the same layers are best given one after another: circuits looked at in one pass share the layers below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nodesieve.circuit import Circuit
from nodesieve.problem import QUICK, Problem

Part = tuple[str, Tensor]  # a level, and indices of nodes of it, (n, dimensions of the level)

FEW = 32  # examples that say in which order parts go; `QUICK` say how many
NOTHING = 0.01  # of the budget: a rise that counts as none
WIDTH = 8  # circuits looked at in one pass
SKIPS = 2  # how often a part that is too dear is passed over
TRIES = 4  # measurements to find how many of the parts that looks have chosen may go


def cheapest_parts(
    start: Circuit,
    parts: Sequence[Part],
    problem: Problem,
    *,
    most: float,
    goes_on: Callable[[int, int], bool],
    gains: Sequence[float] | None = None,
    skipping: bool = False,
) -> list[Part]:
    """As many parts, the cheapest for what they gain first, as together raise the KL by no more than `most`.

    Args:
        problem: whose validation data is looked at.
        gains: of each part; by default its number of nodes.
        goes_on: told how many parts of how many have been closed alone; where it says no, nothing is to go.
        skipping: pass over a part that is too dear beside those before it, `SKIPS` times: of the next `WIDTH`, each alone beside these, those that
            may go come first, and the search goes on with them.
    """
    if not parts:
        return []
    costs: list[float] = []
    (own,) = problem.looks([start], "validation", first=FEW)
    for place in range(0, len(parts), WIDTH):
        costs += _rises([less(start, [part]) for part in parts[place : place + WIDTH]], own, problem)
        if not goes_on(len(costs), len(parts)):
            return []
    gains = [len(index) for _, index in parts] if gains is None else gains
    worth = [rise / gain for rise, gain in zip(costs, gains, strict=True)]
    order = [place for place in sorted(range(len(parts)), key=worth.__getitem__) if costs[place] <= most]
    if not order:
        return []
    (own,) = problem.looks([start], "validation", first=QUICK)
    chosen: list[int] = []

    def rises(beside: Sequence[Sequence[int]]) -> list[float]:
        """How much the KL rises where these go beside the chosen ones."""
        return _rises([less(start, [parts[place] for place in (*chosen, *places)]) for places in beside], own, problem)

    for skips_left in range(SKIPS if skipping else 0, -1, -1):
        low, high = 0, len(order) + 1  # `low` may go, `high` may not
        while high - low > 1:
            middle = sorted({low + max(1, (high - low) * k // 4) for k in (1, 2, 3)} - {high})
            for count, rise in zip(middle, rises([order[:count] for count in middle]), strict=True):
                low, high = (max(low, count), high) if rise <= most and count < high else (low, min(high, count))
        chosen += order[:low]
        ahead, order = order[low : low + WIDTH], order[low + WIDTH :]
        if not ahead or not skips_left or not goes_on(len(parts), len(parts)):
            break
        alone = {place: rise for place, rise in zip(ahead, rises([[place] for place in ahead]), strict=True) if rise <= most}
        if not alone:
            break
        order = [*sorted(alone, key=lambda place: alone[place] / gains[place]), *order]
    return [parts[place] for place in chosen]


def helpful_parts(
    parts: Sequence[Part], opened: Callable[[Sequence[Part]], Circuit], problem: Problem, *, least: float, goes_on: Callable[[int, int], bool]
) -> list[Part]:
    """Closed parts of which each, opened beside those before it, lowers the KL by `least` and more.

    Each is opened alone on some examples, half of them where they are few; of the parts that look best, one after the other is taken by what it
    does on others, which had no say in that.

    Args:
        opened: the circuit with these parts.
        problem: whose validation data is looked at.
        goes_on: as for `cheapest_parts`.
    """
    half = min(QUICK, len(problem.task["validation"]) // 2)
    if not parts or not half:
        return []
    rises: list[float] = []
    (own,) = problem.looks([opened([])], "validation", first=half)
    for place in range(0, len(parts), WIDTH):
        rises += _rises([opened([part]) for part in parts[place : place + WIDTH]], own, problem)
        if not goes_on(len(rises), len(parts)):
            return []
    left = [parts[place] for place in sorted(range(len(parts)), key=rises.__getitem__)[:WIDTH] if rises[place] < 0]
    (own,) = problem.looks([opened([])], "validation", skip=half, first=half + QUICK)
    chosen: list[Part] = []
    while left and goes_on(len(parts), len(parts)):
        kls = problem.looks([opened([*chosen, part]) for part in left], "validation", skip=half, first=half + QUICK)
        gains = [float((own - kl).mean()) for kl in kls]
        best = max(range(len(left)), key=gains.__getitem__)
        if gains[best] < least:
            break
        chosen.append(left[best])
        own = kls[best]
        left = [part for place, part in enumerate(left) if place != best and gains[place] > 0]
    return chosen


def as_many_of(count: int, may_go: Callable[[int], bool]) -> int:
    """How many of `count` may go together: all, or what halving finds in a few tries; of those that may go, it is the last that was asked."""
    low, high, middle = 0, count + 1, count
    for _ in range(TRIES):
        if not low < middle < high:
            break
        low, high = (middle, high) if may_go(middle) else (low, middle)
        middle = (low + high) // 2
    return low


def less(circuit: Circuit, parts: Sequence[Part]) -> Circuit:
    levels = dict.fromkeys(level for level, _ in parts)
    return circuit.without({level: torch.cat([index for name, index in parts if name == level]) for level in levels})


def _rises(circuits: Sequence[Circuit], own: Tensor, problem: Problem) -> list[float]:
    """How much the KL of each is above that of now, which `own` holds of some examples."""
    return [float((kl - own).mean()) for kl in problem.looks(circuits, "validation", first=len(own))]
