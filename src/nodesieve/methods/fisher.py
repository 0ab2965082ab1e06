"""Fisher information: how much the model's own answer distribution moves as a node's gate moves, to second order.

For a gate z, F = E[(d log p(y) / dz) ** 2] with y drawn from the gated model itself. Near open gates KL(full || gated) is about
F (1 - z) ** 2 / 2 when one node closes alone, whatever the answer is: it needs no distractors (Theis et al., arXiv 1801.05787, prune
feature maps by it; Amari 1998). Each example holds all its nodes without children at one gate level drawn uniformly from [0, 1]: leaves, as in
`uniform_gradient`, and MLP outputs, too.

Only nodes without children are measured; what lies above them gets the sum over its children, what closing all of them would cost if none
minded the others. `multigranular` starts from the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nodesieve.batches import Batch, mix
from nodesieve.config import DiscoverConfig
from nodesieve.journal import Journal
from nodesieve.levels import LEVELS, measured
from nodesieve.methods.sensitivity import gate_gradients, uniform_gates
from nodesieve.nodes import LevelTensors
from nodesieve.problem import Problem, Values
from nodesieve.scores import Scores, fold_upwards

EXAMPLES = 512  # enough to rank by: squares of gradients vary less over examples than their mean does


def fisher(problem: Problem, config: DiscoverConfig, journal: Journal) -> Scores:
    """Scores by Fisher information."""
    information = fisher_information(problem, config, journal)
    wholes = {level: information[level] for level in ("head", "mlp_block")}
    return Scores(values=information, nodes=problem.nodes, levels=config.levels, wholes=wholes)


def fisher_information(problem: Problem, config: DiscoverConfig, journal: Journal, *, values: Values | None = None) -> LevelTensors:
    """F of every node of every level, (*shape(level)) on the CPU; 0 at levels without children that are not measured, and the sum of what
    is measured below above them. `values` as in `gate_gradients`."""
    nodes = problem.nodes
    levels = measured(config.levels, nodes.levels)
    total = {level: torch.zeros(nodes.shape(level), device=problem.model.device) for level in LEVELS}
    index = range(len(problem.task["train"]))[:EXAMPLES]
    batches = gate_gradients(
        problem,
        config,
        journal,
        levels=levels,
        moved=levels,
        gate_level=uniform_gates,
        targets=[log_p_of_a_drawn_token],
        index=index,
        generator=torch.Generator().manual_seed(mix(config.seed, 1)),
        values=values,
    )
    for (gradients,) in batches:
        for level, gradient in gradients.items():
            total[level] += gradient.square().sum(0)
    return fold_upwards({level: value.cpu() / len(index) for level, value in total.items()}, lambda own, below: own + below.sum(-1))


def log_p_of_a_drawn_token(logits: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
    """Logits (B, V) -> (B,)."""
    log_p = logits.log_softmax(-1)
    drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(logits.device)
    return log_p.gather(1, drawn).squeeze(1)
