"""Runs of several methods as tables: a line a method, means over its seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from nodesieve.metrics import in_figures, in_percent


def means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line a method: means over seeds of what the table shows; `runs` and `met` say how many there are and how many met the budget."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        line: dict[str, Any] = {"method": method, "runs": len(own), "met": sum(row["met"] for row in own)}
        line |= {level: mean(row["nodes"][level]["kept"] for row in own) for level in own[0]["nodes"]}
        line |= {"size": mean(row["size"] for row in own), "kl": _mean_of_all(row["test"]["kl"] for row in own)}
        for name in ("unpolished", "polish_seconds", "seconds", "peak_memory_bytes"):
            line[name] = _mean_of_known(row[name] for row in own)
        line["exact_match"] = _mean_of_all(row["test"]["exact_match"] for row in own)
        line["faithfulness"] = None if line["kl"] is None else _mean_of_known(row["test"]["faithfulness"] for row in own)
        line["parameters"] = mean(row["parameters"]["kept"] / row["parameters"]["total"] for row in own)
        for unit in ("parts", "leaves"):
            for area in ("cpr", "cmd", "compactness"):
                line[f"{unit}_{area}"] = _mean_of_all(row["curve"][unit][area] for row in own)
        line["leaves_kl"] = {
            point["share"]: _mean_of_all(row["curve"]["leaves"]["points"][place]["kl"] for row in own)
            for place, point in enumerate(own[0]["curve"]["leaves"]["points"])
        }
        line |= {f"{way}_passes": _mean_of_known(row["passes"] and row["passes"][way] for row in own) for way in ("forward", "backward")}
        lines.append(line)
    return lines


def _mean_of_all(values: Iterable[float | None]) -> float | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return mean(known) if len(known) == len(found) else None


def _mean_of_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _in_percent(share: float | None) -> str:
    return "-" if share is None else in_percent(share)


def _in_hundredths(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


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
        "unpolished": lambda line: _in_percent(line["unpolished"]),
        "parameters": lambda line: in_percent(line["parameters"]),
        "test KL": lambda line: in_figures(line["kl"]),
        "same top token": lambda line: _in_percent(line["exact_match"]),
        "faithfulness": lambda line: _in_hundredths(line["faithfulness"]),
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
        "KL at 5%": lambda line: _in_hundredths(line["leaves_kl"][0.05]),
        "10%": lambda line: _in_hundredths(line["leaves_kl"][0.1]),
        "20%": lambda line: _in_hundredths(line["leaves_kl"][0.2]),
        "50%": lambda line: _in_hundredths(line["leaves_kl"][0.5]),
    },
}


def tables(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[list[str]]]:
    """By title: headings, then a line a method. Where a method met the budget with no circuit, the one of lowest KL stands there."""
    lines = means(rows)
    return {title: [list(cells), *([cell(line) for cell in cells.values()] for line in lines)] for title, cells in TABLES.items()}
