"""What the method's paper claims and what we claim, measured on SmolLM2-135M: docs/claims.md is filled from here.

Runs are made with `nodesieve compare` and `nodesieve discover` into --runs, finished ones are kept, unfinished ones are gone on with:

- `TASK/METHOD-SEED`: every method of METHODS through the same selection at a KL budget of 0.25 (claims i and iii);
- `TASK/outputs-open/METHOD-SEED`: those of WITH_OUTPUTS_OPEN again with no gates on MLP outputs, which `size` does not count (claim i);
- `TASK/within-METHOD-SEED`: the sieve within the circuit that a method limited to heads and MLP blocks keeps (claim ii);
- `nodesieve evaluate --controls` of the sieve's circuits: random circuits, the complement, partly ablated complements, parts closed alone;
- `ioi/VARIANT`: shorter runs on IOI, each with one thing changed (claims iv and v).

    python benchmarks/claims/claims.py                      # everything: some 40 hours on 2 cores
    python benchmarks/claims/claims.py --only ioi --seeds 1 # a part
    python benchmarks/claims/claims.py --collect            # run nothing, fill the page with what is there
    python benchmarks/claims/claims.py --collect --runs runs/claims runs/claims-gpu  # of the same seeds on two machines

What is in the results file and not in --runs stays, since the runs take days and more than one machine; delete the file to begin anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from nodesieve import load_run
from nodesieve.batches import mix
from nodesieve.circuit import Circuit
from nodesieve.compare import CURVE, row, tables
from nodesieve.controls import ABLATED_WITH, controls_file, summary
from nodesieve.errors import UserError
from nodesieve.evaluation import problem_of
from nodesieve.levels import DEFAULT_LEVELS, LEAVES
from nodesieve.metrics import in_percent
from nodesieve.models import model_of
from nodesieve.run import Run, read_json
from nodesieve.tasks.load import task_of

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
from circuits import fill  # noqa: E402
from machine import machine, provenance  # noqa: E402

PAGE, RESULTS = HERE.parents[1] / "docs" / "claims.md", HERE.parent / "results" / "claims.json"
# On the last no default was ever tuned, nor was it looked at before.
TASKS = ("ioi", "greater_than", "gendered_pronoun", "subject_verb_agreement")
METHODS = (
    *("sieve", "multigranular", "coarse", "greedy", "nested", "uniform_gradient", "gate_gradient_ig", "gate_gradient", "fisher"),
    *("activation_difference", "weight_magnitude", "random"),
)
WITH_OUTPUTS_OPEN = ("sieve", "fisher", "gate_gradient_ig")
OUTPUTS_OPEN = "outputs-open"
WHOLE = ("coarse", "greedy")  # methods that look at heads and MLP blocks as wholes
SHORT = 160


def without(level: str) -> list[str]:
    """The usual levels but one."""
    return [other for other in DEFAULT_LEVELS if other != level]


LEARNED = {"method": "multigranular"}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    **{
        f"without {level}": {"levels": without(level)}
        for level in ("layer", "attention_block", "mlp_block", "head", "head_dim", "mlp_neuron", "mlp_output")
    },
    "learned gates": LEARNED,
    "learned gates, one sample a batch": {**LEARNED, "gate_samples": "batch"},
    "learned gates, penalties nested": {**LEARNED, "penalty_form": "nested"},
    "learned gates, penalties reached": {**LEARNED, "penalty_form": "reached"},
    "learned gates, controller fixed": {**LEARNED, "controller": "fixed"},
    "learned gates, controller target_size at 0.5": {**LEARNED, "controller": "target_size", "target_size": 0.5},
}
ORDER = {name: place for names in (TASKS, METHODS, tuple(VARIANTS)) for place, name in enumerate(names)}  # of rows
PARTS = ("compare", OUTPUTS_OPEN, "controls", "within", "variants")
CONTROLLED = "sieve"  # the method whose circuits are set beside other circuits
DRAWS = 5
BUDGET = 0.25
CPU = "cpu"  # as runs name it, the first of which named no device


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, nargs="+", default=[Path("runs/claims")], help="the first for what is run, all for what is collected")
    parser.add_argument("--only", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--collect", action="store_true")
    options = parser.parse_args()
    runs = options.runs[0]
    few = [method for method in WITH_OUTPUTS_OPEN if method in options.methods]
    for task in () if options.collect else options.only:
        if "compare" in options.parts:
            compared(runs / task, task, options.methods, options.seeds)
        if OUTPUTS_OPEN in options.parts and few:
            compared(runs / task / OUTPUTS_OPEN, task, few, options.seeds, "--levels", ",".join(without("mlp_output")))
        if "controls" in options.parts and CONTROLLED in options.methods:
            for seed in range(options.seeds):
                nodesieve("evaluate", runs / task / f"{CONTROLLED}-{seed}", "--controls")
        if "within" in options.parts:
            for method, seed in ((method, seed) for seed in range(options.seeds) for method in WHOLE if method in options.methods):
                within(runs / task, task, method, seed)
        if "variants" in options.parts and task == "ioi":
            for name, changed in VARIANTS.items():
                variant(runs / task, name, changed)
    before = read_json(RESULTS) if RESULTS.is_file() else {}
    result = {"machine": machine(), **joined(before, *map(collected, options.runs))}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    fill(PAGE, markdown(result))


def nodesieve(*arguments: Any) -> None:
    print("$ nodesieve", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "nodesieve", *map(str, arguments)], check=True)


def compared(out: Path, task: str, methods: Sequence[str], seeds: int, *flags: Any) -> None:
    nodesieve("compare", "--task", task, "--methods", ",".join(methods), "--seeds", seeds, *flags, "--out", out)


def discovered(out: Path, *flags: Any) -> None:
    """Make the run in `out`, or go on with it, unless it is done."""
    if (out / "checkpoint.safetensors").is_file():
        nodesieve("discover", "--resume", out)
    elif not (out / "metrics.json").is_file():
        nodesieve("discover", "--out", out, "--overwrite", *flags)


def within(runs: Path, task: str, method: str, seed: int) -> None:
    """What of the heads and MLP blocks that a method keeps can go; and as many leaves of them taken away at random."""
    whole, out = runs / f"{method}-{seed}", runs / f"within-{method}-{seed}"
    discovered(out, "--task", task, "--seed", seed, "--within", whole)
    if (out / "random.json").is_file():
        return
    outer, inner = load_run(whole), load_run(out)
    loaded = model_of(inner.config)
    problem = problem_of(loaded, task_of(inner.config, loaded.tokenizer), inner)
    circuits = [drawn_within(outer.circuit, inner.circuit, seed=mix(seed, draw, 19)) for draw in range(DRAWS)]
    kls = [float(kl.mean()) for kl in problem.losses(circuits, "test")]
    (out / "random.json").write_text(json.dumps({"kl": kls}), "utf-8")


def drawn_within(outer: Circuit, inner: Circuit, *, seed: int) -> Circuit:
    """As many leaves of each level as `inner` keeps, drawn from those of `outer`; outputs as in `outer`."""
    generator = torch.Generator().manual_seed(seed)
    masks = dict(outer.masks)
    for level in LEAVES:
        inside = outer.masks[level].nonzero()
        chosen = inside[torch.randperm(len(inside), generator=generator)[: inner.kept(level)]]
        masks[level] = torch.zeros_like(outer.masks[level])
        masks[level][tuple(chosen.unbind(-1))] = True
    return Circuit.of(masks, outer.nodes)


def variant(runs: Path, name: str, changed: dict[str, Any]) -> None:
    flags = [
        part for option, value in changed.items() for part in (f"--{option.replace('_', '-')}", ",".join(value) if isinstance(value, list) else value)
    ]
    discovered(runs / slug(name), "--task", "ioi", "--steps", SHORT, "--no-polish", *flags)


def slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def collected(runs: Path) -> dict[str, Any]:
    tasks, outputs_open, beside, inside = {}, {}, [], []
    for task in TASKS:
        tasks[task], outputs_open[task] = rows_of(runs / task), rows_of(runs / task / OUTPUTS_OPEN)
        for place, run in finished(runs / task, f"{CONTROLLED}-[0-9]"):
            measured = controls_file(place, task=task, split="test", ablation=run.config.ablation)
            kept = read_json(measured) if measured.is_file() else {}
            if kept.get("complete") and kept["circuit"] == run.circuit.fingerprint:
                beside.append({"task": task, "seed": run.config.seed, "size": run.metrics["size"], "groups": summary(kept["groups"])})
        for method in WHOLE:
            for place, run in finished(runs / task, f"within-{method}-[0-9]"):
                outer = load_run(place.parent / place.name.removeprefix("within-"))
                drawn = place / "random.json"
                inside.append(
                    {
                        "task": task,
                        "method": method,
                        "seed": run.config.seed,
                        "outer": brief(outer),
                        "inner": brief(run),
                        "random_kl": read_json(drawn)["kl"] if drawn.is_file() else None,
                    }
                )
    variants = [{"name": name, **brief(run)} for name in VARIANTS for _, run in finished(runs / "ioi", slug(name))]
    here = [one["versions"] for rows in tasks.values() for one in rows if on_cpu(one)]
    return {
        "versions": here[-1] if here else {},
        "tasks": tasks,
        "outputs_open": outputs_open,
        "controls": beside,
        "within": inside,
        "variants": variants,
    }


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """A row for each finished run of a comparison."""
    return [
        {**row(run, read_json(place / CURVE)), "device": run.metrics.get("device", CPU)}
        for method in METHODS
        for place, run in finished(directory, f"{method}-[0-9]")
        if (place / CURVE).is_file()
    ]


def on_cpu(one: dict[str, Any]) -> bool:
    return bool(one["device"] == CPU)


def cost_on_cpu(one: dict[str, Any]) -> dict[str, Any]:
    """A row whose cost may stand beside that of runs on a CPU: none where it was on a GPU, where corrupted prompts are read anew, too."""
    return one if on_cpu(one) else {**one, **dict.fromkeys(("seconds", "polish_seconds", "peak_memory_bytes", "passes"))}


def joined(*parts: dict[str, Any]) -> dict[str, Any]:
    """All that was measured; of what was measured twice, what stands in a later part."""

    def rows(found: list[list[dict[str, Any]]], *names: str) -> list[dict[str, Any]]:
        kept = {tuple(row[name] for name in names): row for some in found for row in some}
        return [kept[key] for key in sorted(kept, key=lambda key: [ORDER.get(part, part) for part in key])]

    def all_of(part: str, nothing: Any = ()) -> list[Any]:
        return [one.get(part, nothing) for one in parts]

    def by_task(part: str) -> dict[str, list[dict[str, Any]]]:
        found = {task: rows([some.get(task, []) for some in all_of(part, {})], "method", "seed", "device") for task in TASKS}
        return {task: some for task, some in found.items() if some}

    return {
        "versions": next((one["versions"] for one in reversed(parts) if one.get("versions")), {}),
        "tasks": by_task("tasks"),
        "outputs_open": by_task("outputs_open"),
        "controls": rows(all_of("controls"), "task", "seed"),
        "within": rows(all_of("within"), "task", "method", "seed"),
        "variants": rows(all_of("variants"), "name"),
    }


def finished(directory: Path, pattern: str) -> Iterator[tuple[Path, Run]]:
    for place in sorted(directory.glob(pattern)):
        if (place / "metrics.json").is_file() and not (place / "checkpoint.safetensors").is_file():
            try:
                yield place, load_run(place)
            except UserError as error:
                print(f"left out {place}: {error}", file=sys.stderr)


def brief(run: Run) -> dict[str, Any]:
    kept = {level: part["kept"] for level, part in run.metrics["nodes"].items()}
    names = ("kl", "accuracy")
    return {
        "nodes": kept,
        "size": run.metrics["size"],
        "met": run.metrics["budget"]["met"],
        **{name: run.metrics["circuit"]["test"][name] for name in names},
        "validation_kl": run.metrics["circuit"]["validation"]["kl"],
        "seconds": run.metrics["seconds"],
    }


def markdown(result: dict[str, Any]) -> str:
    parts = ["### Sizes, seed by seed", "", *at_a_glance(result), ""]
    for task, rows in result["tasks"].items():
        parts += [f"### {task}", ""]
        for title, (headings, *lines) in tables([cost_on_cpu(one) for one in rows]).items():
            parts += [f"{title.capitalize()}:", "", *table(headings, lines), ""]
        parts += ["Means over the runs there are. Size and test KL of each:", "", *by_seed(rows), ""]
    for task, rows in result["outputs_open"].items():
        headings, *lines = tables([cost_on_cpu(one) for one in rows])["smallest circuit"]
        parts += [f"### {task}, MLP outputs left open", "", *table(headings, lines), "", *by_seed(rows), ""]
    if result["controls"]:
        parts += ["### Other circuits on the same test data", "", *others(result["controls"]), ""]
    if result["within"]:
        parts += ["### Within heads and MLPs that coarser methods keep", "", *inside(result["within"]), ""]
    if result["variants"]:
        parts += [f"### One thing changed (IOI, seed 0, {SHORT} steps)", "", *changed(result["variants"]), ""]
    elsewhere = [one for rows in result["tasks"].values() for one in rows if not on_cpu(one)]
    if elsewhere:
        parts += ["### Runs on a GPU", "", *on_gpu(result["tasks"]), "", f"{provenance(elsewhere[-1])} Here is what the others were on:", ""]
    return "\n".join([*parts, provenance(result)]) + "\n"


def at_a_glance(result: dict[str, Any]) -> list[str]:
    """A line a method, a column a task: the share of leaves that each seed's circuit keeps; of a seed on two machines, that of the CPU."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for part, addition in (("tasks", ""), ("outputs_open", ", outputs open")):
        for task, rows in result[part].items():
            for one in sorted(rows, key=on_cpu):  # a later one of the same seed stands
                found.setdefault(one["method"] + addition, {}).setdefault(task, {})[one["seed"]] = one["size"]
    order = [method + addition for addition in ("", ", outputs open") for method in METHODS]
    lines = [[name, *(shares(found[name].get(task, {})) for task in TASKS)] for name in order if name in found]
    return table(["leaves kept by", *TASKS], lines)


