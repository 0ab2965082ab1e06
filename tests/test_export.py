"""Circuits as checkpoints: they say without gates what the gated model says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from command_line import few_prompts, nodesieve, quick_flags
from conftest import random_tokens, tiny_model, word_tokenizer
from nodesieve.ablations import Activations
from nodesieve.architectures import locate
from nodesieve.circuit import Circuit
from nodesieve.errors import UserError
from nodesieve.export import without_closed
from nodesieve.gated_model import GatedModel
from nodesieve.levels import LEVELS
from nodesieve.nodes import NodeSpace
from nodesieve.run import load_run
from nodesieve.weights import write_checkpoint

TOKENS = random_tokens(seed=5)


def circuit(nodes: NodeSpace, *, kept: float = 0.5, seed: int = 1) -> Circuit:
    """Of each fine level about a share of `kept`, most blocks, and the embedding."""
    generator = torch.Generator().manual_seed(seed)
    masks = {
        level: torch.rand(nodes.shape(level), generator=generator) < (0.9 if level in ("layer", "attention_block") else kept) for level in LEVELS
    }
    return Circuit.of({**masks, "mlp_block": torch.ones(nodes.layers), "embedding": torch.ones(1)}, nodes)


def constants(model: GatedModel, *, mean: bool) -> Activations:
    return model.record(random_tokens(seed=3)).map(lambda x: x.mean((0, 1)) if mean else torch.zeros_like(x[0, 0]))


def difference(model: GatedModel, found: Circuit, held: Activations) -> float:
    """Of the logits, in standard deviations of the gated model's."""
    gated = model.gated_logits(TOKENS, found.gates(), held)
    alone = without_closed(model, found, held)
    plain = GatedModel(alone, locate(alone, model.architecture.family)).logits(TOKENS)
    return float((plain - gated).abs().max() / gated.std())


def test_every_family_says_alone_what_it_says_with_gates_of_zeros(any_model: GatedModel) -> None:
    found, before = circuit(any_model.nodes), any_model.logits(TOKENS)
    assert difference(any_model, found, constants(any_model, mean=False)) < 1e-4
    assert torch.equal(any_model.logits(TOKENS), before)  # which is not the circuit's:
    assert float((any_model.gated_logits(TOKENS, found.gates(), constants(any_model, mean=False)) - before).abs().max()) > 0.01


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt_neox", "llama", "llama-tied", "opt", "bloom", "falcon", "granite-multipliers", "starcoder2", "seed_oss", "opt-unbiased"]
)
def test_what_closed_nodes_hold_is_in_the_biases(name: str) -> None:
    model = GatedModel(tiny_model(name))
    assert difference(model, circuit(model.nodes), constants(model, mean=True)) < 1e-4


@pytest.mark.parametrize("name", ["mistral", "gemma2", "olmo2", "mixtral"])
def test_where_there_is_no_place_for_a_constant_that_is_said(name: str) -> None:
    model = GatedModel(tiny_model(name))
    with pytest.raises(UserError, match=r"expects projections with biases.*take --ablation zero"):
        without_closed(model, circuit(model.nodes), constants(model, mean=True))


@pytest.mark.parametrize(("kept", "left"), [(1, 1), (3, 3), (5, 6), (7, 12)])
def test_heads_are_as_few_as_a_config_can_be_written_with(kept: int, left: int, tmp_path: Path) -> None:
    shape = {"hidden_size": 24, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 8, "num_hidden_layers": 2, "vocab_size": 97}
    torch.manual_seed(0)
    model = GatedModel(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape, intermediate_size=48)).eval().requires_grad_(False))
    heads = torch.zeros(model.nodes.shape("head"))
    heads[0, 4 : 4 + kept] = heads[1, 2] = 1
    found = Circuit.of({**circuit(model.nodes, kept=1.1).masks, "head": heads}, model.nodes)
    held = constants(model, mean=False)
    alone = without_closed(model, found, held)
    assert alone.config.num_attention_heads == left
    alone.save_pretrained(tmp_path)
    again = GatedModel(AutoModelForCausalLM.from_pretrained(tmp_path))
    gated = model.gated_logits(TOKENS, found.gates(), held)
    torch.testing.assert_close(again.logits(TOKENS), gated, atol=1e-4 * float(gated.std()), rtol=0)


