"""Controls: the right other circuits, measured alike; stopped and gone on with."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nodesieve import controls, evaluation
from nodesieve.circuit import Circuit
from nodesieve.config import DiscoverConfig, make_config
from nodesieve.console import print_controls
from nodesieve.controls import complement, partly_ablated, random_circuit, run_controls, summary
from nodesieve.evaluation import _intervals, _means, _with_faithfulness, ablated_circuit, evaluate_circuit
from nodesieve.journal import Journal
from nodesieve.levels import CHILDLESS, LEAVES, LEVELS
from nodesieve.nodes import NodeSpace, up_to
from nodesieve.problem import Problem, make_problem
from nodesieve.scores import Scores
from nodesieve.size_curve import SHARES, size_curve
from planted import PLANTED, planted_model, planted_task

SPACES = {
    "dense": NodeSpace(layers=5, heads=4, head_dim=6, neurons=20, width=10),
    "mixed": NodeSpace(layers=5, heads=4, head_dim=6, neurons=20, width=10, experts=4, expert_layers=frozenset({1, 3})),
}


def some_circuit(nodes: NodeSpace, seed: int = 0, share: float = 0.5) -> Circuit:
    generator = torch.Generator().manual_seed(seed)
    return Circuit.of({level: torch.rand(nodes.shape(level), generator=generator) < share for level in LEVELS}, nodes)


@pytest.mark.parametrize("space", list(SPACES))
@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_random_circuits_have_the_same_counts(space: str, by_layer: bool, share: float) -> None:
    nodes = SPACES[space]
    for seed in range(20):
        circuit = some_circuit(nodes, seed, share)
        other = random_circuit(circuit, by_layer=by_layer, seed=seed)
        assert {level: other.kept(level) for level in LEVELS} == {level: circuit.kept(level) for level in LEVELS}
        if by_layer:
            for level in LEVELS:
                counts = [mask.reshape(mask.shape[0], -1).sum(-1).tolist() for mask in (circuit.masks[level], other.masks[level])]
                assert counts[0] == counts[1], level
    draws = {random_circuit(circuit, by_layer=by_layer, seed=seed).fingerprint for seed in range(5)}
    assert len(draws) == 5
    assert random_circuit(circuit, by_layer=by_layer, seed=3).fingerprint == random_circuit(circuit, by_layer=by_layer, seed=3).fingerprint


def test_draws_of_one_group_or_circuit_are_not_those_of_another() -> None:
    nodes = NodeSpace(layers=4, heads=2, head_dim=2, neurons=1000, width=4)
    whole = Circuit.whole(nodes)
    scores = Scores(values={level: mask.float() for level, mask in whole.masks.items()}, nodes=nodes, levels=("mlp_neuron",))
    half = whole.without({"mlp_neuron": some_circuit(nodes, 1).masks["mlp_neuron"].nonzero()})
    other = half.without({"mlp_neuron": half.masks["mlp_neuron"].nonzero()[:1]})
    groups = ("random", "random_by_layer", *(f"partial_{p:g}" for p in controls.ABLATED_WITH))

    def drawn(circuit: Circuit) -> dict[str, torch.Tensor]:
        found = controls.controls(circuit, scores, draws=1, partial_draws=1)
        return {control.group: control.make().masks["mlp_neuron"] for control in found if control.group in groups}

    first, second, again = drawn(half), drawn(other), drawn(half)
    assert all(torch.equal(first[group], again[group]) for group in groups)
    outside = ~half.masks["mlp_neuron"]
    for one, another in ((first["random"], first["random_by_layer"]), *((first[group], second[group]) for group in groups)):
        shares = [float(mask[outside].float().mean()) for mask in (one, another)]
        assert float((one & another)[outside].float().mean()) == pytest.approx(shares[0] * shares[1], abs=0.03)  # what chance gives


def test_the_complement_shares_no_leaf_and_both_make_up_the_whole() -> None:
    nodes = SPACES["dense"]
    circuit, values = some_circuit(nodes), nodes.full(1.0)
    other = complement(circuit, Scores(values=values, nodes=nodes, levels=nodes.levels))
    for level in LEAVES:
        assert not (circuit.masks[level] & other.masks[level]).any()
        assert circuit.kept(level) + other.kept(level) == circuit.nodes.count(level)
    heads = complement(circuit, Scores(values=values, nodes=nodes, levels=("head",)))  # neurons had no gates, so closing them would say nothing
    assert torch.equal(heads.masks["head_dim"], other.masks["head_dim"])
    assert heads.kept("mlp_neuron") == nodes.count("mlp_neuron")


def test_partly_ablated_keeps_the_circuit_and_about_the_right_share_of_the_rest() -> None:
    nodes = NodeSpace(layers=4, heads=8, head_dim=32, neurons=500, width=50)
    circuit = some_circuit(nodes)
    without = Circuit.of({**circuit.masks, "embedding": torch.zeros_like(circuit.masks["embedding"])}, nodes)
    for whole in (circuit, without):
        assert partly_ablated(whole, 1.0, seed=0).fingerprint == whole.fingerprint
        assert complement(whole, Scores(values=nodes.full(1.0), nodes=nodes, levels=nodes.levels)).kept("embedding") == whole.kept("embedding")
    for p in (0.0, 0.5, 0.9, 1.0):
        other = partly_ablated(circuit, p, seed=0)
        assert all(bool((other.masks[level] | ~circuit.masks[level]).all()) for level in LEVELS)
        outside = ~circuit.masks["mlp_neuron"]
        assert float(other.masks["mlp_neuron"][outside].float().mean()) == pytest.approx(1 - p, abs=0.05)


def test_one_kind_is_opened_and_nothing_else_changes() -> None:
    nodes = SPACES["mixed"]
    circuit = some_circuit(nodes, share=0.7)
    for name, levels in controls.OPENED.items():
        other = controls.opened(circuit, levels)
        assert all(bool((other.masks[level] | ~circuit.masks[level]).all()) for level in LEVELS), name
        assert sum(map(other.kept, LEAVES)) + other.kept("mlp_output") > sum(map(circuit.kept, LEAVES)) + circuit.kept("mlp_output"), name
        for level in CHILDLESS:
            parent, expected = LEVELS[level].parent, circuit.masks[level]
            if level in levels and parent is not None:
                expected = nodes.present(level) & up_to(expected, other.masks[parent])
            assert torch.equal(other.masks[level], expected), (name, level)


def test_tenths_of_the_neurons_go_from_those_of_lowest_score_up() -> None:
    whole = Circuit.whole(SPACES["mixed"])
    values = {level: torch.rand(whole.nodes.shape(level), generator=torch.Generator().manual_seed(0)) for level in LEVELS}
    scores = Scores(values=values, nodes=whole.nodes, levels=("mlp_neuron",))  # experts are not scored
    closed = {control.name: whole.masks["mlp_neuron"] & ~control.make().masks["mlp_neuron"] for control in controls.controls(whole, scores, draws=1)}
    tenths = [values["mlp_neuron"][mask] for name, mask in closed.items() if "decile" in name]
    assert [name for name in closed if "decile" in name] == [f"mlp_neuron.decile.{i}" for i in range(10)]
    assert [len(tenth) for tenth in tenths] == [whole.kept("mlp_neuron") // 10] * 10
    assert all(lower.max() < higher.min() for lower, higher in pairwise(tenths))


@pytest.fixture(scope="module")
def planted() -> tuple[Problem, Circuit, Scores]:
    problem = make_problem(planted_model(), planted_task(), DiscoverConfig())
    masks = {level: torch.zeros(problem.nodes.shape(level), dtype=torch.bool) for level in LEVELS}
    for level, indices in PLANTED.items():
        for index in indices:
            masks[level][index] = True
    masks["embedding"] |= True
    scores = Scores(values={level: mask.float() for level, mask in masks.items()}, nodes=problem.nodes, levels=tuple(PLANTED), threshold=0.5)
    return problem, Circuit.of(masks, problem.nodes), scores


def test_a_planted_circuit_stands_up_to_every_control(planted: tuple[Problem, Circuit, Scores]) -> None:
    problem, circuit, scores = planted
    found = run_controls(problem, circuit, scores, draws=19, partial_draws=4)
    told = summary(found)
    assert told["random"]["p"] == told["random_by_layer"]["p"] == pytest.approx(1 / 20)
    assert told["complement"]["kl_mean"] > 0.2
    assert all(told[f"partial_{p}"]["kl_max"] < 0.01 for p in (0.5, 0.75, 0.9))
    assert told["opened"]["count"] == len(controls.OPENED)
    assert told["opened"]["added_by_dearest"] < 0.01
    assert min(told["minimality"]["added"].values()) > 0.1
    assert told["minimality"]["free"] == 0
    head = f"head.{'.'.join(map(str, sorted(PLANTED['head'])[0]))}"
    assert found["circuit"]["circuit"]["exact_match"] == 1 > found["complement"]["complement"]["exact_match"]
    (kl,) = problem.losses([circuit.without({"head": torch.tensor(sorted(PLANTED["head"])[:1])})], "test")
    assert found["minimality"][head]["kl"] == pytest.approx(float(kl.mean()), rel=1e-4)


def test_what_is_measured_unless_asked_otherwise(planted: tuple[Problem, Circuit, Scores]) -> None:
    _, circuit, scores = planted
    counts = Counter(control.group for control in controls.controls(circuit, scores))
    assert counts["random"] == counts["random_by_layer"] == 100
    assert counts["partial_0.5"] == counts["partial_0.75"] == counts["partial_0.9"] == 32


def test_a_summary_worked_out_by_hand() -> None:
    kls = {"random": [0.1, 0.2, 0.3, 0.4], "random_by_layer": [0.3, 0.4, 0.5], "opened": [0.19, 0.5], "minimality": [0.25, 0.19, 0.6, 0.2]}
    found = {group: {f"{group}.{i}": {"kl": kl} for i, kl in enumerate(values)} for group, values in kls.items()}
    told = summary({"circuit": {"circuit": {"kl": 0.2}}, **found})
    assert told["random"]["hits"] == 2  # as low counts
    assert told["random"]["p"] == pytest.approx(3 / 5)
    assert told["random_by_layer"]["p"] == pytest.approx(1 / 4)
    assert told["random"]["kl_mean"] == pytest.approx(0.25)
    assert (told["random"]["kl_min"], told["random"]["kl_max"]) == (0.1, 0.4)
    assert (told["opened"]["dearest"], told["opened"]["added_by_dearest"]) == ("opened.1", pytest.approx(0.3))
    assert told["minimality"]["free"] == 2
    assert summary({"circuit": {"circuit": {"kl": 0.2}}, **found}, nothing=0.06)["minimality"]["free"] == 3
    assert list(told["minimality"]["added"]) == ["minimality.1", "minimality.3", "minimality.0", "minimality.2"]
    assert list(told["minimality"]["added"].values()) == pytest.approx([-0.01, 0.0, 0.05, 0.4])


def test_what_parts_cost_is_shown_from_both_ends(capsys: pytest.CaptureFixture[str]) -> None:
    costs = {f"head.0.{i}": i / 1000 for i in range(40)}
    kls = dict.fromkeys(("kl_mean", "kl_min", "kl_max"), 0.2)
    print_controls({"minimality": {"count": 40, **kls, "free": 1, "nothing": 0.0025, "added": costs}}, title="others")
    shown = capsys.readouterr().out
    assert "head.0.7 " in shown
    assert "... 24 others" in shown
    assert "+0.0390" in shown
    assert "1 cost 0.0025 or less" in shown
    assert "head.0.8 " not in shown


def test_stopped_controls_go_on_where_they_were(planted: tuple[Problem, Circuit, Scores]) -> None:
    problem, circuit, scores = planted
    whole = run_controls(problem, circuit, scores, draws=3, partial_draws=1)

    class Stopping(Journal):
        def progress(self, step: int, total: int, **facts: float) -> None:
            self.stopping = True

    saved: list[dict[str, dict[str, object]]] = []
    with pytest.raises(KeyboardInterrupt):
        run_controls(problem, circuit, scores, draws=3, partial_draws=1, save=lambda found: saved.append(found), journal=Stopping())
    measured: list[int] = []

    def counting(problem: Problem, circuits: list[Circuit], split: object) -> object:
        measured.append(len(circuits))
        return original(problem, circuits, split)

    original = controls.measure_circuits
    controls.measure_circuits = counting  # type: ignore[assignment]
    try:
        again = run_controls(problem, circuit, scores, draws=3, partial_draws=1, done=saved[-1])
    finally:
        controls.measure_circuits = original
    assert again == whole
    total = sum(len(rows) for rows in whole.values())
    assert sum(measured) == total - controls.AT_ONCE > 0


def test_controls_of_other_things_are_measured_anew(
    planted: tuple[Problem, Circuit, Scores], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, circuit, scores = planted
    run: Any = SimpleNamespace(circuit=circuit, scores=scores)
    measured: list[Circuit] = []
    monkeypatch.setattr(controls, "measure_circuits", lambda _, circuits, split: measured.extend(circuits) or [{"kl": 0.0} for _ in circuits])
    task = planted_task()
    other = replace(task, splits={**task.splits, "train": task.splits["train"][1:]})
    for ablation, again in (("zero", False), ("mean", True)):
        for examples, anew in ((task, True), (task, False), (other, again)):
            problem = make_problem(planted_model(), examples, make_config({"ablation": ablation}))
            controls.controls_kept_in(tmp_path / ablation, run, problem, split="test", draws=1, journal=Journal())
            assert bool(measured) == anew
            measured.clear()
    monkeypatch.setattr(controls, "DEFINITION", controls.DEFINITION + 1)
    controls.controls_kept_in(tmp_path / ablation, run, problem, split="test", draws=1, journal=Journal())
    assert measured


def test_controls_are_kept_by_the_name_of_the_task_and_by_what_is_in_a_file(planted: tuple[Problem, Circuit, Scores]) -> None:
    problem, _, _ = planted
    built_in, file = (replace(problem.task, name=name, source=name) for name in ("ioi", "prompts/ioi of mine"))
    names = [controls.name_of_examples(SimpleNamespace(task=task), "test") for task in (built_in, file)]  # type: ignore[arg-type]
    assert names == ["ioi", f"ioi-of-mine-{problem.task['test'].fingerprint[:8]}"]


def test_everything_ablated_is_all_but_the_embedding(planted: tuple[Problem, Circuit, Scores]) -> None:
    found = ablated_circuit(planted[0])
    assert [level for level in LEVELS if found.kept(level)] == ["embedding"]


def test_a_circuit_that_overflows_has_no_metrics_and_is_worse_than_any(
    planted: tuple[Problem, Circuit, Scores], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problem, circuit, scores = planted
    told = evaluation.kl_divergence

    def overflowing(full: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Where they differ much, for one example of the batch, as in 16 bits."""
        kl = told(full, logits)
        return torch.where((kl > 0.5) & (kl == kl.max()), torch.inf, kl)

    monkeypatch.setattr(evaluation, "kl_divergence", overflowing)
    measured = evaluate_circuit(problem, circuit)
    assert measured.circuit["test"]["kl"] is not None
    assert set(measured.ablated["test"].values()) == {None}
    assert measured.circuit["test"]["faithfulness"] is None  # there is nothing to set it beside
    assert set(evaluate_circuit(problem, ablated_circuit(problem)).intervals["test"].values()) == {None}
    found = run_controls(problem, circuit, scores, draws=3, partial_draws=1)
    shown = summary(found)
    assert shown["random"]["kl_mean"] is shown["random"]["kl_max"] is None
    assert shown["random"]["hits"] == 0
    assert None in shown["minimality"]["added"].values()
    json.dumps(shown, allow_nan=False)
    print_controls(shown, title="others")
    assert "inf" not in capsys.readouterr().out
    curve = size_curve(problem, scores, budget=0.1)["leaves"]
    assert curve["points"][0]["kl"] is None
    assert curve["compactness"] in SHARES


