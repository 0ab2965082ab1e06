"""On an NVIDIA GPU: gates give what they give on the CPU, every method finds the planted circuit, and the commands run. `make test-gpu`."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING

import nodesieve as ns
from command_line import QUICK, nodesieve, quick_flags
from conftest import MODEL_TYPES, VARIANTS, random_tokens, tiny_model
from nodesieve.ablations import Corrupted
from nodesieve.batches import Tokens
from nodesieve.config import make_config
from nodesieve.gated_model import GatedModel
from nodesieve.levels import DEFAULT_LEVELS, LEVELS
from nodesieve.methods import METHODS
from nodesieve.models import LoadedModel
from nodesieve.nodes import LevelTensors
from nodesieve.run import RunJournal
from nodesieve.verify import verify
from planted import PLANTED, kept, planted_model, planted_task

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU")]
BUDGET = 0.1
KNOWN = [name for name in (*MODEL_TYPES, *VARIANTS) if VARIANTS.get(name, (name,))[0] in CONFIG_MAPPING]  # to the transformers there
FIND_THE_PLANT = ("hybrid", "sieve", "multigranular", "fisher", "gate_gradient", "gate_gradient_ig", "uniform_gradient")


def on_gpu(loaded: LoadedModel) -> LoadedModel:
    return replace(loaded, model=copy.deepcopy(loaded.model).to("cuda"))


def at(device: str, tokens: Tokens) -> Tokens:
    return Tokens(input_ids=tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device))


def _random_gates(model: GatedModel) -> LevelTensors:
    generator = torch.Generator().manual_seed(0)
    gates = {level: torch.rand(model.nodes.shape(level), generator=generator) for level in LEVELS}
    return {level: z * (torch.rand(z.shape, generator=generator) > 0.3) for level, z in gates.items()}


@pytest.mark.parametrize("name", KNOWN)
def test_gates_and_their_gradients_are_those_on_the_cpu(name: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = GatedModel(tiny_model(name).requires_grad_(False).to(device))
        clean, corrupted = (at(device, random_tokens(seed=seed)) for seed in (0, 1))
        gates = {level: z.to(device).requires_grad_() for level, z in _random_gates(model).items()}
        logits = model.gated_logits(clean, gates, Corrupted(tokens=corrupted))
        logits[:, 0].sum().backward()
        found.append((logits.detach().cpu(), {level: None if z.grad is None else z.grad.cpu() for level, z in gates.items()}))
    (cpu, cpu_gradients), (gpu, gpu_gradients) = found
    torch.testing.assert_close(gpu, cpu, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(gpu_gradients, cpu_gradients, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", KNOWN)
def test_every_family_is_gated_as_it_must_be(name: str) -> None:
    assert [check.name for check in verify(GatedModel(tiny_model(name).to("cuda"))) if not check.passed] == []


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("method", FIND_THE_PLANT)
def test_the_planted_nodes_and_no_others_are_found(method: str, dtype: str) -> None:
    config = make_config({"kl_budget": BUDGET, "steps": 200, "method": method, "learning_dtype": dtype})
    run = ns.discover(on_gpu(planted_model()), planted_task(), config)
    assert {level: kept(run.circuit, level) for level in PLANTED} == PLANTED
    assert run.metrics["budget"]["met"]


@pytest.mark.parametrize("ablation", ["counterfactual", "mean", "zero"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_ablation_runs(method: str, ablation: str, loaded: LoadedModel, tmp_path: Path) -> None:
    config = make_config({**QUICK, "method": method, "ablation": ablation, "polish": True})
    task = ns.load_task("gendered_pronoun", loaded.tokenizer, train_size=32)
    run = ns.discover(on_gpu(loaded), task, config)
    run.save(tmp_path)
    again = ns.load_run(tmp_path)
    there, here = (ns.evaluate(model, task, again).circuit["test"]["kl"] for model in (on_gpu(loaded), loaded))
    assert there == pytest.approx(run.metrics["circuit"]["test"]["kl"], abs=1e-5)
    assert here == pytest.approx(there, abs=1e-3)


@pytest.mark.parametrize("method", ["hybrid", "sieve", "multigranular", "nested", "gate_gradient_ig"])
def test_a_run_that_was_stopped_goes_on_as_it_would_have(method: str, tmp_path: Path) -> None:
    config = make_config({"kl_budget": BUDGET, "steps": 64, "method": method, "validate_every": 10, "polish": False})
    whole = ns.discover(on_gpu(planted_model()), planted_task(), config)

    class Stopping(RunJournal):
        def save(self, *arguments: object, **more: object) -> None:
            super().save(*arguments, **more)  # type: ignore[arg-type]
            self.stopping = True

    with pytest.raises(KeyboardInterrupt):
        ns.discover(on_gpu(planted_model()), planted_task(), config, journal=Stopping(tmp_path))
    gone_on = ns.discover(on_gpu(planted_model()), planted_task(), config, journal=RunJournal(tmp_path))
    assert all(torch.equal(whole.circuit.masks[level], gone_on.circuit.masks[level]) for level in DEFAULT_LEVELS)


def test_memory_is_that_of_the_gpu_and_its_name_is_told() -> None:
    run = ns.discover(on_gpu(planted_model()), planted_task(), make_config({"kl_budget": BUDGET, "steps": 20}))
    assert run.metrics["device"] == torch.cuda.get_device_name()
    assert 0 < run.metrics["peak_memory_bytes"] <= torch.cuda.max_memory_allocated()


def test_the_commands_take_the_gpu_if_there_is_one(model_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--model", model_directory, "--task", "ioi", *quick_flags()]
    assert nodesieve("check-model", model_directory) == 0
    assert nodesieve("discover", *flags, "--out", out) == 0
    assert nodesieve("evaluate", out, "--controls", "--draws", 3) == 0
    assert nodesieve("evaluate", out, "--device", "cpu") == 0
    assert nodesieve("report", out) == 0
    assert nodesieve("stability", out, "--seeds", 2) == 0
    assert nodesieve("compare", *flags, "--methods", "sieve,random,greedy", "--out", tmp_path / "compared") == 0
