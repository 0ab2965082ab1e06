"""What every method is given: a gated model, an encoded task, an ablation, and the full model's answers, which never change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from nodesieve.ablations import ABLATIONS, Ablation, Activations, Corrupted
from nodesieve.batches import Batch, EncodedExample, Split, mix, order_of
from nodesieve.circuit import Circuit
from nodesieve.config import DiscoverConfig
from nodesieve.errors import UserError
from nodesieve.gated_model import GatedModel
from nodesieve.metrics import kl_divergence, logit_difference, upper_bound
from nodesieve.models import LoadedModel, learning_dtype
from nodesieve.nodes import NodeSpace
from nodesieve.shrink import Shrunk
from nodesieve.tasks.base import SPLITS, Example, SplitName, Task
from nodesieve.tasks.encode import EncodedTask, Encoding, encode
from nodesieve.verify import gate

Loss = Callable[[Tensor, Batch], Tensor]  # logits at the answer (B, V), batch -> (B,), lower is better
Values = Callable[[Batch], Activations | Corrupted]  # what closed nodes hold for a batch
Remember = Callable[["Problem", SplitName, bool], Values]  # the same of a split, computed or remembered; exactly, or for looks
MEASURED = 4  # times the batch size of a step, where no gradients are wanted: at least
WIDEST = 2**27  # bytes of the largest tensor of a layer, or of logits: on a GPU, which else waits for Python, as many examples as that allows
CONTEXT = ("max_position_embeddings", "max_seq_len")  # what configs call the longest prompt, in tokens
QUICK = 128  # validation examples that are enough for a first look
CHANCE_EXAMPLES = 256
CHANCE = 0.55  # accuracy of the full model below which there is no behaviour to find a circuit of


class Problem:
    """A model, a task and an ablation, with the full model's logits at the answer positions kept for each split once computed.

    Args:
        ablation: `counterfactual`, `mean` or `zero`.
        loss: what a circuit is to keep low, instead of KL(full || circuit).
        batch_size: examples a forward pass where no gradients are wanted.

    Attributes:
        within: a circuit that a search is to stay within, where one is set.
        remember: what `looks` and `measured` ask for the values of a split when they first need them, where that is set.
    """

    def __init__(self, model: GatedModel, task: EncodedTask, *, ablation: str, loss: Loss | None = None, batch_size: int = 32) -> None:
        self.model = model
        self.task = task
        self.ablation_name = ablation
        self.batch_size = batch_size
        self.ablation: Ablation = ABLATIONS[ablation](model.record, task.splits.get("train") or next(iter(task.splits.values())))
        self.within: Circuit | None = None
        self._loss = loss
        self._full: dict[str, Tensor] = {}
        self._copies: dict[torch.dtype, Problem] = {}
        self.remember: Remember | None = None
        self._remembered: dict[tuple[SplitName, bool], Values] = {}

    @property
    def nodes(self) -> NodeSpace:
        return self.model.nodes

    def in_dtype(self, dtype: torch.dtype) -> Problem:
        """The same problem on a copy of the model in another dtype, to learn with, made once; itself where that is its dtype already."""
        if dtype == self.model.model.dtype:
            return self
        if dtype not in self._copies:
            model = self.model.in_dtype(dtype)
            self._copies[dtype] = Problem(model, self.task, ablation=self.ablation_name, loss=self._loss, batch_size=self.batch_size)
            self._copies[dtype].within, self._copies[dtype].remember = self.within, self.remember
        return self._copies[dtype]

    def learner(self, config: DiscoverConfig) -> Problem:
        """The same problem on the copy that `config` asks to learn and to look with."""
        return self.in_dtype(learning_dtype(config, self.model.model))

    @property
    def keeps_kl_low(self) -> bool:
        """Is what a circuit is to keep low the KL, which is never below 0? A loss of the user's may be."""
        return self._loss is None

    def objective(self, full: Tensor, logits: Tensor, batch: Batch) -> Tensor:
        """What a circuit is to keep low, (B, V), (B, V) -> (B,): KL(full || circuit), or the user's loss."""
        if self._loss is None:
            return kl_divergence(full, logits)
        found = self._loss(logits, batch)
        if not isinstance(found, Tensor) or (logits.requires_grad and not found.requires_grad):
            got = "one without" if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"expected a loss that gives a tensor with a gradient to the logits, got {got}")
        if found.shape != logits.shape[:1]:
            raise UserError(f"expected a loss that gives one number an example, shape {tuple(logits.shape[:1])}, got shape {tuple(found.shape)}")
        if not bool(found.isfinite().all()):
            raise UserError(f"expected a loss that gives finite numbers, got {found.detach().flatten()[:4].tolist()}, ...")
        return found

    def upper_bound(self, kl: Tensor) -> float:
        """Upper end of the one-sided interval of the mean over the first validation examples, (n,) -> nats: what the budget is held against."""
        return upper_bound(kl, prompts=self.task["validation"].prompts[: len(kl)])

    def full_logits(self, split: SplitName) -> Tensor:
        """Logits of the whole model at the answer position of every example, (n, V)."""
        if split not in self._full:
            examples, kept = self.task[split], None
            for batch in examples.batches(self.batch_size):
                logits = self.model.logits(batch.clean)
                kept = logits.new_empty(len(examples), logits.shape[-1]) if kept is None else kept  # at once, and once
                kept[batch.index] = logits
            assert kept is not None
            self._full[split] = kept
        return self._full[split]

    @torch.no_grad()
    def circuit_logits(
        self,
        circuits: Sequence[Circuit],
        split: SplitName,
        *,
        first: int | None = None,
        skip: int = 0,
        cut: bool = False,
        values: Values | None = None,
    ) -> Iterator[tuple[Batch, list[Tensor]]]:
        """Batch by batch, the logits of each circuit (B, V); the ablation's own pass is shared by all of them.

        Args:
            first: only so many examples of the split.
            skip: not so many at its start.
            cut: leave what a circuit has closed out of the computation, which is faster and differs by float error.
            values: what closed nodes hold; by default the ablation's own.
        """
        values = values or self.ablation.values
        shrunk = [self.cut(circuit.masks, keep=False) for circuit in circuits] if cut else None
        gates = [circuit.gates(device=self.model.device) for circuit in circuits]
        for batch in self.task[split].batches(self.batch_size, first=first, skip=skip):
            yield batch, self.model.gated_logits_of_each(batch.clean, gates, values(batch), shrunk=shrunk)

    def losses(
        self,
        circuits: Sequence[Circuit],
        split: SplitName,
        *,
        first: int | None = None,
        skip: int = 0,
        cut: bool = False,
        values: Values | None = None,
    ) -> list[Tensor]:
        """The objective of every example of a split, one (n,) tensor a circuit; infinite where one overflows. Arguments as for `circuit_logits`."""
        full = self.full_logits(split)
        rows: list[list[Tensor]] = [[] for _ in circuits]
        batches = []
        for batch, logits in self.circuit_logits(circuits, split, first=first, skip=skip, cut=cut, values=values):
            batches.append(batch)
            for row, own in zip(rows, logits, strict=True):
                row.append(self.objective(full[batch.index], own, batch).nan_to_num(math.inf, math.inf))
        return [torch.cat(row)[order_of(batches)] for row in rows]

    def looks(self, circuits: Sequence[Circuit], split: SplitName, *, first: int | None = None, skip: int = 0) -> list[Tensor]:
        """`losses` by the fastest way, on the CPU, to compare circuits: cut, and with what is remembered of the split, to 16 bits. Not for numbers to
        report."""
        values = self._remembered_of(split, exactly=False)
        return [kl.cpu() for kl in self.losses(circuits, split, first=first, skip=skip, cut=True, values=values)]

    def measured(self, circuits: Sequence[Circuit], split: SplitName) -> list[Tensor]:
        """`losses` of circuits that are measured one after another: cut, and with what is remembered of the split, in the model's own dtype."""
        return self.losses(circuits, split, cut=True, values=self._remembered_of(split, exactly=True))

    def _remembered_of(self, split: SplitName, *, exactly: bool) -> Values | None:
        if self.remember is not None and (split, exactly) not in self._remembered:
            self._remembered[split, exactly] = self.remember(self, split, exactly)
        return self._remembered.get((split, exactly))

    def cut(self, alive: Mapping[str, Tensor], *, keep: bool = True) -> Shrunk:
        """The model's weights without heads and neurons of which nothing is `alive`, bool masks by level with closed parents' children closed.

        Args:
            keep: as for `Shrunk`.
        """
        neurons = alive["mlp_neuron"] & alive["mlp_output"].any(-1, keepdim=True)
        return self.model.cutter.cut(alive["head_dim"].any(-1), neurons, keep=keep)


