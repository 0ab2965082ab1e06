"""What a benchmark ran on, to stand beside its figures."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nodesieve.run import versions

__all__ = ["machine", "provenance", "versions"]


def provenance(result: Mapping[str, Any]) -> str:
    """The line below a table: what `result` says of the machine, where it does, and of versions: one set of them or several, each shown once."""
    given = result["versions"]
    each = dict.fromkeys(
        ", ".join(f"{name} {number}" for name, number in some.items()) for some in ([given] if isinstance(given, Mapping) else given)
    )
    return (f"Machine: {result['machine']}. " if "machine" in result else "") + f"Versions: {'; '.join(each)}."


def machine(threads: int | None = None) -> str:
    """The cores, or how many of them a run had, the processor and the system."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    cores = f"{os.cpu_count()} cores" if threads in (None, os.cpu_count()) else f"{threads} of {os.cpu_count()} cores"
    return f"{cores}, {model}, {platform.system()}"
