"""How good are a method's scores as a ranking? Circuits cut at ten sizes, measured alike; areas under what they reach.

Sizes are those of the Mechanistic Interpretability Benchmark (Mueller et al., arXiv 2504.13151): for each share the int(share * n) nodes that score
highest, among heads and MLP blocks ("parts") or among leaves, with everything above and below them open and nothing else. CPR is the area under
faithfulness, CMD the area between faithfulness and 1, by trapezoids over the share on a linear axis; compactness is the smallest share whose KL is
within the budget. CPR rewards circuits that answer more strongly than the model, CMD and compactness do not. Shares of nodes are not shares of
edges, so no area here compares with one made from edges.

Where a node stands in a ranking is the highest threshold at which `Scores.circuit` still keeps it, so a node is no better than its ancestors nor
than the best of its descendants; a method that scores heads and MLPs as wholes is ranked by those scores (`Scores.wholes`). Nodes that stand alike,
as the leaves of a head or an MLP do where only wholes are scored, are cut by their place in it. Levels that have no gates are open and not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from nodesieve.circuit import Circuit
from nodesieve.errors import UserError
from nodesieve.evaluation import measure_with_faithfulness
from nodesieve.levels import LEAVES, LEVELS
from nodesieve.nodes import LevelTensors
from nodesieve.problem import Problem
from nodesieve.scores import Scores, can_close, gated, standing, standing_of_parts
from nodesieve.tasks.base import SplitName

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
UNITS: dict[str, tuple[str, ...]] = {"parts": ("head", "mlp_block"), "leaves": LEAVES}


def size_curve(problem: Problem, scores: Scores, *, split: SplitName = "test", budget: float | None) -> dict[str, dict[str, Any]]:
    """By unit ("parts", "leaves"): `points` (share, nodes, kl, accuracy, faithfulness, ...), `cpr`, `cmd` and `compactness`.

    Compactness is None without a KL budget.

    The areas are None where faithfulness is not defined: for a task without distractors.

    Raises:
        UserError: there is nothing to rank.
    """
    if not set(scores.levels) - {"embedding"}:
        raise UserError(f"a size curve expects scores of levels other than the embedding, got {', '.join(scores.levels) or 'none'}")
    found = {}
    for unit in UNITS:
        circuits = [cut(scores, unit, share) for share in SHARES]
        rows = measure_with_faithfulness(problem, circuits, split)
        ranking = ranking_of(scores, unit)
        total = sum(int(gated(ranking, level, scores.nodes).sum()) for level in ranking)
        points = [{"share": share, "nodes": int(share * total), **row} for share, row in zip(SHARES, rows, strict=True)]
        found[unit] = {"points": points, **areas(points), "compactness": None if budget is None else compactness(points, budget)}
    return found


def cut(scores: Scores, unit: str, share: float) -> Circuit:
    """The int(share * n) nodes of `unit` that stand highest, what lies above them and, for parts, what lies below."""
    nodes, ranking = scores.nodes, ranking_of(scores, unit)
    levels = list(ranking)
    counted = torch.cat([gated(ranking, level, nodes).flatten() for level in levels])
    ranked = torch.cat([ranking[level].flatten() for level in levels])
    kept = ranked == torch.inf
    kept[ranked.masked_fill(~counted, -torch.inf).argsort(descending=True, stable=True)[: int(share * int(counted.sum()))]] = True
    masks = {level: nodes.present(level) for level in LEVELS}
    sizes = [nodes.present(level).numel() for level in levels]
    for level, own in zip(levels, kept.split(sizes), strict=True):  # type: ignore[no-untyped-call]
        masks[level] = own.reshape(nodes.shape(level))
    return Circuit.of(masks, nodes)


def ranking_of(scores: Scores, unit: str) -> LevelTensors:
    """Where the nodes of a unit stand, by level; without levels that are always open, for having no gates of their own nor above or below them."""
    ranking = standing(scores) if unit == "leaves" else standing_of_parts(scores)
    return {level: ranking[level] for level in UNITS[unit] if can_close(ranking, level, scores.nodes)}


def areas(points: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """`cpr` and `cmd` of points with a `share`, ascending, and a `faithfulness`."""
    if any(point["faithfulness"] is None for point in points):
        return {"cpr": None, "cmd": None}
    cpr = cmd = 0.0
    for low, high in pairwise(points):
        width = (high["share"] - low["share"]) / 2
        cpr += width * (low["faithfulness"] + high["faithfulness"])
        cmd += width * (abs(1 - low["faithfulness"]) + abs(1 - high["faithfulness"]))
    return {"cpr": cpr, "cmd": cmd}


def compactness(points: Sequence[Mapping[str, Any]], budget: float) -> float:
    """The smallest share whose mean KL is within the budget; the whole model's always is."""
    return min((point["share"] for point in points if point["kl"] is not None and point["kl"] <= budget), default=1.0)
