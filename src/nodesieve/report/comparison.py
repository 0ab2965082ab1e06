"""`compare.html`: methods side by side on one self-contained page. Every text that comes from data is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from nodesieve.report.plots import circuit_sizes, size_curves
from nodesieve.report.tables import means, tables
from nodesieve.report.templates import template


def render(found: Mapping[str, Any]) -> str:
    """What `nodesieve.compare.compare` returns -> an HTML page that needs no other file."""
    lines = means(found["rows"])
    curves = {line["method"]: list(line["leaves_kl"].items()) for line in lines}
    sizes = {line["method"]: (line["size"], line["met"] == line["runs"]) for line in lines}
    pictures = [circuit_sizes(sizes), size_curves(curves, found["budget"])]
    versions: dict[str, list[str]] = {}
    for row in found["rows"]:
        said = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
        versions.setdefault(said, []).append(f"{row['method']}-{row['seed']}")
    return template("comparison.html").render(
        found=found,
        versions=versions,
        tables=tables(found["rows"]),
        seeds=sorted({row["seed"] for row in found["rows"]}),
        pictures=[Markup(svg) for svg in pictures],  # noqa: S704  drawn by us from numbers
    )
