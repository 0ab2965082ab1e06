"""What each ingredient of learned gates is worth: size against validation KL on the way, with one ingredient changed at a time.

Every variant runs `nodesieve discover` on IOI with constant lambdas (`--controller fixed`), so that nothing steers it, and is looked at every
25 steps. Finished runs in --runs are kept. Writes results/what_mattered.json and docs/curves/what-mattered.svg. Flags after `--` go to every run.

    python benchmarks/what_mattered.py -- --dtype bfloat16      # about 25 minutes on 2 cores
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from circuits import CURVES, HERE, call
from machine import machine, versions
from matplotlib.figure import Figure

COMMON = (
    "--task",
    "ioi",
    "--method",
    "multigranular",
    "--controller",
    "fixed",
    "--lambda-init",
    "1.3",
    "--steps",
    "150",
    "--validate-every",
    "25",
    "--repair-share",
    "0",
    "--keep",
    "0.5",
    "--penalties",  # the default's when this was first run
    "head_dim=1.5,mlp_neuron=1.5,mlp_output=1",
)
VARIANTS: dict[str, tuple[str, ...]] = {
    "default": (),
    "even start": ("--log-alpha-spread", "head=0,head_dim=0,mlp_neuron=0,mlp_output=0"),
    "pathwise": ("--estimator", "pathwise"),
    "straight through everywhere": ("--estimator", "straight_through"),
    "one gate sample a batch": ("--gate-samples", "batch"),
    "512 prompts, no further ones": ("--redraws", "0"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seed", default="0")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("flags", nargs="*", help="after --: flags of nodesieve discover")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name, flags in VARIANTS.items():
        out = options.runs / f"what-mattered-{name.replace(' ', '-').replace(',', '')}-{options.seed}"
        if not (out / "metrics.json").is_file():
            call("discover", *COMMON, "--seed", options.seed, "--out", out, "--overwrite", *flags, *options.flags, threads=options.threads)
        rows = [json.loads(line) for line in (out / "history.jsonl").read_text("utf-8").splitlines()]
        looks = [{"step": row["step"], "open": row["open"], **row["validation"]} for row in rows if "validation" in row]
        found[name] = {"flags": [*COMMON, *flags, *options.flags], "looks": looks}
    result = {"machine": machine(), "versions": versions(), "seed": int(options.seed), "variants": found}
    (HERE / "results" / "what_mattered.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    draw(found, CURVES / "what-mattered.svg")


def draw(found: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, variant in found.items():
        axes.plot([100 * look["size"] for look in variant["looks"]], [look["kl"] for look in variant["looks"]], "o-", markersize=3, label=name)
    axes.axhline(0.25, color="#b8c2cc", linestyle="--")
    axes.set(xlabel="head dimensions and neurons kept, %", ylabel="validation KL, nats", ylim=(0, 0.6))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
