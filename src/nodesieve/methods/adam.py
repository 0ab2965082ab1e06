"""What the learning methods share: how fast they learn, and Adam's moments as tensors by name, to be kept and put back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ADAM_BETAS = (0.9, 0.99)
MOMENTS = ("exp_avg", "exp_avg_sq")


def falling(progress: float, final: float) -> float:
    """A learning rate's factor: 1 for the first quarter of the run, then down in a straight line to `final`."""
    return 1 - (1 - final) * max(0.0, (progress - 0.25) / 0.75)


def moments(adam: torch.optim.Adam, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By "MOMENT.NAME", for parameters by name."""
    return {f"{moment}.{name}": adam.state[x][moment] for name, x in parameters.items() for moment in MOMENTS}


def put_back(adam: torch.optim.Adam, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, step: int) -> None:
    """Of what `moments` gave; on each parameter's own device."""
    for name, x in parameters.items():
        own = {moment: tensors[f"{moment}.{name}"].to(x.device).clone() for moment in MOMENTS}
        adam.state[x] = {"step": torch.tensor(float(step)), **own}
