"""A run's circuit in the files of other tools.

`mib`: the JSON of the Mechanistic Interpretability Benchmark (Mueller et al., arXiv 2504.13151) for node circuits: `cfg` (n_layers, n_heads,
parallel_attn_mlp, d_model), `nodes` (`input`, `a{layer}.h{head}`, `m{layer}`, each with `in_graph` and, but for `input`, `score`), `edges` (none).
Its nodes are heads and MLPs, so what is finer is left out. A score is that of the whole where the method gives one, and else the threshold at which
the node closes, be it with what lies above it or with the last of what lies below; where some are negative, all are raised so that the lowest is 0,
since the benchmark's loaders may rank by absolute value.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nodesieve.circuit import Circuit
from nodesieve.errors import UserError
from nodesieve.scores import Scores, standing_of_parts

_NODE = re.compile(r"a(?P<layer>\d+)\.h(?P<head>\d+)|m(?P<mlp>\d+)|input|logits")


@dataclass(frozen=True, kw_only=True)
class MibCircuit:
    """Heads and MLPs: `in_graph` and `scores` by level (`head` (L, H), `mlp_block` (L,)); sizes as in the file."""

    layers: int
    heads: int
    width: int
    parallel: bool
    in_graph: dict[str, Tensor]
    scores: dict[str, Tensor]


def to_mib(circuit: Circuit, scores: Scores, *, parallel: bool) -> dict[str, Any]:
    """The content of the file.

    Args:
        parallel: attention and MLP of a layer read the same stream.
    """
    nodes = circuit.nodes
    ranking = standing_of_parts(scores)
    head, mlp = ranking["head"], ranking["mlp_block"]
    if bool(head.isinf().any()) or bool(mlp.isinf().any()):
        raise UserError(f"--format mib expects scores of heads and of MLP blocks or what is above them, got those of {', '.join(scores.levels)}")
    lowest = min(0.0, float(head.min()), float(mlp.min()))
    head, mlp = head - lowest, mlp - lowest
    listed: dict[str, dict[str, Any]] = {"input": {"in_graph": bool(circuit.masks["embedding"].all())}}
    for layer in range(nodes.layers):
        for number in range(nodes.heads):
            kept = bool(circuit.masks["head"][layer, number])
            listed[f"a{layer}.h{number}"] = {"in_graph": kept, "score": float(head[layer, number])}
        listed[f"m{layer}"] = {"in_graph": bool(circuit.masks["mlp_block"][layer]), "score": float(mlp[layer])}
    cfg = {"n_layers": nodes.layers, "n_heads": nodes.heads, "parallel_attn_mlp": parallel, "d_model": nodes.width}
    return {"cfg": cfg, "nodes": listed, "edges": {}}


def read_mib(path: str | Path) -> MibCircuit:
    """Read such a file, of ours or another tool's; nodes that it leaves out are out of the graph and score 0.

    Raises:
        UserError: it is no such file.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        cfg = content["cfg"]
        layers, heads, width = (int(cfg[name]) for name in ("n_layers", "n_heads", "d_model"))
        in_graph = {"head": torch.zeros(layers, heads, dtype=torch.bool), "mlp_block": torch.zeros(layers, dtype=torch.bool)}
        scores = {level: torch.zeros(mask.shape) for level, mask in in_graph.items()}
        for name, node in content["nodes"].items():
            match = _NODE.fullmatch(name)
            if match is None:
                raise UserError(f"expected nodes named input, a0.h0, m0 or logits in {str(path)!r}, got {name!r}")
            if match["layer"] is None and match["mlp"] is None:
                continue
            level, index = ("head", (int(match["layer"]), int(match["head"]))) if match["mlp"] is None else ("mlp_block", (int(match["mlp"]),))
            if not isinstance(node["in_graph"], bool | int):
                raise UserError(f"expected in_graph of {name} to be true or false in {str(path)!r}, got {node['in_graph']!r}")
            in_graph[level][index] = bool(node["in_graph"])
            scores[level][index] = float(node.get("score", 0.0))
        return MibCircuit(layers=layers, heads=heads, width=width, parallel=bool(cfg["parallel_attn_mlp"]), in_graph=in_graph, scores=scores)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"expected a file {str(path)!r}, could not read it: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        raise UserError(f"expected a node circuit of the Mechanistic Interpretability Benchmark in {str(path)!r}, got {error!r}") from error
