"""How a method tells of its progress and keeps its state, without knowing where either goes.

A method calls `log` for each line of history, `save` now and then, and looks at `stopping` after each step; when it is set it saves and
raises `Stopped` with what it would return by then, or, where that is nothing yet, a KeyboardInterrupt (`heed`). The run directory and the progress
bar implement this elsewhere; the plain `Journal` keeps history in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from nodesieve.usage import Memory, Passes

SCORING, POLISHING = "scoring", "polishing"  # the parts of a run that keep a state of their own


class Stopped(Exception):
    """The user asked to stop; the state is saved, and `scores` holds what the method would return now."""

    def __init__(self, scores: Any) -> None:
        super().__init__("stopped")
        self.scores = scores


@dataclass(frozen=True, kw_only=True)
class State:
    """What a method needs to go on as if it had not been stopped: tensors by name, and plain numbers."""

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


@dataclass
class Journal:
    """Keeps history in memory, saves nothing, never stops. Subclass it to do more."""

    history: list[dict[str, Any]] = field(default_factory=list)
    stopping: bool = False
    phase: str = ""
    seconds: float | None = None  # that scoring took, from a method that counts them over a stop
    scratch: Path | None = None  # where large temporary files may go
    passes: Passes = field(default_factory=Passes)  # of the run, kept beside every state, as is
    memory: Memory = field(default_factory=Memory)
    devices: list[str] = field(default_factory=list)  # that the run has been on, by name
    of: dict[str, str] = field(default_factory=dict)  # fingerprints of the weights and of the examples, by what is shown of them

    def log(self, row: dict[str, Any]) -> None:
        self.history.append(row)

    def say(self, text: str) -> None:
        """A phase begins: "scoring", "selecting", "evaluating"."""
        self.phase = text

    def note(self, text: str) -> None:
        """Something that the user should see, whatever the phase."""

    def progress(self, step: int, total: int, **facts: float) -> None:
        """`step` of `total` steps are done."""

    def heed(self) -> None:
        """Raise KeyboardInterrupt if the user asked to stop."""
        if self.stopping:
            raise KeyboardInterrupt

    def save(self, state: State, *, part: str = SCORING) -> None:
        """Keep `state` for a later `load` of the same part of the run."""

    def load(self, *, part: str = SCORING) -> State | None:
        """The state to go on from, if there is one."""
        return None
