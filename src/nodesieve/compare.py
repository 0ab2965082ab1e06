"""Methods side by side on one model and task: the smallest circuit of each within the budget, and how good its scores are as a ranking.

Each method and seed is a run in DIR/METHOD-SEED, in a process of its own, through the same selection (and polishing, where asked for); what is
there is not made again. `size_curve.json` beside it says how circuits of ten sizes cut from its scores do. `compare.json` holds a row for each run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from nodesieve.config import DiscoverConfig, MethodName
from nodesieve.errors import UserError
from nodesieve.evaluation import problem_of
from nodesieve.metrics import in_percent
from nodesieve.models import LoadedModel, model_of
from nodesieve.run import Run, load_run, read_json, weights_of, write_json
from nodesieve.size_curve import size_curve
from nodesieve.spawn import ensure_run, refuse_changed_weights, refuse_other_weights
from nodesieve.tasks.load import task_of

COMPARISON, CURVE = "compare.json", "size_curve.json"


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
        UserError, KeyboardInterrupt: as `ensure_run` and `refuse_changed_weights`; runs that are done stay, and so does the comparison of an
            earlier call.
    """
    plan = [config.with_method(method, seed=seed) for seed in seeds for method in methods]  # all of them first: what does not fit is said at once
    if len({one.size for one in plan}) > 1:  # controller target_size, of which some methods take no notice
        raise UserError("expected options that ask every method for the same, got a target size, which learned gates alone steer to; use keep")
    places = [directory / f"{one.method}-{one.seed}" for one in plan]
    refuse_changed_weights(places, config, trust_remote_code=trust_remote_code)
    about = {"model": config.model, "task": config.task, "ablation": config.ablation, "budget": config.kl_budget}
    loaded: LoadedModel | None = None
    rows: list[dict[str, Any]] = []
    for one, place in zip(plan, places, strict=True):
        say(f"{one.method}, seed {one.seed}: {len(rows) + 1} of {len(plan)}")
        ensure_run(place, one, quiet=quiet, trust_remote_code=trust_remote_code)
        run = load_run(place)
        curve = read_json(place / CURVE) if (place / CURVE).is_file() else {}
        if curve.get("scores") != run.scores.fingerprint:
            loaded = loaded or model_of(config, trust_remote_code=trust_remote_code)
            refuse_other_weights(loaded, weights_of(run.description), of=place)
            curve = curve_of(loaded, run)
            write_json(place / CURVE, curve)
        rows.append(row(run, curve))
    write_json(directory / COMPARISON, {**about, "rows": rows})
    return {**about, "rows": rows}


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


def means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line a method: means over seeds of what the table shows; `runs` and `met` say how many there are and how many met the budget."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        line: dict[str, Any] = {"method": method, "runs": len(own), "met": sum(row["met"] for row in own)}
        line |= {level: mean(row["nodes"][level]["kept"] for row in own) for level in own[0]["nodes"]}
        line |= {"size": mean(row["size"] for row in own), "kl": mean(row["test"]["kl"] for row in own)}
        for name in ("unpolished", "polish_seconds", "seconds", "peak_memory_bytes"):
            line[name] = _mean_of_known(row[name] for row in own)
        for name in ("exact_match", "faithfulness"):
            line[name] = _mean_of_known(row["test"][name] for row in own)
        line["parameters"] = mean(row["parameters"]["kept"] / row["parameters"]["total"] for row in own)
        for unit in ("parts", "leaves"):
            for area in ("cpr", "cmd", "compactness"):
                values = [row["curve"][unit][area] for row in own]
                line[f"{unit}_{area}"] = None if None in values else mean(values)
        line["leaves_kl"] = {
            point["share"]: mean(row["curve"]["leaves"]["points"][place]["kl"] for row in own)
            for place, point in enumerate(own[0]["curve"]["leaves"]["points"])
        }
        line |= {f"{way}_passes": _mean_of_known(row["passes"] and row["passes"][way] for row in own) for way in ("forward", "backward")}
        lines.append(line)
    return lines


def _mean_of_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


# title -> heading -> the cell, from a line of `means`
TABLES: dict[str, dict[str, Callable[[Mapping[str, Any]], str]]] = {
    "smallest circuit": {
        "method": lambda line: line["method"],
        "within budget": lambda line: f"{line['met']} of {line['runs']}",
        "heads": lambda line: f"{line['head']:,.0f}",
        "MLPs": lambda line: f"{line['mlp_block']:,.0f}",
        "dims": lambda line: f"{line['head_dim']:,.0f}",
        "neurons": lambda line: f"{line.get('mlp_neuron', 0) + line.get('expert', 0):,.0f}",
        "outputs": lambda line: f"{line['mlp_output']:,.0f}",
        "size": lambda line: in_percent(line["size"]),
        "unpolished": lambda line: "-" if line["unpolished"] is None else in_percent(line["unpolished"]),
        "parameters": lambda line: in_percent(line["parameters"]),
        "test KL": lambda line: f"{line['kl']:.3f}",
        "same top token": lambda line: in_percent(line["exact_match"]),
        "faithfulness": lambda line: "-" if line["faithfulness"] is None else f"{line['faithfulness']:.2f}",
        "s": lambda line: " + ".join(f"{line[part]:,.0f}" for part in ("seconds", "polish_seconds") if line[part] is not None) or "-",
        "GB": lambda line: "-" if line["peak_memory_bytes"] is None else f"{line['peak_memory_bytes'] / 1e9:.2f}",
        "passes": lambda line: "-" if line["forward_passes"] is None else f"{line['forward_passes']:,.0f} + {line['backward_passes']:,.0f}",
    },
    "as a ranking": {
        "method": lambda line: line["method"],
        **{
            f"{area}, {unit}": lambda line, key=f"{unit}_{name}": "-" if line[key] is None else f"{line[key]:.{3 if 'compact' in key else 2}f}"  # type: ignore[misc]
            for unit in ("parts", "leaves")
            for area, name in (("CPR", "cpr"), ("CMD", "cmd"), ("compactness", "compactness"))
        },
        "KL at 5%": lambda line: f"{line['leaves_kl'][0.05]:.2f}",
        "10%": lambda line: f"{line['leaves_kl'][0.1]:.2f}",
        "20%": lambda line: f"{line['leaves_kl'][0.2]:.2f}",
        "50%": lambda line: f"{line['leaves_kl'][0.5]:.2f}",
    },
}


def tables(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[list[str]]]:
    """By title: headings, then a line a method. Where a method met the budget with no circuit, the one of lowest KL stands there."""
    lines = means(rows)
    return {title: [list(cells), *([cell(line) for cell in cells.values()] for line in lines)] for title, cells in TABLES.items()}
