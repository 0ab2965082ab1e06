"""What the method's paper claims and what we claim, measured on SmolLM2-135M: docs/claims.md and docs/claims-tables.md are filled from here.

What there is to measure stands in plan.py, how the page shows it in page.py.

Runs are made with `nodesieve compare` and `nodesieve discover` into --runs, finished ones are kept, unfinished ones are gone on with:

- `TASK/METHOD-SEED`: every method of METHODS through the same selection at a KL budget of 0.25;
- `TASK/SETTING/METHOD-SEED`: some of them again with the options of each of SETTINGS;
- `TASK/within-METHOD-SEED`: the sieve within the circuit that a method limited to heads and MLP blocks keeps;
- `nodesieve evaluate --controls` of the sieve's circuits: random circuits, the complement, partly ablated complements, parts closed alone;
- `ioi/VARIANT`: shorter runs on IOI, each with one thing changed.

    python benchmarks/claims/claims.py                      # everything: some 40 hours on 2 cores
    python benchmarks/claims/claims.py --only ioi --seeds 1 # a part
    python benchmarks/claims/claims.py --collect            # run nothing, fill the page with what is there
    python benchmarks/claims/claims.py --collect --runs runs/claims runs/claims-gpu  # of the same seeds on two machines

What is in the results file and not in --runs stays, since the runs take days and more than one machine; delete the file to begin anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from nodesieve import load_run
from nodesieve.batches import mix
from nodesieve.circuit import Circuit
from nodesieve.compare import row
from nodesieve.config import DiscoverConfig, make_config
from nodesieve.controls import DEFINITION, controls_file, costs_nothing, summary
from nodesieve.errors import UserError
from nodesieve.evaluation import problem_of
from nodesieve.files import read_json, write_json
from nodesieve.levels import LEAVES
from nodesieve.models import model_of
from nodesieve.run import CURVE, Run, is_finished
from nodesieve.spawn import ensure_run
from nodesieve.tasks.load import task_of

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
from circuits import call, fill  # noqa: E402
from machine import machine  # noqa: E402
from page import markdown, side_by_side  # noqa: E402
from plan import CONTROLLED, DRAWS, METHODS, ORDER, PARTS, SEEDS, SETTINGS, SHORT, TASKS, VARIANTS, WHOLE, device_of  # noqa: E402

RANDOM = "random.json"  # beside a search within another's circuit
PAGE, RESULTS = HERE.parents[1] / "docs" / "claims.md", HERE.parent / "results" / "claims.json"
TABLES = PAGE.with_name("claims-tables.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, nargs="+", default=[Path("runs/claims")], help="the first for what is run, all for what is collected")
    parser.add_argument("--only", nargs="*", default=TASKS, choices=TASKS)
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--collect", action="store_true")
    options = parser.parse_args()
    runs = options.runs[0]
    for task in () if options.collect else options.only:
        if "compare" in options.parts:
            compared(runs / task, task, options.methods, options.seeds)
        for name, setting in SETTINGS.items():
            few = [method for method in setting.methods if method in options.methods and task in setting.tasks]
            if name in options.parts and few:
                compared(runs / task / name, task, few, options.seeds, setting.options)
        if "controls" in options.parts:
            for method, seed in ((method, seed) for method in CONTROLLED if method in options.methods for seed in range(options.seeds)):
                call("evaluate", runs / task / f"{method}-{seed}", "--controls")
        if "within" in options.parts:
            for method, seed in ((method, seed) for seed in range(options.seeds) for method in WHOLE if method in options.methods):
                within(runs / task, task, method, seed)
        if "variants" in options.parts and task == "ioi":
            for name in VARIANTS:
                made(runs / task / slug(name), options_of(name))
    before = read_json(RESULTS) if RESULTS.is_file() else {}
    known = [part for part in before.get("machine", "").split("; ") if part]
    machines = dict.fromkeys(known if options.collect and known else [*known, machine()])
    result = {"machine": "; ".join(machines), **joined(before, *map(collected, options.runs))}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    fill(PAGE, side_by_side(result))
    fill(TABLES, markdown(result))


def compared(out: Path, task: str, methods: Sequence[str], seeds: int, shared: Mapping[str, Any] | None = None) -> None:
    """`shared`: options of all runs, by their names in a config."""
    more: tuple[Any, ...] = ()
    if shared:
        out.mkdir(parents=True, exist_ok=True)
        (out / "shared.yaml").write_text(yaml.safe_dump(dict(shared)), "utf-8")
        more = ("--config", out / "shared.yaml")
    call("compare", "--task", task, "--methods", ",".join(methods), "--seeds", seeds, *more, "--out", out)


def made(out: Path, config: DiscoverConfig) -> bool:
    """Is the run in `out`, made now if need be? Not where another is, or it failed."""
    try:
        ensure_run(out, config)
    except UserError as error:
        left_out(out, str(error))
        return False
    return True


def within(runs: Path, task: str, method: str, seed: int) -> None:
    """What of the heads and MLP blocks that a method keeps can go; and as many leaves of them taken away at random."""
    whole, out = runs / f"{method}-{seed}", runs / f"within-{method}-{seed}"
    if not made(out, make_config({"task": task, "seed": seed, "within": str(whole), "method": "sieve"})):
        return
    outer, inner = load_run(whole), load_run(out)
    if drawn_of(out, outer, inner) is not None:
        return
    loaded = model_of(inner.config)
    problem = problem_of(loaded, task_of(inner.config, loaded.tokenizer), inner)
    circuits = [drawn_within(outer.circuit, inner.circuit, seed=mix(seed, draw, 19)) for draw in range(DRAWS)]
    kls = [float(kl.mean()) for kl in problem.losses(circuits, "test")]
    write_json(out / RANDOM, {"of": [outer.circuit.fingerprint, inner.circuit.fingerprint], "kl": kls})


def drawn_of(place: Path, outer: Run, inner: Run) -> list[float] | None:
    """The KL of each circuit drawn at random, if they were drawn for these two."""
    found = read_json(place / RANDOM) if (place / RANDOM).is_file() else {}
    return found["kl"] if found.get("of") == [outer.circuit.fingerprint, inner.circuit.fingerprint] else None


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


def options_of(name: str) -> DiscoverConfig:
    """Of a variant."""
    return make_config({"task": "ioi", "steps": SHORT, "polish": False, **VARIANTS[name]})


def slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def collected(runs: Path) -> dict[str, Any]:
    tasks, beside, inside = {}, [], []
    for task in TASKS:
        tasks[task] = rows_of(runs / task)
        for method in CONTROLLED:
            for place, run in finished(runs / task, f"{method}-[0-9]"):
                measured = controls_file(place, task=task, split="test", ablation=run.config.ablation)
                kept = read_json(measured) if measured.is_file() else {}
                if kept.get("complete") and kept["circuit"] == run.circuit.fingerprint and kept.get("definition") == DEFINITION:
                    about = {"task": task, "method": method, "seed": run.config.seed, "size": run.metrics["size"]}
                    beside.append({**about, "groups": summary(kept["groups"], nothing=costs_nothing(run))})
        for method in WHOLE:
            for place, run in finished(runs / task, f"within-{method}-[0-9]"):
                outer = load_run(place.parent / place.name.removeprefix("within-"))
                if run.description.get("within", outer.circuit.fingerprint) != outer.circuit.fingerprint:
                    left_out(place, "it was searched within another circuit than is there now")
                    continue
                inside.append(
                    {
                        "task": task,
                        "method": method,
                        "seed": run.config.seed,
                        "outer": brief(outer),
                        "inner": brief(run),
                        "random_kl": drawn_of(place, outer, run),
                    }
                )
    variants = []
    for name in VARIANTS:
        for place, run in finished(runs / "ioi", slug(name)):
            if run.config.to_dict() == options_of(name).to_dict():
                variants.append({"name": name, **brief(run)})
            else:
                left_out(place, "it has other options than the plan by now")
    return {
        "tasks": tasks,
        "settings": {name: {task: rows_of(runs / task / name) for task in setting.tasks} for name, setting in SETTINGS.items()},
        "controls": beside,
        "within": inside,
        "variants": variants,
    }


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """A row for each finished run of a comparison."""
    rows = []
    for method in METHODS:
        for place, run in finished(directory, f"{method}-[0-9]"):
            if (place / CURVE).is_file():
                rows.append({**row(run, read_json(place / CURVE)), "device": device_of(run)})
            else:
                left_out(place, f"it has no {CURVE} yet, which comes once all runs of its comparison are there")
    return rows


def joined(*parts: dict[str, Any]) -> dict[str, Any]:
    """All that was measured; of what was measured twice, what stands in a later part. What an earlier version has polished stays marked so as long
    as it is the same circuit."""

    def rows(found: list[list[dict[str, Any]]], *names: str) -> list[dict[str, Any]]:
        kept: dict[tuple[Any, ...], dict[str, Any]] = {}
        for one in (one for some in found for one in some):
            before = kept.get(key := tuple(one[name] for name in names), {})
            same = "earlier" in before and before["nodes"] == one["nodes"] and before["test"]["kl"] == one["test"]["kl"]
            kept[key] = {**one, "earlier": before["earlier"]} if same else one
        return [kept[key] for key in sorted(kept, key=lambda key: [ORDER.get(part, part) for part in key])]

    def all_of(part: str, nothing: Any = ()) -> list[Any]:
        return [one.get(part, nothing) for one in parts]

    def by_task(parts: list[Any]) -> dict[str, list[dict[str, Any]]]:
        found = {task: rows([some.get(task, []) for some in parts], "method", "seed", "device") for task in TASKS}
        return {task: some for task, some in found.items() if some}

    return {
        "tasks": by_task(all_of("tasks", {})),
        "settings": {name: by_task([some.get(name, {}) for some in all_of("settings", {})]) for name in SETTINGS},
        "controls": rows(all_of("controls"), "task", "method", "seed"),
        "within": rows(all_of("within"), "task", "method", "seed"),
        "variants": rows(all_of("variants"), "name"),
    }


def finished(directory: Path, pattern: str) -> Iterator[tuple[Path, Run]]:
    for place in sorted(directory.glob(pattern)):
        if is_finished(place):
            try:
                yield place, load_run(place)
            except UserError as error:
                left_out(place, str(error))


def left_out(place: Path, why: str) -> None:
    print(f"left out {place}: {why}", file=sys.stderr)


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
        "device": device_of(run),
    }


if __name__ == "__main__":
    main()
