"""What it takes to measure one more circuit on the validation data of IOI, beside a plain pass of the model over the clean prompts.

Circuits keep the leaves of largest weights. Each is measured whole (as `evaluate` does), cut (without what it has closed), cut with what closed nodes
hold remembered (as selection and polishing do), and looked at (the same on a copy in the dtype that is learned in, to 16 bits).

    python benchmarks/remembered.py         # about 5 minutes on 2 cores
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from machine import machine, provenance, versions

import nodesieve as ns
from nodesieve.cache import remembering
from nodesieve.config import DiscoverConfig
from nodesieve.journal import Journal
from nodesieve.methods import METHODS
from nodesieve.problem import Problem, make_problem
from nodesieve.select import select_size
from nodesieve.weights import dtype_name

RESULTS = Path(__file__).parent / "results" / "remembered.json"
SIZES = (0.5, 0.1, 0.01)
TIMES = 2  # the shorter of so many
WAYS = ("whole", "cut", "remembered", "looked at")


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    loaded = ns.load_model("smollm2-135m")
    config = DiscoverConfig()
    problem = make_problem(loaded, ns.load_task("ioi", loaded.tokenizer), config)
    result = {"machine": machine(), "versions": versions(), **measure(problem, config)}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    RESULTS.with_suffix(".md").write_text(markdown(result), "utf-8")


def measure(problem: Problem, config: DiscoverConfig) -> dict[str, Any]:
    """Seconds of a plain pass, and of each way for each size."""
    problem.remember = remembering(config)
    learner = problem.learner(config)
    problem.full_logits("validation"), learner.full_logits("validation")
    plain = shortest(lambda: [problem.model.logits(batch.clean) for batch in problem.task["validation"].batches(problem.batch_size)])
    scores = METHODS["weight_magnitude"](problem, config, Journal())
    rows = []
    for size in SIZES:
        # measured on the way, which fills the file
        circuit = select_size(scores, partial(problem.measured, split="validation"), keep=size, budget=config.kl_budget).circuit
        ways: dict[str, Callable[[], Any]] = {
            "whole": partial(problem.losses, [circuit], "validation"),
            "cut": partial(problem.losses, [circuit], "validation", cut=True),
            "remembered": partial(problem.measured, [circuit], "validation"),
            "looked at": partial(learner.looks, [circuit], "validation"),
        }
        ways["looked at"]()  # likewise
        rows.append({"size": circuit.size, **{name: shortest(way) for name, way in ways.items()}})
        print(rows[-1], flush=True)
    return {"examples": len(problem.task["validation"]), "dtype": dtype_name(learner.model.model.dtype), "plain": plain, "rows": rows}


def shortest(way: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(TIMES):
        began = time.perf_counter()
        way()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"A plain pass over {result['examples']} prompts takes {result['plain']:.1f} s; the others as ratios to it. Looks are in {result['dtype']}.",
        "",
        "| leaves kept | " + " | ".join(WAYS) + " |",
        "|---" * (len(WAYS) + 1) + "|",
    ]
    for row in result["rows"]:
        lines.append(f"| {100 * row['size']:.0f}% | " + " | ".join(f"{row[way] / result['plain']:.2f}" for way in WAYS) + " |")
    return "\n".join([*lines, "", provenance(result), ""])


if __name__ == "__main__":
    main()
