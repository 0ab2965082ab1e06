"""Multi-granular node pruning: learn gates at every level at once over a frozen model (Haider et al., arXiv 2512.10903).

1. Every node has a gate with one learned number, log_alpha. A parent's gate multiplies its children's. All start open; nodes to which the
   answer is least sensitive (Fisher information, one pass over some training prompts) start nearest to closing.
2. Each step draws gates, one sample for each example of the batch, and runs the clean prompts with closed nodes held at their ablation values.
3. The loss is KL(full model || gated model) at the answer, plus the expected share of open gates of each level times its lambda.
4. A controller sets how much the penalties weigh, by the KL of the binary circuit of now: on the batch at hand every fourth step,
   on validation data now and then. The smallest binary circuit within the budget is remembered; a stretch of steps that leaves the budget far
   behind is taken back, and the way goes on from there with half the pressure.
5. The last steps drop the penalties and only repair.

The scores are the log_alphas: a node is open iff its log_alpha is above 0. Drawing the line anew, against the budget, is left to
`nodesieve.select`, as for every method.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from nodesieve import gates
from nodesieve.batches import Batch, mix
from nodesieve.cache import Cache, training_cache
from nodesieve.circuit import Circuit
from nodesieve.config import DiscoverConfig
from nodesieve.controllers import CONTROLLERS, OBSERVE_EVERY, Controller
from nodesieve.journal import Journal, State, Stopped
from nodesieve.levels import CHILDLESS, LEVELS
from nodesieve.methods.adam import ADAM_BETAS, falling, moments, put_back
from nodesieve.methods.fisher import fisher_information
from nodesieve.methods.task_term import task_term
from nodesieve.nodes import LevelTensors, NodeSpace, up_to, with_ancestors
from nodesieve.problem import Problem
from nodesieve.scores import Scores
from nodesieve.shrink import Shrunk

CLAMP = 6.0  # |log_alpha| stays below this, so that a closed gate can come back
LOOK = 256  # validation examples at most for a look during the run; a few hard words make fewer misleading
SAVE_EVERY = 50
DROP_EVERY = 20


def multigranular(problem: Problem, config: DiscoverConfig, journal: Journal, *, cache: Cache | None = None) -> Scores:
    """Learn log_alpha for `config.levels`; see the module for the method.

    Args:
        cache: of the training examples, on the learner; by default one of its own.

    Raises:
        Stopped: `journal.stopping` was set; the state is saved and a later call with the same arguments goes on from it.
    """
    learner = problem.learner(config)
    cache = cache or training_cache(learner, config, journal.scratch)
    run = _Run(problem, learner, config)
    state = journal.load()
    if state is None:
        began = time.monotonic()
        run.spread(cache, journal)
        run.seconds = time.monotonic() - began
    else:
        run.restore(state)
    repair_from = round(config.steps * (1 - config.repair_share))
    train = problem.task["train"]

    while run.step < config.steps:
        began = time.monotonic()
        repairing = run.step >= repair_from
        batch = train.training_batch(run.step, config.batch_size, config.seed)
        full, values = cache.answers(batch), cache.values(batch)
        observing = not repairing and run.step >= config.warmup_steps and run.step % OBSERVE_EVERY == 0
        each = [run.sample_gates(batch), *([run.binary_gates()] if observing else [])]
        shrunk = [run.shrunk] * len(each)
        logits, *binary = learner.model.gated_logits_of_each(batch.clean, each, values, shrunk=shrunk, recompute=config.memory == "low")
        kl = problem.objective(full, logits, batch).mean()
        shares = run.open_shares()
        penalty = kl.new_zeros(()) if repairing else run.controller.penalty(shares) * run.warmup()
        loss = kl + penalty + task_term(logits, batch, config).mean()
        run.descend(loss, rate=falling(run.step / config.steps, config.learning_rate_final))
        kl_binary = None
        if observing:
            kl_binary = problem.objective(full, binary[0], batch).mean().item()
            run.controller.observe(kl=kl_binary)
        run.step += 1
        if not repairing and run.step % DROP_EVERY == 0:
            run.drop()

        look = run.step % config.validate_every == 0 or run.step == config.steps
        validation = run.look() if look else None
        run.seconds += time.monotonic() - began
        row: dict[str, Any] = {
            "step": run.step,
            "loss": loss.item(),
            "kl": kl.item(),
            "penalty": {level: share.item() for level, share in shares.items()},
            "open": run.kept_shares(),
            "lambda": 0.0 if repairing else run.controller.strength,
            "seconds": run.seconds,
            "cache_bytes": cache.bytes,
            "live": run.live,
        }
        row |= {} if kl_binary is None else {"kl_binary": kl_binary}
        row |= {} if validation is None else {"validation": validation}
        journal.log(row)
        journal.progress(run.step, config.steps, kl=kl.item(), **row["open"])
        if journal.stopping or run.step % SAVE_EVERY == 0:
            journal.save(run.state())
        if journal.stopping:
            raise Stopped(run.scores())
    journal.save(run.state())
    return run.scores()


def _reach(level: str, p: Tensor, nested: LevelTensors) -> Tensor:
    """The probability that all ancestors of a level's nodes are open, as a constant that broadcasts against `p`."""
    parent = LEVELS[level].parent
    return p.new_ones(()) if parent is None else up_to(p, nested[parent].detach())