def test_means_are_over_the_examples_that_have_distractors() -> None:
    nan = float("nan")
    some, none = (torch.tensor(x, dtype=torch.float64) for x in ([nan, 2.0, 4.0], [nan, nan, nan]))
    kl = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert _means({"kl": kl, "logit_diff": some, "accuracy": none}) == {
        "kl": pytest.approx(0.5),
        "kl_p95": pytest.approx(0.95),
        "logit_diff": 3.0,
        "accuracy": None,
    }
    full, ablated = {"logit_diff": some + 1}, {"logit_diff": some - 3}
    assert _with_faithfulness({"logit_diff": some}, full, ablated)["faithfulness"] == pytest.approx(3 / 4)


def test_intervals_hold_the_means(planted: tuple[Problem, Circuit, Scores]) -> None:
    problem, circuit, _ = planted
    rough = Circuit.of({**circuit.masks, "mlp_neuron": torch.zeros_like(circuit.masks["mlp_neuron"])}, problem.nodes)
    evaluation = evaluate_circuit(problem, rough, splits=("test",))
    for name, value in evaluation.circuit["test"].items():
        ends = evaluation.intervals["test"][name]
        assert (value is None) == (ends is None)
        if value is not None and ends is not None and name != "kl_p95":
            assert ends[0] - 1e-9 <= value <= ends[1] + 1e-9


