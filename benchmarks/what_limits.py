"""What keeps a found circuit from being smaller: the table in docs/trials.md, "Where the KL sits".

1. The validation KL of a run's circuit when some of what it closed is opened again: whatever remains is due to what stays closed.
2. How much of what one pass says about the gates of single nodes is signal: the gradient of the KL to each gate over two halves of the
   examples. Their covariance over nodes is signal; what it leaves of the variance is noise, which more examples average away.
3. The validation KL when the cheapest share of such nodes goes, by several readings of the same pass.

    python benchmarks/what_limits.py runs/circuits-ioi-0     # a few minutes on 2 cores
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from circuits import fill
from machine import machine, provenance
from torch import Tensor

from nodesieve import controls, load_run
from nodesieve.batches import Batch
from nodesieve.circuit import Circuit
from nodesieve.evaluation import problem_of
from nodesieve.journal import Journal
from nodesieve.methods.fisher import log_p_of_a_drawn_token
from nodesieve.methods.sensitivity import gate_gradients, open_gates
from nodesieve.metrics import in_percent
from nodesieve.models import model_of
from nodesieve.problem import Problem
from nodesieve.run import Run
from nodesieve.tasks.load import task_of

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "what_limits.json", HERE.parent / "docs" / "trials.md"
EXAMPLES = 512
ASKED = ("head_dim", "mlp_neuron", "mlp_output")
SHARES = (0.06, 0.12, 0.25)
READINGS = {"F": (1.0, 0.0), "30 F - gradient": (30.0, 1.0), "F / 2 - gradient": (0.5, 1.0), "-gradient": (0.0, 1.0)}  # weights of F, gradient
OPENED: dict[str, tuple[str, ...]] = {"nothing": (), **controls.OPENED, "all three kinds within what is kept": ASKED}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path)
    run = load_run(parser.parse_args().directory)
    loaded = model_of(run.config)
    problem = problem_of(loaded, task_of(run.config, loaded.tokenizer), run, splits=("train", "validation"))
    gradients, fisher = looked_at(problem, run)
    result = {
        "machine": machine(),
        "versions": run.description["versions"],
        "run": {"task": run.config.task, "seed": run.config.seed, "size": run.circuit.size, "heads": run.circuit.kept("head")},
        "opened": opened(problem, run.circuit),
        "signal": signal(run.circuit, gradients),
        "closed": closed(problem, run.circuit, {level: x.mean(0) for level, x in gradients.items()}, fisher),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    fill(PAGE, markdown(result))
    print(markdown(result))


def looked_at(problem: Problem, run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """At the circuit, gradients of the KL to the gates of nodes without children, means over each half of the examples (2, *shape(level)), and Fisher
    information, (*shape(level))."""
    learner = problem.learner(run.config)

    def kl(logits: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        return learner.objective(learner.model.logits(batch.clean), logits, batch)

    passes = gate_gradients(
        learner,
        run.config,
        Journal(),
        levels=ASKED,
        moved=(),
        gate_level=open_gates,
        targets=(kl, log_p_of_a_drawn_token),
        index=range(len(problem.task["train"]))[:EXAMPLES],
        generator=torch.Generator().manual_seed(run.config.seed),
        gates=run.circuit.gates(),
    )
    halves = {level: torch.zeros(2, *problem.nodes.shape(level)) for level in ASKED}
    fisher = {level: torch.zeros(problem.nodes.shape(level)) for level in ASKED}
    for number, (gradient, score) in enumerate(passes):
        for level in ASKED:
            halves[level][number % 2] += gradient[level].sum(0).cpu() / (EXAMPLES / 2)
            fisher[level] += score[level].square().sum(0).cpu() / EXAMPLES
    return halves, fisher


def opened(problem: Problem, circuit: Circuit) -> list[dict[str, Any]]:
    circuits = [controls.opened(circuit, levels) for levels in OPENED.values()]
    kls = problem.losses(circuits, "validation", cut=True)
    return [
        {"opened": name, "size": found.size, "heads": found.kept("head"), "kl": float(kl.mean())}
        for name, found, kl in zip(OPENED, circuits, kls, strict=True)
    ]


def signal(circuit: Circuit, gradients: dict[str, Tensor]) -> list[dict[str, Any]]:
    rows = []
    for level in ASKED:
        for kept in (True, False):
            asked = (circuit.masks[level] == kept) & (gradients[level] != 0).any(0)  # in closed blocks and heads every gradient is 0
            if not asked.any():
                continue
            first, second = gradients[level][:, asked]
            covariance, variance = float((first * second).mean()), float((first.square().mean() + second.square().mean()) / 2)
            rows.append({"level": level, "kept": kept, "nodes": len(first), "signal": covariance / variance})
    return rows


def closed(problem: Problem, circuit: Circuit, gradient: dict[str, Tensor], fisher: dict[str, Tensor]) -> list[dict[str, Any]]:
    rows, circuits = [], []
    count = sum(circuit.kept(level) for level in ASKED)
    for share in SHARES:
        for name, (by_fisher, by_gradient) in READINGS.items():
            costs = torch.cat([(by_fisher * fisher[level] - by_gradient * gradient[level])[circuit.masks[level]] for level in ASKED])
            goes = torch.zeros(count, dtype=torch.bool)
            goes[costs.argsort(stable=True)[: round(share * count)]] = True
            masks = {level: mask.clone() for level, mask in circuit.masks.items()}
            for level, part in zip(ASKED, goes.split([circuit.kept(level) for level in ASKED]), strict=True):  # type: ignore[no-untyped-call]
                masks[level][circuit.masks[level]] = ~part
            circuits.append(Circuit.of(masks, circuit.nodes))
            rows.append({"share": share, "by": name})
    kls = problem.losses(circuits, "validation", cut=True)
    return [{**row, "kl": float(kl.mean())} for row, kl in zip(rows, kls, strict=True)]


def markdown(result: dict[str, Any]) -> str:
    run, half = result["run"], EXAMPLES // 2
    lines = [
        f"Of the circuit of `{run['task']}`, seed {run['seed']}, with {in_percent(run['size'])} of the leaves; KL is the mean over validation data.",
        "",
        "| opened again | size | heads | KL |",
        "|---|---|---|---|",
        *(f"| {row['opened']} | {in_percent(row['size'])} | {row['heads']} | {row['kl']:.3f} |" for row in result["opened"]),
        "",
        f"| level | nodes | signal in a gradient over {half} examples, share of the variance |",
        "|---|---|---|",
        *(
            f"| {row['level']}, {'kept' if row['kept'] else 'closed in kept blocks'} | {row['nodes']:,} | {100 * row['signal']:.0f}% |"
            for row in result["signal"]
        ),
        "",
        f"| closed, by | {' | '.join(f'cheapest {100 * share:.0f}%' for share in SHARES)} |",
        "|---|" + "---|" * len(SHARES),
    ]
    for name in READINGS:
        kls = [row["kl"] for row in result["closed"] if row["by"] == name]
        lines.append(f"| {name} | {' | '.join(f'{kl:.3f}' for kl in kls)} |")
    return "\n".join([*lines, "", provenance(result)]) + "\n"


if __name__ == "__main__":
    main()
