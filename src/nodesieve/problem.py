"""What every method is given: a gated model, an encoded task, an ablation, and the full model's answers, which never change."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nodesieve.ablations import ABLATIONS, Ablation
from nodesieve.architectures import locate
from nodesieve.batches import Batch
from nodesieve.circuit import Circuit
from nodesieve.gated_model import GatedModel
from nodesieve.metrics import kl_divergence
from nodesieve.models import LoadedModel
from nodesieve.nodes import LevelTensors, NodeSpace
from nodesieve.tasks.base import SPLITS, SplitName, Task
from nodesieve.tasks.encode import EncodedTask, encode
from nodesieve.verify import gate


class Problem:
    """A model, a task and an ablation, with the full model's logits at the answer positions kept for each split once computed.

    Args:
        ablation: `counterfactual`, `mean` or `zero`.
        batch_size: examples a forward pass when a whole split is measured.
    """

    def __init__(self, model: GatedModel, task: EncodedTask, *, ablation: str, batch_size: int = 32) -> None:
        self.model = model
        self.task = task
        self.ablation_name = ablation
        self.batch_size = batch_size
        self.ablation: Ablation = ABLATIONS[ablation](model.record, task.splits.get("train") or next(iter(task.splits.values())))
        self._full: dict[str, Tensor] = {}

    @property
    def nodes(self) -> NodeSpace:
        return self.model.nodes

    def in_dtype(self, dtype: torch.dtype) -> Problem:
        """The same problem on a copy of the model in another dtype, to learn with; itself where that is its dtype already."""
        if dtype == self.model.model.dtype:
            return self
        model = copy.deepcopy(self.model.model).to(dtype)
        copied = GatedModel(model, locate(model, self.model.architecture.family))
        return Problem(copied, self.task, ablation=self.ablation_name, batch_size=self.batch_size)

    def full_logits(self, split: SplitName) -> Tensor:
        """Logits of the whole model at the answer position of every example, (n, V)."""
        if split not in self._full:
            self._full[split] = torch.cat([self.model.logits(batch.clean) for batch in self.task[split].batches(self.batch_size)])
        return self._full[split]

    @torch.no_grad()
    def circuit_logits(self, circuits: Sequence[Circuit], split: SplitName, *, first: int | None = None) -> Iterator[tuple[Batch, list[Tensor]]]:
        """Batch by batch, the logits of each circuit (B, V); the ablation's own pass is shared by all of them.

        Args:
            first: only so many examples of the split.
        """
        gates: list[LevelTensors] = [{k: v.to(self.model.device) for k, v in circuit.gates().items()} for circuit in circuits]
        for batch in self.task[split].batches(self.batch_size, first=first):
            values = self.ablation.values(batch)
            yield batch, [self.model.gated_logits(batch.clean, z, values) for z in gates]

    def kl(self, circuits: Sequence[Circuit], split: SplitName, *, first: int | None = None) -> list[Tensor]:
        """KL(full || circuit) of every example of a split, one (n,) tensor a circuit."""
        full = self.full_logits(split)
        rows: list[list[Tensor]] = [[] for _ in circuits]
        for batch, logits in self.circuit_logits(circuits, split, first=first):
            for row, own in zip(rows, logits, strict=True):
                row.append(kl_divergence(full[batch.index], own))
        return [torch.cat(row) for row in rows]


def make_problem(loaded: LoadedModel, task: Task, *, ablation: str, splits: Sequence[SplitName] = SPLITS) -> Problem:
    """Encode `splits` of `task` for the model's tokenizer and put both together.

    Raises:
        UserError: the task cannot be encoded, the model's family is not known, or the ablation needs prompts that are not there.
    """
    context = getattr(loaded.model.config, "max_position_embeddings", None)
    needed = [split for split in SPLITS if split in splits or (split == "train" and ablation == "mean")]
    encoded = encode(task, loaded.tokenizer, aligned=ablation == "counterfactual", device=loaded.model.device, context=context, needed=needed)
    return Problem(gate(loaded.model), encoded, ablation=ablation)
