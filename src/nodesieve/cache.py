"""What does not change over a run, kept from one time to the next: corrupted activations and the full model's answers on the examples of a split.

Both lie in a temporary file and are read and written a layer at a time, so that what lies in memory is one layer's of one batch. Activations are
kept in 16 bits to learn and to look with; to measure circuits on validation data one after another, in the model's own dtype. For looks, keys and
values of what the prompts of a batch begin with are kept, too. An example is filled in the first time that it comes up, in the pass that computes it
anyway. Where examples do not come again nothing is kept; where activations would need more than the limit, for experts, and on a GPU, which computes
them in less time than a file is read, only answers are.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from nodesieve.ablations import LAYER_PLACES, Activations, Corrupted, Recorder
from nodesieve.batches import Batch, Split, Tokens
from nodesieve.config import DiscoverConfig
from nodesieve.prefix import Prefix
from nodesieve.problem import Problem, Remember, Values
from nodesieve.tasks.base import SplitName

GIGABYTE = 10**9
LOOKS = 0.25  # of the limit: for validation examples in 16 bits; the rest is of training examples, later of validation examples in full
ANSWER = torch.float32
_Row = tuple[int, int, slice]  # of a batch: its row, the example, its real tokens' places


class Cache:
    """A split's answers and ablation values, batch by batch, computed or remembered.

    Args:
        problem: its model computes what is not there yet.
        split: batches' indices are into this.
        limit: bytes of disk at most; half of what is free, if that is less.
        dtype: that activations are kept in; by default 16 bits, of which those of a float16 model are like its own.
        directory: where the file goes, which has no name and is gone with the process; by default the system's place for temporary files.
        answers: keep answers, too.
        prefixes: keep keys and values of what the clean and corrupted prompts of a batch have in common, too, for batches that come again.
    """

    def __init__(
        self,
        problem: Problem,
        split: Split,
        *,
        limit: float,
        dtype: torch.dtype | None = None,
        directory: Path | None = None,
        answers: bool = True,
        prefixes: bool = False,
    ) -> None:
        self._problem, self._split = problem, split
        nodes = problem.nodes
        self._dtype = dtype or (torch.float16 if problem.model.model.dtype == torch.float16 else torch.bfloat16)
        self._widths = [nodes.place_widths[place] for place in LAYER_PLACES]
        self._vocabulary = problem.model.vocabulary
        answer_bytes = len(split) * self._answer_bytes if answers else 0
        self._starts, end = [], answer_bytes
        for example in split.examples:
            self._starts.append(end)
            end += len(example.clean) * nodes.layers * sum(self._widths) * self._dtype.itemsize
        place = directory or Path(tempfile.gettempdir())
        limit = min(limit, shutil.disk_usage(place).free / 2)
        self._keeps_answers = answers and answer_bytes <= limit
        self._keeps_values = end <= limit and not nodes.experts and problem.model.device.type != "cuda"
        self._answered, self._filled = (torch.zeros(len(split), dtype=torch.bool) for _ in range(2))
        self._prefixes: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}  # of a batch: where keys and values lie, and of what shape
        self._limit, self._end, self._keeps_prefixes = limit, end, prefixes
        self.bytes = 0  # written by now
        self._file: BinaryIO = tempfile.TemporaryFile(dir=place, buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def answers(self, batch: Batch) -> Tensor:
        """The full model's logits, (B, V)."""
        if not self._keeps_answers:
            return self._problem.model.logits(batch.clean)
        if bool(self._answered[batch.index.cpu()].all()):
            kept = torch.empty(len(batch.index), self._vocabulary, dtype=ANSWER)
            for i, row in zip(batch.index.tolist(), kept, strict=True):
                self._read(i * self._answer_bytes, row)
            return kept.to(batch.index.device)
        logits = self._problem.model.logits(batch.clean)
        for i, row in zip(batch.index.tolist(), logits, strict=True):
            if not self._answered[i]:
                self._write(i * self._answer_bytes, row.to("cpu", ANSWER))
        self._answered[batch.index.cpu()] = True
        return logits

    def values(self, batch: Batch) -> Activations | Corrupted:
        """What closed nodes hold."""
        values = self._problem.ablation.values(batch)
        if not self._keeps_values or not isinstance(values, Corrupted):
            return values
        rows = list(self._rows(batch))
        if bool(self._filled[[i for _, i, _ in rows]].all()):
            prefix = partial(self._prefix, batch, values.tokens) if self._keeps_prefixes else None
            return Corrupted(tokens=values.tokens, held=partial(self._held, batch, rows), prefix=prefix)
        return Corrupted(tokens=values.tokens, keep=partial(self._keep, rows))

    @property
    def _answer_bytes(self) -> int:
        return self._vocabulary * ANSWER.itemsize

    def _place(self, i: int, layer: int) -> int:
        """Where the block of an example's layer begins."""
        return self._starts[i] + layer * len(self._split.examples[i].clean) * sum(self._widths) * self._dtype.itemsize

    def _rows(self, batch: Batch) -> Iterator[_Row]:
        width = batch.clean.input_ids.shape[1]
        for row, i in enumerate(batch.index.tolist()):
            length = len(self._split.examples[i].clean)
            yield row, i, slice(width - length, width) if self._split.padding_side == "left" else slice(0, length)

    def _keep(self, rows: Sequence[_Row], layer: int, seen: Activations) -> Activations:
        """What is kept is what gates find the first time, too, so that a run that was stopped goes on nearly as it would have: rounding hangs on what
        other examples are in the batch that computes it."""
        block = torch.cat([getattr(seen, place)[layer] for place in LAYER_PLACES], -1).to("cpu", self._dtype)
        for row, i, real in rows:
            if not self._filled[i]:
                self._write(self._place(i, layer), block[row, real])
        if layer == self._problem.nodes.layers - 1:
            self._filled[[i for _, i, _ in rows]] = True
        return seen.map(lambda x: x.to(self._dtype).to(x.dtype))

    def _held(self, batch: Batch, rows: Sequence[_Row], layer: int, start: int) -> Activations:
        """What a layer's places hold from position `start` on."""
        size, positions = batch.clean.input_ids.shape
        width = sum(self._widths)
        block = torch.zeros(size, positions - start, width, dtype=self._dtype)
        for row, i, real in rows:
            left_out = max(0, start - real.start)
            place = self._place(i, layer) + left_out * width * self._dtype.itemsize
            self._read(place, block[row, max(0, real.start - start) : real.stop - start])
        parts = block.to(batch.index.device, self._problem.model.model.dtype).split(self._widths, -1)  # type: ignore[no-untyped-call]
        held = Recorder()
        for place, part in zip(LAYER_PLACES, parts, strict=True):
            held.edit(place, layer, part)
        return held.seen

    def _prefix(self, batch: Batch, corrupted: Tokens) -> Prefix | None:
        key = tuple(batch.index.tolist())
        if key not in self._prefixes:
            prefix = self._problem.model.read_prefix(batch.clean, corrupted)
            blocks = [] if prefix is None else prefix.tensors()
            if self._end + sum(block.nbytes for block in blocks) > self._limit:  # read each time, it would save too little
                blocks = []
            self._prefixes[key] = []
            for block in blocks:
                self._prefixes[key].append((self._end, torch.empty_like(block, device="meta")))
                self._write(self._end, block.cpu())
                self._end += block.nbytes
        blocks = [torch.empty(like.shape, dtype=like.dtype) for _, like in self._prefixes[key]]
        for (place, _), block in zip(self._prefixes[key], blocks, strict=True):
            self._read(place, block)
        return Prefix.of([block.to(batch.index.device) for block in blocks]) if blocks else None

    def _read(self, place: int, into: Tensor) -> None:
        self._file.seek(place)
        view = _as_bytes(into)
        while len(view):
            count = self._file.readinto(view)  # type: ignore[attr-defined]
            assert count
            view = view[count:]

    def _write(self, place: int, rows: Tensor) -> None:
        self._file.seek(place)
        view = _as_bytes(rows.contiguous())
        self.bytes += len(view)
        while len(view):
            view = view[self._file.write(view) :]


def remembering(config: DiscoverConfig, directory: Path | None = None) -> Remember:
    """For `Problem.remember`: each corrupted prompt is read once, to look, and once, to measure."""

    def values(problem: Problem, split: SplitName, exactly: bool) -> Values:
        dtype = problem.model.model.dtype if exactly else None
        limit = (1 - LOOKS if exactly else LOOKS) * config.cache_limit * GIGABYTE
        return Cache(problem, problem.task[split], limit=limit, dtype=dtype, directory=directory, answers=False, prefixes=not exactly).values

    return values


def training_cache(problem: Problem, config: DiscoverConfig, directory: Path | None = None) -> Cache:
    """Of the training examples, where each comes up twice or more in a run."""
    train = problem.task["train"]
    comes_again = 2 * len(train) <= config.steps * config.batch_size
    return Cache(problem, train, limit=(1 - LOOKS) * config.cache_limit * GIGABYTE if comes_again else 0.0, directory=directory)


def _as_bytes(x: Tensor) -> memoryview:
    return memoryview(x.view(torch.uint8).numpy().data).cast("B")
