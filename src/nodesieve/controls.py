"""What a reviewer would ask of a circuit. Each control measures other circuits on the same examples; `run_controls` takes them one after another.

- `random`: circuits with the same number of kept nodes at every level, drawn at random; `random_by_layer` matches the numbers of every layer as well.
  p = (1 + hits) / (1 + n), a hit being a random circuit whose mean KL is as low.
- `complement`: necessity. Kept head dimensions, neurons and experts are closed and the others kept; outputs and everything above are open,
  then closed where nothing is left below.
- `partial`: nodes without children outside the circuit closed independently with some probability, where the circuit itself closes all of them. A
  circuit whose score rests on errors that cancel does worse with part of its complement open than with none; mean and worst of the draws.
- `opened`: all nodes of one kind opened, the rest as in the circuit: errors of one kind may cancel those of another, which draws over all kinds alike
  do not show.
- `minimality`: each kept block and head, and each tenth of the kept neurons by score, closed alone; what that adds to the KL. Parts that add no more
  than a hundredth of the budget count as free, as they do for polishing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nodesieve.batches import mix
from nodesieve.circuit import Circuit
from nodesieve.config import DRAWS
from nodesieve.errors import UserError
from nodesieve.evaluation import measure_circuits
from nodesieve.files import write_json
from nodesieve.journal import Journal
from nodesieve.levels import CHILDLESS, LEAVES, LEVELS
from nodesieve.metrics import or_none
from nodesieve.models import weights_fingerprint
from nodesieve.nodes import up_to
from nodesieve.parts import NOTHING
from nodesieve.problem import Problem
from nodesieve.run import Run
from nodesieve.scores import Scores, can_close, standing
from nodesieve.tasks import BUILTINS
from nodesieve.tasks.base import SplitName

DEFINITION = 1  # to be raised where a control comes to mean another circuit under the same name: what was kept of it is then measured anew
AT_ONCE = 8  # circuits that share a pass over the corrupted prompts
ABLATED_WITH = (0.5, 0.75, 0.9)
PARTIAL_DRAWS = 32  # for each of these probabilities
DECILES = 10
# by what is opened, the levels of which all nodes are, where what lies above is kept
OPENED: dict[str, tuple[str, ...]] = {
    "dimensions of kept heads": ("head_dim",),
    "neurons of kept blocks": ("mlp_neuron", "expert"),
    "outputs of kept blocks": ("mlp_output",),
    "all MLPs whole": ("layer", "mlp_block", "mlp_neuron", "expert", "mlp_output"),
    "all heads whole": ("layer", "attention_block", "head", "head_dim"),
}


@dataclass(frozen=True, kw_only=True)
class Control:
    """One circuit to measure: the group that it belongs to, its name there, and how to make it."""

    group: str
    name: str
    make: Callable[[], Circuit]


def controls(circuit: Circuit, scores: Scores, *, draws: int = DRAWS, partial_draws: int = PARTIAL_DRAWS) -> Iterator[Control]:
    """The circuit and all others that it is to be compared with; each is a function of the circuit, its group and its name.

    What is drawn for one circuit has nothing in common with what is drawn for another, nor `random` with `random_by_layer`.
    """
    own = mix(0, int(circuit.fingerprint[:16], 16))
    yield Control(group="circuit", name="circuit", make=lambda: circuit)
    for by_layer, group in ((False, "random"), (True, "random_by_layer")):
        for i in range(draws):
            yield Control(group=group, name=str(i), make=partial(random_circuit, circuit, by_layer=by_layer, seed=mix(own, i, 6 if by_layer else 5)))
    yield Control(group="complement", name="complement", make=partial(complement, circuit, scores))
    for p in ABLATED_WITH:
        for i in range(partial_draws):
            yield Control(group=f"partial_{p:g}", name=str(i), make=partial(partly_ablated, circuit, p, seed=mix(own, i, 7)))
    for name, levels in OPENED.items():
        yield Control(group="opened", name=name, make=partial(opened, circuit, levels))
    for name, closed in _parts(circuit, scores):
        yield Control(group="minimality", name=name, make=partial(circuit.without, closed))


def run_controls(
    problem: Problem,
    circuit: Circuit,
    scores: Scores,
    *,
    split: SplitName = "test",
    draws: int = DRAWS,
    partial_draws: int = PARTIAL_DRAWS,
    done: Mapping[str, Mapping[str, Any]] | None = None,
    save: Callable[[dict[str, dict[str, Any]]], None] = lambda found: None,
    journal: Journal | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure the controls -> by group, by name, the metrics of each.

    Args:
        done: what an earlier call had found; it is not measured again. `save` is given all of it, what is returned is what this call asks for.
        save: told what there is after every few circuits.

    Raises:
        KeyboardInterrupt: `journal.stopping` was set; what is there has been saved.
    """
    journal = journal or Journal()
    journal.say("measuring other circuits")
    found: dict[str, dict[str, Any]] = {group: dict(rows) for group, rows in (done or {}).items()}
    planned = list(controls(circuit, scores, draws=draws, partial_draws=partial_draws))
    left = [control for control in planned if control.name not in found.get(control.group, {})]
    for start in range(0, len(left), AT_ONCE):
        some = left[start : start + AT_ONCE]
        for control, metrics in zip(some, measure_circuits(problem, [control.make() for control in some], split), strict=True):
            found.setdefault(control.group, {})[control.name] = metrics
        save(found)
        journal.progress(len(planned) - len(left) + start + len(some), len(planned))
        journal.heed()
    asked: dict[str, dict[str, Any]] = {}
    for control in planned:
        asked.setdefault(control.group, {})[control.name] = found[control.group][control.name]
    return asked


