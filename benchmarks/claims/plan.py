"""What there is to measure: read by `claims.py`, which runs and collects it, and by `page.py`, which shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nodesieve.levels import DEFAULT_LEVELS

# On the last no default was ever tuned, nor was it looked at before.
TASKS = ("ioi", "greater_than", "gendered_pronoun", "subject_verb_agreement")
METHODS = (
    *("sieve", "multigranular", "coarse", "greedy", "nested", "uniform_gradient", "gate_gradient_ig", "gate_gradient", "fisher"),
    *("activation_difference", "weight_magnitude", "random"),
)
WHOLE = ("coarse", "greedy")  # methods that look at heads and MLP blocks as wholes
CONTROLLED = "sieve"  # the method whose circuits are set beside other circuits
DRAWS = 5
CPU = "cpu"  # as runs name it, the first of which named no device


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


SETTINGS = {
    "outputs-open": Setting(
        title="MLP outputs left open", options={"levels": without("mlp_output")}, methods=("sieve", "fisher", "gate_gradient_ig")
    ),  # since `size` does not count outputs
    "leaves-alike": Setting(
        title="leaves priced alike",
        options={"penalties": ["head=0.1", "head_dim=1.35", "mlp_neuron=3.65", "mlp_output=0.1"]},
        methods=("sieve",),
        tasks=("ioi",),
    ),  # since the usual prices ask for few heads and outputs, too
}

SHORT = 160
LEARNED = {"method": "multigranular"}
LEVELS = ("layer", "attention_block", "mlp_block", "head", "head_dim", "mlp_neuron", "mlp_output")
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    **{f"without {level}": {"levels": without(level)} for level in LEVELS},
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
