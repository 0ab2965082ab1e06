"""What a step of learning costs beside plain PyTorch: peak memory above the loaded model, and time, each in a fresh process.

- `forward`: the model without gradients, logits at the answer position only;
- `reference`: the frozen model forward and backward to the embeddings, logits at the answer position only. Everything else is a ratio to it;
- `default`: a step of `discover --method multigranular` with all default levels, early in a run, on examples that have come up before: gated model
  forward and backward, every fourth step the binary circuit, Adam. Corrupted activations and the full model's answers come from the cache;
- `uncached`: the same with room for the answers only: the corrupted prompts advance layer by layer beside the gated model;
- `fresh`: on examples that never come up again: the full model's answers are computed too;
- `low`: `default` with `--memory low`;
- `run`: `default` at six points of a recorded run, with as many heads and neurons dropped in each layer as there, and the share of its steps
  that fill the cache counted in.

All in float32 with random tokens. Time is the median of --steps steps after two that do not count (the two fill the cache), a quarter of it the
median of the steps that measure the binary circuit. Memory is the
high-water mark of the resident set, which Linux lets a process reset, in another process whose allocator gives freed memory back at once:
otherwise what one mode happens to keep for later is larger than the differences between modes. The cache is a file, read and written
piecemeal; its size is given beside.

    python benchmarks/step.py                                      # GPT-2 small's shape, and SmolLM2-135M
    python benchmarks/step.py --quick --out step.json              # GPT-2 small's shape alone
    python benchmarks/step.py --config llama:hidden_size=512,num_hidden_layers=8
    python benchmarks/step.py --record runs/learned                # the run of `--method multigranular` that `run` replays
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

import yaml
from machine import machine, provenance, versions

from nodesieve.journal import Journal, State

HERE = Path(__file__).parent
MODES = ("forward", "reference", "default", "uncached", "fresh", "low", "run")
RECORDED = HERE / "data" / "ioi_live.json"
POINTS = 6
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
    parser.add_argument("--record", type=Path, metavar="RUN", help="keep how many heads and neurons were left in a run, for `run` to replay")
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.record:
        record(options.record)
        return
    if options.measure:
        print(json.dumps(measure(*options.measure, batch=options.batch, length=options.length, steps=options.steps)))
        return
    models = (options.config,) if options.config else MODELS[:1] if options.quick else MODELS
    steps = 8 if options.quick else options.steps
    result: dict[str, Any] = {"machine": machine(), "versions": versions(), "batch": options.batch, "length": options.length, "models": {}}
    for model in models:
        rows = {mode: in_fresh_process(model, mode, batch=options.batch, length=options.length, steps=steps) for mode in MODES}
        reference = rows["reference"]
        ratios = {f"{what}_{mode}": row[what] / reference[what] for mode, row in rows.items() for what in ("time", "memory") if what in row}
        ratios["time_run_average"] = ratios.pop("time_run")
        result["models"][model] = {"measured": rows, "ratios": ratios}
        print(model, {name: round(value, 2) for name, value in ratios.items()}, flush=True)
    result["ratios"] = result["models"][models[0]]["ratios"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    options.out.with_suffix(".md").write_text(markdown(result), "utf-8")


def record(run: Path) -> None:
    """Shares of heads and neurons left in each layer in the middle of each sixth of a run."""
    history = [json.loads(line) for line in (run / "history.jsonl").read_text("utf-8").splitlines()]
    rows = [history[round((point + 0.5) / POINTS * len(history))] for point in range(POINTS)]
    whole = {level: max(counts) for level, counts in history[0]["live"].items()}
    points = [{"step": row["step"], **{level: [n / whole[level] for n in counts] for level, counts in row["live"].items()}} for row in rows]
    config = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    kept = {name: config[name] for name in ("model", "task", "seed", "steps", "batch_size", "train_size", "drop_below")}
    RECORDED.write_text(json.dumps({"config": kept, "points": points}) + "\n", "utf-8")


def in_fresh_process(model: str, mode: str, **sizes: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, environment in (("memory", {**os.environ, **GIVE_BACK}), ("time", None)):
        if (mode, name) == ("run", "memory"):
            continue
        few = {"steps": min(4, sizes["steps"])} if name == "memory" else {}  # the peak is there from the first steps on
        flags = [part for option, value in {**sizes, **few}.items() for part in (f"--{option}", str(value))]
        command = [sys.executable, __file__, "--measure", model, mode, *flags]
        done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, env=environment)
        found |= {key: value for key, value in json.loads(done.stdout.splitlines()[-1]).items() if key not in ("memory", "time") or key == name}
    return found


def measure(model_name: str, mode: str, *, batch: int, length: int, steps: int) -> dict[str, float]:
    import torch

    model = build(model_name)
    steps += 2  # the first two do not count
    ids = torch.randint(5, model.config.get_text_config().vocab_size, (2 * batch * steps, length), generator=torch.Generator().manual_seed(0))
    before = reset_peak()
    found: dict[str, float] = {}
    if mode in MODES[:2]:
        time_of_step = statistics.median(plain(model, ids, batch=batch, steps=steps, backward=mode == "reference")[2:])
    elif mode == "run":
        recorded = json.loads(RECORDED.read_text("utf-8"))
        histories = [learn(model, ids, batch=batch, steps=steps, mode=mode, live=point) for point in recorded["points"]]
        of_points = [typical(history) for history in histories]
        found |= {f"time_at_{point['step']}": took for point, took in zip(recorded["points"], of_points, strict=True)}
        filling = min(seconds_by_step(histories[0])[:2]) - of_points[0]
        config = recorded["config"]
        found["share_of_steps_that_fill"] = config["train_size"] / (config["steps"] * config["batch_size"])
        time_of_step = statistics.mean(of_points) + found["share_of_steps_that_fill"] * filling
    else:
        history = learn(model, ids, batch=batch, steps=steps, mode=mode)
        time_of_step = typical(history)
        found["cache_bytes"] = history[-1]["cache_bytes"]
    return {"time": time_of_step, "memory": float(peak() - before), **found}


def build(name: str) -> Any:
    """A model in evaluation mode with frozen weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from nodesieve.models import load_model
    from nodesieve.weights import PACKAGED_MODELS

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


