"""Nodes cut out of the computation: the same numbers as with gates of 0."""

from __future__ import annotations

import pytest
import torch

from conftest import random_tokens, tiny_model
from nodesieve import shrink
from nodesieve.ablations import Corrupted
from nodesieve.batches import Tokens
from nodesieve.circuit import Circuit
from nodesieve.config import make_config
from nodesieve.gated_model import GatedModel
from nodesieve.journal import Journal
from nodesieve.levels import LEVELS
from nodesieve.methods.multigranular import multigranular
from nodesieve.problem import Problem
from nodesieve.shrink import Cutter
from test_cache import make_problem


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox", "gptj", "opt", "mistral", "gemma", "phi"])
def test_heads_and_neurons_of_common_families_can_be_cut(name: str) -> None:
    found = GatedModel(tiny_model(name)).cutter
    assert found.neurons
    assert found.heads is not None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "codegen", "persimmon"])
def test_sixteen_bits_tell_layouts_apart_also_where_logits_have_much_in_common(name: str, seed: int) -> None:
    model = tiny_model(name, seed=seed).requires_grad_(False)
    last = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)][-1]
    torch.nn.init.normal_(last.bias, std=3.0, generator=torch.Generator().manual_seed(seed))  # some tokens are likelier than others everywhere
    gated = GatedModel(model)
    assert gated.cutter.heads is not None
    copied = gated.in_dtype(torch.bfloat16)
    assert copied.cutter.heads is gated.cutter.heads
    assert GatedModel(copied.model).cutter.heads is gated.cutter.heads


def test_a_copy_in_sixteen_bits_keeps_rotary_frequencies() -> None:
    gated = GatedModel(tiny_model("llama"))
    copied = gated.in_dtype(torch.bfloat16)
    frequencies = {name: buffer for name, buffer in copied.model.named_buffers() if name.endswith("inv_freq")}
    assert frequencies
    assert all(buffer.dtype == torch.float32 for buffer in frequencies.values())
    assert all(parameter.dtype == torch.bfloat16 for parameter in copied.model.parameters())
    assert copied.passes is gated.passes


def test_a_cut_model_gives_the_same_logits_and_gradients(any_model: GatedModel) -> None:
    clean, corrupted = random_tokens(seed=0), Tokens(input_ids=random_tokens(seed=1).input_ids, attention_mask=random_tokens().attention_mask)
    generator = torch.Generator().manual_seed(3)
    alive = {level: (torch.rand(any_model.nodes.shape(level), generator=generator) > 0.5).float() for level in ("head", "mlp_neuron")}
    alive["head"][0], alive["mlp_neuron"][1] = 0, 0  # nothing left of these
    drawn = {level: torch.rand(any_model.nodes.shape(level), generator=generator) for level in LEVELS}
    cut = any_model.cutter.cut(alive["head"] > 0, alive["mlp_neuron"] > 0)
    stored = any_model.record(corrupted)
    parameters = dict(any_model.model.named_parameters())
    for values in (stored, stored.map(lambda x: x.mean((0, 1))), Corrupted(tokens=corrupted)):
        for recompute in (False, True):
            found = []
            for shrunk in (None, cut):
                gates = {level: z.clone().requires_grad_() for level, z in drawn.items()}
                closed = {**gates, **{level: gates[level] * mask for level, mask in alive.items()}}
                logits = any_model.gated_logits(clean, closed, values, shrunk=shrunk, recompute=recompute)
                logits.square().sum().backward()
                found.append({"logits": logits.detach(), **{level: gates[level].grad for level in any_model.nodes.levels}})
            live = {level: torch.ones(any_model.nodes.shape(level)) for level in LEVELS} | alive
            live["head_dim"] = live["head_dim"] * alive["head"].unsqueeze(-1)
            for name in found[0]:
                mask = live.get(name, torch.ones(()))  # a closed node has a gradient only while it is there
                torch.testing.assert_close(found[1][name] * mask, found[0][name] * mask, rtol=1e-3, atol=1e-4)
    assert all(dict(any_model.model.named_parameters())[name] is p for name, p in parameters.items())


@pytest.mark.parametrize("ablation", ["counterfactual", "mean"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma", "mixtral"])
def test_circuits_are_measured_each_without_what_it_has_closed(name: str, ablation: str) -> None:
    problem = make_problem(name)
    other = Problem(problem.model, problem.task, ablation=ablation)
    generator = torch.Generator().manual_seed(0)
    drawn = {level: torch.rand(other.nodes.shape(level), generator=generator) for level in LEVELS}
    circuits = [
        Circuit.of({level: values < (share if level in ("head", "mlp_neuron") else 1) for level, values in drawn.items()}, other.nodes)
        for share in (1, 0.6, 0.3, 0)
    ]
    whole, cut = (other.losses(circuits, "validation", cut=cut) for cut in (False, True))
    for ours, theirs in zip(cut, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    made = [other.cut(circuit.masks, keep=False) for circuit in circuits]
    assert all(entries is None for entries in made[0].live["heads"])
    assert any(entries is not None for entries in made[2].live["neurons"]) == (name != "mixtral")


@pytest.mark.parametrize("options", [{"cache_limit": 8.0}, {}, {"memory": "low"}, {"gate_samples": "batch"}])
def test_a_run_has_the_same_losses_with_and_without_cutting(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(
        {"steps": 60, "batch_size": 3, "drop_below": 0.0, "learning_dtype": "float32", "validate_every": 30, "cache_limit": 0.0, **options}
    )
    runs = []
    for cutting in (True, False):
        if not cutting:
            whole = property(lambda model: Cutter(architecture=model.architecture, neurons=False, heads=None))
            monkeypatch.setattr(GatedModel, "cutter", whole)
        journal = Journal()
        multigranular(make_problem(), config, journal)
        runs.append(journal.history)
    nodes, live = make_problem().nodes, runs[0][-1]["live"]
    assert 0 < sum(live["mlp_neuron"]) < 0.9 * nodes.count("mlp_neuron")
    assert sum(live["head"]) < nodes.count("head")
    for ours, theirs in zip(*runs, strict=True):
        # What closed nodes write is read from 16 bits where it is cut, and made from 16 bits where it is not.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2 if "cache_limit" in options else 1e-4)
        assert ours["live"] == theirs["live"]


def test_few_closed_nodes_are_not_worth_a_copy_of_the_weights() -> None:
    model = GatedModel(tiny_model("llama"))
    live = torch.ones(model.nodes.shape("mlp_neuron"), dtype=torch.bool)
    live[0, 0] = False
    cut = model.cutter.cut(torch.ones(model.nodes.shape("head"), dtype=torch.bool), live)
    whole = 1 / model.nodes.neurons <= 1 - shrink.WORTH_IT
    assert (cut.live["neurons"][0] is None) == whole
    assert cut.live["heads"] == [None] * model.nodes.layers
