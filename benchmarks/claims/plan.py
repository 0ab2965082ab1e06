"""What there is to measure: read by `claims.py`, which runs and collects it, and by `page.py`, which shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nodesieve.config import DiscoverConfig
from nodesieve.levels import DEFAULT_LEVELS
from nodesieve.run import Run

# On the last no default was ever tuned, nor was it looked at before.
TASKS = ("ioi", "greater_than", "gendered_pronoun", "subject_verb_agreement")
METHODS = (
    *("sieve", "hybrid", "multigranular", "coarse", "greedy", "nested", "uniform_gradient", "gate_gradient_ig", "gate_gradient", "fisher"),
    *("activation_difference", "weight_magnitude", "random"),
)
SEEDS = 3
BUDGET = DiscoverConfig().kl_budget  # nats
SCORED = METHODS[6:]  # rankings by one formula, without a search
WHOLE = ("coarse", "greedy")  # methods that look at heads and MLP blocks as wholes
CONTROLLED = ("sieve", "hybrid")  # the methods whose circuits are set beside other circuits
DRAWS = 5


def without(level: str) -> list[str]:
    """The usual levels but one."""
    return [other for other in DEFAULT_LEVELS if other != level]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The same comparison with other options: in the directory of its name beside the runs with the usual ones."""

    title: str
    options: dict[str, Any]
    methods: tuple[str, ...]
    tasks: tuple[str, ...] = TASKS


CUT = "cut-once"
SETTINGS = {
    # what someone does who has a ranking; polishing, a search of its own, takes an hour where scores say little
    CUT: Setting(title="cut once, not polished", options={"polish": False}, methods=SCORED),
    # `size` does not count outputs
    "outputs-open": Setting(
        title="MLP outputs left open", options={"levels": without("mlp_output")}, methods=("sieve", "fisher", "gate_gradient_ig")
    ),
    # the usual prices ask for few heads and outputs, too
    "leaves-alike": Setting(
        title="leaves priced alike",
        options={"penalties": {"head": 0.1, "head_dim": 1.35, "mlp_neuron": 3.65, "mlp_output": 0.1}},
        methods=("sieve",),
        tasks=("ioi",),
    ),
}

SHORT = 160
SIEVE = {"method": "sieve"}
# At the prices that learned gates had when the first of these ran, and not since.
LEARNED = {"method": "multigranular", "penalties": {"head": 5, "head_dim": 1.5, "mlp_neuron": 1.5, "mlp_output": 1}}
LEVELS = without("expert")  # which the model has not
VARIANTS: dict[str, dict[str, Any]] = {
    "sieve": SIEVE,
    **{f"without {level}": {**SIEVE, "levels": without(level)} for level in LEVELS},
    "learned gates": LEARNED,
    **{f"learned gates, without {level}": {**LEARNED, "levels": without(level)} for level in LEVELS},
    "learned gates, one sample a batch": {**LEARNED, "gate_samples": "batch"},
    "learned gates, penalties nested": {**LEARNED, "penalty_form": "nested"},
    "learned gates, penalties reached": {**LEARNED, "penalty_form": "reached"},
    "learned gates, controller fixed": {**LEARNED, "controller": "fixed"},
    "learned gates, controller target_size at 0.5": {**LEARNED, "controller": "target_size", "target_size": 0.5},
}
ORDER = {name: place for names in (TASKS, METHODS, tuple(VARIANTS)) for place, name in enumerate(names)}  # of rows
PARTS = ("compare", *SETTINGS, "controls", "within", "variants")
CPU = "cpu"  # as runs name it


def device_of(run: Run) -> str:
    """What a run was on; the first ones, all on a CPU, named no device."""
    return str(run.metrics.get("device", CPU))


def on_cpu(one: dict[str, Any]) -> bool:
    return bool(one["device"] == CPU)