def learn(model: Any, ids: Any, *, batch: int, steps: int, mode: str, live: dict[str, Any] | None = None, **others: Any) -> list[dict[str, Any]]:
    """The history of a run of `steps` steps, after which it would look at validation data; `live`: shares of nodes that are not dropped, by layer."""
    import torch

    from nodesieve.batches import EncodedExample, Split
    from nodesieve.config import make_config
    from nodesieve.gated_model import GatedModel
    from nodesieve.levels import LEVELS
    from nodesieve.methods.multigranular import multigranular
    from nodesieve.problem import Problem
    from nodesieve.tasks.encode import EncodedTask

    half = len(ids) // 2 if mode == "fresh" else 2 * batch  # two batches, filled in the two steps that do not count
    pairs = zip(ids[:half].tolist(), ids[-half:].tolist(), strict=True)
    examples = tuple(
        EncodedExample(clean=tuple(clean), corrupted=tuple(corrupted), answers=(1,), distractors=(2,), prompt=i)
        for i, (clean, corrupted) in enumerate(pairs)
    )
    splits = {
        "train": Split(examples=examples, pad_id=0, device=torch.device("cpu")),
        "validation": Split(examples=examples[:2], pad_id=0, device=torch.device("cpu")),
    }
    task = EncodedTask(name="random", splits=splits, metrics=(), skipped={}, shown=(), left_out={})
    options = {"steps": steps, "batch_size": batch, "validate_every": steps, "warmup_steps": 0, "repair_share": 0, "learning_dtype": "float32"}
    options["memory"] = "low" if mode == "low" else "default"
    options["cache_limit"] = 1.01 * half * model.config.vocab_size * 4 / 1e9 if mode == "uncached" else 100.0
    even_start = {"log_alpha_spread": dict.fromkeys(LEVELS, 0.0)}  # no pass for Fisher information: a step is what is measured
    config = make_config({**options, **even_start, **others})
    gated = GatedModel(model)
    journal = Beginning(None if live is None else partly_dropped(config, gated.nodes, live))
    multigranular(Problem(gated, task, ablation="counterfactual"), config, journal)
    return journal.history


