"""Circuits of SmolLM2-135M with default settings: the table in docs/results.md.

Runs `nodesieve discover` for each task and seed into --runs (finished runs are kept, unfinished ones resumed), measures the IOI circuits on
prompts of other templates and words (data/ioi_other_words.jsonl, data/ioi_unseen_names.jsonl), and writes results/circuits.json and
results/circuits.md with the machine and the versions, and each run's training curves to docs/curves. Flags after `--` go to `nodesieve discover`.

    python benchmarks/circuits.py                      # everything: some six hours on one core
    python benchmarks/circuits.py --only ioi:0         # one run; rows of the results file that are not in --runs stay
    python benchmarks/circuits.py --at-once 2          # two at a time, each on its share of the cores: sooner done, each run slower
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from machine import machine, provenance

from nodesieve import load_run
from nodesieve.files import read_json, write_json
from nodesieve.metrics import in_percent
from nodesieve.report.plots import training_curves
from nodesieve.run import has_state, is_finished, read_config

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CURVES = HERE.parent / "docs" / "curves"
# task:seed, with :budget where it is not the default
PLAN = (
    *("ioi:0", "ioi:1", "ioi:2"),
    *("greater_than:0", "greater_than:0:0.1", "greater_than:0:0.05"),
    *("gendered_pronoun:0", "gendered_pronoun:0:0.1", "gendered_pronoun:0:0.12"),
)
MAIN_METRIC = {"ioi": "accuracy", "greater_than": "prob_diff", "gendered_pronoun": "logit_diff"}
LEVELS = ("head", "head_dim", "mlp_neuron", "mlp_output")
MACHINE = "machine.txt"  # beside a run
OTHERS = ("other_words", "unseen_names")  # IOI prompts that no run has seen: data/ioi_*.jsonl


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--only", nargs="*", default=PLAN, choices=PLAN, metavar="TASK:SEED[:BUDGET]")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="runs at a time, each on its share of the cores")
    parser.add_argument("--collect", action="store_true", help="run nothing, write the table of what is there")
    parser.add_argument("flags", nargs="*", help="after --: flags of nodesieve discover")
    options = parser.parse_args()
    if not options.collect:
        with ThreadPoolExecutor(options.at_once) as pool:
            list(pool.map(lambda name: discover(name, runs=options.runs, flags=options.flags, at_once=options.at_once), options.only))
    here = [name for name in PLAN if (directory(name, options.runs) / "metrics.json").is_file()]
    known = {entry["name"]: entry for entry in before()}
    rows = known | {name: with_others(row(name, runs=options.runs), known.get(name)) for name in here}
    result = {"runs": [rows[name] for name in PLAN if name in rows]}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "circuits.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    (RESULTS / "circuits.md").write_text(markdown(result), "utf-8")
    fill(HERE.parent / "docs" / "results.md", markdown(result))
    for name in here:
        draw(name, runs=options.runs)
    print(markdown(result))


def before() -> list[dict[str, Any]]:
    """The rows of the results file: runs take hours, and not every machine has them all."""
    file = RESULTS / "circuits.json"
    return list(read_json(file)["runs"]) if file.is_file() else []


def fill(page: Path, table: str) -> None:
    """Put the table between the page's two markers."""
    before, start, rest = page.read_text("utf-8").partition("<!-- circuits -->\n")
    _, end, after = rest.partition("<!-- end -->")
    page.write_text(f"{before}{start}{table}{end}{after}", "utf-8")


def table(headings: list[str], lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings), *("| " + " | ".join(line) + " |" for line in lines)]


def draw(name: str, *, runs: Path) -> None:
    """The training curves of a run, as its report shows them."""
    run = load_run(directory(name, runs))
    CURVES.mkdir(exist_ok=True)
    (CURVES / f"{name.replace(':', '-')}.svg").write_text(training_curves(run.history, run.config.kl_budget), "utf-8")


def directory(name: str, runs: Path) -> Path:
    return runs / f"circuits-{name.replace(':', '-')}"


