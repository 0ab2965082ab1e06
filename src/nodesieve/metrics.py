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


def upper_bound(values: Tensor, *, prompts: Sequence[int] | None = None, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> float:
    """Upper end of the one-sided bootstrap interval of a mean over examples, (n,) -> a number.

    Args:
        prompts: of which prompt each example is, as for `resampled_places`; by default each is of its own.
    """
    places = resampled_places(range(len(values)) if prompts is None else prompts, resamples=resamples, seed=seed)
    return float(at_places(values.cpu().double(), places).nanmean(-1).quantile(confidence))


def resampled_places(prompts: Sequence[int], *, resamples: int = 2000, seed: int = 0) -> Tensor:
    """Which examples are in each bootstrap resample, (resamples, n or more): those of one prompt, by number, are drawn together. Gaps are -1."""
    of_each: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        of_each.setdefault(prompt, []).append(place)
    most = max(map(len, of_each.values()))
    rows = torch.tensor([places + [-1] * (most - len(places)) for places in of_each.values()])
    draws = torch.randint(len(rows), (resamples, len(rows)), generator=torch.Generator().manual_seed(seed))
    return rows[draws].flatten(1)


def at_places(values: Tensor, places: Tensor) -> Tensor:
    """Values of examples, (n,), in resamples of them, as `places`; NaN in gaps."""
    return torch.cat([values, values.new_full((1,), float("nan"))])[places]


def faithfulness(*, circuit: float, full: float, ablated: float) -> float | None:
    """(circuit - ablated) / (full - ablated), not clipped; None where the denominator is near 0."""
    span = full - ablated
    return None if abs(span) < 1e-3 else (circuit - ablated) / span


def _mean_logit(logits: Tensor, tokens: tuple[tuple[int, ...], ...]) -> Tensor:
    return torch.stack([logits[i, list(ids)].mean() for i, ids in enumerate(tokens)])
