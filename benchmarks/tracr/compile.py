"""Compile RASP programs to the weights in this folder, with Tracr (Lindner et al., arXiv 2301.05062). Needs JAX: pip install -e ".[tracr]".

Every file holds a Tracr transformer (no norms, ReLU) as float32 tensors in the layout of `torch.nn.Linear`, and as metadata the words, the answers
and what the residual dimensions stand for. Nothing else in the repository needs JAX; what is compiled is committed.

    python benchmarks/tracr/compile.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tracr.compiler import compiling, lib, nodes, rasp_to_graph
from tracr.rasp import rasp

HERE = Path(__file__).parent
LENGTH = 5  # words of a prompt, after the first token
BOS = "[BOS]"


def shares() -> list[float]:
    return sorted({float(Fraction(i, n)) for n in range(1, LENGTH + 1) for i in range(n + 1)})


# name -> program, words, whether positions see only what is before them, values of a numerical answer
PROGRAMS: dict[str, tuple[Callable[[], Any], list[Any], bool, list[float] | None]] = {
    "x-proportion": (lambda: lib.make_frac_prevs(rasp.tokens == "x"), ["x", "y", "z"], True, shares()),
    "reverse": (lambda: lib.make_reverse(rasp.tokens), ["a", "b", "c", "d"], False, None),
    "sort": (lambda: lib.make_sort(rasp.tokens, rasp.tokens, max_seq_len=LENGTH, min_key=1), [1, 2, 3, 4], False, None),
    "hist": (lib.make_hist, ["a", "b", "c"], False, None),
    "pattern": (lambda: lib.detect_pattern(rasp.tokens, "ab"), ["a", "b", "c"], True, None),
}


def main() -> None:
    for name in PROGRAMS:
        tensors, about = compiled(name)
        save_file(tensors, HERE / f"{name}.safetensors", metadata={"about": json.dumps(about, sort_keys=True)})
        print(name, {key: value for key, value in about.items() if key != "residual"}, sum(x.size for x in tensors.values()))


def compiled(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    make, words, causal, values = PROGRAMS[name]
    program = make()
    model = compiling.compile_rasp_to_model(program, vocab=set(words), max_seq_len=LENGTH + 1, causal=causal, compiler_bos=BOS)
    config, encoding = model.model_config, model.input_encoder.encoding_map
    order = sorted(encoding, key=encoding.get)
    heads, size, width = config.num_heads, config.key_size, len(model.residual_labels)
    tensors = {
        "token_embedding": as_array(model.params["token_embed"]["embeddings"]),
        "position_embedding": as_array(model.params["pos_embed"]["embeddings"]),
    }
    for layer in range(config.num_layers):
        for theirs, ours in (
            ("attn/query", "q"),
            ("attn/key", "k"),
            ("attn/value", "v"),
            ("attn/linear", "o"),
            ("mlp/linear_1", "up"),
            ("mlp/linear_2", "down"),
        ):
            params = model.params[f"transformer/layer_{layer}/{theirs}"]
            tensors[f"{layer}.{ours}.weight"] = as_array(params["w"]).T.copy()
            tensors[f"{layer}.{ours}.bias"] = as_array(params["b"])
    answers = values or [label.partition(":")[2] for label in (model.residual_labels[i] for i in read_at(model.residual_labels, program))]
    about = {
        "words": [str(word) for word in order],
        "bos": BOS,
        "length": LENGTH,
        "causal": causal,
        "layers": config.num_layers,
        "heads": heads,
        "head_dim": size,
        "neurons": tensors["0.up.weight"].shape[0],
        "width": width,
        "residual": list(model.residual_labels),
        "numerical": values is not None,
        "answers": answers,
        "output": read_at(model.residual_labels, program),
        "choices": [str(word) for word in words],
    }
    return tensors, about


def read_at(labels: list[str], program: Any) -> list[int]:
    """The residual dimensions that the answer is read from: one for each answer, or a single one that holds a number."""
    sink = rasp_to_graph.extract_rasp_graph(program).sink[nodes.ID]
    return [i for i, label in enumerate(labels) if label == sink or label.startswith(f"{sink}:")]


def as_array(x: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(x, dtype=np.float32))


if __name__ == "__main__":
    main()
