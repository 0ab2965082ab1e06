"""Would another run have found the same circuit? Runs with other seeds on resampled training data, and what they agree on.

Each further run draws its own noise, batches and bootstrap sample of the training examples; validation and test data stay those of the first run,
so that the consensus can be measured on test data that no run has learned from. How alike two circuits are is said by the Jaccard index of the
nodes kept at each level (shared / in either), beside the index that two random sets of the same sizes have in expectation: chance takes nodes of a
level to be drawn one by one and from all of the model, though those of a head or block come together and --within leaves fewer to draw from, so at
the fine levels it is a lower bar than `random_by_layer` in `nodesieve.controls`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from nodesieve.circuit import Circuit
from nodesieve.config import SEEDS, DiscoverConfig
from nodesieve.discovery import metrics_of
from nodesieve.evaluation import evaluate_circuit, problem_of
from nodesieve.levels import LEVELS
from nodesieve.models import LoadedModel
from nodesieve.nodes import LevelTensors
from nodesieve.run import Run, counted, load_run
from nodesieve.scores import Scores
from nodesieve.select import judge
from nodesieve.spawn import ensure_run, refuse_changed_inputs
from nodesieve.tasks.base import Task

CONSENSUS = "consensus"


def repeat(
    run: Run, directory: Path, *, count: int, quiet: bool = False, trust_remote_code: bool = False, say: Callable[[str], None] = lambda text: None
) -> list[Run]:
    """`count` further runs in `directory`/seed-N, made or read; the run's own directory is the one above.

    Args:
        say: told what begins.

    Raises:
        UserError, KeyboardInterrupt: as `ensure_run` and `refuse_changed_inputs`.
    """
    found = []
    places = {seed: directory / f"seed-{seed}" for seed in ((run.config.seed + 1 + i) % SEEDS for i in range(count))}
    refuse_changed_inputs([directory.parent, *places.values()], run.config, trust_remote_code=trust_remote_code)
    for number, (seed, place) in enumerate(places.items(), 1):
        say(f"seed {seed}: {number} of {count}")
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
    """The expected Jaccard index of two random sets of a and b out of `total` nodes, whose overlap is hypergeometric."""
    if not a and not b:
        return 1.0
    shared = torch.arange(max(0, a + b - total), min(a, b) + 1, dtype=torch.float64)
    log_p = _log_choose(a, shared) + _log_choose(total - a, b - shared)
    return float((log_p.softmax(0) * shared / (a + b - shared)).sum())


def _log_choose(n: int, k: Tensor) -> Tensor:
    return torch.lgamma(torch.tensor(n + 1.0, dtype=torch.float64)) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def consensus_run(run: Run, circuits: Sequence[Circuit], *, at_least: int, loaded: LoadedModel, task: Task) -> Run:
    """What `consensus` keeps, measured like any run's circuit; a node's score is how many of the circuits keep it, at the levels that the run scored.

    Args:
        run: the first of the runs, whose options and data they share.

    Raises:
        UserError: as `evaluate`.
    """
    shared, threshold, config = consensus(circuits, at_least=at_least), at_least - 0.5, run.config
    scores = Scores(values=votes(circuits), nodes=shared.nodes, levels=run.scores.levels)
    problem = problem_of(loaded, task, run, splits=("validation", "test"))
    (kl,) = problem.losses([shared], "validation")
    evaluation = evaluate_circuit(problem, shared, splits=("validation", "test"))
    about = {"runs": len(circuits), "at_least": at_least}
    return Run(
        config=config,
        circuit=shared,
        scores=scores,
        threshold=threshold,
        metrics={
            **metrics_of(problem, judge(shared, scores, threshold, kl, config.kl_budget, problem.upper_bound), evaluation, config),
            **dict.fromkeys(("steps", "seconds", "peak_memory_bytes")),  # null: each run has its own
            "consensus": about,
        },
        description={**run.description, "method": CONSENSUS, "counts": counted(shared), CONSENSUS: about},
    )


def votes(circuits: Sequence[Circuit]) -> LevelTensors:
    """How many of the circuits keep each node, (*shape(level))."""
    return {level: torch.stack([circuit.masks[level].float() for circuit in circuits]).sum(0) for level in LEVELS}


def consensus(circuits: Sequence[Circuit], *, at_least: int) -> Circuit:
    """The nodes that at least so many of the circuits keep, closed."""
    return Circuit.of({level: count >= at_least for level, count in votes(circuits).items()}, circuits[0].nodes)
