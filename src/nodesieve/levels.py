"""The levels at which a model can be cut, coarse to fine: one row of data a level. Imports no torch."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Level:
    """One row of the table below.

    Attributes:
        dims: names of the sizes that make up the shape of the level's gates.
        needs: groups of levels below; a node of which one group has nothing open is closed.
    """

    name: str
    parent: str | None
    dims: tuple[str, ...]
    needs: tuple[tuple[str, ...], ...] = ()


LEVELS: dict[str, Level] = {
    level.name: level
    for level in (
        Level(name="layer", parent=None, dims=("layers",), needs=(("attention_block", "mlp_block"),)),
        Level(name="attention_block", parent="layer", dims=("layers",), needs=(("head",),)),
        Level(name="mlp_block", parent="layer", dims=("layers",), needs=(("mlp_neuron", "expert"), ("mlp_output",))),
        Level(name="head", parent="attention_block", dims=("layers", "heads"), needs=(("head_dim",),)),
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


def above(level: str) -> Iterator[str]:
    """The levels that a level's nodes lie in, from the nearest up."""
    parent = LEVELS[level].parent
    while parent is not None:
        yield parent
        parent = LEVELS[parent].parent


def nearest(level: str, among: Container[str]) -> str | None:
    """Itself or the nearest level that its nodes lie in, of those that are `among`."""
    return next((name for name in (level, *above(level)) if name in among), None)


def measured(levels: Sequence[str], there: Sequence[str]) -> list[str]:
    """The levels without children to measure, of those that are `there`, where `levels` are to be scored: those among them; and in a block in
    which none of them is, all, since what lies above is scored by what lies below. Where some layers have experts and others have none, that holds
    for blocks of either kind. The embedding only if asked for."""
    found = [level for level in CHILDLESS if level in levels and level in there]
    for block in ("attention_block", "mlp_block"):
        own = [level for level in CHILDLESS if level in there and block in above(level)]
        found += own if not set(own) & set(found) else []
    for kind, other in (("mlp_neuron", "expert"), ("expert", "mlp_neuron")):
        found += [kind] if kind in there and other in found and "mlp_output" not in found else []
    return [level for level in CHILDLESS if level in found]
