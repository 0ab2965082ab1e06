"""What the attribution methods share: each example's gradient of some number to its own gates, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nodesieve.batches import Batch
from nodesieve.config import DiscoverConfig
from nodesieve.journal import Journal
from nodesieve.levels import LEVELS
from nodesieve.nodes import LevelTensors
from nodesieve.problem import Problem, Values
from nodesieve.shrink import Shrunk

# (examples, generator) -> the gate level that each example's moved nodes are held at, (B,)
GateLevel = Callable[[int, torch.Generator], Tensor]
# (logits (B, V), batch, generator) -> the number whose gradient is wanted, (B,)
Target = Callable[[Tensor, Batch, torch.Generator], Tensor]


def open_gates(size: int, generator: torch.Generator) -> Tensor:
    return torch.ones(size)


def uniform_gates(size: int, generator: torch.Generator) -> Tensor:
    return torch.rand(size, generator=generator)


def gate_gradients(
    problem: Problem,
    config: DiscoverConfig,
    journal: Journal,
    *,
    levels: Sequence[str],
    moved: Sequence[str],
    gate_level: GateLevel,
    targets: Sequence[Target],
    index: Sequence[int],
    generator: torch.Generator,
    values: Values | None = None,
    gates: LevelTensors | None = None,
    shrunk: Shrunk | None = None,
) -> Iterator[list[LevelTensors]]:
    """For each batch of some training examples, d target / d gate of each of `levels`, (B, *shape(level)), for each target.

    Args:
        moved: the levels whose gates are held at `gate_level` times their own.
        index: which training examples.
        generator: draws gate levels, and tokens where a target needs them.
        values: what closed nodes hold; by default the problem's own ablation.
        gates: where gates are, (*shape(level)); by default open.
        shrunk: weights without what `gates` close, whose gates then get no gradient.
    """
    train, nodes, device = problem.task["train"], problem.nodes, problem.model.device
    start = {level: x.to(device) for level, x in (gates or nodes.full(1.0)).items()}
    done = 0
    for batch in train.batches_of(index, config.batch_size):
        size = len(batch.answers)
        here = gate_level(size, generator).to(device)
        each = {level: start[level].repeat(size, *[1] * start[level].dim()) for level in LEVELS}
        for level in levels:
            if level in moved:
                each[level] *= here.reshape(size, *[1] * start[level].dim())
            each[level].requires_grad_()
        found, logits, low = [], None, config.memory == "low"
        for number, target in enumerate(targets, 1):
            if logits is None or low:  # what is computed again can be gone through once
                logits = problem.model.gated_logits(batch.clean, each, (values or problem.ablation.values)(batch), shrunk=shrunk, recompute=low)
            total = target(logits, batch, generator).sum()
            gradients = torch.autograd.grad(total, [each[level] for level in levels], retain_graph=not low and number < len(targets))
            found.append(dict(zip(levels, gradients, strict=True)))
        yield found
        done += size
        journal.progress(done, len(index))
        journal.heed()
