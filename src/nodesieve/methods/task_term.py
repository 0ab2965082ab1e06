"""The optional task term: what a circuit pays where it gives the answer too small a lead, beside the KL."""

from __future__ import annotations

from torch import Tensor

from nodesieve.batches import Batch
from nodesieve.config import DiscoverConfig
from nodesieve.metrics import logit_difference


def task_term(logits: Tensor, batch: Batch, config: DiscoverConfig) -> Tensor:
    """task_weight x relu(task_margin - logit difference) of each example, (B, V) -> (B,)."""
    if config.task_weight == 0:
        return logits.new_zeros(len(logits))
    assert all(batch.distractors)
    return config.task_weight * (config.task_margin - logit_difference(logits, batch)).relu()
