"""Would another run have found the same circuit? `nodesieve stability` on the real model: docs/evidence.md is filled from here.

One run of the default search, further ones with other seeds on resampled training data, and what they agree on.

    python benchmarks/stability.py               # subject_verb_agreement and two further runs: an hour on one core
    python benchmarks/stability.py --run DIR     # of a run that is there
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from circuits import call, fill, table
from machine import machine, provenance, versions

from nodesieve.files import read_json
from nodesieve.metrics import in_percent
from nodesieve.run import STABILITY, Run, is_finished, load_run

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "stability.json", HERE.parent / "docs" / "evidence.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/stability"))
    parser.add_argument("--task", default="subject_verb_agreement")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    if not is_finished(options.run):
        call("discover", "--task", options.task, "--out", options.run)
    call("stability", options.run, "--seeds", options.seeds)
    result = {"machine": machine(), "versions": versions(), **measured(options.run)}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    fill(PAGE, markdown(result))


def measured(directory: Path) -> dict[str, Any]:
    """What `stability` found of the run the last time, beside what each of its runs has."""
    found = read_json(directory / STABILITY)
    again = sorted((directory / "stability").glob("seed-*"), key=lambda place: int(place.name.removeprefix("seed-")))
    runs = [load_run(directory), *map(load_run, again[: found["runs"] - 1])]  # there may be more, of an earlier call
    first = runs[0].config
    return {"task": first.task, "method": first.method, "circuits": [brief(run) for run in runs], **found}


def brief(run: Run) -> dict[str, Any]:
    return {
        "seed": run.config.seed,
        "resampled": run.config.bootstrap,
        "size": run.metrics["size"],
        "met": run.metrics["budget"]["met"],
        "nodes": {level: part["kept"] for level, part in run.metrics["nodes"].items()},
        "test": run.metrics["circuit"]["test"],
    }


def markdown(result: dict[str, Any]) -> str:
    rows, consensus = result["circuits"], result["consensus"]
    shown = [(f"seed {row['seed']}{', resampled' if row['resampled'] else ''}", row) for row in rows]
    shown.append((f"kept by {consensus['at_least']} of {result['runs']} runs", {**consensus, "test": consensus["circuit"]["test"]}))
    lines = []
    for name, row in shown:
        nodes, test = row["nodes"], row["test"]
        counts = [f"{nodes[level]:,}" for level in ("head", "mlp_block", "head_dim", "mlp_neuron", "mlp_output")]
        lines.append([name, *counts, in_percent(row["size"]), f"{test['kl']:.3f}", in_percent(test["exact_match"]), f"{test['faithfulness']:.2f}"])
    indices = [
        [level, *(f"{row[name]:.2f}" for name in ("jaccard", "lowest", "highest", "chance"))]
        for level, row in result["levels"].items()
        if level != "embedding"
    ]
    parts = table(["circuit", "heads", "MLPs", "dims", "neurons", "outputs", "size", "test KL", "same top token", "faithfulness"], lines)
    parts += ["", *table(["level", "Jaccard index, mean of all pairs", "lowest", "highest", "by chance"], indices)]
    return "\n".join([*parts, "", f"`{result['task']}`, method `{result['method']}`. {provenance(result)}"]) + "\n"


if __name__ == "__main__":
    main()
