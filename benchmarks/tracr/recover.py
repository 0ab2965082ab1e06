"""Which of the nodes that a compiled program needs does each method find, and which others? Precision, recall and AUROC by level.

The truth is that of `tracr_models.truth`, under each ablation. Precision and recall are of the circuit that selection gives at a KL budget below
what any needed node costs, before and after polishing; AUROC is of the scores, whatever the budget: how often a needed node stands above one
that is not.

    python benchmarks/tracr/recover.py         # some 8 minutes on 2 cores
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tracr_models import PROGRAMS, load_program, truth

from nodesieve.circuit import Circuit
from nodesieve.config import make_config
from nodesieve.journal import Journal
from nodesieve.levels import DEFAULT_LEVELS
from nodesieve.methods import METHODS
from nodesieve.polish import polish
from nodesieve.problem import Problem
from nodesieve.scores import standing
from nodesieve.select import select_budget

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "tracr.json"
sys.path.append(str(HERE.parent))
from machine import machine, provenance, versions  # noqa: E402

BUDGET = 0.001  # nats; the least that a needed node costs, closed alone, is 0.0039
COMPARED = (
    *("sieve", "hybrid", "multigranular", "nested", "coarse", "greedy", "fisher", "gate_gradient", "gate_gradient_ig", "uniform_gradient"),
    *("activation_difference", "weight_magnitude", "random"),
)
ABLATIONS = ("counterfactual", "mean", "zero")
FINE = ("head_dim", "mlp_neuron", "mlp_output")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--methods", nargs="*", default=COMPARED, choices=COMPARED)
    parser.add_argument("--programs", nargs="*", default=list(PROGRAMS), choices=list(PROGRAMS))
    options = parser.parse_args()
    if options.out.resolve() == RESULTS.resolve() and (set(options.methods) != set(COMPARED) or set(options.programs) != set(PROGRAMS)):
        parser.error("expected all methods and programs, or --out FILE for some: in the results file they would replace all")
    torch.set_num_threads(1)
    rows = []
    for name in options.programs:
        for ablation in ABLATIONS:
            problem = load_program(name).problem(ablation)
            needed = truth(problem)
            for method in options.methods:
                row = {"program": name, "ablation": ablation, "method": method, **recovered(problem, needed, method)}
                rows.append(row)
                print(
                    name,
                    ablation,
                    method,
                    {level: (part["found"], part["needed"], part["right"]) for level, part in row["levels"].items()},
                    flush=True,
                )
    result = {"machine": machine(), "versions": versions(), "budget": BUDGET, "rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    options.out.with_suffix(".md").write_text(markdown(result), "utf-8")


def recovered(problem: Problem, needed: dict[str, Tensor], method: str) -> dict[str, Any]:
    config = make_config({"method": method, "ablation": problem.ablation_name, "kl_budget": BUDGET, "steps": 300, "validate_every": 10})
    scores = METHODS[method](problem, config, Journal())
    selection = select_budget(scores, lambda circuits: problem.losses(circuits, "validation"), budget=BUDGET)
    polished, _ = polish(problem, selection, config, Journal())
    stands = standing(scores)
    levels = {}
    for level in DEFAULT_LEVELS:
        present, true = problem.nodes.present(level), needed[level]
        levels[level] = {
            "needed": int(true.sum()),
            "auroc": auroc(stands[level][present], true[present]) if level in scores.levels else None,
            **counted(selection.circuit, level, true),
            "polished": counted(polished.circuit, level, true),
        }
    return {"met": selection.met, "kl": selection.kl, "levels": levels}


def counted(circuit: Circuit, level: str, true: Tensor) -> dict[str, int]:
    found = circuit.masks[level]
    return {"found": int(found.sum()), "right": int((found & true).sum())}


def auroc(scores: Tensor, true: Tensor) -> float | None:
    """The chance that a needed node scores above another, ties counting half; None where there are none of one kind."""
    needed, others = scores[true], scores[~true]
    if not len(needed) or not len(others):
        return None
    above = (needed.unsqueeze(1) > others).double() + 0.5 * (needed.unsqueeze(1) == others)
    return float(above.mean())


def markdown(result: dict[str, Any]) -> str:
    """Over all programs: precision and recall over nodes, AUROC as a mean over programs."""
    heads = [
        "method",
        "ablation",
        *(f"{level}: {what}" for level in FINE for what in ("precision", "recall", "AUROC", "precision, polished", "recall, polished")),
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        for ablation in ABLATIONS:
            rows = [row for row in result["rows"] if (row["method"], row["ablation"]) == (method, ablation)]
            cells = [method, ablation]
            for level in FINE:
                parts = [row["levels"][level] for row in rows]
                areas = [part["auroc"] for part in parts if part["auroc"] is not None]
                polished = [{**part["polished"], "needed": part["needed"]} for part in parts]
                cells += [share(parts, "right", "found"), share(parts, "right", "needed")]
                cells += [f"{sum(areas) / len(areas):.2f}" if areas else "-"]
                cells += [share(polished, "right", "found"), share(polished, "right", "needed")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", provenance(result)]) + "\n"


def share(parts: list[dict[str, int]], of: str, all_: str) -> str:
    total = sum(part[all_] for part in parts)
    return f"{sum(part[of] for part in parts) / total:.2f}" if total else "-"


if __name__ == "__main__":
    main()
