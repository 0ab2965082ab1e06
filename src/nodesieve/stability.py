"""Would another run have found the same circuit? Runs with other seeds on resampled training data, and what they agree on.

Each further run draws its own noise, batches and bootstrap sample of the training examples; validation and test data stay those of the first run,
so that the consensus can be measured on test data that no run has learned from. How alike two circuits are is said by the Jaccard index of the
nodes kept at each level (shared / in either), beside what two random sets of the same sizes would share in expectation: chance takes nodes of a
level to be drawn one by one, though those of a head or block come together, so at the fine levels it is a lower bar than `random_by_layer` in
`nodesieve.controls`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import mean

import torch

from nodesieve.circuit import Circuit
from nodesieve.config import DiscoverConfig
from nodesieve.levels import LEVELS
from nodesieve.nodes import NodeSpace
from nodesieve.run import Run, load_run
from nodesieve.spawn import ensure_run


def repeat(run: Run, directory: Path, *, count: int, quiet: bool = False, trust_remote_code: bool = False) -> list[Run]:
    """`count` further runs in `directory`/seed-N, made or read.

    Raises:
        UserError, KeyboardInterrupt: as `ensure_run`.
    """
    first = run.config.seed + 1
    found = []
    for seed in range(first, first + count):
        place = directory / f"seed-{seed}"
        ensure_run(place, resampled(run.config, seed), quiet=quiet, trust_remote_code=trust_remote_code)
        found.append(load_run(place))
    return found


def resampled(config: DiscoverConfig, seed: int) -> DiscoverConfig:
    """The same options with another seed, on the same data resampled."""
    return replace(config, seed=seed, data_seed=config.seed_of_data, bootstrap=True)


def agreement(circuits: Sequence[Circuit]) -> dict[str, dict[str, float]]:
    """By level, over all pairs: `jaccard` (mean), `lowest` and `highest` index, and `chance`, the mean of what chance gives."""
    nodes = circuits[0].nodes
    pairs = list(combinations(circuits, 2))
    found = {}
    for level in nodes.levels:
        values = [jaccard(a, b, level) for a, b in pairs]
        by_chance = [chance(a.kept(level), b.kept(level), nodes.count(level)) for a, b in pairs]
        found[level] = {"jaccard": mean(values), "lowest": min(values), "highest": max(values), "chance": mean(by_chance)}
    return found


def jaccard(a: Circuit, b: Circuit, level: str) -> float:
    """Shared nodes / nodes in either; 1 where neither keeps any."""
    either = int((a.masks[level] | b.masks[level]).sum())
    return int((a.masks[level] & b.masks[level]).sum()) / either if either else 1.0


def chance(a: int, b: int, total: int) -> float:
    """The Jaccard index at the expected overlap of two random sets of a and b out of `total` nodes."""
    if not a and not b:
        return 1.0
    shared = a * b / total
    return shared / (a + b - shared)


def consensus(circuits: Sequence[Circuit], *, at_least: int) -> Circuit:
    """The nodes that at least so many of the circuits keep, closed."""
    nodes: NodeSpace = circuits[0].nodes
    votes = {level: torch.stack([circuit.masks[level].int() for circuit in circuits]).sum(0) for level in LEVELS}
    return Circuit.of({level: count >= at_least for level, count in votes.items()}, nodes)
