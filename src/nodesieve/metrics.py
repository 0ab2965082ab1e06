"""What is measured at the answer position, one number an example; means and intervals over prompts.

Names follow DESIGN: kl in nats, logit_diff, accuracy, exact_match, faithfulness, kl_p95. Lists of answers count by their mean logit.
"""

from __future__ import annotations

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
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def logit_difference(logits: Tensor, batch: Batch) -> Tensor:
    """Mean logit of the answers minus that of the distractors, (B, V) -> (B,); NaN where an example has no distractor."""
    return _mean_logit(logits, batch.answers) - _mean_logit(logits, batch.distractors)


def probability_difference(logits: Tensor, batch: Batch) -> Tensor:
    """Probability of all answers minus that of all distractors, (B, V) -> (B,); NaN where an example has no distractor."""
    return _of_probabilities(logits, batch, lambda p, answers, distractors: p[answers].sum() - p[distractors].sum())


def cutoff_sharpness(logits: Tensor, batch: Batch) -> Tensor:
    """Probability of the first answer minus that of the last distractor, (B, V) -> (B,): how steep the step between them is.

    For `greater_than` these are the numbers next to the start year (Hanna et al., arXiv 2305.00586).
    """
    return _of_probabilities(logits, batch, lambda p, answers, distractors: p[answers[0]] - p[distractors[-1]])


def _of_probabilities(logits: Tensor, batch: Batch, measure: Callable[[Tensor, list[int], list[int]], Tensor]) -> Tensor:
    rows = zip(logits.softmax(-1), batch.answers, batch.distractors, strict=True)
    return torch.stack([measure(p, list(answers), list(wrong)) if wrong else p.new_tensor(float("nan")) for p, answers, wrong in rows])


EXTRA_METRICS = {"prob_diff": probability_difference, "cutoff_sharpness": cutoff_sharpness}


def upper_bound(values: Tensor, *, prompts: Sequence[int] | None = None, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> float:
    """Upper end of the one-sided bootstrap interval of a mean over examples, (n,) -> a number; `prompts` as for `resample`."""
    return float(resample(values.double().cpu(), prompts=prompts, resamples=resamples, seed=seed).nanmean(-1).quantile(confidence))


def resample(values: Tensor, *, prompts: Sequence[int] | None = None, resamples: int = 2000, seed: int = 0) -> Tensor:
    """Bootstrap resamples of examples, (n,) -> (resamples, n or more); the same ones for values of as many examples.

    Args:
        prompts: of which prompt each example is, by number: examples of one are drawn together, and the gaps that this leaves are NaN. By
            default each is of its own.
    """
    own = range(len(values)) if prompts is None else prompts
    places: dict[int, list[int]] = {}
    for place, prompt in enumerate(own):
        places.setdefault(prompt, []).append(place)
    most = max(map(len, places.values()))
    of_prompt = torch.tensor([[*of_one, *[-1] * (most - len(of_one))] for of_one in places.values()])
    draws = torch.randint(len(places), (resamples, len(places)), generator=torch.Generator().manual_seed(seed))
    return torch.cat([values, values.new_full((1,), float("nan"))])[of_prompt[draws].flatten(1)]


def faithfulness(*, circuit: float, full: float, ablated: float) -> float | None:
    """(circuit - ablated) / (full - ablated), not clipped; None where the denominator is near 0."""
    span = full - ablated
    return None if abs(span) < 1e-3 else (circuit - ablated) / span


def _mean_logit(logits: Tensor, tokens: tuple[tuple[int, ...], ...]) -> Tensor:
    return torch.stack([logits[i, list(ids)].mean() for i, ids in enumerate(tokens)])
