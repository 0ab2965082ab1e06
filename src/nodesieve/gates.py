"""Hard-concrete gates: a differentiable stand-in for a switch, after Louizos et al., arXiv 1712.01312.

Each gate has one learned number, log_alpha. A sample is z = clip(s * (zeta - gamma) + gamma, 0, 1) with
s = sigmoid((ln u - ln(1 - u) + log_alpha) / beta), u uniform (equations 10 and 11): exactly 0 or exactly 1 most of the time, and in
between often enough for a gradient. P(z > 0) has a closed form (equation 12), which is what the penalty pays for.
At the end a gate is open iff log_alpha > 0.

The sample's own gradient vanishes wherever it is clipped. `straight_through` keeps the sample but gives it the derivative of P(z > 0),
p (1 - p), which the penalty has too: then whether a gate opens or closes depends only on whether the KL that its opening saves, to first
order, is more than its price. It is biased; docs/trials.md says what was seen of the two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BETA = 2 / 3  # temperature
GAMMA, ZETA = -0.1, 1.1  # how far a sample is stretched beyond 0 and 1 before clipping
_SHIFT = BETA * math.log(-GAMMA / ZETA)


def sample(log_alpha: Tensor, *, batch: int, generator: torch.Generator) -> Tensor:
    """Draw gates: log_alpha (*shape) -> z (batch, *shape) in [0, 1], a sample for each of `batch`.

    The second half mirrors the first (u and 1 - u), which leaves each sample's distribution as it is and evens out their mean.
    """
    half = torch.rand(((batch + 1) // 2, *log_alpha.shape), generator=generator, device=log_alpha.device)
    half = half.clamp_(1e-6, 1 - 1e-6).logit_()
    noise = torch.cat([half, -half[: batch // 2]])
    s = torch.sigmoid((noise + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def straight_through(z: Tensor, log_alpha: Tensor) -> Tensor:
    """The values of z, exactly, with d open_probability(log_alpha) / d log_alpha as their derivative; shapes as `sample`."""
    p = open_probability(log_alpha)
    return z.detach() + (p - p.detach())


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0), the expected share of open gates (arXiv 1712.01312, equation 12)."""
    return torch.sigmoid(log_alpha - _SHIFT)