def discover(name: str, *, runs: Path, flags: list[str], at_once: int) -> None:
    out, threads = directory(name, runs), max(1, (os.cpu_count() or 1) // at_once)
    task, seed, *budget = name.split(":")
    if not is_finished(out):
        own = [part for value in budget for part in ("--kl-budget", value)]
        flags = ["--resume", str(out)] if has_state(out) else ["--task", task, "--seed", seed, "--out", str(out), "--overwrite", *own, *flags]
        call("discover", *flags, threads=threads)
        (out / MACHINE).write_text(machine(threads), "utf-8")
    circuit = load_run(out).circuit.fingerprint
    for other in OTHERS if task == "ioi" else ():
        if on_others(out, other, circuit) is None:
            measured = call("evaluate", out, "--task", HERE / "data" / f"ioi_{other}.jsonl", "--json", threads=threads, capture=True)
            write_json(out / f"{other}.json", {"of": circuit, **json.loads(measured)})


def on_others(out: Path, other: str, circuit: str) -> dict[str, Any] | None:
    """What the circuit does on those prompts, if that was measured of this one."""
    found = read_json(out / f"{other}.json") if (out / f"{other}.json").is_file() else {}
    return found["circuit"]["test"] if found.get("of") == circuit else None


def call(*arguments: Any, threads: int | None = None, capture: bool = False) -> str:
    """`nodesieve` in a process of its own, on as many threads as it takes or is given -> what it printed, where that is captured."""
    print("$ nodesieve", *arguments, flush=True)
    command = [sys.executable, "-P", "-m", "nodesieve", *map(str, arguments)]
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if capture else None, env=environment)
    return done.stdout or ""


def row(name: str, *, runs: Path) -> dict[str, Any]:
    out = directory(name, runs)
    metrics, circuit = (json.loads((out / file).read_text("utf-8")) for file in ("metrics.json", "circuit.json"))
    found = {
        "name": name,
        "task": circuit["task"],
        "seed": circuit["seed"],
        "method": read_config(out).method,
        "metrics": metrics,
        "machine": (out / MACHINE).read_text("utf-8") if (out / MACHINE).is_file() else "unknown machine",
        "versions": circuit["versions"],
        "examples": circuit["examples"]["splits"],
    }
    circuit_of_now = load_run(out).circuit.fingerprint
    measured = {other: on_others(out, other, circuit_of_now) for other in OTHERS}
    return {**found, **{other: metrics for other, metrics in measured.items() if metrics is not None}}


def with_others(entry: dict[str, Any], known: dict[str, Any] | None) -> dict[str, Any]:
    """With what is known of the same circuit on other words, where that was not measured here."""
    same = known is not None and all(known["metrics"][part] == entry["metrics"][part] for part in ("nodes", "circuit"))
    return {**{other: known[other] for other in OTHERS if known is not None and same and other in known}, **entry}


def markdown(result: dict[str, Any]) -> str:
    heads = [
        "task",
        "seed",
        "method",
        "budget",
        "heads",
        "dims",
        "neurons",
        "outputs",
        "size",
        "unpolished",
        "validation KL (upper)",
        "test KL",
        *(f"KL, {other.replace('_', ' ')}" for other in OTHERS),
        "main metric",
        "of full",
        "same top token",
        "faithfulness",
        "steps",
        "s",
        "on",
    ]
    machines = list(dict.fromkeys(entry["machine"] for entry in result["runs"]))
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for entry in result["runs"]:
        metrics, name = entry["metrics"], MAIN_METRIC[entry["task"]]
        own, full = metrics["circuit"]["test"], metrics["full"]["test"]
        cells = [
            entry["task"],
            entry["seed"],
            entry["method"],
            f"{metrics['budget']['kl']:g}",
            *[f"{metrics['nodes'][level]['kept']:,}" for level in LEVELS],
            in_percent(metrics["size"]),
            in_percent(metrics["unpolished"]["size"]) if "unpolished" in metrics else "-",
            validation(metrics),
            f"{own['kl']:.3f}",
            *(f"{entry[other]['kl']:.3f}" if other in entry else "" for other in OTHERS),
            f"{name} {own[name]:.3f}",
            f"{100 * own[name] / full[name]:.0f}%",
            f"{100 * own['exact_match']:.0f}%",
            f"{own['faithfulness']:.2f}",
            metrics["steps"],
            f"{metrics['seconds']:.0f}",
            chr(ord("A") + machines.index(entry["machine"])),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    ran_on = provenance({"versions": [entry["versions"] for entry in result["runs"]]})
    lines += ["", *(f"{chr(ord('A') + number)}: {machine}." for number, machine in enumerate(machines)), ran_on]
    return "\n".join(lines) + "\n"


def validation(metrics: dict[str, Any]) -> str:
    missed = "" if metrics["budget"]["met"] else ", NOT met"
    return f"{metrics['circuit']['validation']['kl']:.3f} ({metrics['budget']['validation_kl_upper']:.3f}{missed})"


if __name__ == "__main__":
    main()