def make_problem(
    loaded: LoadedModel, task: Task, config: DiscoverConfig, *, splits: Sequence[SplitName] = SPLITS, loss: Loss | None = None
) -> Problem:
    """Encode `splits` of `task` for the model's tokenizer and put both together.

    Raises:
        UserError: the task cannot be encoded, the model cannot be gated, or the ablation needs prompts that are not there.
    """
    ablation = ABLATIONS[config.ablation]
    text_config = loaded.model.config.get_text_config()
    encoded = encode(
        task,
        loaded.tokenizer,
        aligned=ablation.aligned,
        device=loaded.model.device,
        context=next((found for name in CONTEXT if (found := getattr(text_config, name, None))), None),
        vocabulary=text_config.vocab_size,
        needed=[split for split in SPLITS if split in splits or (split == "train" and ablation.averaged)],
        encoding=Encoding(**{field.name: getattr(config, field.name) for field in fields(Encoding)}),
    )
    encoded = replace(encoded, metrics=tuple(dict.fromkeys((*encoded.metrics, *config.metrics))))
    model = gate(loaded.model)
    if config.only_correct:
        encoded = _only_correct(model, encoded)
    if config.bootstrap and "train" in encoded.splits:
        encoded = replace(encoded, splits={**encoded.splits, "train": _resampled(encoded["train"], config.seed)})
    problem = Problem(model, encoded, ablation=config.ablation, loss=loss, batch_size=_measured_at_once(model, encoded, config))
    if not config.force:
        _refuse_chance(problem)
    return problem


