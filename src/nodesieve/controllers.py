"""Who sets the weight of the penalties: one class a controller.

Every step a controller turns the open shares of all levels into a penalty term, and then sees how the step went.

- `fixed`: constant lambdas, as in the paper (arXiv 2512.10903).
- `kl_budget`: one multiplier on all lambdas, slowly raised while the KL is under its aim and lowered while it is over it. A rule that only
  accumulates winds up, since the KL answers late: so a KL above its aim also takes from the multiplier at once, and the rule looks at where the
  KL is heading, not only at where it is. It goes by the binary circuit, since sampled gates tell mostly of their own noise. Looks at
  validation data correct for words that training has not seen. A stretch of steps that leaves the budget far behind is taken back, with
  half the pressure from there.
- `target_size`: an augmented Lagrangian for a share of leaves (Wang, Wohlwend and Lei, arXiv 1910.04732).

KL in nats, sizes as shares in [0, 1]. `state` and `restore` are for resuming.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from nodesieve.config import DiscoverConfig
from nodesieve.levels import LEAVES, nearest
from nodesieve.nodes import NodeSpace

OBSERVE_EVERY = 4  # steps


class Controller(Protocol):
    def penalty(self, shares: Mapping[str, Tensor]) -> Tensor:
        """The term to add to the loss, from the expected share of open gates of each learned level."""

    def observe(self, *, kl: float) -> None:
        """The binary circuit of now has this mean KL on a training batch; told every `OBSERVE_EVERY` steps."""

    def validated(self, *, kl: float) -> None:
        """The binary circuit of now has this mean KL on validation data."""

    def missed(self, *, kl_upper: float) -> bool:
        """The binary circuit has left the budget. True: take the last stretch of steps back, to the best circuit so far."""

    @property
    def strength(self) -> float:
        """The multiplier of now, for the history."""

    def state(self) -> dict[str, float]: ...

    def restore(self, state: Mapping[str, float]) -> None: ...


class _Smoothed:
    """Running means of the KL, a fast and a slow one; their difference says where it is heading."""

    FAST, SLOW = 1 - 0.85 ** (OBSERVE_EVERY / 2), 1 - 0.95 ** (OBSERVE_EVERY / 2)

    def __init__(self) -> None:
        self.fast = self.slow = math.nan

    def update(self, kl: float) -> None:
        self.fast = kl if math.isnan(self.fast) else (1 - self.FAST) * self.fast + self.FAST * kl
        self.slow = kl if math.isnan(self.slow) else (1 - self.SLOW) * self.slow + self.SLOW * kl

    @property
    def predicted(self) -> float:
        return self.fast + max(0.0, self.fast - self.slow)


class Fixed:
    """Constant lambdas: `lambda_init` times each level's own."""

    def __init__(self, config: DiscoverConfig, nodes: NodeSpace) -> None:
        self._config = config

    @property
    def strength(self) -> float:
        return self._config.lambda_init

    def penalty(self, shares: Mapping[str, Tensor]) -> Tensor:
        return self.strength * _weighted(shares, self._config.penalties)

    def observe(self, *, kl: float) -> None: ...

    def validated(self, *, kl: float) -> None: ...

    def missed(self, *, kl_upper: float) -> bool:
        return False

    def state(self) -> dict[str, float]:
        return {}

    def restore(self, state: Mapping[str, float]) -> None: ...


