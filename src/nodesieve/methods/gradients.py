"""Attribution baselines: how fast the logit difference changes as a node closes, to first order.

Both take |gradient of the logit difference to the node's gate|, averaged over training examples:

- `gate_gradient`: at gates of 1, where for a head or neuron it is gradient x (activation - ablation value), the quantity of attribution patching
  (Nanda 2023; Syed et al., arXiv 2310.10348).
- `uniform_gradient`: with all leaves at one gate level, drawn uniformly from [0, 1] for each example, which averages the gradient along
  the way from the ablated to the full model, much as integrated gradients does.

Only head dimensions, neurons, experts and MLP outputs (and the embedding, where asked for) are scored; what lies above them gets the highest
score among its descendants.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nodesieve.batches import mix
from nodesieve.config import DiscoverConfig
from nodesieve.errors import UserError
from nodesieve.journal import Journal
from nodesieve.levels import LEAVES, LEVELS
from nodesieve.metrics import logit_difference
from nodesieve.problem import Problem
from nodesieve.scores import Scores, raise_ancestors

EXAMPLES = 2048  # at most; a built-in task draws more, so that the learned gates never see one twice

# (examples, generator) -> the gate level of each example's leaves, (B,)
GateLevel = Callable[[int, torch.Generator], Tensor]


def gate_gradient(problem: Problem, config: DiscoverConfig, journal: Journal) -> Scores:
    """Gradients at open gates."""
    return _scores(problem, config, journal, lambda size, generator: torch.ones(size))


def uniform_gradient(problem: Problem, config: DiscoverConfig, journal: Journal) -> Scores:
    """Gradients at a random gate level an example."""
    return _scores(problem, config, journal, lambda size, generator: torch.rand(size, generator=generator))


def _scores(problem: Problem, config: DiscoverConfig, journal: Journal, gate_level: GateLevel) -> Scores:
    train, nodes, device = problem.task["train"], problem.nodes, problem.model.device
    if any(not example.distractors for example in train.examples):
        raise UserError(f"--method {config.method} expects distractors, since it follows the logit difference; got examples without")
    scored = [level for level in (*LEAVES, "mlp_output", "embedding") if level in config.levels and level in nodes.levels]
    total = {level: torch.zeros(nodes.shape(level), device=device) for level in LEVELS}
    generator = torch.Generator().manual_seed(mix(config.seed, 1))
    done, count = 0, min(EXAMPLES, len(train))
    for batch in train.batches(config.batch_size, first=count):
        size = len(batch.answers)
        gates = {level: torch.ones(size, *nodes.shape(level), device=device) for level in LEVELS}
        here = gate_level(size, generator).to(device)
        for level in scored:
            if level in LEAVES:
                gates[level] *= here.reshape(size, *[1] * len(nodes.shape(level)))
            gates[level].requires_grad_(True)
        logits = problem.model.gated_logits(batch.clean, gates, problem.ablation.values(batch))
        gradients = torch.autograd.grad(logit_difference(logits, batch).sum(), [gates[level] for level in scored])
        for level, gradient in zip(scored, gradients, strict=True):
            total[level] += gradient.sum(0)
        done += size
        journal.progress(done, count)
        if journal.stopping:  # nothing to resume from: it takes no longer to begin anew
            raise KeyboardInterrupt
    values = raise_ancestors({level: value.abs().cpu() / count for level, value in total.items()})
    return Scores(values=values, nodes=nodes, levels=config.levels)
