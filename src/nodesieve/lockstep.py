"""The corrupted prompts' pass and gated passes over the clean prompts, side by side, one layer at a time.

What closed nodes hold is there when a layer's gates ask for it and let go after the layer, so that it is never stored whole; several sets of gates
share it. The first set rides on the model's own forward pass and may carry gradients; the others follow without gradients, and their last stream is
put through the rest of the model afterwards. Sets without gradients are one stream up to the first layer in which their gates differ.

A layer is given the same masks and positions for every stream: clean and corrupted prompts must be padded alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nodesieve.ablations import Activations, Corrupted, Recorder, Routed
from nodesieve.gating import Gating
from nodesieve.hooks import checkpointed, forward_as, handing_out

Layers = Sequence[nn.Module]


class Entered(Exception):
    """Carries the stream that enters layer 0 out of a forward pass that goes no further."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream


class Lockstep:
    """The streams of one batch. `edit` and `route` are for the hooks at the model's places.

    Args:
        gatings: the first may carry gradients, the others not.
        stream: the corrupted prompts' residual stream as it enters layer 0, (B, T, D).
        values: with what is to be done with what each layer's places hold, or what they are known to hold.
        start: how many leading positions are left out.
        recompute: puts the hooks of one layer in place anew, to compute it again in the backward pass; None: what that needs is kept instead.
    """

    def __init__(
        self,
        gatings: Sequence[Gating],
        stream: Tensor,
        *,
        values: Corrupted,
        start: int,
        recompute: Callable[[int], AbstractContextManager[None]] | None,
    ) -> None:
        self._own, self._others = gatings[0], gatings[1:]
        self._corrupted = stream
        self._keep, self._known, self._start = values.keep, values.held, start
        self._recompute = recompute
        self._held = Recorder()  # of the layer at hand
        self._at_work: Gating | None = None  # None: the corrupted stream
        self._streams: list[Tensor] = []
        self._raw: list[Any] = []

    def edit(self, place: str, layer: int, x: Tensor) -> Tensor:
        return self._held.edit(place, layer, x) if self._at_work is None else self._at_work.edit(self._held.seen, place, layer, x)

    def route(self, layer: int, routed: Routed) -> tuple[Tensor, Tensor | None]:
        return self._held.route(layer, routed) if self._at_work is None else self._at_work.route(self._held.seen, layer, routed)

    @contextmanager
    def installed(self, layers: Layers) -> Iterator[None]:
        """The layers' forward passes advance all streams."""
        with ExitStack() as stack:
            for number, layer in enumerate(layers):
                stack.enter_context(forward_as(layer, partial(self._advance, number, layer.forward)))
            yield

    def finishing(self, layers: Layers, which: int) -> AbstractContextManager[None]:
        """The layers' forward passes hand out the last stream of one of the other gatings, whatever enters."""
        return handing_out(layers, [self._raw[which]] * len(layers))

    def _advance(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        if number == 0:
            at_start = Activations(embedding=self._corrupted)

            def entering(gating: Gating, stream: Tensor) -> Tensor:
                return stream if gating.embedding_open else gating.edit(at_start, "embedding", 0, stream)

            stream = hidden.detach() if torch.is_grad_enabled() else hidden
            hidden, self._streams = entering(self._own, hidden), [entering(gating, stream) for gating in self._others]

        def run(hidden: Tensor) -> Any:
            return forward(hidden, *rest, **kwargs)

        def gated(gating: Gating, hidden: Tensor) -> Any:
            self._at_work = gating
            with gating.shrunk.layers([number], self._held.seen) if gating.shrunk else nullcontext():
                return run(hidden)

        def both(hidden: Tensor, corrupted: Tensor) -> tuple[Any, Tensor]:
            self._held = Recorder()
            if self._known is not None:
                self._held.seen, after = self._known(number, self._start), corrupted
            else:
                self._at_work = None
                with torch.no_grad():
                    after = stream_of(run(corrupted))
                if self._keep is not None:
                    self._held.seen = self._keep(number, self._held.seen)
            return gated(self._own, hidden), after

        if self._recompute is not None and torch.is_grad_enabled():
            recompute = self._recompute
            output, after = checkpointed(both, lambda: recompute(number))(hidden, self._corrupted)
        else:
            output, after = both(hidden, self._corrupted)
        done = [] if torch.is_grad_enabled() else [(self._own, hidden, output)]
        self._raw = []
        for gating, stream in zip(self._others, self._streams, strict=True):
            raw = next((raw for other, entered, raw in done if entered is stream and gating.same_at(number, other)), None)
            if raw is None:
                with torch.no_grad():
                    raw = gated(gating, stream)
                done.append((gating, stream, raw))
            self._raw.append(raw)
        self._streams = [stream_of(raw) for raw in self._raw]
        self._corrupted = after
        self._held = Recorder()
        return output


def stream_of(output: Any) -> Tensor:
    """The residual stream in what a layer returns."""
    stream: Tensor = output[0] if isinstance(output, tuple) else output
    return stream
