"""`report.html`: one run, or several side by side, on one self-contained page. Every text that comes from data is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import UndefinedError
from markupsafe import Markup

from nodesieve.errors import UserError
from nodesieve.report.plots import head_map, neuron_density, ranking_curves, training_curves
from nodesieve.report.templates import template
from nodesieve.run import Run


def render(runs: Sequence[tuple[str, Run]]) -> str:
    """(name, run) pairs -> an HTML page that needs no other file.

    Args:
        runs: names are shown as headings; runs without metrics (unfinished ones) are shown without numbers.

    Raises:
        UserError: a run's files lack something that is shown.
    """
    try:
        return template("page.html").render(runs=[_view(name, run) for name, run in runs])
    except (UndefinedError, TypeError, LookupError) as error:
        names = ", ".join(repr(name) for name, _ in runs)
        raise UserError(f"expected whole files of a run in {names}, got some without a part that the report shows ({error})") from error


def _view(name: str, run: Run) -> dict[str, Any]:
    pictures = [("Heads", head_map(run.circuit)), ("MLPs", neuron_density(run.circuit))]
    told = run.history[0] if run.history else {}
    curves = ranking_curves if "sizes" in told else training_curves if "open" in told else None
    if curves is not None:
        pictures.append(("Training", curves(run.history, run.config.kl_budget, of=run.description.get("loss", "KL, nats"))))
    return {
        "name": name,
        "asked": run.asked,
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