def test_options_of_generation_that_cannot_be_written_are_left_out(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.6
    write_checkpoint(tmp_path, model, word_tokenizer())
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.temperature != 0.6


def test_a_closed_embedding_is_refused() -> None:
    model = GatedModel(tiny_model("gpt2"))
    found = Circuit.of({**circuit(model.nodes).masks, "embedding": torch.zeros(1)}, model.nodes)
    with pytest.raises(UserError, match="expects a circuit with the embedding"):
        without_closed(model, found, constants(model, mean=False))


@pytest.mark.parametrize(
    ("name", "neurons", "mean"),
    [
        ("llama", "intermediate_size", False),
        ("llama", "intermediate_size", True),
        ("gpt2", "n_inner", True),
        ("opt", "ffn_dim", True),
        ("phi3", "intermediate_size", False),
    ],
)
def test_layers_are_as_narrow_as_the_widest_of_them_needs(name: str, neurons: str, mean: bool) -> None:
    model = GatedModel(tiny_model(name))
    whole = circuit(model.nodes, kept=0.7)
    masks = {**whole.masks, "head": whole.masks["head"].clone(), "mlp_neuron": whole.masks["mlp_neuron"].clone()}
    masks["head"][:, 1:] = False
    masks["mlp_neuron"][:, 10:] = False
    found = Circuit.of(masks, model.nodes)
    held = constants(model, mean=mean)
    assert difference(model, found, held) < 1e-4
    config = without_closed(model, found, held).config
    assert getattr(config, neurons) == found.masks["mlp_neuron"].sum(-1).max() <= 10
    if name == "llama":
        assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (1, 1, model.nodes.head_dim)
    assert model.model.config.num_attention_heads == 4


def export(*arguments: object) -> int:
    return nodesieve("export", *arguments, "--format", "hf")


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_a_run_becomes_a_checkpoint_that_needs_nothing_of_ours(
    ablation: str, model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tmp_path / "run", tmp_path / "circuit"
    flags = ["--method", "random", "--ablation", ablation, "--keep", "0.2", *quick_flags()]
    assert nodesieve("discover", "--model", model_directory, "--out", run, *flags) == 0
    capsys.readouterr()
    assert export(run, out) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(out)
    assert nodesieve("check-model", out) == 0
    alone, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    original = AutoModelForCausalLM.from_pretrained(model_directory)
    fewer, before = (sum(parameter.numel() for parameter in model.parameters()) for model in (alone, original))
    assert f"{fewer:,} parameters, the model has {before:,};" in told.err
    assert fewer < before
    prompt = tokenizer("When Mary and John went", return_tensors="pt")["input_ids"]
    assert not torch.allclose(alone(prompt).logits, original(prompt).logits, atol=0.01)
    projection = load_run(run).circuit.masks["head_dim"][0].flatten()
    assert (alone.model.layers[0].self_attn.o_proj.weight.abs().sum(0) > 0).sum() == projection.sum()
    assert json.loads((out / "circuit.json").read_text())["task"] == "ioi"
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1  # weights are as readable as the rest
    assert export(run, out) == 2
    assert "expects a new or empty directory" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert export(run, ".") == 2
    assert "with a name of its own" in capsys.readouterr().err
    assert export(run, tmp_path / "nowhere" / "circuit") == 2
    assert nodesieve("export", run, tmp_path / "mib.json", "--ablation", "zero") == 2
    assert "expects --format hf" in capsys.readouterr().err


def test_prompts_that_have_moved_are_those_of_the_run(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, file, moved = tmp_path / "run", few_prompts(tmp_path), tmp_path / "moved.jsonl"
    flags = ["--method", "random", "--ablation", "mean", "--keep", "0.2", *quick_flags()]
    assert nodesieve("discover", "--model", model_directory, "--task", file, "--out", run, *flags) == 0
    file.rename(moved)
    capsys.readouterr()
    assert export(run, tmp_path / "circuit") == 2
    assert "found neither under" in capsys.readouterr().err
    assert export(run, tmp_path / "circuit", "--task", moved) == 0
    capsys.readouterr()
    assert nodesieve("evaluate", run, "--task", moved, "--json") == 0
    assert json.loads(capsys.readouterr().out)["circuit"]["test"]["kl"] == pytest.approx(load_run(run).metrics["circuit"]["test"]["kl"], rel=1e-4)
    other = few_prompts(tmp_path, corrupted="{b} and {b} went").rename(tmp_path / "other.jsonl")
    assert nodesieve("evaluate", run, "--task", other) == 2
    assert "a mean over the run's own training examples" in capsys.readouterr().err
    assert nodesieve("export", run, tmp_path / "mib.json", "--task", moved) == 2
    assert "--task expects --format hf" in capsys.readouterr().err


def test_a_circuit_beside_corrupted_prompts_needs_constants(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tmp_path / "run", tmp_path / "circuit"
    assert nodesieve("discover", "--model", model_directory, "--out", run, "--method", "random", "--keep", "0.2", *quick_flags()) == 0
    assert export(run, out) == 2
    assert f"take --ablation mean or zero, and see what that does to the circuit with: nodesieve evaluate {run}" in capsys.readouterr().err
    monkeypatch.setattr("nodesieve.export.without_closed", lambda model, *_: model.model)
    assert export(run, out, "--ablation", "zero") == 2
    assert "expected the checkpoint to say what the gated model does" in capsys.readouterr().err
    assert list(tmp_path.glob("*circuit*")) == []  # nothing, half of nothing neither
    monkeypatch.undo()

    def cannot(*_: object) -> None:
        raise NotImplementedError("quantised")

    with monkeypatch.context() as patch:
        patch.setattr("nodesieve.export.write_checkpoint", cannot)
        assert export(run, out, "--ablation", "zero") == 2
    assert "it cannot write this llama: quantised" in capsys.readouterr().err
    out.mkdir()
    assert export(run, out, "--ablation", "zero") == 0
    assert (out / "model.safetensors").is_file()