def shares(by_seed: dict[int, float]) -> str:
    """Of the seeds from 0 on; a dash for one that was not run."""
    if not by_seed:
        return "-"
    return " / ".join(in_percent(by_seed[seed]) if seed in by_seed else "-" for seed in range(max(by_seed) + 1))


def on_gpu(tasks: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What the runs cost that were on a GPU, or for a part of the way."""
    lines = [
        [
            *(task, one["method"], str(one["seed"]), one["device"], f"{one['seconds']:,.0f} + {one['polish_seconds'] or 0:,.0f}"),
            f"{one['peak_memory_bytes'] / 1e9:.2f}",
        ]
        for task, rows in tasks.items()
        for one in rows
        if not on_cpu(one)
    ]
    return table(["task", "method", "seed", "device", "s", "GB"], lines)


def by_seed(rows: list[dict[str, Any]]) -> list[str]:
    """A line a method: size and test KL of each seed's circuit."""
    found: dict[tuple[str, int], list[str]] = {}
    for one in rows:
        made = f"{in_percent(one['size'])} ({one['test']['kl']:.3f}{'' if on_cpu(one) else '; GPU'})"
        found.setdefault((one["method"], one["seed"]), []).append(made)
    methods, seeds = dict.fromkeys(one["method"] for one in rows), sorted({one["seed"] for one in rows})
    lines = [[method, *(", ".join(found.get((method, seed), ["-"])) for seed in seeds)] for method in methods]
    return table(["method", *(f"seed {seed}" for seed in seeds)], lines)


def table(headings: list[str], lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings), *("| " + " | ".join(line) + " |" for line in lines)]


def others(rows: list[dict[str, Any]]) -> list[str]:
    """KL by group of circuits. Of random ones the lowest, and p; of partly ablated ones mean and highest."""
    lines = []
    for entry in rows:
        groups = entry["groups"]
        drawn = [f"{groups[name]['kl_min']:.2f} (p = {groups[name]['p']:.3f})" for name in ("random", "random_by_layer")]
        partly = [groups[f"partial_{p:g}"] for p in ABLATED_WITH]
        alone = groups["minimality"]
        own, complement = (groups[name]["kl_mean"] for name in ("circuit", "complement"))
        lines.append(
            [
                *(entry["task"], str(entry["seed"]), in_percent(entry["size"]), f"{own:.3f}", *drawn, f"{complement:.2f}"),
                *(f"{some['kl_mean']:.3f} / {some['kl_max']:.3f}" for some in partly),
                f"{alone['free']} of {alone['count']}",
            ]
        )
    headings = ["task", "seed", "size", "KL", "random, lowest", "random by layer, lowest", "complement"]
    return table([*headings, *(f"{p:.0%} of the complement closed, mean / worst" for p in ABLATED_WITH), "parts that cost nothing alone"], lines)


def inside(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for entry in rows:
        outer, inner = entry["outer"], entry["inner"]
        gone = {level: 1 - inner["nodes"][level] / max(1, outer["nodes"][level]) for level in ("head_dim", "mlp_neuron")}
        lines.append(
            [
                entry["task"],
                entry["method"],
                str(entry["seed"]),
                f"{outer['nodes']['head']} / {outer['nodes']['mlp_block']}",
                in_percent(outer["size"]),
                *(in_percent(gone[level]) for level in gone),
                in_percent(inner["size"]),
                f"{outer['kl']:.3f}",
                f"{inner['kl']:.3f}",
                "-" if entry["random_kl"] is None else f"{mean(entry['random_kl']):.2f}",
            ]
        )
    headings = [
        "task",
        "method",
        "seed",
        "heads / MLPs kept",
        "size",
        "of their dims can go",
        "of their neurons",
        "size then",
        "test KL",
        "test KL then",
    ]
    return table([*headings, "KL, as many at random"], lines)


def changed(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        [
            entry["name"],
            "yes" if entry["met"] else "no",
            *(f"{entry['nodes'][level]:,}" for level in ("head", "head_dim", "mlp_neuron", "mlp_output")),
            in_percent(entry["size"]),
            f"{entry['validation_kl']:.3f}",
            f"{entry['kl']:.3f}",
        ]
        for entry in rows
    ]
    return table(["", "within budget", "heads", "dims", "neurons", "outputs", "size", "validation KL", "test KL"], lines)


if __name__ == "__main__":
    main()
