"""On a model with a planted circuit, the planted nodes and no others are found."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import nodesieve.problem
from merged import Part, merged
from nodesieve import evaluation
from nodesieve.circuit import Circuit
from nodesieve.config import DiscoverConfig, make_config
from nodesieve.console import print_summary
from nodesieve.discovery import Interrupted, discover
from nodesieve.errors import UserError
from nodesieve.journal import Journal
from nodesieve.levels import DEFAULT_LEVELS, LEVELS
from nodesieve.methods.fisher import fisher_information, log_p_of_a_drawn_token
from nodesieve.methods.hybrid import LEARNING_RATE_FINAL, hybrid
from nodesieve.methods.multigranular import _Run, multigranular
from nodesieve.metrics import kl_divergence
from nodesieve.problem import Problem, make_problem
from nodesieve.run import RunJournal, load_run
from nodesieve.scores import Scores
from nodesieve.spawn import refuse_what_changed
from planted import PLANTED, all_nodes, kept, planted_model, planted_task

BUDGET = 0.1


def assert_planted(problem: Problem, planted: Mapping[str, set[tuple[int, ...]]]) -> None:
    """Removing any planted node costs more than twice the budget, removing any other costs nothing."""
    whole = Circuit.whole(problem.nodes)
    for level in DEFAULT_LEVELS:
        indices = all_nodes(problem.nodes, level)
        circuits = [whole.without({level: torch.tensor([index])}) for index in indices]
        for index, kl in zip(indices, problem.losses(circuits, "test"), strict=True):
            if index in planted[level]:
                assert kl.mean() > 2 * BUDGET, (level, index)
            else:
                assert kl.max() < BUDGET / 100, (level, index)


def test_the_plant_is_what_it_claims_to_be() -> None:
    assert_planted(make_problem(planted_model(), planted_task(), DiscoverConfig()), PLANTED)


# Where two nodes share the work, one of them carries half of the answer under mean and zero ablation, which costs less than twice the budget.
@pytest.mark.parametrize(("ablation", "copies"), [("counterfactual", 2), ("counterfactual", 1), ("mean", 1), ("zero", 1)])
@pytest.mark.parametrize(("part", "seed"), [("early", 0), ("early", 1), ("late", 2), ("late", 3)])
def test_of_two_models_merged_into_one_the_task_s_own_is_found(part: Part, seed: int, ablation: str, copies: int) -> None:
    plant = merged(part, seed=seed, copies=copies)
    task = planted_task(seed, about=("early", "late").index(part))
    config = make_config({"kl_budget": BUDGET, "steps": 200, "seed": seed, "ablation": ablation})
    assert_planted(make_problem(plant.loaded, task, config), plant.planted)
    run = discover(plant.loaded, task, config)
    assert {level: kept(run.circuit, level) for level in plant.planted} == plant.planted
    assert run.metrics["budget"]["met"]


@pytest.mark.parametrize(
    "options",
    [{"method": "hybrid", "validate_every": 10}, {"method": "sieve"}, {"method": "multigranular", "validate_every": 10}],
    ids=lambda options: options["method"],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_planted_nodes_and_no_others_are_found(seed: int, options: dict[str, object]) -> None:
    config = make_config({"kl_budget": BUDGET, "steps": 200, "seed": seed, **options})
    run = discover(planted_model(), planted_task(seed), config)
    assert {level: kept(run.circuit, level) for level in PLANTED} == PLANTED
    assert run.metrics["budget"]["met"]
    assert run.metrics["circuit"]["test"]["kl"] < BUDGET


def test_within_the_circuit_of_another_run(tmp_path: Path) -> None:
    coarse = discover(planted_model(), planted_task(), make_config({"kl_budget": BUDGET, "method": "coarse", "steps": 200, "validate_every": 10}))
    assert kept(coarse.circuit, "head") == PLANTED["head"]
    assert coarse.circuit.kept("head_dim") == coarse.circuit.nodes.head_dim
    coarse.save(tmp_path)
    options = {"kl_budget": BUDGET, "steps": 200, "validate_every": 10, "within": str(tmp_path)}
    run = discover(planted_model(), planted_task(), make_config(options))
    assert {level: kept(run.circuit, level) for level in PLANTED} == PLANTED
    first = run.history[0]["open"]
    assert first["head"] == coarse.circuit.kept("head") / coarse.circuit.nodes.count("head")
    with pytest.raises(UserError, match="within expects method hybrid, sieve, multigranular, got fisher"):
        make_config({**options, "method": "fisher"})
    with pytest.raises(UserError, match="expected the test examples that the run was made with"):  # it may have been found on these
        discover(planted_model(), replace(planted_task(1), source=coarse.config.task), make_config(options))


def test_what_is_odd_of_a_circuit_to_stay_within_is_said(tmp_path: Path) -> None:
    class Noting(Journal):
        def note(self, text: str) -> None:
            notes.append(text)

    outer = discover(planted_model(), planted_task(), make_config({"kl_budget": BUDGET, "method": "random", "polish": False}))
    outer.save(tmp_path / "whole")
    replace(outer, metrics={}).save(tmp_path / "half")
    for name, ablation, said in (("half", "counterfactual", "is unfinished"), ("whole", "zero", "under the counterfactual ablation, this is zero")):
        notes: list[str] = []
        options = {"kl_budget": BUDGET, "steps": 16, "within": str(tmp_path / name), "ablation": ablation, "force": True, "polish": False}
        discover(planted_model(), planted_task(), make_config(options), journal=Noting())
        (note,) = (note for note in notes if str(tmp_path) in note)
        assert said in note
    own = planted_task()
    other = replace(own, source="other", splits={**own.splits, "train": own.splits["test"], "test": own.splits["train"]})
    options = {"kl_budget": BUDGET, "steps": 16, "within": str(tmp_path / "whole"), "polish": False}
    notes = []
    run = discover(planted_model(), other, make_config(options), journal=Noting())
    assert run.seen_of(other, "test") == len(own.splits["train"])  # by the outer search, so by what was found within its circuit, too
    assert f"{len(own.splits['train'])} of the test examples are of prompts that" in next(note for note in notes if str(tmp_path) in note)


def test_a_circuit_that_overflows_for_one_example_meets_no_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflowing(full: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """As in 16 bits, where the answer is far off for some example of a batch."""
        kl = kl_divergence(full, logits)
        return torch.where((kl > 0.3) & (kl == kl.max()), torch.nan, kl)

    for module in (evaluation, nodesieve.problem):
        monkeypatch.setattr(module, "kl_divergence", overflowing)
    for method in ("sieve", "fisher"):
        run = discover(planted_model(), planted_task(), make_config({"kl_budget": 1.0, "method": method, "steps": 40}))
        assert run.metrics["budget"]["met"]
        assert 0 <= run.metrics["circuit"]["validation"]["kl"] <= run.metrics["budget"]["validation_kl_upper"] <= 1
    asked = discover(planted_model(), planted_task(), make_config({"keep": 0.05, "method": "random"}))
    asked.save(tmp_path)
    read = load_run(tmp_path)
    assert read.metrics["budget"] == {"kl": 0.25, "met": False, "validation_kl_upper": None}
    assert read.metrics["circuit"]["test"]["kl"] is None
    print_summary(read)


def test_the_circuit_that_a_search_is_to_stay_in_is_part_of_what_it_began_with(tmp_path: Path) -> None:
    class Stopping(RunJournal):
        def log(self, row: dict[str, Any]) -> None:
            super().log(row)
            self.stopping = True

    outer, place = tmp_path / "outer", tmp_path / "run"
    first = discover(planted_model(), planted_task(), make_config({"kl_budget": BUDGET, "steps": 200}))
    another = replace(first, circuit=Circuit.whole(first.circuit.nodes))
    first.save(outer)
    place.mkdir()
    config = make_config({"kl_budget": BUDGET, "steps": 200, "within": str(outer)})
    with pytest.raises(Interrupted):
        discover(planted_model(), planted_task(), config, journal=Stopping(place))
    another.save(outer, overwrite=True)
    with pytest.raises(UserError, match=r"expected the circuit of --within that the run in .* began with, got others"):
        discover(planted_model(), planted_task(), config, journal=RunJournal(place))
    first.save(outer, overwrite=True)
    run = discover(planted_model(), planted_task(), config, journal=RunJournal(place))
    assert run.description["within"] == first.circuit.fingerprint
    run.save(place, overwrite=True)
    own = replace(config, task="ioi")  # by what the run says of itself, not by its examples
    refuse_what_changed(place, own)
    another.save(outer, overwrite=True)
    with pytest.raises(UserError, match="was searched within, got another"):
        refuse_what_changed(place, own)
    shutil.rmtree(outer)
    refuse_what_changed(place, own)  # a finished run does without it


@pytest.mark.parametrize(
    ("method", "levels", "keep"),
    [("greedy", "head,head_dim,mlp_neuron", 0.3), ("coarse", "head,mlp_neuron", 0.3), ("fisher", "head,head_dim", 0.3)],
)
def test_a_size_that_the_gates_of_a_method_cannot_reach_is_refused(method: str, levels: str, keep: float) -> None:
    with pytest.raises(UserError, match=r"expected --levels whose gates can close all but 30.0% of the leaves, .* leave 40.0% at the least"):
        discover(planted_model(), planted_task(), make_config({"method": method, "levels": levels, "keep": keep}))


def test_a_size_that_can_be_reached_within_is_none_too_small(tmp_path: Path) -> None:
    whole = discover(planted_model(), planted_task(), make_config({"method": "random", "keep": 1.0}))
    outer = whole.circuit.without({"mlp_neuron": torch.tensor([[0, i] for i in range(8)])})  # half of the neurons, a fifth of the leaves
    replace(whole, circuit=outer).save(tmp_path)
    options = {"levels": "head,head_dim", "within": str(tmp_path), "steps": 20}
    assert discover(planted_model(), planted_task(), make_config({**options, "keep": 0.3})).circuit.size <= 0.3
    with pytest.raises(UserError, match=r"close all but 19.0% of the leaves, .* leave 20.0% at the least"):
        discover(planted_model(), planted_task(), make_config({**options, "keep": 0.19}))


def test_more_than_was_to_be_kept_is_said() -> None:
    class Notes(Journal):
        def note(self, text: str) -> None:
            notes.append(text)

    notes: list[str] = []
    config = make_config({"method": "nested", "levels": "head_dim,mlp_output", "keep": 0.3, "steps": 8})
    run = discover(planted_model(), planted_task(), config, journal=Notes())
    assert run.circuit.size == pytest.approx(0.4)
    assert any(note.startswith("expected at most 30.0% of the leaves, kept 40.0%: method nested has scores of head_dim") for note in notes)


@pytest.mark.parametrize("method", ["hybrid", "sieve", "multigranular", "gate_gradient"])
def test_levels_that_the_model_does_not_have_are_refused(method: str) -> None:
    with pytest.raises(UserError, match=r"expected --levels among those of this model, layer, .*, got expert"):
        discover(planted_model(), planted_task(), make_config({"levels": "expert", "method": method}))


@pytest.mark.parametrize("method", ["hybrid", "sieve", "multigranular"])
@pytest.mark.parametrize(("levels", "lacking"), [("head,head_dim", None), ("mlp_neuron", None), (None, "head")])
def test_a_search_stays_within(method: str, levels: str | None, lacking: str | None, tmp_path: Path) -> None:
    planted = discover(planted_model(), planted_task(), make_config({"kl_budget": BUDGET, "steps": 200}))
    outer = planted.circuit.without({lacking: planted.circuit.masks[lacking].nonzero()}) if lacking else planted.circuit
    replace(planted, circuit=outer).save(tmp_path)
    config = make_config({"kl_budget": BUDGET, "steps": 20, "method": method, "within": str(tmp_path), **({"levels": levels} if levels else {})})
    if lacking:  # so that the circuit to stay in is over the budget
        with pytest.raises(UserError, match=r"--within expects a circuit within the KL budget of 0\.1, got one that costs 3\."):
            discover(planted_model(), planted_task(), config)
        config = config.changed({"force": True})
    run = discover(planted_model(), planted_task(), config)
    assert not any(bool((mask & ~outer.masks[level]).any()) for level, mask in run.circuit.masks.items())
    assert run.metrics["budget"]["met"] == (lacking is None)


def test_what_is_learned_on_stays_within_at_levels_without_gates_too() -> None:
    config = make_config({"kl_budget": BUDGET, "method": "multigranular", "levels": "head"})
    problem = make_problem(planted_model(), planted_task(), config)
    whole = Circuit.whole(problem.nodes)
    problem.within = whole.without({"mlp_neuron": whole.masks["mlp_neuron"].nonzero()[::2], "head": torch.tensor([[0, 0]])})
    gates = _Run(problem, problem, config).sample_gates(problem.task["train"].batch([0, 1]))
    for level, mask in problem.within.masks.items():
        assert not gates[level][:, ~mask].any()
        assert level == "head" or bool((gates[level][:, mask] == 1).all())


def test_gates_of_levels_that_rounds_do_not_close_are_not_learned_before_them() -> None:
    options = {"kl_budget": BUDGET, "steps": 20, "validate_every": 10, "method": "hybrid", "penalties": {"mlp_output": 0}, "polish": False}
    run = discover(planted_model(), planted_task(), make_config(options))
    assert "mlp_output" not in run.history[0]["open"]
    assert "mlp_neuron" in run.history[0]["open"]


@pytest.mark.parametrize("method", ["hybrid", "sieve", "multigranular", "gate_gradient"])
@pytest.mark.parametrize(
    "levels",
    [
        "layer,attention_block,mlp_block,head,mlp_neuron",
        "layer,attention_block,mlp_block,head",
        "mlp_block,head",
        "layer,mlp_block,head_dim",
        "attention_block,mlp_neuron",
        "layer,attention_block",
        "layer",
    ],
)
def test_the_planted_nodes_are_found_whatever_levels_get_gates(levels: str, method: str) -> None:
    """By scores alone: a level whose children get no gates is scored by what they do."""
    steps = 200 if method == "hybrid" else 100  # it does two things one after the other
    options = {"kl_budget": BUDGET, "steps": steps, "validate_every": 10, "levels": levels, "method": method, "polish": False}
    run = discover(planted_model(), planted_task(), make_config(options))
    assert {level: kept(run.circuit, level) for level in levels.split(",")} == {level: PLANTED[level] for level in levels.split(",")}
    assert run.metrics["budget"]["met"]


def test_what_gates_closed_before_the_rounds_ranks_below_all_else_by_log_alpha() -> None:
    config = make_config({"kl_budget": BUDGET, "steps": 100, "validate_every": 10, "method": "hybrid", "gates_share": 0.6})
    problem = make_problem(planted_model(), planted_task(), config)
    learning = replace(config, steps=60, learning_rate_final=LEARNING_RATE_FINAL, repair_share=0.0)
    gates = multigranular(problem, learning, Journal())
    start, scores = gates.circuit(0.0), hybrid(problem, config, Journal())
    assert start.size < 1
    for level in LEVELS:
        outside = ~start.masks[level] & problem.nodes.present(level)
        if bool(outside.any()) and bool(start.masks[level].any()):
            assert scores.values[level][outside].max() < scores.values[level][start.masks[level]].min()
            found, learned = scores.values[level][outside], gates.values[level][outside]
            assert bool((found[learned.argsort()].diff() >= 0).all())
    assert scores.circuit(0.0).size <= start.size


def test_where_gates_miss_the_budget_rounds_begin_with_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = {level: torch.full_like(x, -1.0) for level, x in planted_scores().values.items()}
    monkeypatch.setattr(
        import_module("nodesieve.methods.hybrid"),
        "multigranular",
        lambda problem, config, journal, **_: told(journal, replace(planted_scores(), values=closed)),
    )
    run = discover(planted_model(), planted_task(), make_config({"kl_budget": BUDGET, "steps": 200, "method": "hybrid", "gates_share": 0.2}))
    assert {level: kept(run.circuit, level) for level in PLANTED} == PLANTED


def planted_scores() -> Scores:
    nodes = make_problem(planted_model(), planted_task(), DiscoverConfig()).nodes
    return Scores(values=nodes.full(1.0), nodes=nodes, levels=DEFAULT_LEVELS, threshold=0.0, learned=True)


def told(journal: Journal, scores: Scores) -> Scores:
    journal.log({"step": 1, "seconds": 0.0})
    return scores


@pytest.mark.parametrize("method", ["fisher", "gate_gradient", "gate_gradient_ig", "uniform_gradient"])
def test_attribution_finds_the_plant_too(method: str) -> None:
    run = discover(planted_model(), planted_task(), make_config({"kl_budget": BUDGET, "method": method}))
    assert {level: kept(run.circuit, level) for level in PLANTED} == PLANTED


def test_fisher_information_is_nothing_where_the_answer_does_not_depend_on_a_node() -> None:
    problem = make_problem(planted_model(), planted_task(), DiscoverConfig())
    information = fisher_information(problem, make_config({}), Journal())
    for level in PLANTED:
        planted = torch.zeros_like(information[level], dtype=torch.bool)
        for index in PLANTED[level]:
            planted[index] = True
        assert information[level][planted].min() > 1000 * information[level][~planted].max() if (~planted).any() else True, level
    heads = information["head"]
    torch.testing.assert_close(heads, information["head_dim"].sum(-1))
    torch.testing.assert_close(information["layer"], information["attention_block"] + information["mlp_block"])


def test_fisher_information_is_of_tokens_drawn_as_the_model_would_say_them() -> None:
    p = torch.tensor([0.7, 0.2, 0.1])
    batch: Any = None
    drawn = log_p_of_a_drawn_token(p.log().repeat(10_000, 1), batch, torch.Generator().manual_seed(0)).exp()
    assert [float(torch.isclose(drawn, one).float().mean()) for one in p] == pytest.approx(p.tolist(), abs=0.02)


def test_the_same_seed_gives_the_same_circuit() -> None:
    config = make_config({"kl_budget": BUDGET, "steps": 30})
    runs = [discover(planted_model(), planted_task(), config) for _ in range(2)]
    assert all(torch.equal(runs[0].circuit.masks[level], runs[1].circuit.masks[level]) for level in DEFAULT_LEVELS)
    assert all(torch.equal(runs[0].scores.values[level], runs[1].scores.values[level]) for level in DEFAULT_LEVELS)
