"""The sieve: from the whole model down, round by round, the nodes go that the circuit of now can best do without, at every level at once.

1. A round asks, over training examples that no round before has had, what closing each kept node would do to this circuit: the gradient g of the
   KL(full || circuit) to the node's gate, and its Fisher information F, the mean square of the gradient of log p(token drawn from the circuit): the
   curvature that the KL to the circuit of now has there. Heads are asked as wholes, too; blocks and layers go with the last of their parts.
   What is known is averaged over the rounds (`MEMORY`): circuits change little, and one neuron's gradient over a few examples is mostly noise.
2. Nodes go in the order of (caution F - g) / price. The price of a node is its level's penalty divided by the nodes of the level, that of a whole
   is its own and those of all that it would take with it: so levels of any size are weighed against one another. One half of F would be right
   for one node alone; many go at once, and what they do adds up, so they are charged far more.
3. How much more, and how many go, is tried out on some validation examples: half the caution of the round before, the same and twice that, at about
   the share of the price of all that is kept that may go; the best of them without whole heads, one of which, if misjudged, costs as much as all
   else; then other shares. The largest goes whose KL rises by no more than its part of what is left of the budget. Where the budget is near, all of
   the split must agree, else a smaller one goes, and each round looks at other examples first: a circuit adapts to those that always judge it.
4. At each fifth of the way, three rounds apart at least, every kept head is closed alone, to see what that does, and those go that cost nothing:
   gates' gradients say too little of wholes. Heads that only disturb what is left are found so; without them the KL falls. Blocks are left to
   polishing.

So the KL is spent little by little, and no gate is ever between open and closed. This is iterative pruning (cf. Molchanov et al., arXiv 1906.10771;
Theis et al., arXiv 1801.05787) at all granularities at once, with ablation in place of removal. The order in which nodes went is the score:
`nodesieve.select` cuts it as it cuts every method's, for the budget or for a size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from itertools import chain, takewhile
from pathlib import Path

import torch
from torch import Tensor

from nodesieve.batches import mix
from nodesieve.cache import Cache, training_cache
from nodesieve.circuit import Circuit
from nodesieve.config import DiscoverConfig
from nodesieve.errors import UserError
from nodesieve.journal import Journal, State, Stopped
from nodesieve.levels import CHILDLESS, LEVELS
from nodesieve.methods.asking import Asked, ask
from nodesieve.methods.looks import Look, Looks
from nodesieve.methods.prices import Candidate, Prices
from nodesieve.nodes import LevelTensors, NodeSpace, up_to
from nodesieve.parts import NOTHING, cheapest_parts, less
from nodesieve.problem import Problem
from nodesieve.scores import Scores, raise_ancestors

ROUND = 16  # steps: batches of training examples that a round asks
ASKED = ("head", *CHILDLESS)  # blocks and layers go when nothing of them is left, unless nothing finer in them gets gates
MEMORY = 0.7  # weight of the rounds before; the first few weigh alike
CAUTION, LEAST_CAUTION, MOST_CAUTION = 10.0, 1.0, 1000.0  # at first, and between what
TIMES = (0.5, 1.0, 2.0)  # the caution of the round before: what is tried
FIRST, MOST = 0.35, 0.5  # shares of what is kept, by price, that go in a round
WIDER, NARROWER = (1.4, 2.0, 4.0), (0.7, 0.45, 0.25, 0.1)  # times the share looked at first: what is tried if that does, and if it costs too much
REST = 0.01  # of the budget would be left if every round spent its part of what is left
HURRY = 1.5  # rounds' even share of what is left: the part that late rounds may spend
LEAST_RISE = 0.01  # of the budget: what a round may always spend
THRIFT = 0.5  # power of the share that fits, next to that of the round before, by which it may cost less
TRIALS, APART = 5, 3  # parts of the rounds, between which heads are closed one by one; rounds from one such trial to the next, at least
TRIED = 96  # heads at most, those that would go first by what is known
NUMBERS = ("round", "tried", "idle", "share", "caution", "seconds", "lasted")
SCORING, CHEAPER = 0.85, 0.75  # of a time limit, for the rounds; and how long the rounds ahead take, as a share of the last: circuits shrink
ENOUGH = 4  # rounds in a row in which nothing could go: the end


def sieve(problem: Problem, config: DiscoverConfig, journal: Journal, *, start: Circuit | None = None, cache: Cache | None = None) -> Scores:
    """Scores by the round in which a node went; what is left stands above 0.

    Args:
        start: the circuit to begin with, in place of the whole model or what the search is to stay within. What it lacks scores lowest.
        cache: of the training examples, on the learner; by default one of its own.

    Raises:
        Stopped: `journal.stopping` was set; the state is saved and a later call with the same arguments goes on from it.
    """
    run = _Sieve(problem, config, journal.scratch, start=start, cache=cache)
    state = journal.load()
    if state is None:
        run.looks.begin(run.circuit)
    else:
        run.restore(state)
    began = time.monotonic() - run.seconds
    while not run.done():
        try:
            if run.round >= run.tried + max(APART, math.ceil(run.planned() / TRIALS)):
                run.close_heads(_Round(journal, run))
                if run.done():  # nothing else had gates, or the size asked for is reached
                    break
            run.seconds = time.monotonic() - began
            asked = run.ask(_Round(journal, run))
        except KeyboardInterrupt:
            if not journal.stopping:
                raise
            journal.save(run.state())  # the round, or the trial of heads, is begun anew
            raise Stopped(run.scores()) from None
        run.learn(asked)
        spent = run.close()
        run.lasted, run.seconds = time.monotonic() - began - run.seconds, time.monotonic() - began
        shares = run.shares()
        journal.log(
            {
                "step": run.step,
                "loss": asked.loss,
                "kl": asked.kl,
                "penalty": {level: shares[level] for level in run.levels},
                "open": shares,
                "lambda": spent,
                "seconds": run.seconds,
                "validation": {"kl": run.looks.kl, "kl_upper": run.looks.kl_upper, "size": run.circuit.size},
            }
        )
        journal.progress(run.step, run.last_step, kl=run.looks.kl, **shares)
        journal.save(run.state())
        if journal.stopping:
            raise Stopped(run.scores())
    return run.scores()


class _Round(Journal):
    """Tells a run's journal of the batches of one round; stops when that does."""

    def __init__(self, journal: Journal, run: _Sieve) -> None:
        super().__init__(stopping=journal.stopping)
        self._journal, self._run, self._shares = journal, run, run.shares()

    def progress(self, step: int, total: int, **facts: float) -> None:
        done = self._run.round * self._run.batches + min(self._run.batches * step // total, self._run.batches - 1)
        self._journal.progress(min(done, self._run.last_step - 1), self._run.last_step, kl=self._run.looks.kl, **self._shares)
        self.stopping = self._journal.stopping


class _Sieve:
    """The circuit of now, what is known of its nodes, and which round took each of those that are gone."""

    def __init__(
        self,
        problem: Problem,
        config: DiscoverConfig,
        scratch: Path | None = None,
        *,
        start: Circuit | None = None,
        cache: Cache | None = None,
    ) -> None:
        self.problem, self.config, self.nodes = problem, config, problem.nodes
        self.learner = problem.learner(config)
        self.cache = cache or training_cache(self.learner, config, scratch)
        levels = [level for level in config.levels if level in self.nodes.levels and config.penalties[level] > 0]
        self.scored = tuple(levels)
        # Those that are asked and priced:
        self.levels = tuple(level for level in levels if level in ASKED or not _goes_with_parts(level, levels, self.nodes))
        if not self.levels:
            raise UserError(f"--method sieve expects a level whose penalty is above 0, got none among {', '.join(config.levels)}")
        self.prices = Prices(nodes=self.nodes, levels=self.levels, penalties=config.penalties)
        self.circuit = start or problem.within or Circuit.whole(self.nodes)
        self.rounds = math.ceil(config.steps / ROUND)
        self.batches = math.ceil(config.steps / self.rounds)  # a round
        self.round = self.tried = self.idle = 0
        self.share, self.caution, self.seconds, self.lasted = FIRST, CAUTION, 0.0, 0.0
        self.looks = Looks(self.learner, config)
        self.gradient: LevelTensors = {}
        self.fisher: LevelTensors = {}
        self.went = {level: torch.full(self.nodes.shape(level), math.inf) for level in LEVELS}  # round, and place in it; kept nodes: infinity
        for level in LEVELS:
            self.went[level][~self.circuit.masks[level]] = -1.0

    @property
    def step(self) -> int:
        return min(self.config.steps, self.round * self.batches)

    @property
    def last_step(self) -> int:
        """Where the rounds that there is time for end."""
        return min(self.config.steps, self.planned() * self.batches)

    def done(self) -> bool:
        small = self.config.keep is not None and self.circuit.size <= self.config.keep
        empty = not any(self.circuit.kept(level) for level in self.levels)
        return self.round >= self.rounds or self.idle >= ENOUGH or small or empty or self.time_left < self.lasted

    @property
    def time_left(self) -> float:
        share = SCORING if self.config.polish else 1.0
        return math.inf if self.config.max_minutes is None else share * 60 * self.config.max_minutes - self.seconds

    def planned(self) -> int:
        """Rounds in all, as many as there is time for."""
        if not self.lasted or self.time_left == math.inf:
            return self.rounds
        return min(self.rounds, self.round + max(1, int(self.time_left / (CHEAPER * self.lasted))))

    def ask(self, journal: Journal) -> Asked:
        """At the circuit of now, over the next examples."""
        return ask(self.learner, self.circuit, self.config, journal, levels=self.levels, index=self._next_examples(), cache=self.cache)

    def _next_examples(self) -> list[int]:
        """Those of the next round, in an order drawn for each pass over the training examples."""
        train, wanted = self.problem.task["train"], self.batches * self.config.batch_size
        places = [divmod(place, len(train)) for place in range(self.round * wanted, (self.round + 1) * wanted)]
        orders = {epoch: torch.randperm(len(train), generator=torch.Generator().manual_seed(mix(self.config.seed, epoch, 11))) for epoch, _ in places}
        return list(dict.fromkeys(int(orders[epoch][place]) for epoch, place in places))  # once each

    def learn(self, asked: Asked) -> None:
        weight = max(1 - MEMORY, 1 / (1 + self.round))
        for known, new in ((self.gradient, asked.gradient), (self.fisher, asked.fisher)):
            for level, x in new.items():
                known[level] = torch.lerp(known[level], x, weight) if level in known else x

    def close(self) -> float:
        """What this round can do without goes -> how many nats each unit of price has cost."""
        room = self.config.kl_budget - self.looks.kl_upper
        rounds = self.planned()
        part = max(1 - REST ** (1 / rounds), HURRY / (rounds - self.round))
        most = max(min(1.0, part) * abs(room), LEAST_RISE * self.config.kl_budget)
        if self.config.keep is None:  # on the way to a size, the budget does not hold
            most = min(most, max(room, 0.0))
        before, taken = self.looks.kl, self._taken(most)
        self.round += 1
        if taken is None:
            self.idle, self.share = self.idle + 1, self.share / 2
            return 0.0
        self.idle, self.share = 0, min(MOST, taken.price / self.prices.total(self.circuit))
        self._take(taken, self.round - 0.5)
        return max(0.0, self.looks.kl - before) / taken.price

    def close_heads(self, journal: _Round) -> None:
        """Those of which closing is seen to cost nothing go."""

        def goes_on(done: int, total: int) -> bool:
            journal.progress(0, total)
            journal.heed()
            return True

        most = min(self.config.kl_budget - self.looks.kl_upper, NOTHING * self.config.kl_budget)
        heads = [("head", index.unsqueeze(0)) for index in self._heads()] if "head" in self.levels and most >= 0 else []
        chosen = cheapest_parts(self.circuit, heads, self.learner, most=most, goes_on=goes_on)
        self.tried = self.round
        for count in (len(chosen), len(chosen) // 2):
            if not count:
                continue
            order = torch.zeros(self.nodes.shape("head"))
            order[tuple(torch.cat([index for _, index in chosen[:count]]).unbind(-1))] = torch.arange(1, count + 1) / (count + 1)
            candidate = self.prices.candidate(self.circuit, less(self.circuit, chosen[:count]), {**self.nodes.full(0.0), "head": order})
            if self.looks.agree(self.looks.at(candidate, turn=self.round), most):
                self._take(candidate, self.round)
                return

    def _heads(self) -> Tensor:
        """Indices of kept heads, (n, 2), layer by layer; where there are very many, of those that would be the first to go as wholes."""
        kept = self.circuit.masks["head"].nonzero()
        return kept[self._cost("head", self.caution)[tuple(kept.unbind(-1))].argsort(stable=True)[:TRIED].sort().values]

    def _taken(self, most: float) -> Candidate | None:
        """What goes: at the caution that costs least, with whole heads or without, the largest share that raises the KL by no more than `most`."""
        usual = self.share * self.prices.total(self.circuit)

        def allowed(look: Look) -> float:
            """Near the budget, where a look is off by as much for few nodes as for many, a small share may not cost what a large one may."""
            return most * min(1.0, look.candidate.price / usual) ** THRIFT if self.looks.near else most

        tried = {self.caution: self._look_at(self.share, self.caution)}
        if tried[self.caution].least > most:  # which caution is best depends on the share
            self.share *= max(NARROWER[-1], most / tried.pop(self.caution).least)
        for caution in (min(MOST_CAUTION, max(LEAST_CAUTION, self.caution * times)) for times in TIMES):
            tried[caution] = tried.get(caution) or self._look_at(self.share, caution)
        self.caution = min(tried, key=lambda caution: tried[caution].rise)
        whole = tried[self.caution]
        first = self._ways(self.share, whole)[0]
        fit = [first] if first.least <= allowed(first) else []
        fit += takewhile(lambda look: look.least <= allowed(look), self._wider(wholes=first is whole)) if fit else ()
        for look in chain(reversed(fit), self._narrower()):
            if look.candidate.price > 0 and look.least <= allowed(look) and self.looks.agree(look, allowed(look)):
                return look.candidate
        return None

    def _wider(self, *, wholes: bool) -> Iterator[Look]:
        """One by one, since the next is often not needed."""
        for share in self._shares(WIDER):
            yield self._look_at(share, self.caution, wholes=wholes)

    def _narrower(self) -> Iterator[Look]:
        """With whole heads and without: which is cheaper depends on how many heads are in the share."""
        for share in self._shares(NARROWER):
            yield from self._ways(share, self._look_at(share, self.caution))

    def _shares(self, factors: Sequence[float]) -> list[float]:
        return [share for share in dict.fromkeys(min(MOST, self.share * factor) for factor in factors) if share != self.share]

    def _ways(self, share: float, whole: Look) -> list[Look]:
        """`whole`, and where it has whole heads the same share without; what is cheaper for its price first."""
        alike = "head_dim" not in self.levels or not bool(whole.candidate.chosen["head"].any())
        ways = [whole] if alike else [whole, self._look_at(share, self.caution, wholes=False)]
        return sorted(ways, key=lambda look: look.per_price)

    def _look_at(self, share: float, caution: float, *, wholes: bool = True) -> Look:
        return self.looks.at(self._cheapest(share, caution, wholes=wholes), turn=self.round)

    def _cheapest(self, share: float, caution: float, *, wholes: bool = True) -> Candidate:
        """`wholes`: may heads go as such?"""
        costs = self._costs(caution)
        if not wholes:
            costs["head"] = torch.full_like(costs["head"], math.inf)
        return self.prices.cheapest(self.circuit, costs, share)

    def _costs(self, caution: float) -> LevelTensors:
        """Of closing each node, (*shape(level))."""
        return {level: self._cost(level, caution) for level in self.levels}

    def _cost(self, level: str, caution: float) -> Tensor:
        return caution * self.fisher[level] - self.gradient[level]

    def _take(self, taken: Candidate, since: float) -> None:
        """`since`: when it began, in rounds; half a round is for the trial of heads that may come first, half for what goes then."""
        gone = {level: self.circuit.masks[level] & ~taken.circuit.masks[level] for level in LEVELS}
        places = _places(taken.chosen, gone)
        for level in LEVELS:
            self.went[level] = torch.where(gone[level], since + places[level] / 2, self.went[level])
        self.circuit = taken.circuit

    def shares(self) -> dict[str, float]:
        """The share of each level that is kept."""
        return {level: self.circuit.kept(level) / self.nodes.count(level) for level in self.scored}

    def scores(self) -> Scores:
        """At most 0 for what is gone, later rounds higher; above 0 what is left, in the order in which it would go."""
        values = {level: (went - self.round).clamp(max=0.0) for level, went in self.went.items()}
        kept = sum(self.circuit.kept(level) for level in self.levels)
        ranks = torch.ones(kept)
        if self.fisher:
            _, order = self.prices.order(self.circuit, self._costs(self.caution))
            ranks[order] = torch.arange(1, kept + 1) / kept
        left = self.prices.by_level(self.circuit, ranks)
        finest = [level for level in self.levels if not _goes_with_parts(level, self.levels, self.nodes)]
        left = raise_ancestors({level: x if level in finest else torch.zeros_like(x) for level, x in left.items()})
        for level, mask in self.circuit.masks.items():
            values[level][mask] = left[level][mask]
        return Scores(values=values, nodes=self.nodes, levels=self.scored, threshold=0.0, within=self.problem.within)

    def state(self) -> State:
        groups = {"went": self.went, "gradient": self.gradient, "fisher": self.fisher}
        numbers = {"step": self.step, **{name: getattr(self, name) for name in NUMBERS}}
        tensors = {f"{group}.{level}": x for group, parts in groups.items() for level, x in parts.items()}
        return State(tensors={"kls": self.looks.kls, **tensors}, numbers=numbers)

    def restore(self, state: State) -> None:
        numbers = state.numbers
        for name in NUMBERS:
            setattr(self, name, numbers[name])
        tensors = dict(state.tensors)
        self.looks.go_on_from(tensors.pop("kls"))
        groups: dict[str, LevelTensors] = {"went": self.went, "gradient": self.gradient, "fisher": self.fisher}
        for name, tensor in tensors.items():
            group, level = name.split(".")
            groups[group][level] = tensor
        self.circuit = Circuit.of({level: went == math.inf for level, went in self.went.items()}, self.nodes)


def _goes_with_parts(level: str, levels: Sequence[str], nodes: NodeSpace) -> bool:
    """Does every node of this level go when nothing of it is left, by gates of `levels` below it?"""
    return bool(_with_parts(level, levels, nodes).all())


def _with_parts(level: str, levels: Sequence[str], nodes: NodeSpace) -> Tensor:
    """In which layers nodes of this level do, (layers,) bool: a layer has two blocks to be left, and an MLP neurons or experts."""
    below = [
        _with_parts(name, levels, nodes) | (nodes.present(name).reshape(nodes.layers, -1).any(-1) & (name in levels))
        for name, row in LEVELS.items()
        if row.parent == level
    ]
    if not below:
        return torch.zeros(nodes.layers, dtype=torch.bool)
    return torch.stack(below).all(0) if level == "layer" else torch.stack(below).any(0)


def _places(chosen: LevelTensors, gone: LevelTensors) -> LevelTensors:
    """When each node that is `gone` went, in (0, 1): those that were `chosen` (above 0) at their own place, or with what lies above them where that
    went before; a whole of which nothing is left with the last of its parts."""
    places = {level: x.clone() for level, x in chosen.items()}
    for name in reversed(list(LEVELS)):  # children come after parents in LEVELS
        parent = LEVELS[name].parent
        if parent is not None and places[name].numel():
            last = torch.maximum(places[parent], places[name].reshape(*places[parent].shape, -1).amax(-1))
            places[parent] = torch.where(chosen[parent] > 0, places[parent], last)
    for name, level in LEVELS.items():
        if level.parent is not None:
            above = up_to(places[name], places[level.parent].masked_fill(~gone[level.parent], torch.inf))
            places[name] = torch.minimum(places[name].masked_fill(places[name] == 0, torch.inf), above)
    return places
