"""Compiled programs: they compute what they say, their needed nodes are all that is needed, and those are found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "tracr"))
from recover import BUDGET, auroc, recovered
from tracr_models import AT_ONCE, HERE, PROGRAMS, load_program, truth

from nodesieve.circuit import Circuit
from nodesieve.tasks.base import SPLITS
from nodesieve.verify import verify

ABLATIONS = ("counterfactual", "mean", "zero")
# Neurons that know the length, which is the same for all prompts: what is the same need not be kept, but where closed nodes hold something else.
NEURONS_OF_REVERSE = {"counterfactual": 0, "mean": 2, "zero": 3}


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_a_program_says_what_it_should(name: str) -> None:
    program = load_program(name)
    problem = program.problem("counterfactual")
    said = program.loaded.tokenizer.convert_ids_to_tokens(problem.full_logits("test").argmax(-1).tolist())
    assert said == [example.answers[0] for example in program.task.splits["test"]]
    assert len({example.answers for example in program.task.splits["test"]}) > 1
    failed = [check.name for check in verify(problem.model) if not check.passed]
    # Compiled models have idle nodes: closing one changes nothing, and on random words no gradient may reach a gate. All else holds.
    assert all(name.startswith(("closing one ", "gradients reach ")) for name in failed)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("name", list(PROGRAMS))
def test_what_is_needed_alone_is_all_that_is_needed(name: str, ablation: str) -> None:
    problem = load_program(name).problem(ablation)
    needed = truth(problem)
    circuit = Circuit.of({**needed, "expert": torch.zeros(problem.nodes.shape("expert")), "embedding": torch.ones(1)}, problem.nodes)
    assert all(torch.equal(circuit.masks[level], mask) for level, mask in needed.items())  # closed: levels agree
    assert name != "reverse" or needed["mlp_neuron"].sum() == NEURONS_OF_REVERSE[ablation]
    for split in SPLITS:
        (kl,) = problem.losses([circuit], split)
        assert float(kl.mean()) < BUDGET
    whole = Circuit.whole(problem.nodes)
    for level in ("head_dim", "mlp_neuron", "mlp_output"):
        for some in needed[level].nonzero().split(AT_ONCE):
            without = [whole.without({level: index.unsqueeze(0)}) for index in some]
            for of_each in zip(*(problem.losses(without, split) for split in SPLITS), strict=True):
                assert torch.cat(of_each).mean() > 2 * BUDGET


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_the_truth_is_what_reading_a_program_says(ablation: str) -> None:
    """By what residual dimensions stand for. Each of these has one head, and one MLP of which nothing is to spare for what the answer hangs on."""
    programs: dict[str, tuple[int, int, int, set[tuple[int, str]]]] = {  # the head's layer, its dimensions, neurons, outputs
        # is a word an x? Then one dimension of one head averages that
        "x-proportion": (1, 1, 1, {(0, "map_3")}),
        # a count; two neurons to tell each of five from the next, since of five words one at least is the last
        "hist": (0, 1, 10, {(0, f"hist_15:{count}") for count in range(1, 6)}),
        # is a word an a, is it a b? Whether there was an a before; and both
        "pattern": (
            *(1, 2, 8),
            {(0, f"map_{which}:{says}") for which in (19, 21) for says in ("False", "True")}
            | {(1, f"detect_pattern(ab)_17:{says}") for says in ("False", "True")},
        ),
    }
    for name, (layer, dims, neurons, outputs) in programs.items():
        needed = truth(load_program(name).problem(ablation))
        with safe_open(HERE / f"{name}.safetensors", framework="pt") as file:
            residual = json.loads(file.metadata()["about"])["residual"]
        assert {(at, residual[d]) for at, d in needed["mlp_output"].nonzero().tolist()} == outputs
        assert needed["head"].nonzero().tolist() == [[layer, 0]]  # what it reads of an MLP comes before
        assert needed["head_dim"].sum() == dims
        assert needed["mlp_neuron"].sum() == neurons


@pytest.mark.parametrize("ablation", ["mean", "zero"])
@pytest.mark.parametrize("name", list(PROGRAMS))
def test_the_sieve_finds_what_is_needed_beside_constants_too(name: str, ablation: str) -> None:
    """Before polishing: all of it, but for a node of `hist` and `sort`, of which some can go together, though none alone; and little else."""
    problem = load_program(name).problem(ablation)
    found = recovered(problem, truth(problem), "sieve")
    assert found["met"]
    for level in ("head_dim", "mlp_neuron", "mlp_output"):
        part = found["levels"][level]
        assert part["right"] >= part["needed"] - (name in ("hist", "sort"))
        assert part["found"] <= part["needed"] + 1 + part["needed"] // 10


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "sieve") for name in PROGRAMS),
        ("reverse", "multigranular"),
        ("pattern", "multigranular"),
        ("sort", "fisher"),
        ("sort", "gate_gradient"),
    ],
)
def test_needed_nodes_are_found(name: str, method: str) -> None:
    """All of them; after polishing, no others. benchmarks/tracr/recover.py has every program and method."""
    problem = load_program(name).problem("counterfactual")
    found = recovered(problem, truth(problem), method)
    assert found["met"]
    for level in ("head_dim", "mlp_neuron", "mlp_output"):
        part = found["levels"][level]
        assert part["polished"]["found"] == part["polished"]["right"] == part["needed"]


def test_auroc_counts_ties_half() -> None:
    assert auroc(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, False])) == 1.0
    assert auroc(torch.tensor([1.0, 1.0]), torch.tensor([True, False])) == 0.5
    assert auroc(torch.tensor([1.0]), torch.tensor([True])) is None
