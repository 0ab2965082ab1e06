"""`report.html`: one run, or several side by side, on one self-contained page. Every text that comes from data is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from nodesieve.report.plots import head_map, neuron_density, training_curves
from nodesieve.run import Run


def render(runs: Sequence[tuple[str, Run]]) -> str:
    """(name, run) pairs -> an HTML page that needs no other file.

    Args:
        runs: names are shown as headings; runs without metrics (unfinished ones) are shown without numbers.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=_number, count=_count, share=_share)
    template = environment.from_string(files("nodesieve.report").joinpath("page.html").read_text("utf-8"))
    return template.render(runs=[_view(name, run) for name, run in runs])


def _view(name: str, run: Run) -> dict[str, Any]:
    pictures = [("Heads", head_map(run.circuit)), ("MLPs", neuron_density(run.circuit))]
    if run.history:
        pictures.append(("Training", training_curves(run.history, run.config.kl_budget)))
    return {
        "name": name,
        "metrics": run.metrics,
        "rows": _rows(run.metrics),
        "description": run.description,
        "config": run.config.to_dict(),
        "pictures": [(title, Markup(svg)) for title, svg in pictures],  # noqa: S704  drawn by us from numbers
    }


def _rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, list[Any]]]:
    """(split, metric, [full, circuit, ablated]) for the table."""
    if not metrics:
        return []
    rows = []
    for split in ("test", "validation"):
        columns = [metrics[part].get(split, {}) for part in ("full", "circuit", "ablated")]
        rows += [(split, name, [column.get(name) for column in columns]) for name in columns[1]]
    return rows


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _count(value: int) -> str:
    return f"{value:,}"


def _share(part: Mapping[str, int]) -> str:
    return f"{100 * part['kept'] / max(1, part['total']):.1f}%"
