"""After selection: close, coarse to fine, what the circuit can do without until nothing more can go within the KL budget.

One threshold over all scores leaves nodes in that the circuit hardly needs, since a score says what a node was worth on the way and not in this
circuit, and scores that were learned from batches are noisy. Here the circuit is held fixed and every node is asked what a change of its gate would
do, over training examples that are drawn anew each time: the gradient of the KL to the gate, and its Fisher information F, the mean square of the
gradient of log p(token drawn from the circuit), which is the curvature that the KL to the circuit of now has there.

1. Blocks, then heads: the `TRIED` cheapest are closed, as many together as validation data says cost nothing: the KL must not rise.
2. Rounds over the nodes without children and heads as wholes. Closing a node is taken to cost `CLOSING` F - gradient, opening one to gain
   -gradient - `OPENING` F. One half of F each would be right for one node alone; many move at once, and their effects add up, so both are charged
   much more (with 1/2, closing the cheapest twentieth of a circuit multiplied its KL; see docs/method.md). The cheapest share
   goes, with and without the best few of those that are closed coming back, or these come back alone; validation data judges each candidate:
   the first `QUICK` examples which ones are worth the whole split, the whole split the rest. All in the dtype that gates are learned in.
   While it lasts, some of the budget is held back: the candidate that is best for its size and its KL is gone on with (`WORTH`).
   What is known of each node is averaged over the rounds (`MEMORY`): circuits change little from one to the next, and the gradient of a single
   neuron over one round's examples is mostly noise.
3. The share is made smaller when too much is lost, and larger when little is. It ends when less than `LEAST` of the nodes would go.
4. In a small circuit the cheapest nodes of all are tried one by one.

Of everything measured on the whole split, the smallest circuit within the budget, measured once more in the model's own dtype, is returned.
Validation data is looked at often here; what that does to the reported numbers is seen on test data, which is not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nodesieve.batches import Split, mix
from nodesieve.circuit import Circuit
from nodesieve.config import DiscoverConfig
from nodesieve.journal import POLISHING, Journal, State
from nodesieve.levels import CHILDLESS
from nodesieve.methods.fisher import log_p_of_a_drawn_token
from nodesieve.methods.sensitivity import gate_gradients, loss_of, open_gates
from nodesieve.models import learning_dtype
from nodesieve.nodes import LevelTensors
from nodesieve.problem import Problem
from nodesieve.scores import fold_upwards
from nodesieve.select import QUICK, Selection, judge

BLOCKS, HEADS = ("attention_block", "mlp_block"), ("head",)
EXAMPLES = 256  # for what closing and opening would do
TRIED = 8
FINALISTS = 2  # candidates of a round that are measured on all of the split, at most
CLOSING, OPENING = 30.0, 10.0
ALONE = 0.5  # in place of `OPENING` where nothing closes
FIRST, LEAST, MOST = 0.12, 0.01, 0.5  # shares of the nodes that go in a round
SMALLER, LARGER = 2.0, 1.5  # a second share that is tried is so many times smaller; after a round that closed all it tried, the next is larger
BACK = 0.02  # share of the nodes that may come back in a round
MEMORY = 0.7  # weight of the rounds before; the first few weigh alike
WORTH = 0.6  # how many times smaller, in logarithms, a circuit must get for the whole budget; where there is budget to spare
ROUNDS = 24


def polish(problem: Problem, selection: Selection, config: DiscoverConfig, journal: Journal) -> tuple[Selection, float]:
    """A circuit within the budget -> a smaller one that is within it too, if there is one; one that misses the budget comes back as it is. And the
    seconds that it took, before and after a stop. What is known after each round is kept in the journal.

    Raises:
        KeyboardInterrupt: `journal.stopping` was set.
    """
    if not selection.met:
        return selection, 0.0
    polisher = _Polisher(problem, selection, config, journal)
    childless = [level for level in polisher.levels if level in CHILDLESS]
    wholes = [level for level in (*BLOCKS, *HEADS) if level in polisher.levels]
    if not polisher.resumed():
        polisher.begin()
        polisher.ask([*wholes, *childless])
        for levels in (BLOCKS, HEADS):
            polisher.close_one_by_one(levels, most=polisher.now.kl)
    wholes = [level for level in wholes if level in HEADS or not childless]
    polisher.rounds([*wholes, *childless])
    while polisher.is_small():
        polisher.ask([*wholes, *childless])
        if not polisher.close_one_by_one([*wholes, *childless]):
            break
    return polisher.confirmed(), polisher.seconds


@dataclass(frozen=True, kw_only=True)
class _Sensitivity:
    """At a circuit, by level (*shape(level)): d KL / d gate, and Fisher information."""

    gradient: LevelTensors
    fisher: LevelTensors

    def cost(self, level: str) -> Tensor:
        return CLOSING * self.fisher[level] - self.gradient[level]

    def loss(self, level: str, caution: float) -> Tensor:
        """Of opening: below 0 where the KL is expected to fall."""
        return caution * self.fisher[level] + self.gradient[level]


class _Polisher:
    def __init__(self, problem: Problem, selection: Selection, config: DiscoverConfig, journal: Journal) -> None:
        self.problem, self.config, self.journal = problem, config, journal
        self.unpolished = self.now = selection
        self.smallest: list[Selection] = []  # within the budget, each smaller than the one before
        self.levels = [level for level in selection.scores.levels if level in problem.nodes.levels and level != "embedding"]
        self.learner = problem.in_dtype(learning_dtype(config.learning_dtype, problem.model.model))
        self.known = _Sensitivity(gradient={}, fisher={})
        self.share = FIRST
        self._selected, self._began, self._drawn, self._round = selection.circuit.fingerprint, time.monotonic(), 0, 0

    def resumed(self) -> bool:
        """Go on from the last round of a run that was stopped, if it began at the same circuit."""
        state = self.journal.load(part=POLISHING)
        if state is None or state.numbers["selected"] != self._selected:
            return False
        groups: dict[str, LevelTensors] = {}
        for name, tensor in state.tensors.items():
            group, level = name.split(".")
            groups.setdefault(group, {})[level] = tensor
        nodes, numbers = self.now.circuit.nodes, state.numbers
        for place, (kl, kl_upper) in enumerate(numbers["smallest"]):
            circuit = Circuit.of(groups[f"smallest {place}"], nodes)
            self.smallest.append(replace(self.now, circuit=circuit, kl=kl, kl_upper=kl_upper, met=True))
        kl, kl_upper, met = numbers["now"]
        self.now = replace(self.now, circuit=Circuit.of(groups["now"], nodes), kl=kl, kl_upper=kl_upper, met=met)
        self.known = _Sensitivity(gradient=groups["gradient"], fisher=groups["fisher"])
        self.share, self._round, self._drawn = numbers["share"], numbers["round"], numbers["drawn"]
        self._began -= numbers["seconds"]
        return True

    def begin(self) -> None:
        """Measure what there is as everything else will be measured."""
        (self.now,) = self._measure([self.now.circuit])

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def save(self) -> None:
        masks = {"now": self.now.circuit.masks, **{f"smallest {place}": found.circuit.masks for place, found in enumerate(self.smallest)}}
        groups = {**masks, "gradient": self.known.gradient, "fisher": self.known.fisher}
        tensors = {f"{group}.{level}": x.clone() for group, parts in groups.items() for level, x in parts.items()}  # circuits may share masks
        numbers = {"selected": self._selected, "share": self.share, "round": self._round, "drawn": self._drawn, "seconds": self.seconds}
        numbers |= {"now": [self.now.kl, self.now.kl_upper, self.now.met], "smallest": [[found.kl, found.kl_upper] for found in self.smallest]}
        self.journal.save(State(tensors=tensors, numbers=numbers), part=POLISHING)

    def confirmed(self) -> Selection:
        """The smallest circuit that is within the budget in the model's own dtype, too."""
        if self.learner is self.problem:
            return self.smallest[-1] if self.smallest else self.unpolished
        off = 0.0
        for found in reversed(self.smallest):
            if found.kl_upper + off <= self.config.kl_budget:
                (selection,) = self._judged(self.problem, [found.circuit])
                if selection.met:
                    return selection
                off = max(off, selection.kl_upper - found.kl_upper)
        return self.unpolished

    def is_small(self) -> bool:
        """Would the smallest round close fewer nodes than can be tried one by one?"""
        childless = [level for level in self.levels if level in CHILDLESS]
        return LEAST * sum(self.now.circuit.kept(level) for level in childless or (*BLOCKS, *HEADS)) < TRIED

    def close_one_by_one(self, levels: Sequence[str], *, most: float = math.inf) -> bool:
        """As many of the cheapest as can go together, in the order of what closing each alone does to the validation KL, within the budget
        and a KL of `most` -> has any gone?"""
        start, levels = self.now.circuit, [level for level in levels if level in self.levels]
        kept = [(level, index) for level in levels for index in start.masks[level].nonzero()]
        if not kept:
            return False
        costs = torch.cat([self.known.cost(level)[start.masks[level]] for level in levels])
        nodes = [kept[place] for place in self._cheapest(levels, costs)[:TRIED].tolist()]
        alone = self._estimate([start.without({level: index.unsqueeze(0)}) for level, index in nodes])

        def fits(selection: Selection) -> bool:
            return selection.met and selection.kl <= most

        free = [place for place in sorted(range(len(nodes)), key=lambda place: alone[place].kl) if fits(alone[place])]
        together = []
        for count in (count for count in (2, 3, 4, 6, 8) if count <= len(free)):
            closed = [nodes[place] for place in free[:count]]
            together.append(start.without({name: torch.stack([i for level, i in closed if level == name]) for name, _ in closed}))
        for candidate in reversed([*(alone[place] for place in free[:1]), *self._estimate(together)]):
            if fits(candidate):
                (selection,) = self._measure([candidate.circuit])
                if fits(selection):
                    self._take(selection)
                    return True
        return False

    def rounds(self, levels: Sequence[str]) -> None:
        """Closing and opening many at once; `levels` without children, and wholes."""
        while self._round < ROUNDS:
            count = _count(self.now.circuit)
            share, least = max(self.share, 1 / count), max(LEAST, 1 / count)
            plan = [(size, back) for size in (share, max(share / SMALLER, least)) for back in (0.0, BACK)] + [(0.0, BACK)]
            found = self._best_of([self._changed(levels, *row) for row in plan])
            if found is not None:
                size, selection = plan[found[0]][0], found[1]
                self._take(selection)
                self.share = min(MOST, LARGER * share) if size == share else size or share
            elif share / SMALLER <= least:
                break
            else:
                self.share = share / SMALLER
            self._round += 1
            self.ask(levels)
            self.save()

    def _value(self, selection: Selection, *, worth: float) -> float:
        """Lower is better: how small, and how much of the budget is left."""
        return math.log(_count(selection.circuit)) + worth * selection.kl_upper / self.config.kl_budget

    def _changed(self, levels: Sequence[str], share: float, back: float) -> Circuit:
        """The circuit without the cheapest `share` of its nodes, with the best of those that are closed, up to a share of `back`."""
        start, found = self.now.circuit, self.known
        count, below = _count(start), _below(start)
        most = round(share * count)
        masks = {level: mask.clone() for level, mask in start.masks.items()}
        sizes = [below[level][start.masks[level]] for level in levels]
        costs = [found.cost(level)[start.masks[level]] / size for level, size in zip(levels, sizes, strict=True)]
        size = torch.cat(sizes)
        order = self._cheapest(levels, torch.cat(costs).masked_fill(size > most, torch.inf))  # a whole that is too large bars nothing behind it
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[order[size[order].cumsum(0) <= most]] = True
        for level, part in zip(levels, chosen.split([len(cost) for cost in costs]), strict=True):  # type: ignore[no-untyped-call]
            masks[level][start.masks[level]] = ~part
        childless = [level for level in levels if level in CHILDLESS]
        if childless and back:
            within, caution = self.problem.within, OPENING if share else ALONE
            barred = {level: start.masks[level] if within is None else start.masks[level] | ~within.masks[level] for level in childless}
            losses = torch.cat([found.loss(level, caution).masked_fill(barred[level], torch.inf).flatten() for level in childless])
            best = losses.argsort(stable=True)[: int(back * count)]
            opened = torch.zeros(len(losses), dtype=torch.bool)
            opened[best[losses[best] < 0]] = True
            for level, part in zip(childless, opened.split([start.masks[level].numel() for level in childless]), strict=True):  # type: ignore[no-untyped-call]
                masks[level] |= part.reshape(masks[level].shape)
        return Circuit.of(masks, start.nodes)

    def _cheapest(self, levels: Sequence[str], costs: Tensor) -> Tensor:
        """Places of kept nodes, of all `levels` in turn, in the order of what closing them costs. Among equals, those of low score come first: where
        the model is so sure of its answer that every gradient is 0, scores are all that is known."""
        scores, masks = self.now.scores, self.now.circuit.masks
        order = torch.cat([scores.values[level][masks[level]] for level in levels]).argsort(stable=True)
        return order[costs[order].argsort(stable=True)]

    def _best_of(self, circuits: Sequence[Circuit]) -> tuple[int, Selection] | None:
        """The candidate to go on with, and its place: by a first look, then on all of the split. The first that is worth it; else one that spends
        what is left of the budget; None where none is smaller within it."""
        estimates = self._estimate(circuits)

        def rank(place: int) -> tuple[bool, float]:
            estimate = estimates[place]
            return not estimate.met, self._value(estimate, worth=WORTH) if estimate.met else estimate.kl

        places = sorted(range(len(circuits)), key=rank)
        smaller: list[tuple[int, Selection]] = []
        for place in [place for place in places[:FINALISTS] if estimates[place].met] or places[:1]:
            (selection,) = self._measure([circuits[place]])
            if selection.met and self._value(selection, worth=WORTH) < self._value(self.now, worth=WORTH) - LEAST:
                return place, selection
            if selection.met and _count(selection.circuit) < _count(self.now.circuit):
                smaller.append((place, selection))
        return min(smaller, key=lambda found: _count(found[1].circuit), default=None)

    def _estimate(self, circuits: Sequence[Circuit]) -> list[Selection]:
        """A first look: the KL of the circuit of now and how much it rises or falls on the first `QUICK` examples. A difference on the same
        examples varies far less than either KL."""
        now, budget, found = self.now, self.config.kl_budget, []
        own, *kls = self.learner.losses([now.circuit, *circuits], "validation", first=QUICK, cut=True)
        for circuit, kl in zip(circuits, kls, strict=True):
            more = float((kl - own).mean())
            found.append(replace(now, circuit=circuit, kl=now.kl + more, kl_upper=now.kl_upper + more, met=now.kl_upper + more <= budget))
        return found

    def _measure(self, circuits: Sequence[Circuit]) -> list[Selection]:
        """On all of the split, in the dtype that is learned in."""
        found = self._judged(self.learner, circuits)
        for selection in found:
            best = (self.smallest or [self.unpolished])[-1].circuit
            if selection.met and _count(selection.circuit) < _count(best) and selection.circuit.size <= best.size:
                self.smallest.append(selection)
        return found

    def _judged(self, problem: Problem, circuits: Sequence[Circuit]) -> list[Selection]:
        kls = problem.losses(circuits, "validation", cut=True)
        scores, threshold, budget = self.unpolished.scores, self.unpolished.threshold, self.config.kl_budget
        return [judge(circuit, scores, threshold, kl, budget) for circuit, kl in zip(circuits, kls, strict=True)]

    def _take(self, selection: Selection) -> None:
        self.now = selection
        self.journal.say(f"polishing: {100 * selection.circuit.size:.1f}% of the leaves, validation KL {selection.kl:.3f}")

    def ask(self, levels: Sequence[str]) -> None:
        """Gradients and Fisher information at the circuit of now, over training examples that no round has had, into what is known."""
        learner, nodes, train = self.learner, self.problem.nodes, self._next_examples()
        sums = [{level: torch.zeros(nodes.shape(level), device=learner.model.device) for level in levels} for _ in range(2)]
        rows = gate_gradients(
            learner,
            self.config,
            self.journal,
            levels=levels,
            moved=(),
            gate_level=open_gates,
            values_of=(loss_of(learner), log_p_of_a_drawn_token),
            examples=EXAMPLES,
            gates=self.now.circuit.gates(),
            train=train,
        )
        for gradient, score in rows:
            for level in levels:
                sums[0][level] += gradient[level].sum(0)
                sums[1][level] += score[level].square().sum(0)
        old, weight = self.known, max(1 - MEMORY, 1 / (1 + self._drawn))

        def averaged(before: LevelTensors, total: LevelTensors) -> LevelTensors:
            new = {level: x.cpu() / len(train) for level, x in total.items()}
            return {**before, **{level: torch.lerp(before.get(level, x), x, weight) for level, x in new.items()}}

        self.known = _Sensitivity(gradient=averaged(old.gradient, sums[0]), fisher=averaged(old.fisher, sums[1]))
        self._drawn += 1

    def _next_examples(self) -> Split:
        train = self.problem.task["train"]
        drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(mix(self.config.seed, self._drawn, 11)))[:EXAMPLES]
        return replace(train, examples=tuple(train.examples[i] for i in drawn.tolist()))


def _count(circuit: Circuit) -> int:
    """Kept nodes without children."""
    return max(1, sum(circuit.kept(level) for level in CHILDLESS if level != "embedding"))


def _below(circuit: Circuit) -> LevelTensors:
    """How many kept nodes without children lie in or below each node, (*shape(level)); 1 at least."""
    counts = {name: mask.float() if name in CHILDLESS else torch.zeros(mask.shape) for name, mask in circuit.masks.items()}
    return {level: total.clamp(min=1) for level, total in fold_upwards(counts, lambda own, below: own + below.sum(-1)).items()}
