"""A frozen Hugging Face model with a gate at every node.

Hooks sit at five places: the residual stream that enters layer 0, the input of each attention output projection, each attention write,
the input of each MLP down projection, each MLP write; where a layer routes, its experts take the place of the down projection. `record`
reads what they hold; `gated_logits` replaces it by z * x + (1 - z) * a, computed as `torch.lerp(a, x, z)`, which is exact at z = 0 and z = 1.
The hooks live inside a `with` block and are gone after it, also when the model raises; the model's training mode and `requires_grad` flags
are put back as they were.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nodesieve.ablations import Activations, Corrupted, Recorder
from nodesieve.architectures import Architecture, locate, resolve
from nodesieve.batches import Tokens
from nodesieve.errors import Trying, UserError
from nodesieve.gating import Gating
from nodesieve.hooks import checkpointed, forward_as, handing_out, hooked, listening
from nodesieve.in_one import in_one, is_gated, written_out
from nodesieve.lockstep import Entered, Lockstep
from nodesieve.nodes import NodeSpace
from nodesieve.prefix import Prefix, common_start, reads_alike
from nodesieve.shrink import Cutter, Shrunk, find_cutter
from nodesieve.usage import Passes
from nodesieve.weights import dtype_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FREQUENCIES = ("inv_freq", "embed_positions")  # what transformers calls the buffers that rotate queries and keys, or ends their names with


class GatedModel:
    """Runs `model` plainly, recorded or gated; always returns logits at the answer position only.

    Args:
        model: a causal LM. It is not changed.
        architecture: where its places are; by default what its family's row in `nodesieve.families` says.

    Raises:
        UserError: no architecture is given and the family has no row.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture | None = None) -> None:
        self.model = model
        self.passes = Passes()
        self.architecture: Architecture = architecture or resolve(model)
        modules = [module for places in self.architecture.places for module in places.layer.modules()]
        self._written_out = [module for module in modules if written_out(module)]
        self._gated_mlps = [module for module in modules if is_gated(module)]
        self._takes = frozenset(inspect.signature(model.forward).parameters)
        self._cache_name = "cache" if "cache" in self._takes else "past_key_values"  # since transformers 5.24, and before

    @property
    def nodes(self) -> NodeSpace:
        return self.architecture.nodes

    @property
    def vocabulary(self) -> int:
        """How many logits a position has, those that no token of the tokenizer stands for included."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    def in_dtype(self, dtype: torch.dtype) -> GatedModel:
        """A copy in another dtype, on the same account of passes. Rotary frequencies stay as they are, as where transformers loads a checkpoint: to
        16 bits, distant positions would be others."""
        rounded = {id(p): nn.Parameter(p.detach().to(dtype, copy=True), requires_grad=p.requires_grad) for p in self.model.parameters()}
        model = copy.deepcopy(self.model, rounded).to(dtype)  # one parameter after the other, never a whole copy that is not rounded
        for own, other in zip(model.modules(), self.model.modules(), strict=True):
            own._buffers.update({name: buffer for name, buffer in other._buffers.items() if name.endswith(FREQUENCIES)})
        copied = GatedModel(model, locate(model, self.architecture.family))
        copied.passes = self.passes
        copied.cutter = replace(self.cutter, architecture=copied.architecture)  # more digits tell more
        return copied

    @torch.no_grad()
    def logits(self, tokens: Tokens) -> Tensor:
        """The model as it is: logits at each prompt's last token, (B, V) in float32 (float64 for a float64 model)."""
        self.passes.forward += len(tokens.input_ids)
        with self._frozen():
            return self._run(tokens)

    @torch.no_grad()
    def record(self, tokens: Tokens) -> Activations:
        """What the five places hold when the model reads `tokens`; each (B, T, size of the place)."""
        recorder = Recorder()
        self.passes.forward += len(tokens.input_ids)
        with self._frozen(), hooked(self.architecture.places, recorder.edit, recorder.route, rows=len(tokens.input_ids)):
            self._run(tokens)
        return recorder.seen

    def gated_logits(
        self,
        tokens: Tokens,
        gates: Mapping[str, Tensor],
        values: Activations | Corrupted,
        *,
        shrunk: Shrunk | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Logits at each prompt's last token with every node gated, (B, V) in float32; gradients flow to `gates`.

        Args:
            tokens: the clean prompts, (B, T).
            gates: a tensor in [0, 1] for each level, (*shape(level)) for one gate a node, or (B, *shape(level)) for one an example.
            values: what closed nodes hold: tensors that broadcast against (B, T, size of the place), or the corrupted prompts.
            shrunk: weights without nodes whose gates are 0, from `nodesieve.shrink`.
            recompute: keep only what enters each layer for the backward pass, and compute the layer again there (Chen et al., arXiv 1604.06174).
        """
        (logits,) = self.gated_logits_of_each(tokens, [gates], values, shrunk=[shrunk], recompute=recompute)
        return logits

    def gated_logits_of_each(
        self,
        tokens: Tokens,
        each: Sequence[Mapping[str, Tensor]],
        values: Activations | Corrupted,
        *,
        shrunk: Sequence[Shrunk | None] | None = None,
        recompute: bool = False,
    ) -> list[Tensor]:
        """`gated_logits` for several sets of gates, each with its own `shrunk`; gradients flow to the first.

        Corrupted prompts are read once. Beside them, sets without gradients share the layers below the first in which they differ; in `passes` each
        set counts as a whole.
        """
        if not each:
            return []
        gatings = [Gating(gates, self.model.dtype, own) for gates, own in zip(each, shrunk or [None] * len(each), strict=True)]
        learning, count = torch.is_grad_enabled() and gatings[0].learns, len(tokens.input_ids)
        self.passes.forward += count * (len(gatings) + (learning and recompute))
        self.passes.backward += count * learning
        if isinstance(values, Corrupted):
            if torch.equal(tokens.attention_mask, values.tokens.attention_mask):
                self.passes.forward += count * (values.held is None)
                return self._in_lockstep(tokens, gatings, values, recompute)
            values = self.record(values.tokens)
        alone = learning and self._answer_alone(tokens)
        with self._activations_in_one() if learning else nullcontext():
            first = self._gated(tokens, gatings[0], values, recompute=recompute, answer_alone=alone)
            with torch.no_grad():
                return [first, *(self._gated(tokens, gating, values, recompute=False, answer_alone=alone) for gating in gatings[1:])]

    def _gated(self, tokens: Tokens, gating: Gating, values: Activations, *, recompute: bool, answer_alone: bool) -> Tensor:
        @contextmanager
        def at_places(layers: Sequence[int] | None = None) -> Iterator[None]:
            edit, route = partial(gating.edit, values), partial(gating.route, values)
            embedding = layers is None and not gating.embedding_open
            with ExitStack() as stack:
                if gating.shrunk is not None:
                    stack.enter_context(gating.shrunk.layers(range(self.nodes.layers) if layers is None else layers, values))
                stack.enter_context(
                    hooked(
                        self.architecture.places,
                        edit,
                        route,
                        rows=len(tokens.input_ids),
                        layers=layers,
                        embedding=embedding,
                        answer_alone=answer_alone,
                    )
                )
                yield

        with self._frozen(), at_places(), self._recomputed(at_places) if recompute and torch.is_grad_enabled() else nullcontext():
            return self._run(tokens)

    def _in_lockstep(self, tokens: Tokens, gatings: Sequence[Gating], values: Corrupted, recompute: bool) -> list[Tensor]:
        layers = [places.layer for places in self.architecture.places]

        def at_places(layers: Sequence[int] | None = None) -> AbstractContextManager[None]:
            return hooked(
                self.architecture.places,
                streams.edit,
                streams.route,
                rows=len(tokens.input_ids),
                layers=layers,
                embedding=False,
                answer_alone=alone,
            )

        def anew(layer: int) -> AbstractContextManager[None]:
            return self._again(at_places([layer]))

        learning = torch.is_grad_enabled() and gatings[0].learns
        alone = learning and values.keep is None and self._answer_alone(tokens)
        with self._frozen(), torch.set_grad_enabled(learning), self._activations_in_one() if learning else nullcontext():
            if values.prefix is not None:
                prefix = values.prefix()
            else:
                prefix = self.read_prefix(tokens, values.tokens) if learning and values.keep is None else None
            if prefix is not None:
                prefix.shrunk = {gating.shrunk for gating in gatings if gating.shrunk is not None}
            start = 0 if prefix is None else prefix.get_seq_length()
            entering = self._entering(values.tokens, prefix)
            streams = Lockstep(gatings, entering, values=values, start=start, recompute=anew if recompute else None)
            with at_places(), streams.installed(layers):
                logits = [self._run(tokens, prefix)]
            with torch.no_grad():
                for which in range(len(gatings) - 1):
                    with streams.finishing(layers, which):
                        logits.append(self._run(tokens, prefix))
        return logits

    @torch.no_grad()
    def _entering(self, tokens: Tokens, prefix: Prefix | None) -> Tensor:
        """The residual stream that enters layer 0, (B, T, D)."""

        def leave(*args: Any, **kwargs: Any) -> None:
            raise Entered(args[0] if args else kwargs["hidden_states"])

        with forward_as(self.architecture.places[0].layer, leave):
            try:
                self._run(tokens, prefix)
            except Entered as entered:
                return entered.stream
        raise AssertionError("layer 0 was not called")

    def listening(self) -> AbstractContextManager[list[Any]]:
        """Inside, what each layer returns is kept, layer by layer: for `going_on`."""
        return listening([places.layer for places in self.architecture.places])

    def going_on(self, outputs: Sequence[Any]) -> AbstractContextManager[None]:
        """Inside, passes over the same prompts leave out the first layers, of which these are the outputs; those must be what they would be."""
        return handing_out([places.layer for places in self.architecture.places[: len(outputs)]], outputs)

    def start(self, clean: Tokens, corrupted: Tokens) -> int:
        """How many leading positions gated passes may leave out, since nothing differs there."""
        start, length = common_start(clean, corrupted), clean.input_ids.shape[1]
        return start if start and reads_alike(self.model.config, start, length) and self._goes_on_from_a_prefix else 0

    def read_prefix(self, clean: Tokens, corrupted: Tokens) -> Prefix | None:
        """Keys and values of the positions that gated passes may leave out; None where that saves too little."""
        start = self.start(clean, corrupted)
        with self._frozen():
            return self._read_prefix(clean, start) if start else None

    @cached_property
    def cutter(self) -> Cutter:
        """What can be cut out of the computation where nodes are closed for good; found out by trying."""
        clean, corrupted = self._random_tokens(0), self._random_tokens(1)
        values = self.record(corrupted)

        @torch.no_grad()
        def logits(gates: Mapping[str, Tensor], shrunk: Shrunk | None) -> Tensor:
            return self.gated_logits(clean, {level: z.to(self.device) for level, z in gates.items()}, values, shrunk=shrunk)

        return find_cutter(self.architecture, logits, tolerance=self.tolerance)

    @cached_property
    def _goes_on_from_a_prefix(self) -> bool:
        """Some models keep no keys and values, or position by something else than `position_ids`."""
        return self._same_logits(lambda tokens: self._run(tokens, self._read_prefix(tokens, 4)))

    @cached_property
    def _multiplies_plainly(self) -> bool:
        """Is a gated MLP of this model down(act(gate(x)) * up(x)), and nothing more?"""

        def products(tokens: Tokens) -> Tensor:
            with in_one([], self._gated_mlps):
                return self._run(tokens)

        return self._same_logits(products)

    def _answer_alone(self, tokens: Tokens) -> bool:
        """May the last layer work at the last position only? Not where answers are elsewhere, or the model minds."""
        return bool((tokens.last == tokens.input_ids.shape[1] - 1).all()) and self._broadcasts_the_last_write

    @cached_property
    def _broadcasts_the_last_write(self) -> bool:
        """Does the last layer add what it writes at one position to all of them? Experts are left out."""

        def alone(tokens: Tokens) -> Tensor:
            recorder = Recorder()
            with hooked(self.architecture.places, recorder.edit, recorder.route, rows=len(tokens.input_ids), embedding=False, answer_alone=True):
                return self._run(tokens)

        return self.architecture.places[-1].experts is None and self._same_logits(alone)

    def _same_logits(self, other: Callable[[Tokens], Tensor]) -> bool:
        """Find out by trying, on a few random tokens, whether another way to the logits gives the model's own."""
        tokens = self._random_tokens(0)
        with self._frozen(), torch.no_grad(), Trying():
            plain = self._run(tokens)
            return self.agree(other(tokens), plain)
        return False

    def _random_tokens(self, seed: int) -> Tokens:
        ids = torch.randint(min(5, self.vocabulary - 1), self.vocabulary, (2, 8), generator=torch.Generator().manual_seed(seed)).to(self.device)
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        return Tokens(input_ids=ids, attention_mask=mask)

    def agree(self, found: Tensor, expected: Tensor) -> bool:
        """Are these the same logits, as far as two ways to them may be apart?"""
        return bool((found - expected).abs().max() <= self.tolerance * expected.std())

    @property
    def tolerance(self) -> float:
        """How far two ways to the same logits may be apart, in their standard deviations."""
        return 0.1 if self.model.dtype.itemsize < 4 else 1e-3

    @torch.no_grad()
    def _read_prefix(self, tokens: Tokens, start: int) -> Prefix:
        prefix = Prefix()
        self._forward(tokens, slice(0, start), prefix, logits_to_keep=1)
        prefix.read = True
        return prefix

    def _run(self, tokens: Tokens, prefix: Prefix | None = None) -> Tensor:
        """Logits at each row's last real token; the vocabulary projection is asked for no more positions than hold one."""
        start = 0 if prefix is None else prefix.get_seq_length()
        last = tokens.last - start
        wanted = torch.unique(last)
        width = tokens.input_ids.shape[1] - start
        whole = len(wanted) == 1 and int(wanted) == width - 1  # always so under left padding
        logits = self._forward(tokens, slice(start, None), prefix, logits_to_keep=1 if whole else wanted)
        if whole:
            answer: Tensor = logits[:, -1]
        else:
            at = torch.searchsorted(wanted, last) if logits.shape[1] == len(wanted) else last
            answer = logits[torch.arange(len(last), device=last.device), at]
        self._refuse_no_numbers(answer)
        return answer.to(torch.promote_types(answer.dtype, torch.float32))

    def _refuse_no_numbers(self, logits: Tensor) -> None:
        """Elsewhere NaN stands for what an example has not, and means leave it out."""
        most = float(logits.detach().amax())
        if not most < math.inf:
            dtype = dtype_name(self.model.dtype)
            raise UserError(f"expected numbers as logits, got {most:g} in {dtype}: are they too large for it? Use bfloat16 or float32 (--dtype)")

    def _forward(self, tokens: Tokens, positions: slice, prefix: Prefix | None, *, logits_to_keep: int | Tensor) -> Tensor:
        """The model's logits at some of the `positions`, (B, n, V); what comes before them is in `prefix`, or goes there."""
        options: dict[str, Any] = {
            "logits_to_keep": logits_to_keep,
            "position_ids": tokens.position_ids[:, positions],  # models with ALiBi take none
        }
        # The last position is a strided slice, which torch would multiply as B matrices, with as many copies of the weights.
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda _module, inputs: (inputs[0].contiguous(), *inputs[1:]))
        try:
            logits: Tensor = self.model(
                input_ids=tokens.input_ids[:, positions],
                attention_mask=tokens.attention_mask[:, : positions.stop],
                use_cache=prefix is not None,
                **{self._cache_name: prefix},
                **{name: value for name, value in options.items() if name in self._takes},
            ).logits
        finally:
            hook.remove()
        return logits

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        training = [m for m in self.model.modules() if m.training]
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            for module in training:
                module.training = False
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
            for module in training:
                module.training = True

    @contextmanager
    def _recomputed(self, at_places: Callable[[Sequence[int]], AbstractContextManager[None]]) -> Iterator[None]:
        """Each layer's forward as a checkpoint. By the time that a layer is computed again the hooks are gone, so it brings its own."""

        def again(number: int) -> AbstractContextManager[None]:
            return self._again(at_places([number]))

        with ExitStack() as stack:
            for number, places in enumerate(self.architecture.places):
                stack.enter_context(forward_as(places.layer, checkpointed(places.layer.forward, partial(again, number))))
            yield

    @contextmanager
    def _activations_in_one(self) -> Iterator[None]:
        """For learning; measuring leaves the model as it is, to the bit."""
        with in_one(self._written_out, self._gated_mlps if self._multiplies_plainly else []):
            yield

    @contextmanager
    def _again(self, at_places: AbstractContextManager[None]) -> Iterator[None]:
        """What a layer needs around it to be computed again in the backward pass."""
        with self._frozen(), self._activations_in_one(), at_places:
            yield