class KLBudget:
    """The sparsest circuit whose validation KL stays within `kl_budget`."""

    RATE = 0.003  # largest change of ln(lambda) a step
    ABOVE = 2.0  # and what is taken from it as long as the KL is above its aim, by all of it
    AIM = 0.78  # of the budget: what is left pays for the interval around the validation KL
    FLOOR = 0.02  # lambda never falls below this
    TOLERANCE = 1.3  # times the budget: from here on, steps are taken back

    def __init__(self, config: DiscoverConfig, nodes: NodeSpace) -> None:
        self._config = config
        self._kl = _Smoothed()
        self._log_lambda = math.log(config.lambda_init)
        self._slack = 0.0  # how far the KL is below its aim, as a share of it, in [-1, 1]
        self._gap = 1.0  # validation KL / training KL of the binary circuit

    @property
    def strength(self) -> float:
        return math.exp(self._log_lambda + self.ABOVE * min(0.0, self._slack))

    def penalty(self, shares: Mapping[str, Tensor]) -> Tensor:
        return self.strength * _weighted(shares, self._config.penalties)

    def observe(self, *, kl: float) -> None:
        self._kl.update(kl)
        aim = self._config.kl_budget * self.AIM
        self._slack = max(-1.0, min(1.0, 1 - self._kl.predicted * self._gap / aim))
        self._log_lambda = max(math.log(self.FLOOR), self._log_lambda + OBSERVE_EVERY * self.RATE * self._slack)

    def validated(self, *, kl: float) -> None:
        if not math.isnan(self._kl.fast):
            measured = min(3.0, max(1.0, kl / max(self._kl.fast, 1e-9)))
            self._gap += 0.5 * (measured - self._gap)

    def missed(self, *, kl_upper: float) -> bool:
        if kl_upper < self.TOLERANCE * self._config.kl_budget:
            return False
        self._log_lambda = max(math.log(self.FLOOR), self._log_lambda - math.log(2))
        return True

    def state(self) -> dict[str, float]:
        return {
            "log_lambda": self._log_lambda,
            "slack": self._slack,
            "gap": self._gap,
            "fast": self._kl.fast,
            "slow": self._kl.slow,
        }

    def restore(self, state: Mapping[str, float]) -> None:
        self._log_lambda, self._slack, self._gap = state["log_lambda"], state["slack"], state["gap"]
        self._kl.fast, self._kl.slow = state["fast"], state["slow"]


class TargetSize:
    """A share of leaves, `target_size`, by Lagrangian multipliers: u * excess + v * excess ** 2, both multipliers rising with the excess. Leaves that
    have no gates of their own are as open as what they lie in."""

    RATE = 0.5 * OBSERVE_EVERY

    def __init__(self, config: DiscoverConfig, nodes: NodeSpace) -> None:
        self._config = config
        assert config.target_size is not None  # the config settles it for this controller
        self._size = config.target_size
        self._leaves = {level: nodes.count(level) for level in LEAVES if level in nodes.levels}
        self._linear = self._quadratic = 0.0
        self._excess = 0.0

    @property
    def strength(self) -> float:
        return self._linear

    def penalty(self, shares: Mapping[str, Tensor]) -> Tensor:
        gated = {level: nearest(level, shares) for level in self._leaves}
        whole = torch.ones_like(next(iter(shares.values())))
        kept = [count * (whole if (own := gated[level]) is None else shares[own]) for level, count in self._leaves.items()]
        size = torch.stack(kept).sum() / sum(self._leaves.values())
        excess = size - self._size
        self._excess = float(excess.detach())
        others = {level: share for level, share in shares.items() if level not in gated.values()}
        pull = self._linear * excess + self._quadratic * excess**2
        return pull + max(0.0, self._linear) * _weighted(others, self._config.penalties) if others else pull

    def observe(self, *, kl: float) -> None:
        self._linear += self.RATE * self._excess
        self._quadratic += self.RATE * self._excess**2

    def validated(self, *, kl: float) -> None: ...

    def missed(self, *, kl_upper: float) -> bool:
        return False

    def state(self) -> dict[str, float]:
        return {"linear": self._linear, "quadratic": self._quadratic}

    def restore(self, state: Mapping[str, float]) -> None:
        self._linear, self._quadratic = state["linear"], state["quadratic"]


def _weighted(shares: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    return torch.stack([weights[level] * share for level, share in shares.items()]).sum()


CONTROLLERS: dict[str, Callable[[DiscoverConfig, NodeSpace], Controller]] = {
    "fixed": Fixed,
    "kl_budget": KLBudget,
    "target_size": TargetSize,
}
