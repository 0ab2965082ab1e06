"""What every method returns: one float a node, higher meaning more worth keeping."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nodesieve.circuit import Circuit
from nodesieve.levels import LEVELS
from nodesieve.nodes import LevelTensors, NodeSpace, closed


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One float32 tensor a level, each (*shape(level)).

    Attributes:
        values: the scores. Levels outside `levels` are ignored: their nodes are kept wherever their ancestors are.
        levels: which levels the method scored.
        threshold: where the method itself draws the line. None: it only ranks.
        learned: are they log_alpha of gates?
        earlier: other scores that the method had on its way and thinks worth a look, at their own threshold.
        other: another reading of what the method found, to be searched like this one; the better of the two on validation data is taken.
        wholes: scores of heads and MLP blocks as wholes, where those in `values` are their descendants'.
        within: a circuit that no circuit cut from these scores leaves.
    """

    values: LevelTensors
    nodes: NodeSpace
    levels: tuple[str, ...]
    threshold: float | None = None
    learned: bool = False
    earlier: Scores | None = None
    other: Scores | None = None
    wholes: LevelTensors | None = None
    within: Circuit | None = None

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the scores of all levels that have some."""
        found = hashlib.sha256()
        for group in ({level: self.values[level] for level in self.levels}, self.wholes or {}):
            for name, x in ((level, group[level]) for level in self.nodes.levels if level in group):  # in one order, whatever wrote them
                found.update(f"{name} {tuple(x.shape)}".encode() + x.detach().cpu().float().contiguous().numpy().tobytes())
        return found.hexdigest()

    def circuit(self, threshold: float) -> Circuit:
        """Keep what scores above `threshold`, then close the hierarchy."""
        kept = {
            level: self.values[level] > threshold if level in self.levels else torch.ones_like(self.values[level], dtype=torch.bool)
            for level in LEVELS
        }
        if self.within is not None:
            kept = {level: mask & self.within.masks[level] for level, mask in kept.items()}
        return Circuit.of(kept, self.nodes)


def raise_ancestors(values: LevelTensors) -> LevelTensors:
    """Give each parent the highest score among its descendants, so that one threshold never cuts a node off from the root.

    For methods that score the finest levels only: a block is worth keeping as soon as one of its nodes is. The embedding, which has
    no descendants, keeps its score.
    """
    return fold_upwards(values, lambda own, below: torch.maximum(own, below.amax(-1)))


def raised(values: Mapping[str, Tensor], nodes: NodeSpace) -> LevelTensors:
    """Scores of some levels, of all levels: the nodes given keep theirs, what lies above them gets the highest; 0 where nothing below is given."""
    unknown = {level: torch.full(nodes.shape(level), -torch.inf) for level in LEVELS}
    given = {level: value.masked_fill(~nodes.present(level), -torch.inf) for level, value in values.items()}
    return {level: value.masked_fill(value == -torch.inf, 0.0) for level, value in raise_ancestors({**unknown, **given}).items()}


def sums_of_leaves(values: LevelTensors) -> LevelTensors:
    """Heads and MLP blocks as wholes (`Scores.wholes`), worth the sum over their leaves, or over their outputs where these alone have values: (L, H)
    and (L,)."""
    hidden = torch.cat([values["mlp_neuron"], values["expert"]], -1)
    return {"head": values["head_dim"].sum(-1), "mlp_block": (hidden if bool(hidden.any()) else values["mlp_output"]).sum(-1)}


def fold_upwards(values: LevelTensors, combine: Callable[[Tensor, Tensor], Tensor]) -> LevelTensors:
    """Replace each parent's value by `combine` of it, (*shape), and of its children's of one level, (*shape, children), from the leaves up."""
    out = dict(values)
    for name in reversed(list(LEVELS)):  # children come after parents in LEVELS
        parent = LEVELS[name].parent
        if parent is not None and out[name].numel():
            below = out[name].reshape(*out[parent].shape, -1)
            out[parent] = combine(out[parent], below)
    return out


def standing(scores: Scores) -> LevelTensors:
    """The highest threshold at which a circuit cut from the scores keeps each node, (*shape(level)), whatever it is to stay within."""
    own: LevelTensors = {}
    for level in LEVELS:
        value = scores.values[level].float() if level in scores.levels else torch.full(scores.nodes.shape(level), torch.inf)
        own[level] = value.masked_fill(~scores.nodes.present(level), -torch.inf)
    return closed(own)


def standing_of_parts(scores: Scores) -> LevelTensors:
    """How heads and MLP blocks rank, by level: as wholes where the method scores them so and they can close, else by `standing`."""
    wholes = scores.wholes or {}
    return {level: torch.where(x == torch.inf, x, wholes[level]) if level in wholes else x for level, x in standing(scores).items()}


def gated(standing: LevelTensors, level: str, nodes: NodeSpace) -> Tensor:
    """Which nodes of a level have gates, of their own or above or below them?"""
    return nodes.present(level) & (standing[level] != torch.inf)


def can_close(standing: LevelTensors, level: str, nodes: NodeSpace) -> bool:
    """Have any nodes of a level gates?"""
    return bool(gated(standing, level, nodes).any())
