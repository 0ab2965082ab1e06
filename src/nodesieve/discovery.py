"""From a model and a task to a checked circuit: score, select, polish where asked to, evaluate. The same road for every method.

Choices look at training and validation data only; the test split is measured once, at the end, by the circuit that was chosen.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from nodesieve.cache import remembering
from nodesieve.circuit import Circuit, count_parameters
from nodesieve.config import DiscoverConfig
from nodesieve.errors import UserError, refuse_other_kinds
from nodesieve.evaluation import Evaluation, ablated_circuit, evaluate_circuit
from nodesieve.journal import SCORING, Journal, Stopped
from nodesieve.levels import DEFAULT_LEVELS, LEVELS
from nodesieve.method_rows import readers_of
from nodesieve.methods import METHODS
from nodesieve.metrics import in_percent, or_none
from nodesieve.models import DTYPES, LoadedModel, device_name
from nodesieve.polish import polish
from nodesieve.problem import QUICK, Loss, Problem, as_counts, counts_in_words, make_problem, refuse_lacking
from nodesieve.run import Run, counted, describe, load_run, refuse_other_examples, resuming
from nodesieve.scores import Scores
from nodesieve.select import Selection, select_budget, select_size
from nodesieve.tasks import BUILTINS
from nodesieve.tasks.base import Task
from nodesieve.weights import dtype_name

FEW = 30  # validation examples, below which there is a word about it
# Options that may be other ones when a run is gone on with: of how it is computed, and names of what is compared by its content.
MAY_CHANGE = ("model", "revision", "task", "within", "device", "cache_limit", "memory", "max_minutes", "force")


class Interrupted(KeyboardInterrupt):
    """A discovery was stopped on request. `run` is what it had found by then, without metrics; it can be resumed."""

    def __init__(self, run: Run) -> None:
        super().__init__("interrupted")
        self.run = run


@torch.inference_mode(False)
@torch.enable_grad()
def discover(
    loaded: LoadedModel, task: Task, config: DiscoverConfig | None = None, *, journal: Journal | None = None, loss: Loss | None = None
) -> Run:
    """Find the circuit of `task` in a model.

    Args:
        loaded: from `load_model`.
        task: from `load_task`.
        config: options; by default those of `DiscoverConfig`. Its `device` only describes the run; `model`, `revision`, `task` and
            `dtype` become what `loaded` and `task` are, and so do the sizes and the seed that `load_task` was given.
        journal: where progress and checkpoints go; by default nowhere.
        loss: what the circuit is to keep low instead of KL(full || circuit): takes the gated model's logits at the answer (B, V) and a
            `nodesieve.batches.Batch`, gives one number an example (B,). Budget, controller and selection then go by it; the KL is still reported.

    Raises:
        UserError: model, task and options do not fit together.
        Interrupted: `journal.stopping` was set, or Ctrl-C came after scoring; Ctrl-C before there is a circuit is a plain KeyboardInterrupt.
    """
    config = _of_what_is_given(config or DiscoverConfig(), loaded, task)
    if not (loss is None or callable(loss)):
        raise UserError(f"discover expects a loss that can be called, got {type(loss).__name__}")
    journal = journal or Journal()
    refuse_lacking(task.splits.get("train", ()), config)
    problem = make_problem(loaded, task, config, loss=loss)
    refuse_lacking(problem.task["train"].examples, config)
    journal.passes = problem.model.passes
    journal.memory.device = problem.model.device
    journal.devices = [device_name(problem.model.device)]
    weights, fingerprints = loaded.fingerprint, task.fingerprints
    journal.of = {"model's weights": weights, **{f"{split} examples": found for split, found in fingerprints.items()}}
    journal.of |= {f"option {name}": json.dumps(value) for name, value in config.to_dict().items() if name not in MAY_CHANGE}
    outer = _outer(problem, config, task, journal, weights)
    problem.within = None if outer is None else outer.circuit
    within = None if outer is None else outer.circuit.fingerprint
    journal.of |= {"circuit of --within": within} if within else {}
    problem.remember = remembering(config, journal.scratch)
    if not set(config.levels) & set(problem.nodes.levels):
        raise UserError(f"expected --levels among those of this model, {', '.join(problem.nodes.levels)}, got {', '.join(config.levels)}")
    if config.size is not None:
        _refuse_out_of_reach(problem, config, config.size)
    for line in (*_examples_in_words(problem, task), *_unread(config, task)):
        journal.note(line)
    if config.size is None and not config.force:
        _refuse_nothing_to_find(problem, config)
        _refuse_nothing_left(problem, config)
    if problem.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(problem.model.device)
    examples: dict[str, Any] = {"splits": as_counts(problem.task), "shown": list(problem.task.shown), "fingerprints": fingerprints}
    examples |= {"duplicates": task.duplicates} if task.duplicates else {}
    examples |= {"place": task.place} if task.place else {}
    examples["looked_at"] = " ".join(sorted(task.looked_at | (set() if outer is None else outer.looked_at)))
    described = partial(describe, config, revision=loaded.revision, fingerprint=weights, within=within, examples=examples, loss=loss)
    journal.say(SCORING)
    clock = time.monotonic()
    try:
        scores = METHODS[config.method](problem, config, journal)
    except Stopped as stopped:
        raise Interrupted(_unfinished(config, described, journal, stopped.scores)) from None
    if journal.stopping:  # asked for after the method had last looked
        _refuse_uncut(scores)
        raise Interrupted(_unfinished(config, described, journal, scores))
    seconds = journal.seconds or (journal.history[-1]["seconds"] if journal.history else time.monotonic() - clock)

    selection: Selection | None = None
    try:
        journal.say("selecting")
        selection = unpolished = _select(problem, scores, config, journal)
        if config.polish:
            journal.say("polishing")
            limit = math.inf if config.max_minutes is None else 60 * config.max_minutes - seconds
            selection, polishing = polish(problem, selection, config, journal, limit=limit)
        passes = asdict(problem.model.passes)
        journal.say("evaluating")
        evaluation = evaluate_circuit(problem, selection.circuit, splits=("validation", "test"))
    except KeyboardInterrupt:
        if selection is None:
            _refuse_uncut(scores)
        raise Interrupted(_unfinished(config, described, journal, scores, selection)) from None
    metrics = {**metrics_of(problem, selection, evaluation, config), **_spent(journal, seconds=seconds), "passes": passes}
    if config.polish:
        metrics["unpolished"] = {
            "size": unpolished.circuit.size,
            "nodes": {level: unpolished.circuit.kept(level) for level in problem.nodes.levels},
            "validation_kl_upper": or_none(unpolished.kl_upper),
            "seconds": polishing,
        }
    return Run(
        config=config,
        circuit=selection.circuit,
        scores=selection.scores,
        threshold=selection.threshold,
        metrics=metrics,
        description=described(selection.circuit, complete=True),
        history=journal.history,
    )


def _of_what_is_given(config: DiscoverConfig, loaded: LoadedModel, task: Task) -> DiscoverConfig:
    """Options that name the model and the task at hand, so that what is written of the run finds them again.

    Raises:
        UserError: one of the three is something else.
    """
    refuse_other_kinds(
        "discover",
        ("a model from load_model", loaded, LoadedModel),
        ("a task from load_task", task, Task),
        ("options as a DiscoverConfig", config, DiscoverConfig),
    )
    drawn: dict[str, Any] = {name: value for name, value in task.drawn.items() if name != "data_seed" or value != config.seed_of_data}
    dtype: Any = dtype_name(loaded.model.dtype)
    names: dict[str, Any] = {"model": loaded.id, "revision": loaded.asked, "dtype": dtype if dtype in DTYPES else config.dtype}
    return replace(config, task=task.source or task.name, **names, **drawn)


def _outer(problem: Problem, config: DiscoverConfig, task: Task, journal: Journal, weights: str) -> Run | None:
    """The run whose circuit is to be searched within, if there is one."""
    if config.within is None:
        return None
    outer = load_run(config.within)
    if outer.circuit.nodes != problem.nodes:
        raise UserError(f"--within expects a circuit of this model, which has {problem.nodes}, got one of a model that has {outer.circuit.nodes}")
    if outer.was_found_on(task):  # with other test examples, some of them may be among those that the outer circuit was found on
        refuse_other_examples(outer.description, task, ("test",))
    elif seen := outer.seen_of(task, "test"):
        journal.note(f"{seen} of the test examples are of prompts that the circuit in {config.within} was searched or chosen on")
    if not outer.was_found_in(weights):
        journal.note(f"the weights of {config.model} are not those that the circuit in {config.within} was found in")
    if not outer.metrics:
        journal.note(
            f"the run in {config.within} is unfinished, this is within its circuit of now; to go on with it first: {resuming(config.within)}"
        )
    if outer.config.ablation != config.ablation:
        journal.note(f"the circuit in {config.within} was found under the {outer.config.ablation} ablation, this is {config.ablation}")
    return outer


def _refuse_out_of_reach(problem: Problem, config: DiscoverConfig, size: float) -> None:
    """Raise UserError where closing all gates that there are would leave more than is to be kept."""
    outer = problem.within or Circuit.whole(problem.nodes)
    levels = [level for level in LEVELS if level in config.seen]
    least = outer.without({level: outer.masks[level].nonzero() for level in levels}).size
    if least > size:
        raise UserError(
            f"expected --levels whose gates can close all but {in_percent(size)} of the leaves, got {', '.join(levels)}, which leave "
            f"{in_percent(least)} at the least"
        )


def _refuse_nothing_to_find(problem: Problem, config: DiscoverConfig) -> None:
    """Raise UserError where the circuit that keeps nothing is within the budget."""
    (lost,) = problem.losses([ablated_circuit(problem)], "validation", first=QUICK)
    if float(lost.mean()) <= config.kl_budget:
        raise UserError(
            f"expected prompts on which closing every node costs more than the KL budget of {config.kl_budget:g}, got {float(lost.mean()):.3g} on "
            f"validation data such as {problem.task.shown[0]}; if the answers to clean and corrupted prompts are not alike, ask for a lower "
            "--kl-budget. --force goes on all the same"
        )


def _refuse_nothing_left(problem: Problem, config: DiscoverConfig) -> None:
    """Raise UserError where the circuit to stay within is over the budget already, so that nothing may be closed."""
    if problem.within is None:
        return
    (lost,) = problem.measured([problem.within], "validation")
    if float(lost.mean()) > config.kl_budget:
        raise UserError(
            f"--within expects a circuit within the KL budget of {config.kl_budget:g}, got one that costs {float(lost.mean()):.3g} on validation "
            "data; ask for a higher --kl-budget, or --force goes on all the same"
        )


def _select(problem: Problem, scores: Scores, config: DiscoverConfig, journal: Journal) -> Selection:
    def measure(circuits: Sequence[Circuit]) -> list[torch.Tensor]:
        return problem.measured(circuits, "validation")

    if config.size is not None:
        selection = select_size(scores, measure, keep=config.size, budget=config.kl_budget, upper=problem.upper_bound)
        if selection.circuit.size > config.size:  # the method scored fewer levels than it might have
            journal.note(
                f"expected at most {in_percent(config.size)} of the leaves, kept {in_percent(selection.circuit.size)}: method {config.method} has "
                f"scores of {', '.join(scores.levels)}, which close no more; it may take other --levels"
            )
        return selection
    learner = problem.learner(config)

    def look(circuits: Sequence[Circuit]) -> list[torch.Tensor]:
        return learner.looks(circuits, "validation", first=QUICK)

    return select_budget(scores, measure, budget=config.kl_budget, look=look, upper=problem.upper_bound)


def _refuse_uncut(scores: Scores) -> None:
    """Raise KeyboardInterrupt where scores are a ranking that nothing has cut yet: there is no circuit to keep."""
    if scores.threshold is None:
        raise KeyboardInterrupt


def _unfinished(
    config: DiscoverConfig,
    described: Callable[..., dict[str, Any]],
    journal: Journal,
    scores: Scores,
    selection: Selection | None = None,
) -> Run:
    """What was selected, or, before that, what the method itself would cut."""
    threshold = selection.threshold if selection else scores.threshold or 0.0
    circuit = selection.circuit if selection else scores.circuit(threshold)
    return Run(
        config=config,
        circuit=circuit,
        scores=selection.scores if selection else scores,
        threshold=threshold,
        metrics={},
        description=described(circuit, complete=False),
        history=journal.history,
    )


def metrics_of(problem: Problem, selection: Selection, evaluation: Evaluation, config: DiscoverConfig) -> dict[str, Any]:
    """What `metrics.json` says of a circuit, however it was found."""
    parameters = count_parameters(selection.circuit, problem.model.architecture)
    return {
        "nodes": counted(selection.circuit),
        "parameters": {"kept": parameters.kept, "total": parameters.total},
        "size": selection.circuit.size,
        "full": evaluation.full,
        "circuit": evaluation.circuit,
        "ablated": evaluation.ablated,
        "intervals": evaluation.intervals,
        "budget": {"kl": config.kl_budget, "met": selection.met, "validation_kl_upper": or_none(selection.kl_upper)},
    }


def _spent(journal: Journal, *, seconds: float) -> dict[str, Any]:
    """What it says of the way there."""
    return {
        "steps": journal.history[-1]["step"] if journal.history else 0,
        "seconds": seconds,
        "peak_memory_bytes": journal.memory.peak(),
        "device": ", then ".join(journal.devices),
    }


def _examples_in_words(problem: Problem, task: Task) -> Iterator[str]:
    yield from (f"example: {example}" for example in problem.task.shown)
    for split, counts in as_counts(problem.task).items():
        yield f"{split}: {counts_in_words(counts)}"
        if split in problem.task.left_out:
            yield f"skipped in {split}, e.g.: {problem.task.left_out[split]}"
    if task.duplicates:
        yield f"left out for being there twice: {task.duplicates}"
    if len(problem.task["validation"]) < FEW:
        yield (
            f"only {len(problem.task['validation'])} validation examples decide what goes and whether the KL budget is met: with fewer than {FEW}, "
            "expect the test KL to be well above it"
        )


def _unread(config: DiscoverConfig, task: Task) -> Iterator[str]:
    if set(config.levels) != set(DEFAULT_LEVELS) and set(config.levels) != set(config.seen):
        others = ", ".join(level for level in config.levels if level not in config.seen)
        yield f"method {config.method} gives no gates to {others}: it looks at {', '.join(config.seen)} alone"
    for name in config.unread:
        yield f"--{name.replace('_', '-')} has no effect with --method {config.method}; it is read by {', '.join(readers_of(name))}"
    if task.source not in BUILTINS:
        yield from (f"--{name.replace('_', '-')} has no effect on prompts of one's own" for name in config.drawn)
