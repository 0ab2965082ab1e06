"""After selection: close what the circuit can do without, coarse to fine, until nothing more can go within the KL budget.

One threshold over all scores leaves nodes in that cost nothing by now, since a score says what a node was worth on the way and not in this circuit.
Blocks come first, then heads, then single dimensions, neurons and outputs. At each stage:

1. What closing each kept node would add to the KL, to first order: minus the gradient of the KL to its gate, in this circuit, over training
   examples that are drawn anew each time. They rank; they decide nothing.
2. The longest stretch of that ranking, cheapest first, whose nodes can all be closed with the budget still met on validation data, found by
   bisection; and so on, with new gradients, until less than `LEAST` of the stage's nodes goes.
3. Of the blocks and heads that are left, the `TRIED` cheapest by that ranking are then closed one at a time where validation data says that
   nothing is lost: the KL must not rise.

Validation data is looked at often here; what that does to the reported numbers is seen on test data, which is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nodesieve.batches import Batch, Split, mix
from nodesieve.circuit import Circuit
from nodesieve.config import DiscoverConfig
from nodesieve.journal import Journal
from nodesieve.levels import LEVELS
from nodesieve.methods.sensitivity import gate_gradients, open_gates
from nodesieve.metrics import upper_bound
from nodesieve.models import learning_dtype
from nodesieve.nodes import LevelTensors
from nodesieve.problem import Problem
from nodesieve.select import WIDTH, Selection

STAGES = (("attention_block", "mlp_block"), ("head",), ("head_dim", "mlp_neuron", "expert", "mlp_output"))
ONE_BY_ONE = ("attention_block", "mlp_block", "head")
EXAMPLES = 256  # for a ranking
LEAST = 0.005
TRIED = 12
FINEST = 64  # of the parts into which a stage's nodes are cut, in the search for how many can go


def polish(problem: Problem, selection: Selection, config: DiscoverConfig, journal: Journal) -> Selection:
    """A circuit within the budget -> one that lacks some of its nodes and is within it too. One that misses the budget comes back as it is."""
    if not selection.met:
        return selection
    polisher = _Polisher(problem, selection, config, journal)
    for stage in STAGES:
        levels = [level for level in stage if level in selection.scores.levels and level in problem.nodes.levels]
        if levels:
            polisher.close_cheapest(levels)
            polisher.close_one_by_one([level for level in levels if level in ONE_BY_ONE])
    return polisher.selection


class _Polisher:
    def __init__(self, problem: Problem, selection: Selection, config: DiscoverConfig, journal: Journal) -> None:
        self.problem, self.selection, self.config, self.journal = problem, selection, config, journal
        self.learner = problem.in_dtype(learning_dtype(config.learning_dtype, problem.model.model))
        self._rounds = 0

    def close_cheapest(self, levels: Sequence[str]) -> None:
        while True:
            ranked = self._ranked(levels)
            count = self._longest(levels, ranked)
            if count <= LEAST * len(ranked) or count == len(ranked):
                return

    def close_one_by_one(self, levels: Sequence[str]) -> None:
        """The cheapest, in the order of what closing each alone does to the validation KL, if it is not raised."""
        if not levels:
            return
        kept = [(level, index) for level in levels for index in self.selection.circuit.masks[level].nonzero()]
        nodes = [kept[place] for place in self._ranked(levels)[:TRIED].tolist()]
        circuits = [self.selection.circuit.without({level: index.unsqueeze(0)}) for level, index in nodes]
        kls = [float(kl.mean()) for kl in self._measure(circuits)]
        for place in sorted(range(len(nodes)), key=kls.__getitem__):
            if kls[place] > self.selection.kl:
                return
            level, index = nodes[place]
            if self.selection.circuit.masks[level][tuple(index)]:
                circuit = self.selection.circuit.without({level: index.unsqueeze(0)})
                self._take_if_met([circuit], most=self.selection.kl)

    def _longest(self, levels: Sequence[str], ranked: Tensor) -> int:
        """Close as many of the kept nodes of `levels`, in the order of `ranked`, as the budget allows -> how many."""
        kept = [(level, self.selection.circuit.masks[level].nonzero()) for level in levels]
        start = self.selection.circuit

        def without(count: int) -> Circuit:
            closed, done = {}, 0
            for level, index in kept:
                own = ranked[:count][(ranked[:count] >= done) & (ranked[:count] < done + len(index))] - done
                closed[level] = index[own]
                done += len(index)
            return start.without(closed)

        low, high = 0, len(ranked) + 1  # `low` of them can go, `high` cannot
        while high - low > max(1, len(ranked) // FINEST // 4 if low else 1):
            gap = high - low
            counts = sorted({low + max(1, gap * k // (WIDTH + 1)) for k in range(1, WIDTH + 1)} - {high})
            if low == 0:  # little can go, in the main
                counts = sorted({max(1, min(high - 1, gap // divisor)) for divisor in (64, 16, 4)})
            taken = self._take_if_met([without(count) for count in counts])
            met = [count for count, was in zip(counts, taken, strict=True) if was]
            missed = [count for count, was in zip(counts, taken, strict=True) if not was]
            high = min([high, *missed])
            low = max([low, *(count for count in met if count < high)])
        return low

    def _take_if_met(self, circuits: Sequence[Circuit], most: float | None = None) -> list[bool]:
        """Measure circuits and go over to the smallest that is within the budget -> which of them are."""
        taken = []
        for circuit, kl in zip(circuits, self._measure(circuits), strict=True):
            upper = upper_bound(kl)
            taken.append(upper <= self.config.kl_budget and (most is None or float(kl.mean()) <= most))
            if taken[-1] and _nodes(circuit) < _nodes(self.selection.circuit):
                self.selection = replace(self.selection, circuit=circuit, kl=float(kl.mean()), kl_upper=upper)
        return taken

    def _measure(self, circuits: Sequence[Circuit]) -> list[Tensor]:
        found: list[Tensor] = []
        for start in range(0, len(circuits), WIDTH):
            found += self.problem.losses(circuits[start : start + WIDTH], "validation", cut=True)
            self.journal.progress(len(found), len(circuits), kl=self.selection.kl, **self._shares())
        return found

    def _ranked(self, levels: Sequence[str]) -> Tensor:
        """Places of the kept nodes of `levels`, level after level, the cheapest first."""
        costs = self._costs(levels)
        return torch.cat([costs[level] for level in levels]).argsort(stable=True)

    def _costs(self, levels: Sequence[str]) -> LevelTensors:
        """What closing each kept node of `levels` adds to the KL to first order, (kept,) in the order of `nonzero`."""
        circuit = self.selection.circuit
        total = {level: torch.zeros(self.problem.nodes.shape(level), device=self.problem.model.device) for level in levels}
        learner, train = self.learner, self._next_examples()

        def kl(logits: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
            return learner.objective(learner.model.logits(batch.clean), logits, batch)

        rows = gate_gradients(
            learner,
            self.config,
            self.journal,
            levels=levels,
            moved=(),
            gate_level=open_gates,
            value=kl,
            examples=EXAMPLES,
            gates=circuit.gates(),
            train=train,
        )
        for gradients in rows:
            for level, gradient in gradients.items():
                total[level] -= gradient.sum(0)
        return {level: value.cpu()[circuit.masks[level]] for level, value in total.items()}

    def _next_examples(self) -> Split:
        train = self.problem.task["train"]
        drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(mix(self.config.seed, self._rounds, 11)))[:EXAMPLES]
        self._rounds += 1
        return replace(train, examples=tuple(train.examples[i] for i in drawn.tolist()))

    def _shares(self) -> dict[str, float]:
        circuit = self.selection.circuit
        return {level: circuit.kept(level) / circuit.nodes.count(level) for level in self.selection.scores.levels if circuit.nodes.count(level)}


def _nodes(circuit: Circuit) -> int:
    return sum(circuit.kept(level) for level in LEVELS)