def _measured_at_once(model: GatedModel, task: EncodedTask, config: DiscoverConfig) -> int:
    """Examples a forward pass where no gradients are wanted."""
    least = MEASURED * config.batch_size
    if model.device.type != "cuda":
        return least
    longest = max(len(example.clean) for split in task.splits.values() for example in split.examples)
    of_a_place = longest * max(model.nodes.place_widths.values()) * model.model.dtype.itemsize
    most: int = WIDEST // max(of_a_place, model.vocabulary * torch.float32.itemsize)
    return max(least, most)


def _resampled(split: Split, seed: int) -> Split:
    """As many prompts, drawn with replacement, with all examples of each."""
    by_prompt: dict[int, list[EncodedExample]] = {}
    for example in split.examples:
        by_prompt.setdefault(example.prompt, []).append(example)
    prompts = list(by_prompt.values())
    drawn = torch.randint(len(prompts), (len(prompts),), generator=torch.Generator().manual_seed(mix(seed, 17)))
    return replace(split, examples=tuple(example for i in drawn.tolist() for example in prompts[i]))


def refuse_lacking(examples: Sequence[Example | EncodedExample], config: DiscoverConfig) -> None:
    """Raise UserError where a training example lacks what the method, or an option, cannot do without."""
    for part, what in config.needs.items():
        if not all(getattr(example, part) for example in examples):
            instead = "set it to 0" if what.startswith("--") else "take another method"
            why = f"; add them, or {instead}"
            if config.answer_tokens == "all":
                why = f" (as the further tokens of an answer are with --answer-tokens all); take --answer-tokens first, or {instead}"
            raise UserError(f"{what} expects {part} in every training example, got some without{why}")


def _only_correct(model: GatedModel, task: EncodedTask) -> EncodedTask:
    """The examples that the full model gets right, in every split alike."""
    splits, skipped = {}, {}
    for name, split in task.splits.items():
        if not all(example.distractors for example in split.examples):
            raise UserError(
                f"--only-correct, an option of the run, expects distractors in every example, got some without in the {name} split (as the further "
                "tokens of an answer are with --answer-tokens all)"
            )
        right: list[int] = []
        for batch in split.batches(32):
            chosen = batch.index[logit_difference(model.logits(batch.clean), batch) > 0]
            right += chosen.tolist()
        if len(right) < 2:
            raise UserError(
                f"--only-correct, an option of the run, expects at least 2 {name} examples that the full model gets right, got {len(right)} of "
                f"{len(split)}"
            )
        splits[name] = replace(split, examples=tuple(split.examples[i] for i in sorted(right)))
        skipped[name] = {**task.skipped[name], "full_model_wrong": len(split) - len(right)}
    return replace(task, splits=splits, skipped=skipped)


def _refuse_chance(problem: Problem) -> None:
    """Raise UserError where the full model does not do the task, going by up to `CHANCE_EXAMPLES` examples, those of validation data first."""
    task, model = problem.task, problem.model
    right: list[bool] = []
    for name in ("validation", "train", "test"):
        if name not in task.splits:
            continue
        for batch in task.splits[name].batches(problem.batch_size, first=CHANCE_EXAMPLES - len(right)):
            logits = problem.full_logits(name)[batch.index] if name == "validation" else model.logits(batch.clean)  # validation's are kept
            difference = logit_difference(logits, batch)
            right += (difference[~difference.isnan()] > 0).tolist()  # not of examples without distractors
    accuracy = sum(right) / max(1, len(right))
    if right and accuracy < CHANCE:
        raise UserError(
            f"expected a full model that does the task, got an accuracy of {accuracy:.2f} on {len(right)} examples such as {task.shown[0]}; "
            "likely reasons: token ids made for another tokenizer, answers without their leading space, a task too hard for this model. "
            "--force goes on all the same"
        )


def as_counts(task: EncodedTask) -> Mapping[str, Mapping[str, int]]:
    """By split: examples used, and skipped for each reason."""
    skipped = {name: {f"skipped_{why}": count for why, count in reasons.items()} for name, reasons in task.skipped.items()}
    return {name: {"used": len(split), **skipped[name]} for name, split in task.splits.items()}


def counts_in_words(counts: Mapping[str, int]) -> str:
    """Of one split, from `as_counts`."""
    left_out = [f"{count} {why.replace('_', ' ')}" for why, count in counts.items() if why != "used" and count]
    return ", ".join([f"{counts['used']} examples", *left_out])
