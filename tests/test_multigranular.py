"""Gates learned at every level: how their penalties, rates and samples are as the options say."""

from __future__ import annotations

import pytest
import torch

import nodesieve as ns
from command_line import FEW, QUICK
from nodesieve.cache import training_cache
from nodesieve.config import make_config
from nodesieve.journal import Journal
from nodesieve.levels import LEVELS
from nodesieve.method_rows import LEARNING_RATES, LOG_ALPHA_INIT, PENALTIES
from nodesieve.methods.fisher import fisher_information
from nodesieve.methods.multigranular import _Run
from nodesieve.models import LoadedModel
from nodesieve.problem import make_problem
from planted import planted_model, planted_task


def test_gates_warm_up_and_end_with_repair(loaded: LoadedModel) -> None:
    options = {**QUICK, "method": "multigranular", "controller": "fixed", "steps": 10, "warmup_steps": 4, "repair_share": 0.3}
    run = ns.discover(loaded, ns.load_task("ioi", loaded.tokenizer, **FEW), make_config(options))
    added = [row["loss"] - row["kl"] for row in run.history]
    full = [row["lambda"] * sum(PENALTIES[level] * share for level, share in row["penalty"].items()) for row in run.history]
    assert added[:7] == pytest.approx([min(1, (step + 1) / 4) * full[step] for step in range(7)], rel=1e-4)
    assert added[7:] == pytest.approx([0, 0, 0], abs=1e-6)
    assert [row["lambda"] for row in run.history[7:]] == [0, 0, 0]


def test_each_level_learns_at_its_own_rate(loaded: LoadedModel) -> None:
    rates = {"learning_rates": {"head": 0.0, "mlp_neuron": 0.1}, "log_alpha_spread": dict.fromkeys(LEVELS, 0.0)}
    run = ns.discover(loaded, ns.load_task("ioi", loaded.tokenizer, **FEW), make_config({**QUICK, "method": "multigranular", "steps": 1, **rates}))
    moved = {level: float((run.scores.values[level] - LOG_ALPHA_INIT[level]).abs().max()) for level in ("head", "head_dim", "mlp_neuron")}
    assert moved == pytest.approx({"head": 0.0, "head_dim": LEARNING_RATES["head_dim"], "mlp_neuron": 0.1}, rel=1e-3)  # Adam's first step


@pytest.mark.parametrize("samples", ["example", "batch"])
def test_a_gate_is_drawn_for_each_example_or_once_for_all(loaded: LoadedModel, samples: str) -> None:
    options = make_config({**QUICK, "method": "multigranular", "gate_samples": samples, "log_alpha_init": dict.fromkeys(LEVELS, 0.0)})
    problem = make_problem(loaded, ns.load_task("ioi", loaded.tokenizer, **FEW), options)
    z = _Run(problem, problem, options).sample_gates(problem.task["train"].training_batch(0, 4, 0))
    for level in ("head_dim", "mlp_neuron"):
        assert z[level].shape == (4, *problem.nodes.shape(level))
        assert torch.equal(z[level][0], z[level][1]) == (samples == "batch")


def test_what_is_dropped_stays_closed_whatever_a_controller_wants_open(loaded: LoadedModel) -> None:
    size = {"controller": "target_size", "target_size": 0.5, "penalties": dict.fromkeys(LEVELS, 1.0)}
    options = make_config({**QUICK, "method": "multigranular", **size})
    problem = make_problem(loaded, ns.load_task("ioi", loaded.tokenizer, **FEW), options)
    run = _Run(problem, problem, options)
    with torch.no_grad():
        run.log_alpha["mlp_neuron"][0] = -0.01
    run.drop()
    for _ in range(3):
        run.descend(-torch.stack([x.sum() for x in run.log_alpha.values()]).sum(), rate=1.0)  # opens all
    assert float(run.log_alpha["mlp_neuron"].detach()[0].max()) <= 0
    assert float(run.log_alpha["mlp_neuron"].detach()[1].min()) > LOG_ALPHA_INIT["mlp_neuron"]
    assert run.circuit().masks["mlp_neuron"].any(-1).tolist() == [False, *[True] * (problem.nodes.layers - 1)]


def test_nodes_of_least_fisher_information_start_nearest_to_closing() -> None:
    options = make_config({"method": "multigranular", "learning_dtype": "float32", "batch_size": 8})
    problem = make_problem(planted_model(), planted_task(), options)
    run = _Run(problem, problem, options)
    cache = training_cache(problem, options, None)
    run.spread(cache, Journal())
    information = fisher_information(problem, options, Journal(), values=cache.values)
    for level in ("head_dim", "mlp_neuron"):
        order = information[level].flatten().argsort(stable=True)
        assert bool((run.log_alpha[level].detach().flatten()[order].diff() >= 0).all())
        assert float(run.log_alpha[level].detach().max()) == pytest.approx(options.log_alpha_init[level])


@pytest.mark.parametrize(("form", "head"), [("own", 1.0), ("nested", 0.5), ("reached", 0.5)])
def test_penalties_count_what_is_reached(form: str, head: float) -> None:
    options = make_config({"method": "multigranular", "penalty_form": form, "learning_dtype": "float32"})
    problem = make_problem(planted_model(), planted_task(), options)
    run = _Run(problem, problem, options)
    with torch.no_grad():
        for x in run.log_alpha.values():
            x.fill_(30.0)
        run.log_alpha["attention_block"][0] = -30.0
    shares = run.open_shares()
    assert float(shares["head"].detach()) == pytest.approx(head)
    (gradient,) = torch.autograd.grad(shares["head"], run.log_alpha["attention_block"], allow_unused=True)
    assert (gradient is not None) == (form == "nested")
