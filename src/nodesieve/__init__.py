"""NodeSieve finds circuits in language models: the smallest set of nodes that alone reproduces what a model says.

import nodesieve as ns

loaded = ns.load_model("smollm2-135m")
task = ns.load_task("ioi", loaded.tokenizer)
run = ns.discover(loaded, task, ns.DiscoverConfig(steps=300))
run.save("runs/ioi")
print(run.metrics["circuit"]["test"], run.circuit.size)

again = ns.load_run("runs/ioi")
print(ns.evaluate(loaded, task, again).circuit["test"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nodesieve.circuit import Circuit
    from nodesieve.config import DiscoverConfig
    from nodesieve.discovery import discover
    from nodesieve.errors import UserError
    from nodesieve.evaluation import evaluate
    from nodesieve.models import load_model
    from nodesieve.run import Run, load_run
    from nodesieve.tasks.load import load_task

_PUBLIC = {
    "Circuit": "circuit",
    "DiscoverConfig": "config",
    "Run": "run",
    "UserError": "errors",
    "discover": "discovery",
    "evaluate": "evaluation",
    "load_model": "models",
    "load_run": "run",
    "load_task": "tasks.load",
}
__all__ = ["Circuit", "DiscoverConfig", "Run", "UserError", "discover", "evaluate", "load_model", "load_run", "load_task"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import nodesieve` loads neither torch nor transformers."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nodesieve' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"nodesieve.{_PUBLIC[name]}"), name)
