"""What a circuit does: the metrics of the full model, the circuit, and everything ablated, over the examples of a split.

`kl` is KL(full || circuit) in nats at the answer position, `kl_p95` its 95th percentile over examples; `exact_match` says how often both give the
same top token; `faithfulness` is (m(circuit) - m(ablated)) / (m(full) - m(ablated)) with m the mean logit difference. Metrics that need distractors
are means over the examples that have some, None where none has; all are None of a circuit whose KL is not finite for some example.
"Ablated" closes every node but the embedding, under the problem's own ablation.
`intervals` are 95% bootstrap intervals over prompts: what another draw of as many test examples might have given, for this circuit.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nodesieve.ablations import ABLATIONS
from nodesieve.batches import Batch, order_of
from nodesieve.circuit import Circuit, refuse_other_nodes
from nodesieve.config import AblationName
from nodesieve.errors import SeenPromptsWarning, UserError, refuse_other_kinds
from nodesieve.metrics import EXTRA_METRICS, Resamples, faithfulness, kl_divergence, logit_difference
from nodesieve.models import LoadedModel
from nodesieve.problem import Problem, make_problem
from nodesieve.run import Run, refuse_other_examples
from nodesieve.tasks.base import SPLITS, SplitName, Task
from nodesieve.tasks.load import task_of

Metrics = dict[str, float | None]
Intervals = dict[str, tuple[float, float] | None]
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over the examples of each split: of the full model, the circuit, and everything ablated; and [low, high] of the circuit's."""

    full: dict[str, Metrics]
    circuit: dict[str, Metrics]
    ablated: dict[str, Metrics]
    intervals: dict[str, Intervals]


def evaluate(
    loaded: LoadedModel,
    task: Task,
    run: Run,
    *,
    splits: Sequence[SplitName] = ("test",),
    ablation: AblationName | None = None,
    own: Task | None = None,
) -> Evaluation:
    """Measure a run's circuit on `task`, which may be another than the one it was found on -> metrics by split and name, e.g.
    `.circuit["test"]["kl"]`, in nats (docs/files.md says what each is).

    Other weights than those the circuit was found in are measured, too: `run.was_found_in(loaded.fingerprint)` tells.

    Args:
        loaded: from `load_model`.
        task: from `load_task`.
        run: from `discover` or `load_run`.
        splits: `validation`, `test` or both, `train` too.
        ablation: another than the run's own. Under `mean` closed nodes hold the mean over the run's own training examples, whatever `task` is.
        own: the task that the run was made on, which `mean` needs beside another where it was made of records: no file holds these.

    Raises:
        UserError: there are no such splits, the run was made on a model of other sizes, or the task cannot be used, or it is the run's own and holds
            other examples now; under `mean`, the run's own cannot be read.
    """
    return evaluate_circuit(problem_of(loaded, task, run, splits=splits, ablation=ablation, own=own), run.circuit, splits=splits)


def problem_of(
    loaded: LoadedModel,
    task: Task,
    run: Run,
    *,
    splits: Sequence[SplitName] = ("test",),
    ablation: AblationName | None = None,
    own: Task | None = None,
) -> Problem:
    """The model, `task` and ablation to measure a run's circuit with; arguments and errors as for `evaluate`."""
    if isinstance(splits, str) or not splits or not set(splits) <= set(SPLITS):
        raise UserError(f"expected splits as a list of some of {', '.join(SPLITS)}, got {splits!r}")
    refuse_other_kinds(
        "evaluate",
        ("a model from load_model", loaded, LoadedModel),
        ("a task from load_task", task, Task),
        ("own as a task from load_task", own or task, Task),
        ("a run from discover or load_run", run, Run),
    )
    ablation = ablation or run.config.ablation
    if ablation not in ABLATIONS:
        raise UserError(f"ablation expects one of {', '.join(ABLATIONS)}, got {ablation!r}")
    averaged: tuple[SplitName, ...] = ("train",) if ABLATIONS[ablation].averaged else ()
    if run.was_found_on(task):
        refuse_other_examples(run.description, task, (*splits, *averaged))
    else:
        _tell_of_seen(run, task, splits)
        if averaged and not run.shares(task, "train"):  # what closed nodes hold is part of the circuit, whatever it is measured on
            own = _own_task(run, loaded, own)
            task = replace(task, splits={**task.splits, "train": own.splits["train"]}, redrawn=own.redrawn)
    problem = make_problem(loaded, task, replace(run.config, force=True, ablation=ablation), splits=splits)
    refuse_other_nodes(run.circuit, problem.nodes)
    return problem


def _own_task(run: Run, loaded: LoadedModel, given: Task | None) -> Task:
    """What the run was made on, read again unless it is given."""
    try:
        own = given or task_of(run.config, loaded.tokenizer)
        refuse_other_examples(run.description, own, ("train",))
        return own
    except UserError as error:
        raise UserError(f"under the mean ablation closed nodes hold a mean over the run's own training examples: {error}") from error


def _tell_of_seen(run: Run, task: Task, splits: Sequence[SplitName]) -> None:
    for split in splits:
        seen, count = run.seen_of(task, split), len(task.splits[split])
        if seen:
            warnings.warn(
                f"{seen} of the {count} {split} examples in {task.source or task.name!r} are of prompts that the circuit was searched or chosen "
                "on: what it does on them says little of others",
                SeenPromptsWarning,
                stacklevel=4,
            )