def test_intervals_shrink_with_more_examples() -> None:
    widths = []
    for count in (50, 800):
        spread = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
        found = _intervals({"logit_diff": spread + 1}, {"kl": spread, "logit_diff": spread}, {"logit_diff": -spread}, prompts=range(count))
        low, high = found["kl"] or (0.0, 0.0)
        assert 0 < low < float(spread.mean()) < high
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.3)  # the square root of 16 times as many


def test_intervals_are_of_95_percent() -> None:
    spread = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = [{"logit_diff": spread}, {"kl": spread, "logit_diff": spread}, {"logit_diff": -spread}]
    found = _intervals(*rows, prompts=range(400))
    low, high = found["kl"] or (0.0, 0.0)
    assert high - low == pytest.approx(2 * 1.96 * float(spread.std()) / 20, rel=0.08)
    low, high = found["kl_p95"] or (0.0, 0.0)
    assert low < float(spread.quantile(0.95)) < high < low + 1


def test_faithfulness_has_no_interval_where_a_resample_has_none() -> None:
    spread = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = [{"logit_diff": spread}, {"kl": spread.abs(), "logit_diff": spread}]
    for far, known in ((1e-2, False), (10.0, True)):  # now and then the full model and the ablated one are level
        found = _intervals(*rows, {"logit_diff": spread.roll(1) - far}, prompts=range(50))
        assert (found["faithfulness"] is not None) == known
        assert found["logit_diff"] is not None


