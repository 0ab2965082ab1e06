"""The pages' templates, which lie beside this file; everything put into one is escaped."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from nodesieve.metrics import in_figures, in_percent


def template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("nodesieve", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=in_figures, count=_count, share=_share, percent=in_percent)
    return environment.get_template(name)


def _count(value: int) -> str:
    return f"{value:,}"


def _share(part: dict[str, int]) -> str:
    return in_percent(part["kept"] / max(1, part["total"]))
