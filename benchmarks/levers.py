"""What each means of saving time or memory is worth alone: a step of step.py with one of them taken away, beside the step with all.

Ratios to the step with all of them (GPT-2 small's shape, 16 x 32 tokens, as in step.py; memory and time in separate fresh processes). `prefix`
is measured on prompts whose second half alone differs; `bfloat16` and `fused Adam` are the reverse, something that the default does not
have here, put in.

    python benchmarks/levers.py         # about 15 minutes on 2 cores
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import machine, provenance, versions
from step import GIVE_BACK, HERE, build, learn, peak, reset_peak, typical

# name -> (mode of step.py that it belongs to, what it does)
LEVERS = {
    "all": ("default", "the default"),
    "gate": ("default", "gates left to autograd, which keeps three tensors each"),
    "activation": ("default", "activation functions as transformers writes them out"),
    "gate noise": ("default", "gradients through the samples of leaves, too"),
    "fused Adam": ("default", "Adam's fused kernel put in"),
    "bfloat16": ("default", "gates learned on a bfloat16 copy of the model"),
    "all, uncached": ("uncached", "the same without room for activations"),
    "lockstep": ("uncached", "corrupted activations recorded whole"),
    "half differs": ("default", "prompts that differ in their second half only"),
    "prefix": ("default", "the same, read from the first position on"),
    "SmolLM2": ("default", "the default, on SmolLM2-135M"),
    "gated product": ("default", "the same, with the product in its MLPs left to autograd"),
}
TURNS = 2  # a time is the shorter of so many, taken in turns: a machine has slow minutes
BASE = {"lockstep": "all, uncached", "prefix": "half differs", "SmolLM2": "SmolLM2", "gated product": "SmolLM2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "levers.json")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    rows: dict[str, dict[str, float]] = {}
    for turn in range(TURNS):
        for name in LEVERS:
            found = rows.setdefault(name, {})
            if turn == 0:
                found["memory"] = in_fresh_process(name, "memory", {**os.environ, **GIVE_BACK})
            found["time"] = min(found.get("time", float("inf")), in_fresh_process(name, "time"))
            print(turn, name, found, flush=True)
    result = {"machine": machine(), "versions": versions(), "measured": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    options.out.with_suffix(".md").write_text(markdown(result), "utf-8")


def in_fresh_process(name: str, what: str, environment: dict[str, str] | None = None) -> float:
    done = subprocess.run([sys.executable, __file__, "--measure", name], check=True, text=True, stdout=subprocess.PIPE, env=environment)
    return float(json.loads(done.stdout.splitlines()[-1])[what])


def measure(name: str) -> dict[str, float]:
    import torch

    model = build("smollm2-135m" if BASE.get(name, name) == "SmolLM2" else "gpt2")
    ids = torch.randint(5, model.config.vocab_size, (2 * 16 * 11, 32), generator=torch.Generator().manual_seed(0))
    if BASE.get(name, name) == "half differs":
        ids[-32:, :16] = ids[:32, :16]
    options: dict[str, Any] = {"bfloat16": {"learning_dtype": "bfloat16"}, "gate noise": {"estimator": "pathwise"}}.get(name, {})
    PATCHES.get(name, lambda: None)()
    before = reset_peak()
    history = learn(model, ids, batch=16, steps=11, mode=LEVERS[name][0], **options)
    return {"time": typical(history), "memory": float(peak() - before)}


def _gates_by_autograd() -> None:
    import torch

    from nodesieve.gating import Gating

    def edit(self: Gating, values: Any, place: str, layer: int, x: Any) -> Any:
        a = values.embedding if place == "embedding" else getattr(values, place)[layer]
        return torch.lerp(a, x, self.at(place, layer))

    Gating.edit = edit  # type: ignore[method-assign]


def _activations_written_out() -> None:
    from nodesieve import in_one

    in_one.IN_ONE.clear()


def _products_by_autograd() -> None:
    from nodesieve import gated_model

    gated_model.is_gated = lambda module: False  # type: ignore[attr-defined]


def _recorded_whole() -> None:
    from nodesieve.ablations import Corrupted
    from nodesieve.gated_model import GatedModel

    own = GatedModel.gated_logits_of_each

    def recorded(self: GatedModel, tokens: Any, each: Any, values: Any, **options: Any) -> Any:
        return own(self, tokens, each, self.record(values.tokens) if isinstance(values, Corrupted) else values, **options)

    GatedModel.gated_logits_of_each = recorded  # type: ignore[method-assign]


def _from_the_first_position() -> None:
    from nodesieve.gated_model import GatedModel

    GatedModel.start = lambda *_: 0  # type: ignore[method-assign]


def _fused_adam() -> None:
    from functools import partial

    import torch

    torch.optim.Adam = partial(torch.optim.Adam, fused=True)  # type: ignore[assignment,misc]


PATCHES: dict[str, Callable[[], None]] = {
    "gate": _gates_by_autograd,
    "activation": _activations_written_out,
    "lockstep": _recorded_whole,
    "prefix": _from_the_first_position,
    "fused Adam": _fused_adam,
    "gated product": _products_by_autograd,
}


def markdown(result: dict[str, Any]) -> str:
    lines = ["| what | time | memory |", "|---|---|---|"]
    rows = result["measured"]
    for name, row in rows.items():
        base = rows[BASE.get(name, "all")]
        lines.append(f"| {name}: {LEVERS[name][1]} | {row['time'] / base['time']:.2f} | {row['memory'] / base['memory']:.2f} |")
    return "\n".join([*lines, "", provenance(result)]) + "\n"


if __name__ == "__main__":
    main()
