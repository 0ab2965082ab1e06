"""What a benchmark ran on, to stand beside its figures."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from nodesieve.run import versions

__all__ = ["machine", "versions"]


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{os.cpu_count()} cores, {model}, {platform.system()}"
