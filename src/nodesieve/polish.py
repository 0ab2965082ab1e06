"""After selection: greedily, coarse to fine, close what the circuit can do without, until little more can go within the KL budget; take back heads.

One threshold over all scores leaves nodes in that the circuit hardly needs: scores are noisy, and those of one level or layer need not compare with
those of another. Here parts of the circuit are closed on validation data alone, the same way for every method:

1. blocks, then heads;
2. of each level without children, layer by layer, the nodes of lowest score: first half of them, then a sixth (`PARTS`), one at least;
3. blocks, heads and smaller parts (`SMALLER`) together, then the smallest alone;
4. single nodes of levels of which few are left (`SINGLES`).

Then heads that are closed, those that scored highest, are opened one by one, each with the dimensions that the method had left it or, where it had
left none, with all. What lowers the KL on examples that had no say in the choice stays open, and stages 3 and 4 spend what that has won. This is
done over as long as a hundredth fewer nodes without children are left in the end (`LITTLE`); with no fewer, the circuit from before comes back.
Heads judged alone do not say what a few of them can do together: the first stages close some that gates had been sure of.

A stage closes as many of the cheapest parts together as may go (`nodesieve.parts`), cheap for how many nodes without children go with them: those
that leave the KL where it is, and in the last three stages whatever the budget allows. Each is done over until little or nothing more goes. In
a large circuit single nodes are too many to be tried, so some may be left that could go.

Looks are at part of the validation data, on the copy of the model that is learned on; what is closed is measured on all of it in the model's own
dtype.
Validation data is looked at often here; what that does to the reported numbers is seen on test data, which is not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from nodesieve.circuit import Circuit
from nodesieve.config import DiscoverConfig
from nodesieve.journal import POLISHING, Journal, State
from nodesieve.levels import CHILDLESS, LEAVES, LEVELS
from nodesieve.metrics import in_percent
from nodesieve.parts import NOTHING, TRIES, Part, as_many_of, cheapest_parts, helpful_parts, less
from nodesieve.problem import Problem
from nodesieve.select import Selection, judge

BLOCKS, HEADS = ("attention_block", "mlp_block"), ("head",)
PARTS, SMALLER = (1 / 2, 1 / 6), (1 / 16, 1 / 64)  # of the kept nodes of one level in one layer
SINGLES = 512  # nodes of a level without children that a circuit may have to be tried one by one
AGAIN = 8  # turns of a stage, at most
OPENED, TIMES = 64, 3  # closed heads that are opened again to see what that does; how often, at most
LITTLE, FEW = 0.01, 0.05  # of the leaves, of the heads and blocks tried: a turn that closes less of both is the last of its stage


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """What is tried: kinds of parts, and whether they may spend the budget or only what costs nothing."""

    levels: tuple[str, ...]
    share: float | None  # of a childless level's nodes in a layer, heads and blocks one by one; None: all one by one, where they are few
    spending: bool
    of_leaves: bool = True  # have any leaves gates, whose number then says how far it has come?
    opening: bool = False  # of heads that are closed

    def is_done(self, before: Circuit, after: Circuit) -> bool:
        """Has a turn closed so little that another is not worth its time?"""
        kept, left = (sum(circuit.kept(level) for level in self.levels if level not in CHILDLESS) for circuit in (before, after))
        fine, finer = (circuit.size if self.of_leaves else circuit.childless for circuit in (before, after))
        return finer > (1 - LITTLE) * fine and left >= (1 - FEW) * kept


def polish(problem: Problem, selection: Selection, config: DiscoverConfig, journal: Journal, *, limit: float = math.inf) -> tuple[Selection, float]:
    """A circuit within the budget -> a smaller one that is within it too, if there is one; one that misses the budget comes back as it is. And the
    seconds that it took, before and after a stop, which are about `limit` at most. What is left after each turn of a stage is kept in the journal.

    Raises:
        KeyboardInterrupt: `journal.stopping` was set.
    """
    if not selection.met:
        return selection, 0.0
    polisher = _Polisher(problem, selection, config)
    stages = list(_stages(polisher.levels))
    state = journal.load(part=POLISHING)
    first, turns = polisher.restored(state) if state is not None else (0, 0)
    began = time.monotonic() - (state.numbers["seconds"] if state is not None and first + turns else 0.0)
    until = began + limit
    for number, stage in enumerate(stages[first:], first):
        if time.monotonic() > until:
            break
        if stage.opening and not polisher.reopen(journal, until=until):
            break
        for done in range(turns if number == first else 0, 0 if stage.opening else AGAIN):
            before = polisher.now.circuit
            if not polisher.go_through(stage, journal, until=until):
                break
            journal.say(f"polishing: {in_percent(polisher.now.circuit.size)} of the leaves, validation KL {polisher.now.kl:.3f}")
            if stage.is_done(before, polisher.now.circuit):
                break
            journal.save(polisher.state(stage=number, turns=done + 1, seconds=time.monotonic() - began), part=POLISHING)
        journal.save(polisher.state(stage=number + 1, seconds=time.monotonic() - began), part=POLISHING)
    return polisher.smallest, time.monotonic() - began


def _stages(levels: Sequence[str]) -> Iterator[_Stage]:
    childless = tuple(level for level in levels if level in CHILDLESS)
    stage = partial(_Stage, of_leaves=bool(set(levels) & set(LEAVES)))
    blocks, heads = (tuple(level for level in wholes if level in levels) for wholes in (BLOCKS, HEADS))
    for wholes in (blocks, heads):
        yield stage(levels=wholes, share=None, spending=False)
    for share in PARTS:
        yield stage(levels=childless, share=share, spending=False)
    small, smallest = SMALLER
    spending = [
        stage(levels=(*blocks, *heads, *childless), share=small, spending=True),
        stage(levels=childless, share=smallest, spending=True),
        stage(levels=childless, share=None, spending=True),
    ]
    yield from spending
    for _ in range(TIMES if heads else 0):
        yield stage(levels=heads, share=None, spending=False, opening=True)
        yield from spending


class _Polisher:
    def __init__(self, problem: Problem, selection: Selection, config: DiscoverConfig) -> None:
        self.problem, self.config, self.now = problem, config, selection
        self.levels = [level for level in selection.scores.levels if level in problem.nodes.levels and level != "embedding"]
        self.learner = problem.learner(config)
        self._selected = selection.circuit
        self._outer = selection.scores.within or Circuit.whole(problem.nodes)
        self._before: Selection | None = None  # heads were opened again

    @property
    def smallest(self) -> Selection:
        """What there was before heads came back, if no fewer nodes are left since."""
        before = self._before
        return self.now if before is None or self.now.circuit.childless < before.circuit.childless else before

    def reopen(self, journal: Journal, *, until: float) -> bool:
        """Open closed heads without which the KL is higher -> are there any? Not if the last ones that came back were little or no gain."""
        if self._before is not None and self.now.circuit.childless > (1 - LITTLE) * self._before.circuit.childless:
            return False
        self._before = self.now
        heads = [("head", index.unsqueeze(0)) for index in self._closed_heads()]
        least = NOTHING * self.config.kl_budget
        chosen = helpful_parts(heads, self._opened, self.learner, least=least, goes_on=_goes_on(journal, until))
        if not chosen or not self._taken(self._opened(chosen), limit=math.nextafter(self.now.kl, 0)):  # lower than before
            return False
        opened = "1 head" if len(chosen) == 1 else f"{len(chosen)} heads"
        journal.say(f"polishing: {opened} opened again, validation KL {self.now.kl:.3f}")
        return True

    def go_through(self, stage: _Stage, journal: Journal, *, until: float) -> bool:
        """Close as much as may go -> has anything gone? Nothing goes once it is later than `until`, on the monotonic clock."""
        start, room = self.now.circuit, self.config.kl_budget - self.now.kl_upper
        most = room if stage.spending else min(room, NOTHING * self.config.kl_budget)
        parts = list(self._parts(stage))
        gains = [_gain(start, part) for part in parts]
        chosen = cheapest_parts(start, parts, self.learner, most=most, goes_on=_goes_on(journal, until), gains=gains, skipping=True)
        limit = self.now.kl + most

        def may_go(parts: Sequence[Part]) -> bool:
            return time.monotonic() <= until and self._taken(less(start, parts), limit=limit)

        if as_many_of(len(chosen), lambda count: may_go(chosen[:count])):
            return True
        return any(may_go([part]) for part in chosen[1 : 1 + TRIES])  # the first need not speak for the others

    def _parts(self, stage: _Stage) -> Iterator[Part]:
        for level in stage.levels:
            if level in CHILDLESS and stage.share is not None:
                yield from self._lowest(level, stage.share)
            elif level not in CHILDLESS or self.now.circuit.kept(level) <= SINGLES:
                yield from ((level, index.unsqueeze(0)) for index in self.now.circuit.masks[level].nonzero())

    def _lowest(self, level: str, share: float) -> Iterator[Part]:
        """A share of each layer's nodes, one at least: those that score lowest."""
        for layer, mask in enumerate(self.now.circuit.masks[level]):
            kept = mask.nonzero()
            if not len(kept):
                continue
            count = max(1, int(share * len(kept)))
            values = self.now.scores.values[level][layer][tuple(kept.unbind(-1))]
            lowest = kept[values.argsort(stable=True)[:count]]
            yield level, torch.cat([torch.full((count, 1), layer), lowest], -1)

    def _taken(self, circuit: Circuit, *, limit: float) -> bool:
        """Go on with it if all of the validation data allows it."""
        (kl,) = self.problem.measured([circuit], "validation")
        found = judge(circuit, self.now.scores, self.now.threshold, kl, self.config.kl_budget, self.problem.upper_bound)
        if not found.met or found.kl > limit:
            return False
        self.now = found
        return True

    def _closed_heads(self) -> torch.Tensor:
        """Indices of those that scored highest, (n, 2), layer by layer; of what the search is to stay within, if there is that."""
        closed = (self._outer.masks["head"] & ~self.now.circuit.masks["head"]).nonzero()
        values = self.now.scores.values["head"][tuple(closed.unbind(-1))]
        return closed[values.argsort(descending=True, stable=True)[:OPENED].sort().values]

    def _opened(self, heads: Sequence[Part]) -> Circuit:
        """The circuit of now and these heads, as the method left them or, where it left nothing of them, whole."""
        masks = {level: mask.clone() for level, mask in self.now.circuit.masks.items()}
        for _, index in heads:
            ((layer, head),) = index.tolist()
            left, whole = (circuit.masks["head_dim"][layer, head] for circuit in (self._selected, self._outer))
            masks["head_dim"][layer, head] = left if left.any() else whole
            masks["head"][layer, head] = masks["attention_block"][layer] = masks["layer"][layer] = True
        return Circuit.of(masks, self.problem.nodes)

    def state(self, *, stage: int, turns: int = 0, seconds: float) -> State:
        """What there is to go on from, with so many turns of a stage done."""
        circuits = {"now": self.now, **({} if self._before is None else {"before": self._before})}
        numbers = {"selected": self._selected.fingerprint, "stage": stage, "turns": turns, "seconds": seconds}
        return State(
            tensors={f"{name}.{level}": mask for name, one in circuits.items() for level, mask in one.circuit.masks.items()},
            numbers={**numbers, **{name: [one.kl, one.kl_upper] for name, one in circuits.items()}},
        )

    def restored(self, state: State) -> tuple[int, int]:
        """The stage to go on with and how many of its turns are done: none, unless the state is of a run that began at the same circuit, and of a
        version that named its parts alike."""
        if state.numbers["selected"] != self._selected.fingerprint or not all(f"now.{level}" in state.tensors for level in LEVELS):
            return 0, 0
        self.now = self._kept("now", state)
        self._before = self._kept("before", state) if "before" in state.numbers else None
        return int(state.numbers["stage"]), int(state.numbers.get("turns", 0))  # not in states of before turns were kept

    def _kept(self, name: str, state: State) -> Selection:
        circuit = Circuit.of({level: state.tensors[f"{name}.{level}"] for level in LEVELS}, self.problem.nodes)
        kl, upper = state.numbers[name]
        return replace(self.now, circuit=circuit, kl=kl, kl_upper=upper)


def _goes_on(journal: Journal, until: float) -> Callable[[int, int], bool]:
    """Tells of what has been looked at, and whether there is time for more."""

    def goes_on(done: int, total: int) -> bool:
        journal.progress(done, total)
        journal.heed()
        return time.monotonic() <= until

    return goes_on


def _gain(circuit: Circuit, part: Part) -> int:
    """How many nodes without children go with a part."""
    level, index = part
    if level in CHILDLESS:
        return len(index)
    smaller = less(circuit, [part])
    return circuit.childless - smaller.childless