class _Run:
    """The state of one optimisation: log_alpha, Adam, the controller, the best circuit so far."""

    def __init__(self, problem: Problem, learner: Problem, config: DiscoverConfig) -> None:
        self.problem, self.learner, self.config = problem, learner, config
        self.nodes: NodeSpace = problem.nodes
        self.device = problem.model.device
        self.levels = tuple(level for level in config.levels if level in self.nodes.levels)
        self.present = {level: self.nodes.present(level).to(self.device) for level in self.levels}
        self.step = 0
        self.seconds = 0.0
        self.dropped = {level: torch.zeros(self.nodes.shape(level), dtype=torch.bool, device=self.device) for level in LEVELS}
        self.shrunk: Shrunk | None = None
        self.live = {"head": [self.nodes.heads] * self.nodes.layers, "mlp_neuron": [self.nodes.neurons] * self.nodes.layers}
        self.log_alpha = {
            level: torch.full(self.nodes.shape(level), config.log_alpha_init[level], device=self.device, requires_grad=True) for level in self.levels
        }
        groups = [{"params": [self.log_alpha[level]], "lr": config.learning_rates[level]} for level in self.levels]
        self.adam = torch.optim.Adam(groups, betas=ADAM_BETAS)
        self.controller: Controller = CONTROLLERS[config.controller](config, self.nodes)
        if problem.within is not None:
            self.stay_within(problem.within)
        self.best: dict[str, Tensor] | None = None  # log_alpha and Adam's moments when the smallest circuit within the budget was seen
        self.best_size = 1.0

    @torch.no_grad()
    def stay_within(self, circuit: Circuit) -> None:
        """Nodes outside the circuit are closed from the first step on, and never revived."""
        for level in LEVELS:
            self.dropped[level] = ~circuit.masks[level].to(self.device)
            if level in self.log_alpha:
                self.log_alpha[level][self.dropped[level]] = -CLAMP
        self.shrink()

    def spread(self, cache: Cache, journal: Journal) -> None:
        """Start nodes of low Fisher information nearer to closing: `log_alpha_spread` below the others of their level at most, evenly by rank."""
        spreads = {level: self.config.log_alpha_spread[level] for level in self.log_alpha}
        if not any(spreads.values()):
            return
        information = fisher_information(self.learner, self.config, journal, values=cache.values)
        with torch.no_grad():
            for level, spread in spreads.items():
                flat = information[level][self.nodes.present(level)]
                rank = torch.empty_like(flat)
                rank[flat.argsort(stable=True)] = torch.linspace(0, 1, len(flat))
                self.log_alpha[level][self.present[level]] -= spread * (1 - rank).to(self.device)

    def sample_gates(self, batch: Batch) -> LevelTensors:
        """Gates of each example, (B, *shape(level)); of levels that are not learned all are open but what the search stays within lacks. A function
        of seed and step alone."""
        generator = torch.Generator(self.device).manual_seed(mix(self.config.seed, self.step, 2))
        size = len(batch.answers)
        drawn = size if self.config.gate_samples == "example" else 1
        z = {level: (~dropped).float().expand(size, *dropped.shape) for level, dropped in self.dropped.items() if level not in self.log_alpha}
        for level, log_alpha in self.log_alpha.items():
            straight = self.config.estimator == "straight_through" or (self.config.estimator == "mixed" and level in CHILDLESS)
            with torch.set_grad_enabled(not straight):
                sample = gates.sample(log_alpha, batch=drawn, generator=generator)
            sample = gates.straight_through(sample, log_alpha) if straight else sample
            z[level] = sample.masked_fill(self.dropped[level], 0).expand(size, *log_alpha.shape)
        return z

    @torch.no_grad()
    def drop(self) -> None:
        """Nodes whose log_alpha has fallen below the line stay closed from now on, and leave the computation."""
        new = {level: (log_alpha < self.config.drop_below) & ~self.dropped[level] for level, log_alpha in self.log_alpha.items()}
        if any(bool(nodes.any()) for nodes in new.values()):
            for level, nodes in new.items():
                self.dropped[level] |= nodes
            self.shrink()

    def shrink(self) -> None:
        """Cut out what has been dropped; a head or a neuron of which nothing is left to write too."""
        alive = with_ancestors({level: ~dropped for level, dropped in self.dropped.items()})
        self.shrunk = self.learner.cut(alive)
        self.live = {"head": self.shrunk.live_heads.sum(-1).tolist(), "mlp_neuron": self.shrunk.live_neurons.sum(-1).tolist()}

    def circuit(self) -> Circuit:
        """The binary circuit of now, closed."""
        return self._scores(self.log_alpha).circuit(0.0)

    def binary_gates(self) -> LevelTensors:
        """Gates of the circuit of now, 0 or 1, closed, (*shape(level))."""
        return self.circuit().gates(device=self.device)

    def open_shares(self) -> LevelTensors:
        """The expected share of open gates of each learned level, as the penalties count it."""
        own = {level: gates.open_probability(log_alpha) for level, log_alpha in self.log_alpha.items()}
        if self.config.penalty_form == "own":
            return {level: p[self.present[level]].mean() for level, p in own.items()}
        nested = with_ancestors({level: own.get(level, torch.ones(self.nodes.shape(level), device=self.device)) for level in LEVELS})
        if self.config.penalty_form == "nested":
            return {level: nested[level][self.present[level]].mean() for level in own}
        # "reached": a node in a closed block is not pushed further shut, so that the block has something to come back to.
        return {level: (p * _reach(level, p, nested))[self.present[level]].mean() for level, p in own.items()}

    def kept_shares(self) -> dict[str, float]:
        """The share of each learned level that the binary circuit of now keeps, closed."""
        circuit = self.circuit()
        return {level: circuit.kept(level) / self.nodes.count(level) for level in self.levels}

    def warmup(self) -> float:
        return min(1.0, (self.step + 1) / max(1, self.config.warmup_steps))

    def descend(self, loss: Tensor, *, rate: float) -> None:
        for group, level in zip(self.adam.param_groups, self.levels, strict=True):
            group["lr"] = self.config.learning_rates[level] * rate
        self.adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.adam.step()
        with torch.no_grad():
            for level, log_alpha in self.log_alpha.items():
                log_alpha.clamp_(-CLAMP, CLAMP)
                gone = log_alpha.clamp(max=min(0.0, self.config.drop_below))  # whatever a controller wants to have open
                log_alpha.copy_(torch.where(self.dropped[level], gone, log_alpha))

    def look(self) -> dict[str, float]:
        """Measure the binary circuit of now on validation data, and tell the controller; keep the circuit or go back to the best one."""
        circuit = self.circuit()
        (kl,) = self.problem.losses([circuit], "validation", first=LOOK)
        upper = self.problem.upper_bound(kl)
        self.controller.validated(kl=float(kl.mean()))
        met = upper <= self.config.kl_budget
        if met and circuit.size <= self.best_size:
            self.best_size = circuit.size
            self.best = {name: tensor.detach().clone() for name, tensor in self.learned().items()}
        elif not met and self.best is not None and self.controller.missed(kl_upper=upper):
            with torch.no_grad():
                for name, tensor in self.learned().items():
                    tensor.copy_(self.best[name])
            self.shrink()
        return {"kl": float(kl.mean()), "kl_upper": upper, "size": circuit.size}

    def learned(self) -> dict[str, Tensor]:
        """log_alpha and Adam's moments by name: all that a step changes."""
        tensors: dict[str, Tensor] = {f"log_alpha.{level}": x for level, x in self.log_alpha.items()}
        dropped = {f"dropped.{level}": self.dropped[level] for level in self.log_alpha}
        return tensors | moments(self.adam, self.log_alpha) | dropped

    def scores(self) -> Scores:
        """Of now, and of the best circuit that met the budget on the way."""
        return self._scores(self.log_alpha, earlier=None if self.best is None else self._scores(self._best_log_alpha()))

    def _best_log_alpha(self) -> LevelTensors:
        assert self.best is not None
        return {level: self.best[f"log_alpha.{level}"] for level in self.log_alpha}

    def _scores(self, log_alpha: LevelTensors, earlier: Scores | None = None) -> Scores:
        values = {level: log_alpha[level].detach().float().cpu() if level in log_alpha else torch.ones(self.nodes.shape(level)) for level in LEVELS}
        return Scores(values=values, nodes=self.nodes, levels=self.levels, threshold=0.0, learned=True, earlier=earlier, within=self.problem.within)

    def state(self) -> State:
        tensors = {name: tensor.detach() for name, tensor in self.learned().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in (self.best or {}).items()}
        return State(
            tensors=tensors,
            numbers={
                "step": self.step,
                "seconds": self.seconds,
                "best_size": self.best_size,
                "controller": self.controller.state(),
            },
        )

    def restore(self, state: State) -> None:
        self.step, self.seconds, self.best_size = (state.numbers[name] for name in ("step", "seconds", "best_size"))
        self.controller.restore(state.numbers["controller"])
        put_back(self.adam, self.log_alpha, state.tensors, step=self.step)
        for level, x in self.log_alpha.items():
            with torch.no_grad():
                x.copy_(state.tensors[f"log_alpha.{level}"])
            self.dropped[level] = state.tensors[f"dropped.{level}"].to(self.device).clone()
        if any(bool(dropped.any()) for dropped in self.dropped.values()):
            self.shrink()
        if any(name.startswith("best.") for name in state.tensors):
            self.best = {name: state.tensors[f"best.{name}"].to(self.device).clone() for name in self.learned()}
