"""What closing each node would do to a circuit, asked of some training examples: gradients and Fisher information of the gates, at the circuit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nodesieve.batches import Batch, mix
from nodesieve.cache import Cache
from nodesieve.circuit import Circuit
from nodesieve.config import DiscoverConfig
from nodesieve.journal import Journal
from nodesieve.methods.fisher import log_p_of_a_drawn_token
from nodesieve.methods.sensitivity import gate_gradients, open_gates
from nodesieve.methods.task_term import task_term
from nodesieve.nodes import LevelTensors
from nodesieve.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Asked:
    """At a circuit: the mean loss, the KL in it, and by level (*shape(level)), on the CPU, d loss / d gate and Fisher information."""

    loss: float
    kl: float
    gradient: LevelTensors
    fisher: LevelTensors


def ask(
    problem: Problem, circuit: Circuit, config: DiscoverConfig, journal: Journal, *, levels: Sequence[str], index: Sequence[int], cache: Cache
) -> Asked:
    """Over the training examples `index`.

    Args:
        cache: of the training examples.
    """
    nodes = problem.nodes
    sums = [{level: torch.zeros(nodes.shape(level), device=problem.model.device) for level in levels} for _ in range(2)]
    losses: list[Tensor] = []
    kls: list[Tensor] = []

    def loss(logits: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        kl = problem.objective(cache.answers(batch), logits, batch)
        found = kl + task_term(logits, batch, config)
        kls.append(kl.detach())
        losses.append(found.detach())
        return found

    rows = gate_gradients(
        problem,
        config,
        journal,
        levels=levels,
        moved=(),
        gate_level=open_gates,
        targets=(loss, log_p_of_a_drawn_token),
        index=index,
        generator=torch.Generator().manual_seed(mix(config.seed, 1)),  # the same for each round: docs/trials.md says why
        values=cache.values,
        gates=circuit.gates(),
        shrunk=problem.cut(circuit.masks),
    )
    for gradient, score in rows:
        for level in levels:
            sums[0][level] += gradient[level].sum(0)
            sums[1][level] += score[level].square().sum(0)
    gradients, squares = ({level: x.cpu() / len(index) for level, x in total.items()} for total in sums)
    lost = float(torch.cat(losses).mean())
    if lost == 0 and problem.keeps_kl_low:  # at its lowest, where gradients are rounding, though far above Fisher information of saturated answers
        gradients = {level: torch.zeros_like(x) for level, x in gradients.items()}
    return Asked(loss=lost, kl=float(torch.cat(kls).mean()), gradient=gradients, fisher=squares)
