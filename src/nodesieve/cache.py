"""What does not change over a run, kept from one epoch to the next: corrupted activations and the full model's answers on training examples.

Both lie in a temporary file, activations in 16 bits, and are read and written a layer at a time, so that what lies in memory is one layer's of one
batch. An example is filled in the first time that it comes up, in the pass that computes it anyway. Where each example comes up less than twice
nothing is kept; where activations would need more than the limit, and for experts, only answers are.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from nodesieve.ablations import LAYER_PLACES, Activations, Corrupted
from nodesieve.batches import Batch
from nodesieve.config import DiscoverConfig
from nodesieve.problem import Problem

GIGABYTE = 10**9
ANSWER = torch.float32


class TrainingCache:
    """The training split's answers and ablation values, batch by batch, computed or remembered.

    Args:
        problem: its model computes what is not there yet.
        config: `cache_limit`, and how often each example will come up.
        directory: where the file goes, which has no name and is gone with the process; by default the system's place for temporary files.
    """

    def __init__(self, problem: Problem, config: DiscoverConfig, directory: Path | None = None) -> None:
        self._problem = problem
        nodes, self._split = problem.nodes, problem.task["train"]
        self._dtype = torch.float16 if problem.model.model.dtype == torch.float16 else torch.bfloat16
        widths = {"heads": nodes.heads * nodes.head_dim, "attention_write": nodes.width, "neurons": nodes.neurons, "mlp_write": nodes.width}
        self._widths = [widths[place] for place in LAYER_PLACES]
        self._with_embedding = "embedding" in config.levels
        self._vocabulary: int = problem.model.model.get_output_embeddings().weight.shape[0]
        answers = len(self._split) * self._answer_bytes
        self._starts, end = [], answers
        for example in self._split.examples:
            self._starts.append(end)
            end += len(example.clean) * self._token_bytes
        place = directory or Path(tempfile.gettempdir())
        limit = min(config.cache_limit * GIGABYTE, shutil.disk_usage(place).free / 2)
        comes_again = 2 * len(self._split) <= config.steps * config.batch_size
        self._keeps_answers = comes_again and answers <= limit
        self._keeps_values = comes_again and end <= limit and not nodes.experts
        self._answered, self._filled = (torch.zeros(len(self._split), dtype=torch.bool) for _ in range(2))
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
        if bool(self._filled[batch.index.cpu()].all()):
            return self._remembered(batch, self._problem.model.start(batch.clean, values.tokens))
        return Corrupted(tokens=values.tokens, keep=partial(self._keep, batch))

    @property
    def _token_bytes(self) -> int:
        layers = self._problem.nodes.layers * sum(self._widths) + self._with_embedding * self._problem.nodes.width
        return layers * self._dtype.itemsize

    @property
    def _answer_bytes(self) -> int:
        return self._vocabulary * ANSWER.itemsize

    def _place(self, i: int, layer: int) -> int:
        """Where the block of an example's layer begins; the embedding's comes after the last layer's."""
        number = self._problem.nodes.layers if layer == -1 else layer
        length = len(self._split.examples[i].clean)
        return self._starts[i] + number * length * sum(self._widths) * self._dtype.itemsize

    def _rows(self, batch: Batch) -> Iterator[tuple[int, int, slice]]:
        """(row of the batch, example, its real tokens' places)."""
        width = batch.clean.input_ids.shape[1]
        for row, i in enumerate(batch.index.tolist()):
            length = len(self._split.examples[i].clean)
            yield row, i, slice(width - length, width) if self._split.padding_side == "left" else slice(0, length)

    def _keep(self, batch: Batch, layer: int, seen: Activations) -> None:
        if layer == -1:
            if not self._with_embedding:
                return
            assert seen.embedding is not None
            block = seen.embedding
        else:
            block = torch.cat([getattr(seen, place)[layer] for place in LAYER_PLACES], -1)
        block = block.to("cpu", self._dtype)
        for row, i, real in self._rows(batch):
            if not self._filled[i]:
                self._write(self._place(i, layer), block[row, real])
        if layer == self._problem.nodes.layers - 1:
            self._filled[batch.index.cpu()] = True

    def _remembered(self, batch: Batch, start: int) -> Activations:
        dtype = self._problem.model.model.dtype
        latest: dict[int, tuple[Tensor, ...]] = {}

        def read(which: int, layer: int) -> Tensor:
            if layer not in latest:
                latest.clear()  # first, so that no two layers are held at once
                latest[layer] = self._block(batch, layer, sum(self._widths), start).split(self._widths, -1)  # type: ignore[no-untyped-call]
            return latest[layer][which].to(dtype)

        embedding = self._block(batch, -1, self._problem.nodes.width, start).to(dtype) if self._with_embedding else None
        return Activations(start=start, embedding=embedding, **{place: _ByLayer(partial(read, which)) for which, place in enumerate(LAYER_PLACES)})

    def _block(self, batch: Batch, layer: int, width: int, start: int) -> Tensor:
        """A layer's activations of a batch from position `start` on, (B, T - start, width)."""
        size, positions = batch.clean.input_ids.shape
        block = torch.zeros(size, positions - start, width, dtype=self._dtype)
        for row, i, real in self._rows(batch):
            left_out = max(0, start - real.start)
            place = self._place(i, layer) + left_out * width * self._dtype.itemsize
            self._read(place, block[row, max(0, real.start - start) : real.stop - start])
        return block.to(batch.index.device)

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


def _as_bytes(x: Tensor) -> memoryview:
    return memoryview(x.view(torch.uint8).numpy().data).cast("B")


class _ByLayer(Mapping[int, Tensor]):
    """Looks like a dict of tensors; each is read when it is asked for, and not kept."""

    def __init__(self, read: Callable[[int], Tensor]) -> None:
        self._read = read

    def __getitem__(self, layer: int) -> Tensor:
        return self._read(layer)

    def __iter__(self) -> Iterator[int]:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError
