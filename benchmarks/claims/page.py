"""How the docs show what was measured: `side_by_side` of the results file in claims.md, `markdown` in claims-tables.md."""

from __future__ import annotations

from collections.abc import Collection
from statistics import mean
from typing import Any

from circuits import table
from machine import provenance
from plan import BUDGET, CUT, METHODS, SEEDS, SETTINGS, SHORT, TASKS, on_cpu

from nodesieve.controls import ABLATED_WITH
from nodesieve.metrics import in_percent
from nodesieve.parts import NOTHING
from nodesieve.report.tables import tables

STAR = "\\*"  # at what an earlier version has polished; of a share, at one of the two
DIFFERENCE = {"greater_than": "prob_diff"}  # between answers; logit_diff where nothing stands here


def side_by_side(result: dict[str, Any]) -> str:
    """The circuits of all methods: leaves before and after polishing, also beside the sieve's, and how well they do the task."""
    shown = circuits_of(result["tasks"])
    away = sum(not on_cpu(one) for one in shown)
    parts = [f"{len(shown)} of {len(METHODS) * len(TASKS) * SEEDS} runs are there" + (f", {away} of them scored on a GPU." if away else "."), ""]
    parts += ["### Leaves kept, seed by seed", "", *at_a_glance(result), ""]
    parts += ["### Leaves kept before polishing", "", *before_polishing(result), ""]
    parts += ["### The sieve's leaves as a share of those of others", "", *beside_the_sieve(result), ""]
    parts += ["### How much of the task is left", "", *left_of_the_task(result["tasks"]), ""]
    return "\n".join([*parts, ran_on(result)]) + "\n"


def markdown(result: dict[str, Any]) -> str:
    """Everything that was measured."""
    parts = beyond_validation(circuits_of(result["tasks"]))
    for task, rows in result["tasks"].items():
        parts += [f"### {task}", ""]
        for title, (headings, *lines) in tables([cost_on_cpu(one) for one in of_each_seed(rows)]).items():
            parts += [f"{title.capitalize()}:", "", *table(headings, lines), ""]
        parts += ["Means over the seeds there are, of one on two machines that of the CPU. Size and test KL of each run:", "", *by_seed(rows), ""]
    for name, by_task in result["settings"].items():
        for task, rows in by_task.items():
            headings, *lines = tables([cost_on_cpu(one) for one in of_each_seed(rows)])["smallest circuit"]
            parts += [f"### {task}, {SETTINGS[name].title}", "", *table(headings, lines), "", *by_seed(rows), ""]
    if result["controls"]:
        parts += ["### Other circuits on the same test data", "", *others(result["controls"]), ""]
    if result["within"]:
        parts += ["### Within heads and MLPs that coarser methods keep", "", *inside(result["within"]), ""]
    if result["variants"]:
        parts += [f"### One thing changed (IOI, seed 0, {SHORT} steps)", "", *changed(result["variants"]), ""]
    elsewhere = [one["versions"] for rows in result["tasks"].values() for one in rows if not on_cpu(one)]
    if elsewhere:
        about = f"{provenance({'versions': elsewhere})} Here is what the others were on:"
        parts += ["### Runs on a GPU", "", *on_gpu(result["tasks"]), "", about, ""]
    return "\n".join([*parts, ran_on(result)]) + "\n"


def ran_on(result: dict[str, Any]) -> str:
    """The machines, and the versions of all runs on a CPU."""
    return provenance({**result, "versions": [one["versions"] for rows in result["tasks"].values() for one in rows if on_cpu(one)]})


def circuits_of(tasks: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a task, method and seed."""
    return [one for rows in tasks.values() for one in of_each_seed(rows)]


def of_each_seed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a method and seed; of a seed on two machines, that of the CPU."""
    first = {(one["method"], one["seed"]): one for one in rows}  # in the order in which they come
    return list((first | {(one["method"], one["seed"]): one for one in sorted(rows, key=on_cpu)}).values())


def beyond_validation(rows: list[dict[str, Any]]) -> list[str]:
    """Of how many circuits test data says more than validation data had promised."""
    above = sum(one["test"]["kl"] > one["validation_kl_upper"] for one in rows)
    over = sum(one["test"]["kl"] > one["budget"] for one in rows)
    found = f"the test KL of {above} is above the upper end of the interval on validation data, of {over} above the budget"
    return [f"Of {len(rows)} circuits, {found}.", ""]


def at_a_glance(result: dict[str, Any]) -> list[str]:
    """A line a method, a column a task: the share of leaves that each seed's circuit keeps."""
    lines = []
    settings = {name: found for name, found in result["settings"].items() if name != CUT}
    for addition, by_task in (("", result["tasks"]), *((f", {SETTINGS[name].title}", found) for name, found in settings.items())):
        for method in METHODS:
            found = {task: of_method(by_task.get(task, []), method) for task in TASKS}
            if any(found.values()):
                cells = (shares(sizes(kept), starred=earlier(kept)) for kept in found.values())
                lines.append([method + addition, *cells])
    return table(["leaves kept by", *TASKS], lines)


def before_polishing(result: dict[str, Any]) -> list[str]:
    """A line a method, a column a task: the share of leaves that each seed's scores keep, cut once."""
    return table(["cut once", *TASKS], [[method, *(shares(unpolished(result, task, method)) for task in TASKS)] for method in METHODS])


def beside_the_sieve(result: dict[str, Any]) -> list[str]:
    """A line a method, a column a task: by seed the sieve's size over that of the method, and the same before polishing."""
    lines = []
    for method in METHODS[1:]:
        cells = []
        for task in TASKS:
            own, other = (of_method(result["tasks"].get(task, []), name) for name in (METHODS[0], method))
            polished = over(sizes(own), sizes(other))
            cut = over(unpolished(result, task, METHODS[0]), unpolished(result, task, method))
            cells.append(f"{shares(polished, digits=0, starred=earlier(own) ^ earlier(other))} ({shares(cut, digits=0)})" if polished or cut else "-")
        lines.append([method, *cells])
    return table(["beside", *TASKS], lines)


def unpolished(result: dict[str, Any], task: str, method: str) -> dict[int, float]:
    """Sizes before polishing by seed; where nothing was polished, of what was cut once."""
    once = of_method(result["settings"].get(CUT, {}).get(task, []), method)
    return sizes(once) | sizes(of_method(result["tasks"].get(task, []), method), "unpolished")


def sizes(by_seed: dict[int, dict[str, Any]], which: str = "size") -> dict[int, float]:
    return {seed: one[which] for seed, one in by_seed.items()}


def over(these: dict[int, float], those: dict[int, float]) -> dict[int, float]:
    return {seed: these[seed] / those[seed] for seed in these.keys() & those.keys()}


def left_of_the_task(tasks: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A line a method, a column a task: by seed what the circuit has of the full model's difference between answers, on test data."""
    measures = {task: DIFFERENCE.get(task, "logit_diff") for task in tasks}
    lines = []
    for method in METHODS:
        cells = []
        for task, measure in measures.items():
            found = of_method(tasks[task], method)
            cells.append(shares({seed: one["test"][measure] / one["full"][measure] for seed, one in found.items()}, digits=0))
        lines.append([method, *cells])
    return table(["left by", *(f"{task}, {measure}" for task, measure in measures.items())], lines)


def of_method(rows: list[dict[str, Any]], method: str) -> dict[int, dict[str, Any]]:
    """A method's rows by seed."""
    return {one["seed"]: one for one in of_each_seed(rows) if one["method"] == method}


def earlier(by_seed: dict[int, dict[str, Any]]) -> set[int]:
    """Seeds of the rows that an earlier version polished. Those say so that were made before heads could come back; whoever changes polishing, marks
    those there are in the results file."""
    return {seed for seed, one in by_seed.items() if "earlier" in one}


def shares(by_seed: dict[int, float], *, digits: int | None = None, starred: Collection[int] = ()) -> str:
    """Of each seed; a dash for one that was not run."""
    shown = {seed: (in_percent(share) if digits is None else f"{share:.{digits}%}") + STAR * (seed in starred) for seed, share in by_seed.items()}
    return " / ".join(shown.get(seed, "-") for seed in range(SEEDS)) if shown else "-"


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
        made = f"{in_percent(one['size'])}{STAR * ('earlier' in one)} ({one['test']['kl']:.3f}{'' if on_cpu(one) else '; GPU'})"
        found.setdefault((one["method"], one["seed"]), []).append(made)
    methods, seeds = dict.fromkeys(one["method"] for one in rows), sorted({one["seed"] for one in rows})
    lines = [[method, *(", ".join(found.get((method, seed), ["-"])) for seed in seeds)] for method in methods]
    return table(["method", *(f"seed {seed}" for seed in seeds)], lines)


def others(rows: list[dict[str, Any]]) -> list[str]:
    """KL by group of circuits. Of random ones the lowest, and p; of partly ablated ones mean and highest."""
    lines = []
    for entry in rows:
        groups = entry["groups"]
        drawn = [f"{groups[name]['kl_min']:.2f} (p = {groups[name]['p']:.3f})" for name in ("random", "random_by_layer")]
        partly = [groups[f"partial_{p:g}"] for p in ABLATED_WITH]
        alone = groups["minimality"]
        own, complement = (groups[name]["kl_mean"] for name in ("circuit", "complement"))
        cheapest, few = alone["kl_min"] - own, NOTHING * BUDGET
        if "added" in alone:
            free = str(sum(cost is not None and cost <= few for cost in alone["added"].values()))
        else:  # an early row, which says of the others only how many are below 0
            free = f"{max(alone['free'], int(cheapest <= few))} or more"
        lines.append(
            [
                *(entry["task"], entry["method"], str(entry["seed"]), in_percent(entry["size"]), f"{own:.3f}", *drawn, f"{complement:.2f}"),
                *(f"{some['kl_mean']:.3f} / {some['kl_max']:.3f}" for some in partly),
                f"{groups['opened']['kl_max']:.3f} ({groups['opened']['dearest']})" if "opened" in groups else "-",
                f"{free} of {alone['count']} (cheapest {cheapest:+.4f})",
            ]
        )
    headings = ["task", "method", "seed", "size", "KL", "random, lowest", "random by layer, lowest", "complement"]
    partly = [f"{p:.0%} of the complement closed, mean / worst" for p in ABLATED_WITH]
    return table([*headings, *partly, "one kind opened, worst", f"parts that cost {NOTHING * BUDGET:g} or less alone"], lines)


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
            entry["device"],
        ]
        for entry in rows
    ]
    return table(["", "within budget", "heads", "dims", "neurons", "outputs", "size", "validation KL", "test KL", "device"], lines)


def cost_on_cpu(one: dict[str, Any]) -> dict[str, Any]:
    """A row whose cost may stand beside that of runs on a CPU: none where it was on a GPU, where corrupted prompts are read anew, too."""
    return one if on_cpu(one) else {**one, **dict.fromkeys(("seconds", "polish_seconds", "peak_memory_bytes", "passes"))}
