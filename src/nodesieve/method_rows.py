"""What options mean to each method, and the defaults that differ from level to level.

Imports no torch, as `config.py`, which checks options by this.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from nodesieve.levels import LEVELS

PerLevel = dict[str, float]
MethodName = Literal[
    "hybrid",
    "sieve",
    "multigranular",
    "nested",
    "coarse",
    "greedy",
    "fisher",
    "gate_gradient",
    "gate_gradient_ig",
    "uniform_gradient",
    "activation_difference",
    "weight_magnitude",
    "random",
]

LEARNING_RATES: PerLevel = dict.fromkeys(LEVELS, 0.05)
LOG_ALPHA_INIT: PerLevel = dict.fromkeys(LEVELS, 3.0)
LOG_ALPHA_SPREAD: PerLevel = {**dict.fromkeys(LEVELS, 0.0), "head": 2.5, "head_dim": 3.0, "mlp_neuron": 3.5, "expert": 2.5, "mlp_output": 3.5}
PENALTIES: PerLevel = {**dict.fromkeys(LEVELS, 1.5), "head": 6.0, "head_dim": 2.0, "mlp_neuron": 3.2, "mlp_output": 0.75}
# The penalties of the sieve, which weighs levels against one another by them.
PRICES: PerLevel = {**dict.fromkeys(LEVELS, 1.5), "head": 2.0, "head_dim": 2.5, "mlp_output": 1.0}
BOTH: PerLevel = {**PENALTIES, "head": 4.4, "head_dim": 2.8, "mlp_neuron": 2.5, "mlp_output": 1.35}  # of gates and of the rounds after them
PER_LEVEL = {
    "penalties": PENALTIES,
    "learning_rates": LEARNING_RATES,
    "log_alpha_init": LOG_ALPHA_INIT,
    "log_alpha_spread": LOG_ALPHA_SPREAD,
}

OF_LAYERS = tuple(level for level in LEVELS if level != "embedding")

STEERED = ("controller", "target_size", "repair_share")  # options of runs that learn gates to the end
OF_GATES = (
    *("gate_samples", "estimator", "penalty_form", "lambda_init", "learning_rates", "log_alpha_init", "log_alpha_spread", "warmup_steps"),
    *("drop_below", "validate_every"),
)
OF_SEARCHES = ("penalties", "task_weight", "task_margin", "steps")
OF_LEARNED_GATES = (*STEERED, *OF_GATES, *OF_SEARCHES, "learning_rate_final")


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """What options mean to a method.

    Attributes:
        reads: those of the options in `READ`, which not every method takes notice of.
        penalties: its own defaults.
        sees: levels, some of which it needs, and no others of which it looks at.
        needs: parts of an example that it cannot do without.
        inside: can it search within a circuit?
        planned: can it plan for a time?
    """

    reads: tuple[str, ...] = ()
    penalties: PerLevel = field(default_factory=lambda: PENALTIES)
    sees: tuple[str, ...] = tuple(LEVELS)
    needs: tuple[Literal["corrupted", "distractors"], ...] = ()
    inside: bool = False
    planned: bool = False

    @property
    def steered(self) -> bool:
        """Does it learn gates to the end, by a controller?"""
        return set(STEERED) <= set(self.reads)


METHOD_ROWS: dict[MethodName, MethodRow] = {
    "hybrid": MethodRow(reads=(*OF_GATES, *OF_SEARCHES, "gates_share"), penalties=BOTH, inside=True),
    "sieve": MethodRow(reads=OF_SEARCHES, penalties=PRICES, inside=True, planned=True),
    "multigranular": MethodRow(reads=OF_LEARNED_GATES, inside=True),
    "nested": MethodRow(reads=("steps", "learning_rate_final")),
    "coarse": MethodRow(reads=OF_LEARNED_GATES, sees=("layer", "attention_block", "mlp_block", "head")),
    "greedy": MethodRow(sees=("head", "mlp_block")),
    "fisher": MethodRow(),
    "gate_gradient": MethodRow(needs=("distractors",)),
    "gate_gradient_ig": MethodRow(needs=("distractors",)),
    "uniform_gradient": MethodRow(needs=("distractors",)),
    "activation_difference": MethodRow(sees=OF_LAYERS, needs=("corrupted",)),
    "weight_magnitude": MethodRow(sees=OF_LAYERS),
    "random": MethodRow(),
}
READ = tuple(dict.fromkeys(name for row in METHOD_ROWS.values() for name in row.reads))


def readers_of(option: str) -> list[str]:
    """The methods that read one of `READ`."""
    return [name for name, row in METHOD_ROWS.items() if option in row.reads]


def method_for(options: Iterable[str]) -> MethodName:
    """The method that `auto` stands for where these options are set."""
    chosen = set(options)
    if "gates_share" in chosen:
        return "hybrid"
    return "multigranular" if chosen & {*STEERED, *OF_GATES} else "sieve"
