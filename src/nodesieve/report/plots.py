"""Pictures of a run as inline SVG, drawn by matplotlib without its global state: kept heads, neuron density, training curves."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from math import nan
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from nodesieve.circuit import Circuit

INK, MUTED = "#1f2933", "#b8c2cc"
LOWEST = 1e-3  # nats that a log scale shows
COLOURS = ("#1668a7", "#d9541e", "#2e8540", "#7b4ab5", "#b58900", "#c2185b", "#4a5568", "#00838f", "#8d6e63")  # as many as levels


def head_map(circuit: Circuit) -> str:
    """Layers by heads: the share of each kept head's dimensions that is kept."""
    share = circuit.masks["head_dim"].float().mean(-1)  # (L, H)
    layers, heads = share.shape
    figure = Figure(figsize=(max(3.0, 0.32 * heads + 1.6), max(2.4, 0.19 * layers + 1.0)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1, origin="lower")
    axes.set(xlabel="head", ylabel="layer")
    _integer_ticks(axes)
    figure.colorbar(image, ax=axes, label="share of its dimensions kept")
    return _svg(figure, f"Kept heads by layer: {circuit.kept('head')} of {layers * heads}")


def neuron_density(circuit: Circuit) -> str:
    """By layer, the share of MLP neurons (or experts) and of MLP outputs that is kept."""
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    axes = figure.add_subplot()
    for offset, level, colour in ((-0.2, "mlp_neuron", COLOURS[0]), (-0.2, "expert", COLOURS[3]), (0.2, "mlp_output", COLOURS[1])):
        if level not in circuit.nodes.levels:
            continue
        share: Tensor = circuit.masks[level].float().mean(-1)
        axes.bar([layer + offset for layer in range(len(share))], (100 * share).tolist(), width=0.4, color=colour, label=level)
    axes.set(xlabel="layer", ylabel="kept, %")
    axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain(axes)
    return _svg(figure, "Kept MLP neurons and outputs by layer")


def training_curves(history: Sequence[Mapping[str, Any]], budget: float, *, of: str = "KL, nats") -> str:
    """KL, or `of` what else the budget is, the open share of every level, and the controller's multiplier, over the steps."""
    steps = [row["step"] for row in history]
    figure = Figure(figsize=(6.4, 6.6), layout="constrained")
    kl_axes, open_axes, lambda_axes = figure.subplots(3, 1, sharex=True, height_ratios=(1.2, 1.4, 0.8))
    kl_axes.plot(steps, _smooth(steps, [row["kl"] for row in history]), color=COLOURS[0], label="training (smoothed)")
    binary = [(row["step"], row["kl_binary"]) for row in history if "kl_binary" in row]
    if binary:
        at, values = zip(*binary, strict=True)
        kl_axes.plot(at, _smooth(at, values, memory=0.96), color=COLOURS[2], label="training, binary circuit (smoothed)")
    seen = [(row["step"], row["validation"]["kl"]) for row in history if "validation" in row]
    kl_axes.plot(*zip(*seen, strict=True), "o-", color=COLOURS[1], markersize=3, label="validation, circuit") if seen else None
    kl_axes.axhline(budget, color=MUTED, linestyle="--", label="budget")
    kl_axes.set(ylabel=_literal(of))
    if min(row["kl"] for row in history) > -LOWEST:  # a loss of the user's may be below 0
        kl_axes.set_ylim(bottom=0)
    kl_axes.legend(frameon=False, fontsize=8)
    for colour, level in zip(COLOURS, history[-1]["open"], strict=False):
        open_axes.plot(steps, [row["open"][level] for row in history], color=colour, label=level)
    open_axes.set(ylabel="share kept", ylim=(0, 1.02))
    open_axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    lambda_axes.plot(steps, [row["lambda"] for row in history], color=INK)
    lambda_axes.set(ylabel="lambda", xlabel="step")
    for axes in (kl_axes, open_axes, lambda_axes):
        _plain(axes)
    return _svg(figure, f"Training: {of.removesuffix(', nats')}, open shares and lambda by step")


def ranking_curves(history: Sequence[Mapping[str, Any]], budget: float, *, of: str = "KL, nats") -> str:
    """KL, or `of` what else the budget is, on training examples over the steps, of a ranking's circuits of some sizes from small to large."""
    steps = [row["step"] for row in history]
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    count, logarithmic = min(5, len(history[0]["sizes"])), min(min(row["kls"]) for row in history) >= 0  # a loss of the user's may be below 0
    for number in range(count):
        share = number / max(count - 1, 1)
        places = [round(share * (len(row["sizes"]) - 1)) for row in history]  # a batch has one example in each of as many stretches of sizes
        sizes, kls = ([row[name][place] for row, place in zip(history, places, strict=True)] for name in ("sizes", "kls"))
        label = f"about {100 * sum(sizes) / len(sizes):.2g}%"
        smooth = _smooth(steps, kls, memory=0.96)
        axes.plot(steps, [max(kl, LOWEST) for kl in smooth] if logarithmic else smooth, color=COLOURS[number], label=label)
    axes.axhline(budget, color=MUTED, linestyle="--", label="budget")
    axes.set(yscale="log" if logarithmic else "linear", xlabel="step", ylabel=f"{_literal(of)} (smoothed)")
    axes.legend(frameon=False, fontsize=8, title="leaves kept", loc="center left", bbox_to_anchor=(1, 0.5))
    _plain(axes)
    return _svg(figure, f"Training: {of.removesuffix(', nats')} by step, at several sizes")


def size_curves(lines: Mapping[str, Sequence[tuple[float, float | None]]], budget: float) -> str:
    """By method, KL against the share of leaves kept, both on log scales; a gap where there is none."""
    figure = Figure(figsize=(6.8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for number, (method, points) in enumerate(lines.items()):
        shares, kls = zip(*points, strict=True)
        look = ("-" if number < len(COLOURS) else "--") + "o"
        heights = [nan if kl is None else max(kl, LOWEST) for kl in kls]
        axes.plot([100 * share for share in shares], heights, look, color=COLOURS[number % len(COLOURS)], markersize=3, label=method)
    axes.axhline(budget, color=MUTED, linestyle=":", label="budget")
    axes.set(xscale="log", yscale="log", xlabel="leaves kept, %", ylabel="KL, nats")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _plain(axes)
    return _svg(figure, "KL by share of leaves kept, by method")


def circuit_sizes(sizes: Mapping[str, tuple[float, bool]]) -> str:
    """By method, the share of leaves of its smallest circuit; pale where no circuit met the budget."""
    figure = Figure(figsize=(6.8, 0.6 + 0.32 * len(sizes)), layout="constrained")
    axes = figure.add_subplot()
    names = list(sizes)[::-1]
    axes.barh(names, [100 * sizes[name][0] for name in names], color=[COLOURS[0] if sizes[name][1] else MUTED for name in names])
    axes.set(xlabel="leaves kept, %", xlim=(0, 100))
    _plain(axes)
    return _svg(figure, "Leaves kept by the smallest circuit of each method")


def _smooth(steps: Sequence[int], values: Sequence[float], memory: float = 0.9) -> list[float]:
    """`memory`: what a value weighs after one more step."""
    out = list(values[:1])
    for (before, now), value in zip(pairwise(steps), values[1:], strict=True):
        old = memory ** (now - before)
        out.append(old * out[-1] + (1 - old) * value)
    return out


def _integer_ticks(axes: Any) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _literal(text: str) -> str:
    """As it is, where matplotlib would read a formula between dollars."""
    return text.replace("$", r"\$")


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _svg(figure: Figure, title: str) -> str:
    """An <svg> element that stands for itself in a page: no XML prologue, a title for screen readers, ids of its own."""
    stream = io.StringIO()
    with rc_context({"svg.hashsalt": title}):  # the same ids each time
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Title": title})
    text = stream.getvalue()
    svg = text[text.index("<svg") :]
    prefix = re.sub(r"\W+", "-", title.lower()).strip("-")[:24]
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
