"""What a run spends: prompts read, and memory."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Passes:
    """How many prompts have been read, and how many of them backwards too."""

    forward: int = 0
    backward: int = 0

    def raise_to(self, before: Mapping[str, int]) -> None:
        """At least those of before a stop."""
        self.forward = max(self.forward, before["forward"])
        self.backward = max(self.backward, before["backward"])


@dataclass
class Memory:
    """The peak in bytes: of the GPU's allocator on CUDA, of the whole process elsewhere; 0 on Windows, which has no such number."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    before: int = 0  # in the processes that the run was stopped in

    def peak(self) -> int:
        if self.device.type == "cuda":
            return max(self.before, int(torch.cuda.max_memory_allocated(self.device)))
        if sys.platform == "win32":
            return self.before
        if (own := _of_this_program()) is not None:
            return max(self.before, own)
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return max(self.before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _of_this_program() -> int | None:
    """Linux's count, which begins with the program; `getrusage` has that of what started it in it."""
    try:
        status = Path("/proc/self/status").read_text("ascii", "replace")
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), None)
