"""Learned gates first, and the sieve from where they stop: `multigranular` for the first part of the steps, `sieve` for the rest.

Learned gates move all nodes at once, against noise, and so find out what can stand in for what; near the end they close little more at the same KL.
The sieve's rounds take single nodes whose worth is asked at the circuit as it is. From the circuit of learned gates they go on far beyond what
drawing a line through log_alpha can close, and further than from the whole model in as many steps.

What is gone is scored by the round in which it went; what the gates had closed before stands below that, by log_alpha.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nodesieve.cache import training_cache
from nodesieve.circuit import Circuit
from nodesieve.config import DiscoverConfig
from nodesieve.journal import Journal, State
from nodesieve.methods.multigranular import multigranular
from nodesieve.methods.sieve import sieve
from nodesieve.nodes import LevelTensors
from nodesieve.problem import Problem
from nodesieve.scores import Scores

GATES, ROUNDS = "gates", "rounds"
LEARNING_RATE_FINAL = 0.3  # of the gates: they are not to come to rest, and what they cannot repair rounds can


def hybrid(problem: Problem, config: DiscoverConfig, journal: Journal) -> Scores:
    """Scores by the round in which a node went, above those of nodes that learned gates had closed before.

    Raises:
        Stopped: `journal.stopping` was set; the state is saved and a later call with the same arguments goes on from it.
    """
    steps = min(config.steps - 1, round(config.gates_share * config.steps))
    priced = tuple(level for level in config.levels if config.penalties[level] > 0)  # the others have no rounds, and stay open
    if steps < 1 or not priced:
        return sieve(problem, config, journal)
    state = journal.load()
    cache = training_cache(problem.learner(config), config, journal.scratch)  # one for both parts
    if state is None or state.numbers["phase"] == GATES:
        learning = replace(
            config,
            steps=steps,
            levels=priced,
            controller="kl_budget",
            target_size=None,
            learning_rate_final=LEARNING_RATE_FINAL,
            repair_share=0.0,
        )
        phase = _Phase(journal, state, name=GATES, steps=(0, steps, config.steps))
        gates = _within_budget(multigranular(problem, learning, phase, cache=cache), problem, config)
        state, before = None, float(journal.history[-1]["seconds"])
    else:
        gates = {name.removeprefix("gates."): x for name, x in state.tensors.items() if name.startswith("gates.")}
        before = float(state.numbers["before"])
    start = Scores(values=gates, nodes=problem.nodes, levels=tuple(gates), within=problem.within).circuit(0.0) if gates else None
    beside = {f"gates.{level}": x for level, x in gates.items()}
    phase = _Phase(journal, state, name=ROUNDS, steps=(steps, config.steps, config.steps), seconds=before, beside=beside)
    found = sieve(problem, replace(config, steps=config.steps - steps), phase, start=start, cache=cache)
    return found if start is None else _with_those_before(found, start, gates)


def _within_budget(learned: Scores, problem: Problem, config: DiscoverConfig) -> LevelTensors:
    """log_alpha of all levels, of the last circuit or else the best one on the way; none where neither meets the budget."""
    for scores in (learned, learned.earlier):
        if scores is not None:
            (kl,) = problem.learner(config).looks([scores.circuit(0.0)], "validation")
            if problem.upper_bound(kl) <= config.kl_budget:
                return scores.values
    return {}


def _with_those_before(found: Scores, start: Circuit, gates: LevelTensors) -> Scores:
    lowest = min(float(found.values[level].min()) for level in found.levels if found.values[level].numel())
    values = {level: torch.where(start.masks[level], x, lowest - 2 + gates[level].sigmoid()) for level, x in found.values.items()}
    return replace(found, values=values)


class _Phase(Journal):
    """One phase's part of a run's journal: steps and seconds are counted on from those before, and the state says whose it is.

    Args:
        state: what the run has to go on from, of this phase or none.
        steps: of the run, at which the phase begins and ends, and all.
        seconds: before this phase.
        beside: tensors to be kept beside this phase's own.
    """

    def __init__(
        self,
        journal: Journal,
        state: State | None,
        *,
        name: str,
        steps: tuple[int, int, int],
        seconds: float = 0.0,
        beside: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__(stopping=journal.stopping, scratch=journal.scratch)
        self._journal, self._state, self._name, self._seconds, self._beside = journal, state, name, seconds, beside or {}
        self._begin, self._end, self._all = steps

    def log(self, row: dict[str, Any]) -> None:
        self._journal.log({**row, "step": self._begin + row["step"], "seconds": self._seconds + row["seconds"]})

    def progress(self, step: int, total: int, **facts: float) -> None:
        if total == self._end - self._begin:  # else something else is counted, such as examples that are asked before the first step
            step, total = self._begin + step, self._all
        self._journal.progress(step, total, **facts)
        self.stopping = self._journal.stopping

    def save(self, state: State, *, part: str = "") -> None:
        numbers = {**state.numbers, "step": self._begin + state.numbers["step"], "phase": self._name, "before": self._seconds}
        self._journal.save(State(tensors={**state.tensors, **self._beside}, numbers=numbers))

    def load(self, *, part: str = "") -> State | None:
        if self._state is None:
            return None
        numbers = {**self._state.numbers, "step": self._state.numbers["step"] - self._begin}
        return State(tensors={name: x for name, x in self._state.tensors.items() if name not in self._beside}, numbers=numbers)
