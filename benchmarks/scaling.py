"""How time and memory of a step grow with sequence length, batch, layers and width, beside plain PyTorch: ratios to the reference of step.py.

Random-weight Llama shapes in float32; one size is changed at a time, the others stay at the base (bold in the table). Every point is measured as in
step.py, each in fresh processes: `reference`, and a step in the default mode and with `--memory low`.

    python benchmarks/scaling.py        # about 12 minutes on 2 cores
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from machine import machine, provenance, versions
from step import HERE, in_fresh_process

BASE = {"length": 64, "batch": 4, "layers": 6, "width": 384}
CHANGED: dict[str, tuple[int, ...]] = {
    "length": (16, 64, 256, 1024),
    "batch": (4, 16, 64),
    "layers": (3, 6, 12),
    "width": (192, 384, 768),
}
MODES = ("reference", "default", "low")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "scaling.json")
    options = parser.parse_args()
    points: list[dict[str, Any]] = []
    measured: dict[str, Any] = {}
    for name, sizes in CHANGED.items():
        for size in sizes:
            shape = {**BASE, name: size}
            key = json.dumps(shape)
            measured[key] = measured.get(key) or measure(shape, options.steps)
            points.append({"changed": name, **shape, "measured": measured[key]})
            print(name, size, {mode: {what: round(value, 2) for what, value in row.items()} for mode, row in ratios(points[-1]).items()}, flush=True)
    result = {"machine": machine(), "versions": versions(), "points": points}
    options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    options.out.with_suffix(".md").write_text(markdown(result), "utf-8")


def measure(shape: dict[str, int], steps: int) -> dict[str, dict[str, float]]:
    width = shape["width"]
    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "vocab_size": 32000,
        "max_position_embeddings": 1024,
    }
    model = "llama:" + ",".join(f"{name}={size}" for name, size in sizes.items())
    return {mode: in_fresh_process(model, mode, batch=shape["batch"], length=shape["length"], steps=steps) for mode in MODES}


def ratios(point: dict[str, Any]) -> dict[str, dict[str, float]]:
    rows = point["measured"]
    return {mode: {what: rows[mode][what] / rows["reference"][what] for what in ("time", "memory")} for mode in MODES[1:]}


def markdown(result: dict[str, Any]) -> str:
    head = "| changed | size | reference, s | GB | time, default | low | memory, default | low |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for point in result["points"]:
        name, rows, times = point["changed"], point["measured"], ratios(point)
        size = f"**{point[name]}**" if point[name] == BASE[name] else str(point[name])
        cells = [f"{times[mode][what]:.2f}" for what in ("time", "memory") for mode in MODES[1:]]
        lines.append(f"| {name} | {size} | {rows['reference']['time']:.2f} | {rows['reference']['memory'] / 1e9:.2f} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", provenance(result)]) + "\n"


if __name__ == "__main__":
    main()