def controls_file(directory: Path, *, task: str, split: SplitName, ablation: str) -> Path:
    """Where a run keeps the controls of its circuit on these examples; `task` as `name_of_examples` gives it."""
    return directory / f"controls-{task}-{split}-{ablation}.json"


def name_of_examples(problem: Problem, split: SplitName) -> str:
    """A built-in task's name; files of prompts that have the same name are told apart by what is in them."""
    name = re.sub(r"[^\w.-]+", "-", Path(problem.task.name).name)
    return name if problem.task.source in BUILTINS else f"{name}-{problem.task[split].fingerprint[:8]}"


def controls_kept_in(path: Path, run: Run, problem: Problem, *, split: SplitName, draws: int, journal: Journal) -> dict[str, dict[str, Any]]:
    """`run_controls`, going on from what an earlier call wrote into the file, unless that was of another circuit, other examples or another model.

    Raises:
        UserError: the file cannot be read.
        KeyboardInterrupt: as `run_controls`.
    """
    of: dict[str, Any] = {
        "definition": DEFINITION,
        "circuit": run.circuit.fingerprint,
        "scores": run.scores.fingerprint,
        "examples": problem.task[split].fingerprint,
        "weights": weights_fingerprint(problem.model.model),
    }
    if problem.ablation.averaged:
        of["training examples"] = problem.task["train"].fingerprint
    try:
        kept = json.loads(path.read_text("utf-8"))
        done = kept["groups"] if {name: kept.get(name) for name in of} == of else {}
    except FileNotFoundError:
        done = {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"expected controls of an earlier call, could not read {str(path)!r}: {error}; remove it to start anew") from error

    def save(found: Any, *, complete: bool = False) -> None:
        write_json(path, {**of, "complete": complete, "groups": found})

    found = run_controls(problem, run.circuit, run.scores, split=split, draws=draws, done=done, save=save, journal=journal)
    save({group: {**done.get(group, {}), **rows} for group, rows in found.items()}, complete=True)
    return found


def costs_nothing(run: Run) -> float:
    """Nats of KL that count as none, by the run's budget; 0 where that is of another loss."""
    return 0.0 if "loss" in run.description else NOTHING * run.config.kl_budget


def summary(found: Mapping[str, Mapping[str, Any]], *, nothing: float = 0.0) -> dict[str, dict[str, Any]]:
    """By group: how many, mean, lowest and highest KL; p where circuits are random; what is dearest to open where each kind is opened alone, and what
    each part adds to the KL where it is closed alone, cheapest first.

    Args:
        nothing: nats of KL; parts that add no more are counted as free.
    """
    own = _or_infinite(found["circuit"]["circuit"]["kl"])
    result: dict[str, dict[str, Any]] = {}
    for group, rows in found.items():
        kls = {name: _or_infinite(row["kl"]) for name, row in rows.items()}
        values = list(kls.values())
        numbers = {"kl_mean": sum(values) / len(values), "kl_min": min(values), "kl_max": max(values)}
        result[group] = {"count": len(values), **{name: or_none(number) for name, number in numbers.items()}}
        if group.startswith("random"):
            hits = sum(kl <= own for kl in values)
            result[group] |= {"hits": hits, "p": (1 + hits) / (1 + len(values))}
        if group == "opened":
            dearest = max(kls, key=kls.__getitem__)
            result[group] |= {"dearest": dearest, "added_by_dearest": or_none(kls[dearest] - own)}
        if group == "minimality":
            added = {name: kls[name] - own for name in sorted(kls, key=kls.__getitem__)}
            free = sum(cost <= nothing for cost in added.values())
            result[group] |= {"added": {name: or_none(cost) for name, cost in added.items()}, "nothing": nothing, "free": free}
    return result


def _or_infinite(kl: float | None) -> float:
    """One that is not finite is kept as None, which JSON has."""
    return math.inf if kl is None else kl


