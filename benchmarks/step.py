"""What a step of learning costs beside plain PyTorch: peak memory above the loaded model, and time, each in a fresh process.

- `forward`: the model without gradients, logits at the answer position only;
- `reference`: the frozen model forward and backward to the embeddings, logits at the answer position only. Everything else is a ratio to it;
- `step`: a step of `discover --method multigranular` with all default levels on prompts that never repeat: full model, corrupted prompts, gated
  model forward and backward, every other step the binary circuit, Adam;
- `step-low`: the same with `--memory low`.

All in float32 with random tokens. Time is the median of --steps steps after two that do not count. Memory is the high-water mark of the
resident set, which Linux lets a process reset, in another process whose allocator gives freed memory back at once: otherwise what one mode
happens to keep for later is larger than the differences between modes.

    python benchmarks/step.py                                      # GPT-2 small's shape, and SmolLM2-135M
    python benchmarks/step.py --quick --out step.json              # GPT-2 small's shape alone
    python benchmarks/step.py --config llama:hidden_size=512,num_hidden_layers=8
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import machine, versions

HERE = Path(__file__).parent
MODES = ("forward", "reference", "default", "uncached", "fresh", "low")
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MODELS = ("gpt2", "smollm2-135m")  # gpt2: random weights in GPT-2 small's shape, which is the config's default


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="GPT-2 small's shape alone, fewer steps")
    parser.add_argument("--config", help="TYPE or TYPE:OPTION=NUMBER,...: a model of this config with random weights, instead")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "step.json")
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure, batch=options.batch, length=options.length, steps=options.steps)))
        return
    models = (options.config,) if options.config else MODELS[:1] if options.quick else MODELS
    steps = 6 if options.quick else options.steps
    result: dict[str, Any] = {"machine": machine(), "versions": versions(), "batch": options.batch, "length": options.length, "models": {}}
    for model in models:
        rows = {mode: in_fresh_process(model, mode, batch=options.batch, length=options.length, steps=steps) for mode in MODES}
        reference = rows["reference"]
        ratios = {f"{what}_{mode}": rows[mode][what] / reference[what] for mode in MODES for what in ("time", "memory")}
        result["models"][model] = {"measured": rows, "ratios": ratios}
        print(model, {name: round(value, 2) for name, value in ratios.items()}, flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    options.out.with_suffix(".md").write_text(markdown(result), "utf-8")


def in_fresh_process(model: str, mode: str, **sizes: int) -> dict[str, float]:
    flags = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, __file__, "--measure", model, mode, *flags]
    found: dict[str, float] = {}
    for name, environment in (("memory", {**os.environ, **GIVE_BACK}), ("time", None)):
        done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, env=environment)
        found[name] = json.loads(done.stdout.splitlines()[-1])[name]
    return found


def measure(model_name: str, mode: str, *, batch: int, length: int, steps: int) -> dict[str, float]:
    import torch

    model = build(model_name)
    ids = torch.randint(5, model.config.get_text_config().vocab_size, (2 * batch * (steps + 2), length), generator=torch.Generator().manual_seed(0))
    before = reset_peak()
    sizes = {"batch": batch, "steps": steps + 2}
    took = plain(model, ids, **sizes, backward=mode == "reference") if mode in MODES[:2] else learn(model, ids, **sizes, mode=mode)
    return {"time": statistics.median(took[2:]), "memory": float(peak() - before)}


def build(name: str) -> Any:
    """A model in evaluation mode with frozen weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from nodesieve.models import PACKAGED_MODELS, load_model

    if name in PACKAGED_MODELS:
        return load_model(name).model
    kind, _, given = name.partition(":")
    config = AutoConfig.for_model(kind, **{key: int(value) for key, value in (pair.split("=") for pair in given.split(",") if pair)})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def plain(model: Any, ids: Any, *, batch: int, steps: int, backward: bool) -> list[float]:
    import torch

    took = []
    for step in range(steps):
        began = time.perf_counter()
        embedded = model.get_input_embeddings()(ids[step * batch : (step + 1) * batch]).requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            logits = model(inputs_embeds=embedded, logits_to_keep=1, use_cache=False).logits[:, -1]
            if backward:
                logits.log_softmax(-1)[:, 0].sum().backward()
        took.append(time.perf_counter() - began)
    return took


def learn(model: Any, ids: Any, *, batch: int, steps: int, mode: str) -> list[float]:
    import torch

    from nodesieve.batches import EncodedExample, Split
    from nodesieve.config import make_config
    from nodesieve.gated_model import GatedModel
    from nodesieve.journal import Journal
    from nodesieve.levels import LEVELS
    from nodesieve.methods.multigranular import multigranular
    from nodesieve.problem import Problem
    from nodesieve.tasks.encode import EncodedTask

    half = len(ids) // 2 if mode == "fresh" else 2 * batch  # two batches, filled in the two steps that do not count
    pairs = zip(ids[:half].tolist(), ids[-half:].tolist(), strict=True)
    examples = tuple(EncodedExample(clean=tuple(clean), corrupted=tuple(corrupted), answers=(1,), distractors=(2,)) for clean, corrupted in pairs)
    splits = {
        "train": Split(examples=examples, pad_id=0, device=torch.device("cpu")),
        "validation": Split(examples=examples[:2], pad_id=0, device=torch.device("cpu")),
    }
    task = EncodedTask(name="random", splits=splits, metrics=(), skipped={}, shown=(), left_out={})
    options = {"steps": steps, "batch_size": batch, "validate_every": steps, "warmup_steps": 0, "repair_share": 0, "learning_dtype": "float32"}
    options["memory"] = "low" if mode == "low" else "default"
    options["cache_limit"] = 1.01 * half * model.config.vocab_size * 4 / 1e9 if mode == "uncached" else 100.0
    journal = Journal()
    even_start = {"log_alpha_spread": dict.fromkeys(LEVELS, 0.0)}  # no pass for Fisher information: a step is what is measured
    multigranular(Problem(GatedModel(model), task, ablation="counterfactual"), make_config({**options, **even_start}), journal)
    seconds = [row["seconds"] for row in journal.history[:-1]]  # the last step looks at validation data
    return [seconds[0], *(after - before for before, after in itertools.pairwise(seconds))]


def reset_peak() -> int:
    """Set the high-water mark to what is resident now -> bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def markdown(result: dict[str, Any]) -> str:
    lines = ["| model | what | time, s | x reference | memory, GB | x reference |", "|---|---|---|---|---|---|"]
    for model, entry in result["models"].items():
        for mode, row in entry["measured"].items():
            time_ratio, memory_ratio = entry["ratios"][f"time_{mode}"], entry["ratios"][f"memory_{mode}"]
            lines.append(f"| {model} | {mode} | {row['time']:.2f} | {time_ratio:.2f} | {row['memory'] / 1e9:.2f} | {memory_ratio:.2f} |")
    shown = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return "\n".join([*lines, "", f"Batch {result['batch']} x {result['length']} tokens. Machine: {result['machine']}. Versions: {shown}."]) + "\n"


if __name__ == "__main__":
    main()