def evaluate_circuit(problem: Problem, circuit: Circuit, *, splits: Sequence[SplitName] = ("test",)) -> Evaluation:
    """Measure a circuit on `splits`; the full model and the ablated one are measured beside it, in the same pass."""
    result = Evaluation(full={}, circuit={}, ablated={}, intervals={})
    for split in splits:
        full, own, ablated = _measure(problem, [circuit, ablated_circuit(problem)], split)
        result.full[split] = _means(full)
        result.circuit[split], result.ablated[split] = (_with_faithfulness(values, full, ablated) for values in (own, ablated))
        result.intervals[split] = _intervals(full, own, ablated, prompts=problem.task[split].prompts)
    return result


def measure_circuits(problem: Problem, circuits: Sequence[Circuit], split: SplitName) -> list[Metrics]:
    """The metrics of several circuits from one pass over the split, without faithfulness; what each has closed is left out of the computation."""
    return [_means(values) for values in _measure(problem, circuits, split, cut=True)[1:]]


def measure_with_faithfulness(problem: Problem, circuits: Sequence[Circuit], split: SplitName) -> list[Metrics]:
    """`measure_circuits` with faithfulness, for which everything ablated is measured in the same pass."""
    full, *rows, ablated = _measure(problem, [*circuits, ablated_circuit(problem)], split, cut=True)
    return [_with_faithfulness(row, full, ablated) for row in rows]


def ablated_circuit(problem: Problem) -> Circuit:
    """Every node closed, the embedding open."""
    closed = {level: torch.zeros(problem.nodes.shape(level), dtype=torch.bool) for level in problem.nodes.full(0.0)}
    return Circuit.of({**closed, "embedding": torch.ones(1, dtype=torch.bool)}, problem.nodes)


def _measure(problem: Problem, circuits: Sequence[Circuit], split: SplitName, *, cut: bool = False) -> tuple[dict[str, Tensor], ...]:
    """Of the full model and of each circuit, each metric of every example, (n,), in the order of the examples; NaN where one has no distractor."""
    full_logits = problem.full_logits(split)
    batches: list[Batch] = []
    rows: list[dict[str, list[Tensor]]] = [{} for _ in range(1 + len(circuits))]
    for batch, circuit_logits in problem.circuit_logits(circuits, split, cut=cut):
        batches.append(batch)
        full = full_logits[batch.index]
        for row, logits in zip(rows, [full, *circuit_logits], strict=True):
            difference = logit_difference(logits, batch)
            values = {"logit_diff": difference, "accuracy": torch.where(difference.isnan(), difference, (difference > 0).float())}
            if logits is not full:
                values = {"kl": kl_divergence(full, logits), "exact_match": (logits.argmax(-1) == full.argmax(-1)).float(), **values}
            values |= {name: EXTRA_METRICS[name](logits, batch) for name in problem.task.metrics}
            for name, value in values.items():
                row.setdefault(name, []).append(value)
    order = order_of(batches)
    measured = [{name: torch.cat(parts)[order].cpu().double() for name, parts in row.items()} for row in rows]
    for values in measured[1:]:
        if not bool(values["kl"].isfinite().all()):  # as in 16 bits, where a circuit can overflow: it has no means, not those of other examples
            values.update({name: torch.full_like(value, float("nan")) for name, value in values.items()})
    return tuple(measured)


def _means(values: dict[str, Tensor]) -> Metrics:
    means: Metrics = {name: None if bool(value.isnan().all()) else float(value.nanmean()) for name, value in values.items()}
    if "kl" in values:
        means["kl_p95"] = None if means["kl"] is None else float(values["kl"].quantile(0.95))
    return means


def _with_faithfulness(values: dict[str, Tensor], full: dict[str, Tensor], ablated: dict[str, Tensor]) -> Metrics:
    differences = (row["logit_diff"].nanmean(0, keepdim=True) for row in (values, full, ablated))
    return {**_means(values), "faithfulness": _faithfulness(*differences)[0]}


def _intervals(full: dict[str, Tensor], own: dict[str, Tensor], ablated: dict[str, Tensor], *, prompts: Sequence[int]) -> Intervals:
    """Percentile bootstrap; a resample takes the same examples of all three."""
    resamples = Resamples(prompts)
    resampled = {name: resamples.means(value) for name, value in own.items()}
    resampled["kl_p95"] = resamples.quantiles(own["kl"], 0.95)
    others = (resamples.means(row["logit_diff"]) for row in (full, ablated))
    resampled["faithfulness"] = torch.tensor([float("nan") if x is None else x for x in _faithfulness(resampled["logit_diff"], *others)])
    ends = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    found: Intervals = {}
    for name, means in resampled.items():
        if name == "faithfulness":  # a ratio: where one resample has none, those that have are no fair sample of it
            means = means if not bool(means.isnan().any()) else torch.full_like(means, float("nan"))
        low, high = means.double().nanquantile(ends).tolist()
        found[name] = None if low != low else (low, high)
    return found


def _faithfulness(circuit: Tensor, full: Tensor, ablated: Tensor) -> list[float | None]:
    """Of mean logit differences, (k,) each."""
    rows = zip(circuit.tolist(), full.tolist(), ablated.tolist(), strict=True)
    return [None if any(x != x for x in row) else faithfulness(circuit=row[0], full=row[1], ablated=row[2]) for row in rows]
