"""Attribution baselines: how fast the logit difference changes as a node closes, to first order.

All take the gradient of the logit difference to the node's gate, averaged over training examples:

- `gate_gradient`: at gates of 1, where for a head or neuron it is gradient x (activation - ablation value), the quantity of attribution patching
  (Nanda 2023; Syed et al., arXiv 2310.10348).
- `uniform_gradient`: with all leaves at one gate level, drawn uniformly from [0, 1] for each example, which averages the gradient along
  the way from the ablated to the full model, much as integrated gradients does;
- `gate_gradient_ig`: the same average for each example, over a grid of gate levels (midpoints): integrated gradients of the gates
  (Sundararajan et al., arXiv 1703.01365; cf. EAP-IG, Hanna et al., arXiv 2403.17806).

It is read in two ways, and validation data says which serves better: by its size (a node that works against the answer is part of how the model comes
to it), or with its sign (such a node is the first to go).

Only head dimensions, neurons, experts and MLP outputs (and the embedding, where asked for) are scored; what lies above them gets the highest
score among its descendants. As wholes, heads and MLP blocks are scored by the sum over their leaves, which is the gradient to a gate of their own.
"""

from __future__ import annotations

import time

import torch

from nodesieve.batches import mix
from nodesieve.config import DiscoverConfig
from nodesieve.journal import Journal, State
from nodesieve.levels import LEAVES, LEVELS, measured
from nodesieve.methods.sensitivity import GateLevel, gate_gradients, open_gates, uniform_gates
from nodesieve.metrics import logit_difference
from nodesieve.problem import Problem
from nodesieve.scores import Scores, raised, sums_of_leaves

EXAMPLES = 2048  # passes forward and backward at most; a built-in task draws more, so that the learned gates never see one twice
IG_LEVELS = 8


def gate_gradient(problem: Problem, config: DiscoverConfig, journal: Journal) -> Scores:
    """Gradients at open gates."""
    return _scores(problem, config, journal, open_gates)


def uniform_gradient(problem: Problem, config: DiscoverConfig, journal: Journal) -> Scores:
    """Gradients at a random gate level an example."""
    return _scores(problem, config, journal, uniform_gates)


def gate_gradient_ig(problem: Problem, config: DiscoverConfig, journal: Journal) -> Scores:
    """Gradients integrated over gate levels."""
    grid = [(i + 0.5) / IG_LEVELS for i in range(IG_LEVELS)]
    return _scores(problem, config, journal, *(lambda size, generator, z=z: torch.full((size,), z) for z in grid))


def _scores(problem: Problem, config: DiscoverConfig, journal: Journal, *gate_levels: GateLevel) -> Scores:
    """Averaged over examples and gate levels, the same examples at each; goes on after the last gate level that was through."""
    nodes = problem.nodes
    levels = measured(config.levels, nodes.levels)
    total = {level: torch.zeros(nodes.shape(level), device=problem.model.device) for level in LEVELS}
    count = min(EXAMPLES // len(gate_levels), len(problem.task["train"]))
    done, began, state = 0, time.monotonic(), journal.load()
    if state is not None:
        done, began = state.numbers["done"], began - state.numbers["seconds"]
        total = {level: x.to(problem.model.device) for level, x in state.tensors.items()}
    for number, gate_level in enumerate(gate_levels[done:], done + 1):
        batches = gate_gradients(
            problem,
            config,
            journal,
            levels=levels,
            moved=LEAVES,
            gate_level=gate_level,
            targets=[lambda logits, batch, generator: logit_difference(logits, batch)],
            index=range(count),
            generator=torch.Generator().manual_seed(mix(config.seed, 1)),
        )
        for (gradients,) in batches:
            for level, gradient in gradients.items():
                total[level] += gradient.sum(0) / (count * len(gate_levels))
        numbers = {"step": 0, "done": number, "seconds": time.monotonic() - began}
        journal.save(State(tensors=total, numbers=numbers))
    journal.seconds = time.monotonic() - began
    signed = {level: value.cpu() for level, value in total.items()}
    scored = {level: signed[level] for level in levels}
    wholes = sums_of_leaves(signed)
    by_sign = Scores(values=raised(scored, nodes), nodes=nodes, levels=config.levels, wholes=wholes)
    by_size = raised({level: value.abs() for level, value in scored.items()}, nodes)
    return Scores(values=by_size, nodes=nodes, levels=config.levels, wholes={level: x.abs() for level, x in wholes.items()}, other=by_sign)
