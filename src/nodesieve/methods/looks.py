"""What circuits cost on validation data, as the sieve asks it: quickly of some examples, and of all of them where that decides.

Far from the budget the first `QUICK` examples are enough. Near it all of the split must agree, and each round looks at other examples first: a
circuit adapts to those that always judge it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nodesieve.circuit import Circuit
from nodesieve.config import DiscoverConfig
from nodesieve.methods.prices import Candidate
from nodesieve.problem import QUICK, Problem

NEAR = 0.5  # of the budget: circuits of more than that are measured on all of the split
JUMP = 1.2  # times what a round may spend: a rise on all of the split above which a candidate is refused


@dataclass(frozen=True, kw_only=True)
class Look:
    """A candidate's KL on the validation examples from `start` on that a round looks at first, (n,), and by how much it is above that of now."""

    candidate: Candidate
    kls: Tensor
    start: int
    rise: float
    doubt: float  # about the rise, where all of the split is asked next

    @property
    def least(self) -> float:
        """What the rise may be at the least."""
        return self.rise - self.doubt

    @property
    def per_price(self) -> float:
        return self.rise / self.candidate.price if self.candidate.price > 0 else math.inf


class Looks:
    """What candidates would do to the circuit of now. `kls`, (n,): its KL, of all validation examples or, far from the budget, of the first ones."""

    def __init__(self, problem: Problem, config: DiscoverConfig) -> None:
        self.problem, self.config = problem, config
        self.kls, self.kl, self.kl_upper = torch.zeros(0), math.nan, math.nan

    def begin(self, circuit: Circuit) -> None:
        """Measure what there is."""
        self.go_on_from(self._completed(circuit, self._measured(circuit, 0, QUICK), 0))

    def go_on_from(self, kls: Tensor) -> None:
        self.kls, self.kl, self.kl_upper = kls, float(kls.mean()), self.problem.upper_bound(kls)

    @property
    def near(self) -> bool:
        """Is the budget so near that all of the split is asked?"""
        return len(self.kls) > QUICK

    def at(self, candidate: Candidate, *, turn: int) -> Look:
        """`turn`: of the parts of the split, which is looked at."""
        start = turn % max(1, len(self.kls) // QUICK) * QUICK
        kls = self._measured(candidate.circuit, start, start + QUICK)
        rises = kls - self.kls[start : start + QUICK]  # on the same examples differences vary far less than either KL
        doubt = float(rises.std()) / math.sqrt(len(rises)) if self.near else 0.0
        return Look(candidate=candidate, kls=kls, start=start, rise=float(rises.mean()), doubt=doubt)

    def agree(self, look: Look, most: float) -> bool:
        """Does all of the validation data allow it, too, where the budget is near: a rise of about `most`? If so, it becomes the circuit of now."""
        kls = self._completed(look.candidate.circuit, look.kls, look.start)
        fits = self.config.keep is not None or self.problem.upper_bound(kls) <= self.config.kl_budget
        both = min(len(kls), len(self.kls))  # examples
        if fits and float((kls[:both] - self.kls[:both]).mean()) <= JUMP * most:
            self.go_on_from(kls)
            return True
        return False

    def _completed(self, circuit: Circuit, kls: Tensor, start: int) -> Tensor:
        """The KL of the examples from `start` on, with that of all others where the budget is near or some before are left out."""
        if start == 0 and self.problem.upper_bound(kls) <= NEAR * self.config.kl_budget:
            return kls
        return torch.cat([self._measured(circuit, 0, start), kls, self._measured(circuit, start + len(kls))])

    def _measured(self, circuit: Circuit, start: int, stop: int | None = None) -> Tensor:
        """The KL of these examples, as far as there are so many."""
        if start >= len(self.problem.task["validation"]) or start == stop:
            return torch.zeros(0)
        (kls,) = self.problem.looks([circuit], "validation", skip=start, first=stop)
        return kls
