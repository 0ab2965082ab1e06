"""What a circuit does: the metrics of the full model, the circuit, and everything ablated, over the examples of a split.

`kl` is KL(full || circuit) in nats at the answer position, `kl_p95` its 95th percentile over examples; `exact_match` says how often both give the
same top token; `faithfulness` is (m(circuit) - m(ablated)) / (m(full) - m(ablated)) with m the mean logit difference. Metrics that need distractors
are means over the examples that have some, None where none has. "Ablated" closes every node but the embedding, under the problem's own ablation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nodesieve.circuit import Circuit
from nodesieve.errors import UserError
from nodesieve.metrics import EXTRA_METRICS, faithfulness, kl_divergence, logit_difference
from nodesieve.models import LoadedModel
from nodesieve.problem import Problem, make_problem
from nodesieve.run import Run
from nodesieve.tasks.base import SplitName, Task

Metrics = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over the examples of each split: of the full model, the circuit, and everything ablated."""

    full: dict[str, Metrics]
    circuit: dict[str, Metrics]
    ablated: dict[str, Metrics]


def evaluate(loaded: LoadedModel, task: Task, run: Run, *, splits: Sequence[SplitName] = ("test",)) -> Evaluation:
    """Measure a run's circuit on `task`, which may be another than the one it was found on, under the run's own ablation.

    Raises:
        UserError: the run was made on a model of other sizes, or the task cannot be used.
    """
    problem = make_problem(loaded, task, replace(run.config, force=True), splits=splits)
    if run.circuit.nodes != problem.nodes:
        raise UserError(f"expected a circuit of this model, which has {problem.nodes}, got one of a model that has {run.circuit.nodes}")
    return evaluate_circuit(problem, run.circuit, splits=splits)


def evaluate_circuit(problem: Problem, circuit: Circuit, *, splits: Sequence[SplitName] = ("test",)) -> Evaluation:
    """Measure a circuit on `splits`; the full model and the ablated one are measured beside it, in the same pass."""
    result = Evaluation(full={}, circuit={}, ablated={})
    for split in splits:
        full, own, ablated = _measure(problem, [circuit, ablated_circuit(problem)], split)
        for metrics in (own, ablated):
            metrics["faithfulness"] = _faithfulness(metrics, full, ablated)
        result.full[split], result.circuit[split], result.ablated[split] = full, own, ablated
    return result


def ablated_circuit(problem: Problem) -> Circuit:
    """Every node closed, the embedding open."""
    closed = {level: torch.zeros(problem.nodes.shape(level), dtype=torch.bool) for level in problem.nodes.full(0.0)}
    return Circuit.of({**closed, "embedding": torch.ones(1, dtype=torch.bool)}, problem.nodes)


def _measure(problem: Problem, circuits: Sequence[Circuit], split: SplitName) -> tuple[Metrics, ...]:
    """Metrics of the full model and of each circuit, from one pass over the split."""
    full_logits = problem.full_logits(split)
    has_distractors = any(example.distractors for example in problem.task[split].examples)
    rows: list[dict[str, list[Tensor]]] = [{} for _ in range(1 + len(circuits))]
    for batch, circuit_logits in problem.circuit_logits(circuits, split):
        full = full_logits[batch.index]
        for row, logits in zip(rows, [full, *circuit_logits], strict=True):
            values: dict[str, Tensor] = {}
            if logits is not full:
                values |= {"kl": kl_divergence(full, logits), "exact_match": (logits.argmax(-1) == full.argmax(-1)).float()}
            if has_distractors:
                difference = logit_difference(logits, batch)
                values |= {"logit_diff": difference, "accuracy": torch.where(difference.isnan(), difference, (difference > 0).float())}
                values |= {name: EXTRA_METRICS[name](logits, batch) for name in problem.task.metrics}
            for name, value in values.items():
                row.setdefault(name, []).append(value)
    return tuple(_means({name: torch.cat(parts).double() for name, parts in row.items()}, has_distractors) for row in rows)


def _means(values: dict[str, Tensor], has_distractors: bool) -> Metrics:
    means: Metrics = {name: float(value.nanmean()) for name, value in values.items()}
    if "kl" in values:
        means["kl_p95"] = float(values["kl"].quantile(0.95))
    if not has_distractors:
        means |= {"logit_diff": None, "accuracy": None}
    return means


def _faithfulness(metrics: Metrics, full: Metrics, ablated: Metrics) -> float | None:
    circuit_m, full_m, ablated_m = metrics["logit_diff"], full["logit_diff"], ablated["logit_diff"]
    if circuit_m is None or full_m is None or ablated_m is None:
        return None
    return faithfulness(circuit=circuit_m, full=full_m, ablated=ablated_m)
