"""Methods side by side on one model and task: the smallest circuit of each within the budget, and how good its scores are as a ranking.

Each method and seed is a run in DIR/METHOD-SEED, in a process of its own, through the same selection (and polishing, where asked for); what is
there is not made again. `size_curve.json` beside it says how circuits of ten sizes cut from its scores do. `compare.json` holds a row for each run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nodesieve.config import DiscoverConfig
from nodesieve.errors import UserError
from nodesieve.evaluation import problem_of
from nodesieve.files import read_json, write_json
from nodesieve.method_rows import MethodName
from nodesieve.models import LoadedModel, model_of
from nodesieve.problem import refuse_lacking
from nodesieve.run import CURVE, Run, load_run, weights_of
from nodesieve.size_curve import size_curve
from nodesieve.spawn import ensure_run, refuse_changed_inputs, refuse_other_weights
from nodesieve.tasks import BUILTINS
from nodesieve.tasks.load import refuse_no_task, task_of
from nodesieve.tasks.readers import read_task

COMPARISON = "compare.json"


def compare(
    config: DiscoverConfig,
    directory: Path,
    *,
    methods: Sequence[MethodName],
    seeds: Sequence[int],
    quiet: bool = False,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Make or read every run, write `compare.json` and return what it holds: `rows`, one a method and seed.

    Args:
        config: options that all runs share, but method and seed.
        say: told what begins.

    Raises:
        UserError, KeyboardInterrupt: as `ensure_run` and `refuse_changed_inputs`; runs that are done stay, and so does the comparison of an
            earlier call.
    """
    plan = [config.with_method(method, seed=seed) for seed in seeds for method in methods]  # all of them first: what does not fit is said at once
    if len({one.size for one in plan}) > 1:  # controller target_size, of which some methods take no notice
        raise UserError("expected options that ask every method for the same, got a target size, which learned gates alone steer to; use keep")
    if set(config.levels) == {"embedding"}:
        raise UserError("expected levels other than the embedding, which alone makes no ranking to compare")
    _refuse_lacking(plan)
    places = [directory / f"{one.method}-{one.seed}" for one in plan]
    refuse_changed_inputs(places, config, trust_remote_code=trust_remote_code)
    about = {"model": config.model, "task": config.task, "ablation": config.ablation, "budget": config.kl_budget, "asked": plan[0].size}
    for number, (one, place) in enumerate(zip(plan, places, strict=True), 1):
        say(f"{one.method}, seed {one.seed}: {number} of {len(plan)}")
        ensure_run(place, one, quiet=quiet, trust_remote_code=trust_remote_code)
    loaded: LoadedModel | None = None  # not before the last run is made, which needs the memory
    rows: list[dict[str, Any]] = []
    for place in places:
        run = load_run(place)
        curve = read_json(place / CURVE) if (place / CURVE).is_file() else {}
        if curve.get("scores") != run.scores.fingerprint:
            say(f"{run.config.method}, seed {run.config.seed}: circuits of ten sizes")
            loaded = loaded or model_of(config, trust_remote_code=trust_remote_code)
            refuse_other_weights(loaded, weights_of(run.description), of=place)
            curve = curve_of(loaded, run)
            write_json(place / CURVE, curve)
        rows.append(row(run, curve))
    write_json(directory / COMPARISON, {**about, "rows": rows})
    return {**about, "rows": rows}


def _refuse_lacking(plan: Sequence[DiscoverConfig]) -> None:
    """`refuse_lacking` for every method, as far as a file tells before it is read as tokens: before the first run, not after some."""
    config = plan[0]
    refuse_no_task(config.task)
    if config.task in BUILTINS:
        return
    task = read_task(config.task, seed=config.seed_of_data)
    for one in plan:
        refuse_lacking(task.splits.get("train", ()), one)


def curve_of(loaded: LoadedModel, run: Run) -> dict[str, Any]:
    """The size curve of a run's scores on its own test data, and what scores these were."""
    config = run.config
    curve = size_curve(problem_of(loaded, task_of(config, loaded.tokenizer), run), run.scores, budget=config.kl_budget)
    return {"scores": run.scores.fingerprint, **curve}


def row(run: Run, curve: Mapping[str, Any]) -> dict[str, Any]:
    metrics = run.metrics
    return {
        "method": run.config.method,
        "seed": run.config.seed,
        "met": metrics["budget"]["met"],
        "budget": metrics["budget"]["kl"],
        "size": metrics["size"],
        "unpolished": metrics.get("unpolished", {}).get("size"),
        "polish_seconds": metrics.get("unpolished", {}).get("seconds"),
        "nodes": metrics["nodes"],
        "parameters": metrics["parameters"],
        "validation_kl_upper": metrics["budget"]["validation_kl_upper"],
        "test": metrics["circuit"]["test"],
        "intervals": metrics["intervals"]["test"],
        "full": metrics["full"]["test"],
        "seconds": metrics["seconds"],
        "peak_memory_bytes": metrics["peak_memory_bytes"],
        "device": metrics.get("device"),
        "versions": run.description["versions"],
        "passes": metrics["passes"],
        "curve": dict(curve),
    }
