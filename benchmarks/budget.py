"""What a step holds in memory for models of 1, 8 and 70 billion parameters, by part, in bfloat16: arithmetic from shapes, checked against autograd.

What a layer keeps for its backward pass is counted on a model of the same proportions and a sixteenth of the widths, by looking at the tensors
that autograd saves in a step with all levels on; it grows in proportion to the widths (attention keeps no matrix of positions by positions).

    python benchmarks/budget.py         # writes results/budget.md; seconds
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import provenance, versions
from step import HERE
from transformers import AutoConfig, AutoModelForCausalLM

from nodesieve.ablations import Corrupted
from nodesieve.batches import Tokens
from nodesieve.gated_model import GatedModel

SCALE = 16
VOCABULARY = 128_256
CARDS = (12, 16, 24, 40, 48, 80, 141, 192)  # GB of memory that cards are sold with


@dataclass(frozen=True, kw_only=True)
class Shape:
    name: str
    layers: int
    width: int
    neurons: int
    heads: int
    groups: int
    tied: bool = False

    @property
    def parameters(self) -> int:
        attention = 2 * self.width**2 + 2 * self.width * (self.width // self.heads) * self.groups
        return self.layers * (attention + 3 * self.width * self.neurons) + (1 if self.tied else 2) * VOCABULARY * self.width

    @property
    def gates(self) -> int:
        return self.layers * (3 + self.heads + 2 * self.width + self.neurons)


SHAPES = (
    Shape(name="1B", layers=16, width=2048, neurons=8192, heads=32, groups=8, tied=True),
    Shape(name="8B", layers=32, width=4096, neurons=14336, heads=32, groups=8),
    Shape(name="70B", layers=80, width=8192, neurons=28672, heads=64, groups=8),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "budget.md")
    options = parser.parse_args()
    lines = [
        "| model | mode | weights | for the backward pass | gates and Adam | logits | in all, GB | fits a card of |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        weights = 2 * shape.parameters
        layer = SCALE * saved_by_a_layer(shape, options.batch, options.length)
        streams = 2 * 2 * options.batch * options.length * shape.width
        gates = shape.gates * (4 * 4 + options.batch * (4 + 4 + 2 + 2))  # log_alpha, gradient, Adam; each example's gates and their gradient
        logits = 4 * 4 * options.batch * VOCABULARY  # full and gated, in float32, and what the loss makes of them
        for mode, kept in (("default", shape.layers * layer), ("low", shape.layers * streams + layer)):
            total = weights + kept + gates + logits
            card = next((f"{card} GB" for card in CARDS if total < 0.95e9 * card), "several")
            cells = " | ".join(f"{part / 1e9:.2f}" for part in (weights, kept, gates, logits, total))
            lines.append(f"| {shape.name} | {mode} | {cells} | {card} |")
    text = "\n".join([*lines, "", f"Batch {options.batch} x {options.length} tokens, bfloat16. {provenance({'versions': versions()})}"]) + "\n"
    options.out.write_text(text, "utf-8")
    print(text)


def saved_by_a_layer(shape: Shape, batch: int, length: int) -> int:
    """Bytes that one more layer keeps for the backward pass, at a sixteenth of the widths."""
    two, three = (saved(model_of(shape, layers), batch, length) for layers in (2, 3))
    return three - two


def model_of(shape: Shape, layers: int) -> Any:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=shape.width // SCALE,
        intermediate_size=shape.neurons // SCALE,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        head_dim=shape.width // shape.heads // SCALE,
        vocab_size=512,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval().requires_grad_(False)


def saved(model: Any, batch: int, length: int) -> int:
    """Bytes of all tensors, but for weights, that autograd keeps after a gated forward pass."""
    gated = GatedModel(model)
    clean, corrupted = torch.randint(5, 500, (2, batch, length), generator=torch.Generator().manual_seed(0))
    tokens, other = (Tokens(input_ids=ids, attention_mask=torch.ones_like(ids)) for ids in (clean, corrupted))
    gates = {level: torch.rand(batch, *gated.nodes.shape(level)).requires_grad_() for level in gated.nodes.full(1.0)}
    gates["embedding"] = torch.ones(batch, 1)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}  # holding the storages keeps their addresses apart

    def look(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(look, lambda x: x):
        gated.gated_logits(tokens, gates, Corrupted(tokens=other))
    return sum(storage.nbytes() for storage in kept.values())


if __name__ == "__main__":
    main()
