"""What is measured at the answer position, one number an example; means and intervals over prompts.

Names follow DESIGN: kl in nats, logit_diff, accuracy, exact_match, faithfulness, kl_p95. Lists of answers count by their mean logit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from nodesieve.batches import Batch


def in_percent(share: float) -> str:
    """A share as it is shown: one decimal, and two below 1%, where small circuits differ."""
    return f"{100 * share:.{2 if 0 < share < 0.01 else 1}f}%"


def in_figures(value: object) -> str:
    """A measured number as it is shown: three decimals, a zero without sign; "-" where there is none, and other things as they are."""
    return "-" if value is None else f"{round(value, 3) + 0.0:.3f}" if isinstance(value, float) else str(value)


def or_none(number: float) -> float | None:
    """A number as JSON has it, which knows no infinity."""
    return number if math.isfinite(number) else None


def kl_divergence(full: Tensor, circuit: Tensor) -> Tensor:
    """KL(full || circuit) of each example in nats: logits (B, V), (B, V) -> (B,)."""
    log_p, log_q = functional.log_softmax(full, -1), functional.log_softmax(circuit, -1)
    return (log_p.exp() * (log_p - log_q)).masked_fill(log_p == -math.inf, 0).sum(-1)  # what the full model rules out adds nothing


def logit_difference(logits: Tensor, batch: Batch) -> Tensor:
    """Mean logit of the answers minus that of the distractors, (B, V) -> (B,); NaN where an example has no distractor."""
    return _mean_logit(logits, batch.answers) - _mean_logit(logits, batch.distractors)


def probability_difference(logits: Tensor, batch: Batch) -> Tensor:
    """Probability of all answers minus that of all distractors, (B, V) -> (B,); NaN where an example has no distractor."""
    return _of_probabilities(logits, batch, lambda p, answers, distractors: p[answers].sum() - p[distractors].sum())


def cutoff_sharpness(logits: Tensor, batch: Batch) -> Tensor:
    """Probability of the first answer minus that of the last distractor, (B, V) -> (B,): how steep the step between them is.

    For `greater_than` these are the numbers next to the start year's, above and below (Hanna et al., arXiv 2305.00586).
    """
    return _of_probabilities(logits, batch, lambda p, answers, distractors: p[answers[0]] - p[distractors[-1]])


def _of_probabilities(logits: Tensor, batch: Batch, measure: Callable[[Tensor, list[int], list[int]], Tensor]) -> Tensor:
    rows = zip(logits.softmax(-1), batch.answers, batch.distractors, strict=True)
    return torch.stack([measure(p, list(answers), list(wrong)) if wrong else p.new_tensor(float("nan")) for p, answers, wrong in rows])


EXTRA_METRICS = {"prob_diff": probability_difference, "cutoff_sharpness": cutoff_sharpness}


def upper_bound(values: Tensor, *, prompts: Sequence[int] | None = None) -> float:
    """Upper end of the one-sided 95% bootstrap interval of a mean over examples, (n,) -> a number; infinite where one of them is not finite.

    Args:
        prompts: of which prompt each example is, as for `Resamples`; by default each is of its own.
    """
    if not bool(values.isfinite().all()):
        return math.inf
    return float(Resamples(range(len(values)) if prompts is None else prompts).means(values.cpu().double()).quantile(0.95))


class Resamples:
    """Bootstrap resamples of examples, `COUNT` of them, always the same for as many prompts: the examples of one prompt are drawn together.

    Args:
        prompts: of which prompt each example is, by any number.
    """

    COUNT = 2000
    AT_ONCE = 2**22  # numbers

    def __init__(self, prompts: Sequence[int]) -> None:
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        self._of = torch.tensor([numbers[prompt] for prompt in prompts])
        self._prompts = len(numbers)
        self._draws = torch.randint(self._prompts, (self.COUNT, self._prompts), generator=torch.Generator().manual_seed(0))

    def means(self, values: Tensor) -> Tensor:
        """Of values of the examples, (n,), the mean in each resample, (COUNT,); NaN is left out."""
        sums, counts = (values.new_zeros(self._prompts).index_add(0, self._of, x) for x in (values.nan_to_num(), (~values.isnan()).to(values.dtype)))
        some = torch.split(self._draws, max(1, self.AT_ONCE // self._prompts))
        return torch.cat([sums[draws].sum(-1) / counts[draws].sum(-1) for draws in some])

    def quantiles(self, values: Tensor, share: float) -> Tensor:
        """Of values of the examples, (n,) and none of them NaN, the quantile in each resample, (COUNT,), interpolated as `torch.quantile` does."""
        ordered, order = values.sort()
        found = []
        for draws in torch.split(self._draws, max(1, self.AT_ONCE // len(values))):
            times = torch.zeros_like(draws).scatter_add(1, draws, torch.ones_like(draws))  # how often each prompt is drawn
            upto = times[:, self._of[order]].cumsum(-1)
            place = share * (upto[:, -1:] - 1).double()
            below, above = (ordered[torch.searchsorted(upto, end.long() + 1)] for end in (place.floor(), place.ceil()))
            found.append((below + (place - place.floor()) * (above - below)).squeeze(-1))
        return torch.cat(found)


def faithfulness(*, circuit: float, full: float, ablated: float) -> float | None:
    """(circuit - ablated) / (full - ablated), not clipped; None where the denominator is near 0."""
    span = full - ablated
    return None if abs(span) < 1e-3 else (circuit - ablated) / span


def _mean_logit(logits: Tensor, tokens: tuple[tuple[int, ...], ...]) -> Tensor:
    return torch.stack([logits[i, list(ids)].mean() for i, ids in enumerate(tokens)])