class Beginning(Journal):
    """A run that begins in a given state."""

    def __init__(self, state: State | None) -> None:
        super().__init__()
        self._state = state

    def load(self, *, part: str = "") -> State | None:
        return self._state


def partly_dropped(config: Any, nodes: Any, live: dict[str, Any]) -> State:
    """The state at step 0, but for nodes dropped at random: in each layer the share that the layer at the same relative depth had dropped."""
    import torch

    from nodesieve.controllers import CONTROLLERS
    from nodesieve.methods.adam import MOMENTS
    from nodesieve.methods.multigranular import CLAMP

    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for level in config.levels:
        dropped = torch.zeros(nodes.shape(level), dtype=torch.bool)
        if level in live:
            for layer, row in enumerate(dropped):
                share = live[level][round(layer * (len(live[level]) - 1) / max(1, nodes.layers - 1))]
                row[torch.randperm(len(row), generator=generator)[round(share * len(row)) :]] = True
        log_alpha = torch.full(nodes.shape(level), config.log_alpha_init[level]).masked_fill(dropped, -CLAMP)
        tensors |= {
            f"log_alpha.{level}": log_alpha,
            f"dropped.{level}": dropped,
            **{f"{name}.{level}": torch.zeros_like(log_alpha) for name in MOMENTS},
        }
    controller = CONTROLLERS[config.controller](config, nodes).state()
    return State(
        tensors=tensors, numbers={"step": 0, "seconds": 0.0, "best_size": 1.0, "controller": controller, "passes": {"forward": 0, "backward": 0}}
    )


def seconds_by_step(history: list[dict[str, Any]]) -> list[float]:
    """Without the last step, which looks at validation data."""
    seconds = [row["seconds"] for row in history[:-1]]
    return [seconds[0], *(after - before for before, after in itertools.pairwise(seconds))]


def typical(history: list[dict[str, Any]]) -> float:
    """Seconds of a step: the median of those that measure the binary circuit and of those that do not, weighed by how often each comes."""
    from nodesieve.controllers import OBSERVE_EVERY

    took = list(zip(seconds_by_step(history), history, strict=False))[2:]
    observing, others = ([seconds for seconds, row in took if ("kl_binary" in row) == wanted] for wanted in (True, False))
    return statistics.median(observing) / OBSERVE_EVERY + statistics.median(others) * (1 - 1 / OBSERVE_EVERY)


def reset_peak() -> int:
    """Set the high-water mark to what is resident now -> bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def markdown(result: dict[str, Any]) -> str:
    lines = ["| model | what | time, s | x reference | memory, GB | x reference | cache, GB |", "|---|---|---|---|---|---|---|"]
    for model, entry in result["models"].items():
        for mode, row in entry["measured"].items():
            ratios = entry["ratios"] | {"time_run": entry["ratios"]["time_run_average"]}
            times = f"{row['time']:.2f} | {ratios[f'time_{mode}']:.2f}"
            memory = f"{row['memory'] / 1e9:.2f} | {ratios[f'memory_{mode}']:.2f}" if "memory" in row else " | "
            cache = f"{row['cache_bytes'] / 1e9:.2f}" if row.get("cache_bytes") else ""
            lines.append(f"| {model} | {mode} | {times} | {memory} | {cache} |")
    return "\n".join([*lines, "", f"Batch {result['batch']} x {result['length']} tokens. {provenance(result)}"]) + "\n"


if __name__ == "__main__":
    main()
