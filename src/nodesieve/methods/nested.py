"""A ranking that holds at every size down to `SMALLEST`, from one run: circuits are cut from it without learning anew.

Each node has one number. A leaf's rank goes by its own number plus those of its head (or none), its block and its layer, so that blocks and heads
rise and fall as wholes. Each example of a batch draws a size, and the leaves that stand highest up to that size are opened, softly at the edge:
their distance from the edge is the log_alpha of hard-concrete gates (`nodesieve.gates`), whose gradients go straight through the clipping. The edge
moves with the ranking, so that what one leaf gains others lose. The loss is log(1 + KL(full || gated)), which keeps the smallest sizes, at which no
circuit can do the task, from deciding everything; a loss of the user's, which may be below 0, is taken as it is. Cf. Matryoshka representations
(Kusupati et al., arXiv 2205.13147) and Matryoshka attribution (arXiv 2609.25518). Outputs of MLPs are not ranked; each is open while its block is.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from nodesieve import gates
from nodesieve.batches import mix
from nodesieve.cache import training_cache
from nodesieve.config import DiscoverConfig
from nodesieve.errors import UserError
from nodesieve.journal import Journal, State
from nodesieve.levels import LEAVES, LEVELS, above
from nodesieve.methods.adam import ADAM_BETAS, falling, moments, put_back
from nodesieve.methods.fisher import fisher_information
from nodesieve.nodes import LevelTensors, NodeSpace, up_to
from nodesieve.problem import Problem
from nodesieve.scores import Scores, fold_upwards, raised

SMALLEST = 0.01  # sizes are drawn evenly on a log scale from here to everything
START = 3.0  # the leaves' numbers at the start are spread evenly over this much, by rank of Fisher information
LEARNING_RATE = 0.05
SAVE_EVERY = 50


def nested(problem: Problem, config: DiscoverConfig, journal: Journal) -> Scores:
    """Learn a ranking of the leaves for `config.steps` steps; resumable."""
    learner = problem.learner(config)
    cache = training_cache(learner, config, journal.scratch)
    ranking = _Ranking(problem.nodes, config, problem.model.device)
    state = journal.load()
    began = time.monotonic()
    if state is None:
        ranking.start(fisher_information(learner, config, journal, values=cache.values))
    else:
        ranking.restore(state)
        began -= ranking.seconds
    train = problem.task["train"]
    while ranking.step < config.steps:
        batch = train.training_batch(ranking.step, config.batch_size, config.seed)
        sampled, sizes = ranking.sample(len(batch.answers))
        logits = learner.model.gated_logits(batch.clean, sampled, cache.values(batch), recompute=config.memory == "low")
        kl = problem.objective(cache.answers(batch), logits, batch)
        loss = (kl.log1p() if problem.keeps_kl_low else kl).mean()
        ranking.descend(loss)
        ranking.seconds = time.monotonic() - began
        row: dict[str, Any] = {"step": ranking.step, "loss": loss.item(), "kl": kl.mean().item()}
        row |= {"penalty": {}, "open": ranking.shares(sampled), "lambda": 0.0, "seconds": ranking.seconds}
        journal.log(row | _by_size(kl.detach(), sizes))
        journal.progress(ranking.step, config.steps, kl=row["kl"])
        if journal.stopping or ranking.step % SAVE_EVERY == 0:
            journal.save(ranking.state())
        journal.heed()
    return ranking.scores()


def _by_size(kl: Tensor, sizes: Tensor) -> dict[str, Any]:
    return {"sizes": [round(size, 4) for size in sizes.tolist()], "kls": [round(x, 4) for x in kl.tolist()]}


class _Ranking:
    def __init__(self, nodes: NodeSpace, config: DiscoverConfig, device: torch.device) -> None:
        self.nodes, self.config, self.device = nodes, config, device
        self.leaves = [level for level in LEAVES if level in config.levels and level in nodes.levels]
        if not self.leaves:
            raise UserError(f"--method nested expects --levels with some of {', '.join(LEAVES)}, got {', '.join(config.levels)}")
        self.levels = (*(level for level in config.levels if level not in LEAVES and self._can_be_told_apart(level)), *self.leaves)
        self.values = {level: torch.zeros(nodes.shape(level), device=device, requires_grad=True) for level in self.levels}
        self.adam = torch.optim.Adam(list(self.values.values()), lr=LEARNING_RATE, betas=ADAM_BETAS)
        self.present = torch.cat([nodes.present(level).flatten() for level in self.leaves]).to(device)
        self.step = 0
        self.seconds = 0.0

    def _can_be_told_apart(self, level: str) -> bool:
        """Has every node of it a ranked leaf in it?"""
        ranked = {name: self.nodes.present(name) & torch.tensor(name in self.leaves) for name in LEVELS}
        return bool(fold_upwards(ranked, lambda own, below: own | below.any(-1))[level][self.nodes.present(level)].all())

    @torch.no_grad()
    def start(self, information: LevelTensors) -> None:
        flat = torch.cat([information[level].flatten() for level in self.leaves]).to(self.device)
        rank = torch.empty_like(flat)
        rank[flat.argsort(stable=True)] = torch.linspace(0, START, len(flat), device=self.device)
        for level, own in zip(self.leaves, rank.split([self.values[level].numel() for level in self.leaves]), strict=True):  # type: ignore[no-untyped-call]
            self.values[level].copy_(own.reshape(self.values[level].shape))

    def standing(self) -> LevelTensors:
        """Of each leaf: its own number and those of all that lies above it."""
        found = {}
        for leaf in self.leaves:
            total = self.values[leaf]
            for level in above(leaf):
                if level in self.values:
                    total = total + up_to(total, self.values[level])
            found[leaf] = total
        return found

    def sample(self, batch: int) -> tuple[LevelTensors, Tensor]:
        """Gates of each example, (B, *shape(level)), and its size, (B,)."""
        generator = torch.Generator(self.device).manual_seed(mix(self.config.seed, self.step, 13))
        place = (torch.arange(batch, device=self.device) + torch.rand(batch, generator=generator, device=self.device)) / batch
        sizes = torch.exp(math.log(SMALLEST) * (1 - place))  # one in each of B stretches of the log scale
        standing = self.standing()
        flat = torch.cat([standing[leaf].flatten() for leaf in self.leaves])
        ordered = flat.detach()[self.present].sort(descending=True).values
        edge = ordered[(sizes * (len(ordered) - 1)).long()]  # (B,)
        distance = flat - edge.unsqueeze(1)  # (B, leaves)
        with torch.no_grad():
            p = gates.open_probability(distance)
            weight = (p * (1 - p)).masked_fill(~self.present, 0.0)
            weight /= weight.sum(-1, keepdim=True).clamp(min=1e-12)
        moved = (weight * flat).sum(-1, keepdim=True)  # the edge's gradient: as many leaves are open before a step and after it
        distance = distance - (moved - moved.detach())
        drawn = torch.stack([gates.sample(row, batch=1, generator=generator)[0] for row in distance.detach()])
        z = gates.straight_through(drawn, distance).split([standing[leaf].numel() for leaf in self.leaves], -1)  # type: ignore[no-untyped-call]
        sampled = {level: torch.ones(batch, *self.nodes.shape(level), device=self.device) for level in LEVELS}
        return sampled | {leaf: own.reshape(batch, *self.nodes.shape(leaf)) for leaf, own in zip(self.leaves, z, strict=True)}, sizes

    def shares(self, sampled: LevelTensors) -> dict[str, float]:
        """Of the gates of each ranked level of leaves, how many are open."""
        return {level: float((sampled[level] > 0).flatten(1)[:, self.nodes.present(level).flatten()].float().mean()) for level in self.leaves}

    def descend(self, loss: Tensor) -> None:
        rate = falling(self.step / self.config.steps, self.config.learning_rate_final)
        for group in self.adam.param_groups:
            group["lr"] = LEARNING_RATE * rate
        self.adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.adam.step()
        self.step += 1

    @torch.no_grad()
    def scores(self) -> Scores:
        values = raised({leaf: x.detach().float().cpu() for leaf, x in self.standing().items()}, self.nodes)
        return Scores(values=values, nodes=self.nodes, levels=self.levels)

    def state(self) -> State:
        tensors = {f"value.{level}": x.detach() for level, x in self.values.items()}
        return State(tensors=tensors | moments(self.adam, self.values), numbers={"step": self.step, "seconds": self.seconds})

    def restore(self, state: State) -> None:
        self.step, self.seconds = state.numbers["step"], state.numbers["seconds"]
        for level, x in self.values.items():
            with torch.no_grad():
                x.copy_(state.tensors[f"value.{level}"])
        put_back(self.adam, self.values, state.tensors, step=self.step)
