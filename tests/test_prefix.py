"""Positions before the first difference are read once, and change nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from conftest import tiny_config
from nodesieve.ablations import Activations, Corrupted
from nodesieve.batches import Tokens
from nodesieve.cache import training_cache
from nodesieve.gated_model import GatedModel
from nodesieve.levels import LEVELS
from nodesieve.prefix import common_start
from test_cache import config, make_problem


def prompts(width: int = 8, same: int = 4) -> tuple[Tokens, Tokens]:
    """Two rows, the second one token shorter; the first `same` columns are equal."""
    ids = torch.randint(5, 50, (2, 2, width), generator=torch.Generator().manual_seed(0))
    ids[1, :, :same] = ids[0, :, :same]
    mask = torch.ones(2, width, dtype=torch.long)
    mask[1, 0] = 0
    clean, corrupted = (Tokens(input_ids=rows, attention_mask=mask) for rows in ids)
    return clean, corrupted


def test_where_the_first_difference_is() -> None:
    assert common_start(*prompts(8, 4)) == 4
    assert common_start(*prompts(8, 1)) == 0  # too little to be worth it
    clean, _ = prompts()
    assert common_start(clean, clean) == 0
    shorter = Tokens.pad([[5, 6, 7, 8, 9], [5, 6]], pad_id=0, device="cpu", side="right")
    other = Tokens.pad([[5, 6, 7, 1, 9], [5, 6]], pad_id=0, device="cpu", side="right")
    assert common_start(shorter, other) == 0  # the second row's answer comes before
    assert common_start(Tokens.pad([[5, 6, 7]], pad_id=0, device="cpu"), Tokens.pad([[5, 6, 7, 8]], pad_id=0, device="cpu")) == 0


def test_keys_that_a_longer_prompt_would_rotate_otherwise_are_not_read_beforehand() -> None:
    small = tiny_config("phi3")
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 12}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, **factors}
    config = type(small)(**{**small.to_dict(), "rope_parameters": rope, "original_max_position_embeddings": 12})
    model = GatedModel(AutoModelForCausalLM.from_config(config).eval().requires_grad_(False))
    for width, same, start in ((12, 4, 4), (16, 4, 0), (16, 12, 0), (16, 13, 13)):
        clean, corrupted = prompts(width, same)
        assert model.start(clean, corrupted) == start
        gates = {level: z.requires_grad_() for level, z in model.nodes.full(1.0).items()}
        torch.testing.assert_close(model.gated_logits(clean, gates, Corrupted(tokens=corrupted)), model.logits(clean), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_whole_prompts(any_model: GatedModel) -> None:
    clean, corrupted = prompts()
    assert any_model.start(clean, corrupted) == 4
    stored = any_model.record(corrupted)
    generator = torch.Generator().manual_seed(2)
    drawn = {level: torch.rand(any_model.nodes.shape(level), generator=generator) for level in LEVELS}
    live = {level: torch.rand(any_model.nodes.shape(level), generator=generator) > 0.4 for level in ("head", "mlp_neuron")}
    cut = any_model.cutter.cut(live["head"], live["mlp_neuron"])
    for shrunk in (None, cut):
        if shrunk is not None:
            drawn |= {level: drawn[level] * mask for level, mask in live.items()}
        for recompute in (False, True):
            found = []
            for values in (stored, Corrupted(tokens=corrupted)):
                gates = {level: z.clone().requires_grad_() for level, z in drawn.items()}
                logits = any_model.gated_logits(clean, gates, values, shrunk=shrunk, recompute=recompute)
                logits.square().sum().backward()
                found.append({"logits": logits.detach(), **{level: gates[level].grad for level in any_model.nodes.levels}})
            for name, whole in found[0].items():
                torch.testing.assert_close(found[1][name], whole, rtol=1e-3, atol=1e-4)


def test_what_is_remembered_begins_where_prompts_differ(tmp_path: Path) -> None:
    problem = make_problem(same=4)
    cache = training_cache(problem, config(), tmp_path)
    everything = problem.task["train"].batch(range(len(problem.task["train"])))
    gates = {level: torch.full(problem.nodes.shape(level), 0.5, requires_grad=level != "embedding") for level in LEVELS}
    gates["embedding"] = torch.ones(1)
    problem.model.gated_logits(everything.clean, gates, cache.values(everything))
    batch = problem.task["train"].batch([4, 1, 2])
    values = cache.values(batch)
    assert isinstance(values, Corrupted)
    assert values.held is not None
    asked: list[int] = []

    def held(layer: int, start: int) -> Activations:
        asked.append(start)
        assert values.held is not None
        return values.held(layer, start)

    assert batch.corrupted is not None
    got = problem.model.gated_logits(batch.clean, gates, replace(values, held=held))
    assert min(asked) >= 3
    torch.testing.assert_close(got, problem.model.gated_logits(batch.clean, gates, problem.model.record(batch.corrupted)), rtol=2e-2, atol=1e-2)