def test_intervals_take_prompts_for_independent_and_not_the_tokens_of_their_answers() -> None:
    spread = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = [{"logit_diff": spread + 1}, {"kl": spread, "logit_diff": spread}, {"logit_diff": -spread}]
    repeated = [{name: x.repeat_interleave(4) for name, x in row.items()} for row in rows]
    alone, together = _intervals(*rows, prompts=range(50)), _intervals(*repeated, prompts=[i // 4 for i in range(200)])
    for name in ("kl", "logit_diff", "faithfulness"):
        assert together[name] == pytest.approx(alone[name])


def test_an_exact_match_is_with_the_full_model_be_it_right_or_wrong() -> None:
    problem = make_problem(planted_model(), planted_task(about=1), make_config({"force": True}))  # of which the model knows nothing
    found = evaluate_circuit(problem, Circuit.whole(problem.nodes))
    assert found.full["test"]["accuracy"] < 0.8
    assert found.circuit["test"]["exact_match"] == 1


@pytest.mark.parametrize("by_layer", [False, True])
def test_any_child_may_be_the_one_that_a_kept_parent_keeps(by_layer: bool) -> None:
    nodes = NodeSpace(layers=3, heads=4, head_dim=6, neurons=20, width=10)
    whole = Circuit.whole(nodes)
    one = whole.without(
        {level: whole.masks[level].nonzero()[whole.masks[level].nonzero()[:, -1] > 0] for level in ("head_dim", "mlp_neuron", "mlp_output")}
    )
    drawn = [random_circuit(one, by_layer=by_layer, seed=seed) for seed in range(200)]
    for level in ("head_dim", "mlp_neuron", "mlp_output"):
        share = torch.stack([circuit.masks[level] for circuit in drawn]).float().mean(0)
        assert float(share.min()) > 0, level
        assert float(share.mean()) == pytest.approx(1 / nodes.shape(level)[-1])
