"""The levels at which a model can be cut, coarse to fine: one row of data a level. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Level:
    """One row of the table below. `dims` names the sizes that make up the shape of the level's gates."""

    name: str
    parent: str | None
    dims: tuple[str, ...]


LEVELS: dict[str, Level] = {
    level.name: level
    for level in (
        Level(name="layer", parent=None, dims=("layers",)),
        Level(name="attention_block", parent="layer", dims=("layers",)),
        Level(name="mlp_block", parent="layer", dims=("layers",)),
        Level(name="head", parent="attention_block", dims=("layers", "heads")),
        Level(name="head_dim", parent="head", dims=("layers", "heads", "head_dim")),
        Level(name="mlp_neuron", parent="mlp_block", dims=("layers", "neurons")),
        Level(name="expert", parent="mlp_block", dims=("layers", "experts")),
        Level(name="mlp_output", parent="mlp_block", dims=("layers", "width")),
        Level(name="embedding", parent=None, dims=("embeddings",)),
    )
}
DEFAULT_LEVELS: tuple[str, ...] = tuple(name for name in LEVELS if name != "embedding")
LEAVES: tuple[str, ...] = ("head_dim", "mlp_neuron", "expert")
CHILDLESS: tuple[str, ...] = tuple(name for name in LEVELS if all(level.parent != name for level in LEVELS.values()))