def random_circuit(circuit: Circuit, *, by_layer: bool, seed: int) -> Circuit:
    """As many kept nodes at every level as `circuit` has, or in every layer with `by_layer`, drawn at random from the top down under kept parents.

    Each kept parent gets a child first, so that closing changes nothing and the numbers are those of `circuit`.
    """
    generator = torch.Generator().manual_seed(seed)
    nodes = circuit.nodes
    layers = range(nodes.layers)
    kinds = [[layer for layer in layers if (layer in nodes.expert_layers) == routes] for routes in (False, True)]
    strata = [[layer] for layer in layers] if by_layer else [kind for kind in kinds if kind]
    kept: dict[str, Tensor] = {"embedding": circuit.masks["embedding"]}
    for name, level in LEVELS.items():
        if name == "embedding":
            continue
        own, parent = circuit.masks[name], level.parent
        allowed = nodes.present(name) if parent is None else nodes.present(name) & up_to(own, kept[parent])
        first = _one_for_each_parent(name, kept, allowed, generator)
        kept[name] = torch.zeros_like(own)
        for rows in strata:
            kept[name][rows] = _draw(int(own[rows].sum()), allowed[rows], first[rows], generator)
    return Circuit.of(kept, nodes)


def _one_for_each_parent(name: str, kept: Mapping[str, Tensor], allowed: Tensor, generator: torch.Generator) -> Tensor:
    """A child of each kept parent, where it must have one at this level: a layer needs one of its two blocks."""
    parent = LEVELS[name].parent
    if parent is None or name == "attention_block":
        return torch.zeros_like(allowed)
    if name == "mlp_block":
        return allowed & ~kept["attention_block"]
    families = allowed.reshape(*kept[parent].shape, -1)
    ranks = torch.rand(families.shape, generator=generator).masked_fill(~families, -1.0)
    if not families.shape[-1]:
        return torch.zeros_like(allowed)
    picked = torch.zeros_like(families).scatter_(-1, ranks.argmax(-1, keepdim=True), value=True) & families
    return picked.reshape(allowed.shape)


def _draw(count: int, allowed: Tensor, first: Tensor, generator: torch.Generator) -> Tensor:
    """`count` of the allowed entries, those of `first` before others."""
    ranks = torch.rand(allowed.shape, generator=generator) + first
    ranks = ranks.masked_fill(~allowed, -1.0).flatten()
    chosen = torch.zeros(ranks.shape, dtype=torch.bool)
    chosen[ranks.topk(min(count, int(allowed.sum()))).indices] = True
    return chosen.reshape(allowed.shape)


def complement(circuit: Circuit, scores: Scores) -> Circuit:
    """The leaves that `circuit` does not keep, everything else open, leaves that no gate could close too; the embedding as in `circuit`."""
    nodes, stands = circuit.nodes, standing(scores)
    kept = {level: ~circuit.masks[level] if level in LEAVES and can_close(stands, level, nodes) else nodes.present(level) for level in LEVELS}
    kept["embedding"] = circuit.masks["embedding"]
    return Circuit.of(kept, nodes)


def partly_ablated(circuit: Circuit, probability: float, *, seed: int) -> Circuit:
    """Nodes without children outside `circuit` closed with `probability` each; those above a node that stays open are open. The same seed closes the
    more, the higher the probability."""
    generator = torch.Generator().manual_seed(seed)
    nodes = circuit.nodes
    kept = {level: nodes.present(level) for level in LEVELS}
    for level in CHILDLESS:
        spared = torch.rand(nodes.shape(level), generator=generator) >= probability
        kept[level] = (circuit.masks[level] | spared) & nodes.present(level)
    return Circuit.of(kept, nodes)


def opened(circuit: Circuit, levels: Sequence[str]) -> Circuit:
    """`circuit` with all nodes of `levels` open that have kept parents."""
    return Circuit.of({level: circuit.nodes.present(level) if level in levels else mask for level, mask in circuit.masks.items()}, circuit.nodes)


def _parts(circuit: Circuit, scores: Scores) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each kept block and head, each tenth of the kept neurons by score: by name, what to close."""
    nodes = circuit.nodes
    for level in ("attention_block", "mlp_block", "head"):
        for index in circuit.masks[level].nonzero():
            yield nodes.name(level, tuple(index.tolist())), {level: index.unsqueeze(0)}
    for level in ("mlp_neuron", "expert"):
        kept = circuit.masks[level].nonzero()
        if level not in scores.levels or not len(kept):
            continue
        order = scores.values[level][circuit.masks[level]].argsort()
        for number, part in enumerate(order.tensor_split(DECILES)):
            if len(part):
                yield f"{level}.decile.{number}", {level: kept[part]}
