"""From the last node back, close each head and MLP block that the budget allows (after ACDC, Conmy et al., arXiv 2304.14997, on nodes).

A sweep visits what is still open, from the last layer to the first, and closes a node for good where that adds less than a tolerance to the mean
KL over the first `EXAMPLES` training examples. ACDC makes one sweep at a tolerance of the user's choice; here sweeps follow one another,
each with twice the tolerance, until the KL is well over the budget, or nothing is left where a size is asked for. So one run gives the circuits
of many tolerances: a node's score says when it went, and selection draws the line on validation data as for every method. Nothing finer than heads
and MLP blocks is looked at.

What enters a layer stays as it is for the length of a sweep, since only later layers have changed: it is kept, and a visit begins there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nodesieve.ablations import Activations, Corrupted
from nodesieve.batches import Batch
from nodesieve.circuit import Circuit
from nodesieve.config import DiscoverConfig
from nodesieve.journal import Journal, State
from nodesieve.levels import LEVELS
from nodesieve.nodes import LevelTensors
from nodesieve.problem import Problem
from nodesieve.scores import Scores

EXAMPLES = 64
FIRST_TOLERANCE = 1 / 1024  # of the KL budget
ENOUGH = 1.5  # times the budget: where sweeps end
SAVE_EVERY = 25

_Node = tuple[int, int]  # layer, and head or -1 for the MLP block


def greedy(problem: Problem, config: DiscoverConfig, journal: Journal) -> Scores:
    """Close heads and MLP blocks one after the other; resumable."""
    search = _Search(problem, config)
    state = journal.load()
    if state is None:
        search.begin()
    else:
        search.restore(state)
    began = time.monotonic() - search.seconds
    visits = 0
    enough = ENOUGH * config.kl_budget if config.keep is None else math.inf  # on the way to a size, the budget does not hold
    while search.left and search.kl <= enough:
        for node in search.left[search.place :]:
            search.visit(node)
            visits += 1
            search.seconds = time.monotonic() - began
            journal.progress(search.place, len(search.left), kl=search.kl, head=search.share)
            if journal.stopping or visits % SAVE_EVERY == 0:
                journal.save(search.state())
            journal.heed()
            if search.kl > enough:
                break
        search.end_sweep()
    journal.seconds = search.seconds
    return search.scores()


class _Search:
    def __init__(self, problem: Problem, config: DiscoverConfig) -> None:
        self.nodes, self.config = problem.nodes, config
        learner = problem.learner(config)
        self._learner = learner
        self._batches: list[tuple[Batch, Tensor, Activations]] = []
        for batch in learner.task["train"].batches(problem.batch_size, first=EXAMPLES):
            values = learner.ablation.values(batch)
            held = learner.model.record(values.tokens) if isinstance(values, Corrupted) else values
            self._batches.append((batch, problem.model.logits(batch.clean), held))
        layers = range(self.nodes.layers - 1, -1, -1)
        self.left = [node for layer in layers for node in ((layer, -1), *((layer, head) for head in range(self.nodes.heads - 1, -1, -1)))]
        self.left = [node for node in self.left if ("mlp_block" if node[1] < 0 else "head") in config.levels]
        self._all = len(self.left)
        self.gone: list[_Node] = []
        self.place = 0  # in the sweep
        self.tolerance = FIRST_TOLERANCE * config.kl_budget
        self.kl = 0.0
        self.seconds = 0.0
        self._outputs: list[list[Any]] = []  # of each layer, a batch, as they were when the sweep began

    def begin(self) -> None:
        """Measure the whole model: rounding, where gates are learned in 16 bits, costs more than the first nodes may."""
        self._outputs = self._listen()
        self.kl = self._measure([], since=0)

    @property
    def share(self) -> float:
        return 1 - len(self.gone) / self._all

    @torch.no_grad()
    def visit(self, node: _Node) -> None:
        if not self._outputs:
            self._outputs = self._listen()
        kl = self._measure([*self.gone, node], since=node[0])
        if kl - self.kl <= self.tolerance:
            self.gone.append(node)
            self.kl = kl
        self.place += 1

    def end_sweep(self) -> None:
        gone = set(self.gone)
        self.left = [node for node in self.left if node not in gone]
        self.place = 0
        self.tolerance *= 2
        self._outputs = []

    def _listen(self) -> list[list[Any]]:
        model, gates = self._learner.model, self._gates(self.gone)
        found = []
        for batch, _, values in self._batches:
            with model.listening() as outputs:
                model.gated_logits(batch.clean, gates, values)
            found.append(outputs)
        return found

    def _measure(self, closed: Sequence[_Node], *, since: int) -> float:
        """The mean KL; layers before `since` are as they were when the sweep began."""
        model, gates = self._learner.model, self._gates(closed)
        total = 0.0
        for (batch, full, values), outputs in zip(self._batches, self._outputs, strict=True):
            with model.going_on(outputs[:since]):
                total += float(self._learner.objective(full, model.gated_logits(batch.clean, gates, values), batch).sum())
        return total / sum(len(batch.answers) for batch, _, _ in self._batches)

    def _gates(self, closed: Sequence[_Node]) -> LevelTensors:
        heads, mlps = [node for node in closed if node[1] >= 0], [node[:1] for node in closed if node[1] < 0]
        gone = {"head": torch.tensor(heads, dtype=torch.long).reshape(-1, 2), "mlp_block": torch.tensor(mlps, dtype=torch.long).reshape(-1, 1)}
        return Circuit.whole(self.nodes).without(gone).gates(device=self._learner.model.device)

    def scores(self) -> Scores:
        """0, 1, 2, ... in the order in which nodes went; those that are left, above."""
        order = {node: float(number) for number, node in enumerate(self.gone)}
        left = float(self._all)
        values = {level: torch.full(self.nodes.shape(level), left) for level in LEVELS}
        for (layer, head), number in order.items():
            if head < 0:
                values["mlp_block"][layer] = number
            else:
                values["head"][layer, head] = number
        return Scores(values=values, nodes=self.nodes, levels=tuple(level for level in self.config.row.sees if level in self.config.levels))

    def state(self) -> State:
        numbers = {"place": self.place, "tolerance": self.tolerance, "kl": self.kl, "seconds": self.seconds, "left": self.left, "gone": self.gone}
        return State(tensors={}, numbers={"step": 0, **numbers})

    def restore(self, state: State) -> None:
        for name in ("place", "tolerance", "kl", "seconds"):
            setattr(self, name, state.numbers[name])
        self.left, self.gone = ([(layer, head) for layer, head in state.numbers[name]] for name in ("left", "gone"))
