"""Scores -> Circuit: the same for every method.

One threshold over all scored nodes, then closing. Either the largest circuit within a size (`keep`), or the smallest circuit whose KL stays
within a budget. The budget is met when the upper end of a one-sided 95% bootstrap interval of the mean validation KL is within it.

Thresholds are tried on a grid on which each next circuit has about 2% fewer leaves. The KL rises, in the main, along the grid, so a
bisection finds where it crosses the budget: first by a cheaper look at each circuit, which says where to measure. A method that has drawn a line of
its own near the budget saves that search. Every circuit measured counts, and the smallest one that met the budget wins.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nodesieve.circuit import Circuit
from nodesieve.levels import LEAVES, nearest
from nodesieve.metrics import upper_bound
from nodesieve.scores import Scores

Measure = Callable[[Sequence[Circuit]], list[Tensor]]  # circuits -> the validation KL of every example, (n,) a circuit
Upper = Callable[[Tensor], float]

GRID_RATIO = 1.02
WIDTH = 3  # circuits measured in one pass over the data; they share the ablation's part of it
NEAR = 0.5  # of the budget: a method's own circuit of more than that, and no more than all of it, is where the search begins
NEARBY = (1, 4, 16, 64)  # grid points to each side of where a first look puts the crossing that are measured, until it lies between them


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The circuit chosen, the scores and the threshold that cut it, its validation KL (mean, and upper end of the interval)."""

    circuit: Circuit
    scores: Scores
    threshold: float
    kl: float
    kl_upper: float
    met: bool


def select_size(scores: Scores, measure: Measure, *, keep: float, budget: float, upper: Upper = upper_bound) -> Selection:
    """The largest circuit of at most `keep` of the leaves; of two readings of the scores, that of lower KL."""
    found = [_of_size(reading, measure, keep=keep, budget=budget, upper=upper) for reading in (scores, scores.other) if reading is not None]
    return min(found, key=lambda selection: selection.kl)


def _of_size(scores: Scores, measure: Measure, *, keep: float, budget: float, upper: Upper) -> Selection:
    cuts = [_below_all(scores), *torch.unique(_scored(scores, scores.levels)).tolist()]  # a head or a block may go between two leaves
    place = bisect_left(cuts, True, key=lambda cut: scores.circuit(cut).size <= keep)
    cut = cuts[min(place, len(cuts) - 1)]
    circuit = scores.circuit(cut)
    return judge(circuit, scores, cut, measure([circuit])[0], budget, upper)


def select_budget(scores: Scores, measure: Measure, *, budget: float, look: Measure | None = None, upper: Upper = upper_bound) -> Selection:
    """The smallest circuit within the KL budget; where no threshold meets it, the one of lowest KL, with `met` False.

    Args:
        look: KLs by a cheaper way, over fewer examples say, that only guide the search; by default `measure`.
        upper: the KL of every example -> upper end of the interval of their mean.
    """
    readings = [reading for reading in (scores, scores.other) if reading is not None]
    found = [selection for reading in readings for selection in _searched(reading, measure, look or measure, budget=budget, upper=upper)]
    met = [selection for selection in found if selection.met]
    if met:
        return min(met, key=lambda selection: (selection.circuit.size, selection.circuit.childless, selection.kl))
    return min(found, key=lambda selection: selection.kl_upper)


def _searched(scores: Scores, measure: Measure, look: Measure, *, budget: float, upper: Upper) -> list[Selection]:
    """Everything that was measured in search of the smallest circuit within the budget."""
    cuts = _grid(scores)
    tried: dict[int, Selection] = {}
    looks: dict[int, float] = {}

    def try_all(places: Sequence[int]) -> None:
        new = [place for place in places if place not in tried]
        circuits = [scores.circuit(cuts[place]) for place in new]
        for place, circuit, kl in zip(new, circuits, measure(circuits) if new else [], strict=True):
            tried[place] = judge(circuit, scores, cuts[place], kl, budget, upper)

    def looked_at(place: int) -> float:
        if place not in looks:
            (kl,) = look([scores.circuit(cuts[place])])
            looks[place] = float(kl.mean())
        return looks[place]

    def crossing(most: float) -> int:
        """The last cut before the first look exceeds `most`."""
        return max(0, bisect_left(range(len(cuts)), True, key=lambda place: looked_at(place) > most) - 1)

    middle = None if scores.threshold is None else cuts.index(scores.threshold)
    if middle is None or not NEAR * budget < looked_at(middle) <= budget:
        middle = crossing(budget)
        try_all([middle])
        middle = crossing(budget - (tried[middle].kl_upper - looked_at(middle)))
    try_all([middle])
    low, high = -1, len(cuts)  # everything up to `low` is taken to meet the budget, everything from `high` on to miss it
    for radius in NEARBY:
        try_all([place for place in (middle - radius, middle + radius) if 0 <= place < len(cuts)])
        low, high = _bracket(tried, low, high)
        if middle - radius <= low and high <= middle + radius:
            break
    while high - low > 1:
        gap = high - low
        try_all(sorted({low + max(1, gap * k // (WIDTH + 1)) for k in range(1, WIDTH + 1)} - {high}))
        low, high = _bracket(tried, low, high)
    found = list(tried.values())
    if scores.earlier is not None and scores.earlier.threshold is not None:
        circuit = scores.earlier.circuit(scores.earlier.threshold)
        found.append(judge(circuit, scores.earlier, scores.earlier.threshold, measure([circuit])[0], budget, upper))
    return found


def _bracket(tried: dict[int, Selection], low: int, high: int) -> tuple[int, int]:
    """Narrow (low, high) to the stretch between the last cut that met the budget before the first that missed it."""
    for place in sorted(tried):
        if not tried[place].met:
            return low, min(high, place)
        low = max(low, place)
    return low, high


def _grid(scores: Scores) -> list[float]:
    """Thresholds in ascending order: keep everything, the method's own, and cuts that leave 2% fewer leaves each time."""
    ordered = _reference(scores).sort(descending=True).values
    count = len(ordered)
    ranks = {min(count - 1, int(count / GRID_RATIO**k)) for k in range(1 + math.ceil(math.log(count, GRID_RATIO)))}
    own = [] if scores.threshold is None else [scores.threshold]
    return sorted({_below_all(scores), *own, *ordered[sorted(ranks)].tolist()})


def _below_all(scores: Scores) -> float:
    """The highest threshold that keeps everything; finite, so that it can be written down."""
    lowest = torch.stack([scores.values[level].min() for level in scores.levels if scores.values[level].numel()]).min()
    return float(torch.nextafter(lowest, torch.tensor(-math.inf)))


def _reference(scores: Scores) -> Tensor:
    """The scores that sizes are counted by: of leaves, of what is nearest above leaves that have none; of all levels where no leaf has any."""
    leaves = [level for level in LEAVES if scores.nodes.count(level)]
    if not set(leaves) & set(scores.levels):
        return _scored(scores, scores.levels)
    return _scored(scores, dict.fromkeys(level for leaf in leaves if (level := nearest(leaf, scores.levels)) is not None))


def _scored(scores: Scores, levels: Iterable[str]) -> Tensor:
    return torch.cat([scores.values[level][scores.nodes.present(level)] for level in levels])


def judge(circuit: Circuit, scores: Scores, threshold: float, kl: Tensor, budget: float, upper: Upper) -> Selection:
    """A circuit and the KL of every validation example, (n,), against the budget."""
    kl_upper = upper(kl)
    return Selection(circuit=circuit, scores=scores, threshold=threshold, kl=float(kl.mean()), kl_upper=kl_upper, met=kl_upper <= budget)
