"""What `greedy` and `nested` find on a model whose circuit is known, and that rankings go on where they were stopped."""

from __future__ import annotations

import math
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from nodesieve.circuit import Circuit
from nodesieve.config import make_config
from nodesieve.discovery import discover
from nodesieve.journal import POLISHING, SCORING, Journal, State
from nodesieve.levels import LEAVES
from nodesieve.methods import METHODS
from nodesieve.methods.gradients import IG_LEVELS
from nodesieve.methods.greedy import EXAMPLES, _Search
from nodesieve.methods.nested import SMALLEST, _Ranking
from nodesieve.nodes import NodeSpace
from nodesieve.problem import make_problem
from nodesieve.run import RunJournal
from nodesieve.size_curve import UNITS, cut
from planted import PLANTED, planted_model, planted_task
from test_cache import make_problem as random_problem

BUDGET = 0.1


def test_greedy_keeps_the_planted_heads_and_blocks_whole() -> None:
    run = discover(planted_model(), planted_task(), make_config({"kl_budget": BUDGET, "method": "greedy"}))
    for level in ("head", "mlp_block"):
        assert {tuple(index) for index in run.circuit.masks[level].nonzero().tolist()} == PLANTED[level]
    assert run.circuit.kept("head_dim") == run.circuit.kept("head") * run.circuit.nodes.head_dim
    assert run.metrics["budget"]["met"]


@pytest.mark.parametrize("method", ["greedy", "nested", "fisher", "gate_gradient", "activation_difference"])
def test_rankings_are_made_from_training_data_alone(method: str) -> None:
    config = make_config({"kl_budget": BUDGET, "method": method, "steps": 2})
    problem = make_problem(planted_model(), planted_task(), config, splits=("train",))
    assert set(METHODS[method](problem, config, Journal()).levels) <= set(config.levels)


def test_greedy_goes_on_to_a_size_beyond_the_budget() -> None:
    run = discover(planted_model(), planted_task(), make_config({"kl_budget": 1e-4, "method": "greedy", "keep": 0.3, "polish": False}))
    assert 0.1 < run.circuit.size <= 0.3


def test_greedy_goes_from_the_last_node_back() -> None:
    problem = make_problem(planted_model(), planted_task(), make_config({}))
    scores = METHODS["greedy"](problem, make_config({"kl_budget": BUDGET}), Journal())
    planted = {("head", *index) for index in PLANTED["head"]} | {("mlp_block", *index) for index in PLANTED["mlp_block"]}
    gone = [(float(scores.values[level][index]), level, *index) for level in UNITS["parts"] for index in _all(scores.values[level])]
    first = [tuple(rest) for _, *rest in sorted(gone)][: len(gone) - len(planted)]
    layers = [index[1] for index in first]
    assert layers == sorted(layers, reverse=True)  # nothing but the plant costs anything: all the rest goes in the first sweep
    assert not planted & set(first)


def test_greedy_measures_what_a_whole_pass_would() -> None:
    """Though a visit begins at its own layer."""
    problem, config = make_problem(planted_model(), planted_task(), make_config({})), make_config({"kl_budget": BUDGET, "learning_dtype": "float32"})
    search = _Search(problem, config)
    search.begin()
    for node in search.left:
        search.visit(node)
        closed = Circuit.of({**Circuit.whole(problem.nodes).masks, **_kept(problem.nodes, search.gone)}, problem.nodes)
        (kls,) = problem.losses([closed], "train", first=EXAMPLES)
        assert search.kl == pytest.approx(float(kls.mean()), abs=1e-6)
    assert search.gone


def test_greedy_does_not_charge_nodes_for_rounding() -> None:
    """Which, in 16 bits, costs more than the first sweep allows a node."""
    swept = []
    for dtype in ("float32", "bfloat16"):
        problem = make_problem(planted_model(), planted_task(), make_config({}))
        search = _Search(problem, make_config({"kl_budget": BUDGET, "learning_dtype": dtype}))
        search.begin()
        for node in search.left:
            search.visit(node)
        swept.append(search.gone)
    assert search.kl > search.tolerance
    assert swept[0] == swept[1]


def test_nested_ranks_the_plant_first_at_every_size() -> None:
    config = make_config({"kl_budget": BUDGET, "method": "nested", "steps": 200, "batch_size": 16})
    run = discover(planted_model(), planted_task(), config)
    leaves = {(level, *index) for level in LEAVES if level in PLANTED for index in PLANTED[level]}
    total = sum(run.circuit.nodes.count(level) for level in LEAVES)
    top = cut(run.scores, "leaves", (len(leaves) + 0.5) / total)
    assert {(level, *index) for level in LEAVES for index in map(tuple, top.masks[level].nonzero().tolist())} == leaves
    assert run.metrics["budget"]["met"]
    assert run.metrics["size"] == pytest.approx(len(leaves) / total)


def test_nested_draws_other_sizes_and_gates_each_step_and_by_the_seed() -> None:
    nodes = NodeSpace(layers=2, heads=3, head_dim=4, neurons=8, width=12)

    def drawn(seed: int, step: int) -> tuple[list[float], list[float]]:
        ranking = _Ranking(nodes, make_config({"seed": seed}), torch.device("cpu"))
        ranking.step = step
        sampled, sizes = ranking.sample(4)
        return sizes.tolist(), sampled["mlp_neuron"].flatten().tolist()

    first = drawn(0, 0)
    assert first == drawn(0, 0)
    assert all(first[part] != other[part] for other in (drawn(1, 0), drawn(0, 1)) for part in (0, 1))
    assert [math.ceil(4 * (1 - math.log(size) / math.log(SMALLEST))) for size in first[0]] == [1, 2, 3, 4]  # each in a stretch of the log scale


@pytest.mark.parametrize("method", ["greedy", "nested"])
def test_stopped_it_goes_on_as_if_it_had_not_been(method: str, tmp_path: Path) -> None:
    problem = make_problem(planted_model(), planted_task(), make_config({}))
    config = make_config({"kl_budget": BUDGET, "method": method, "steps": 12, "batch_size": 8})

    class Stopping(RunJournal):
        def progress(self, step: int, total: int, **facts: float) -> None:
            self.stopping = step == 5

    whole = METHODS[method](problem, config, Journal())
    with pytest.raises(KeyboardInterrupt):
        METHODS[method](problem, config, Stopping(tmp_path))
    again = METHODS[method](problem, config, RunJournal(tmp_path))
    for level in whole.levels:
        torch.testing.assert_close(again.values[level], whole.values[level])


@pytest.mark.parametrize("levels_through", [3, IG_LEVELS])
def test_attributions_go_on_after_the_last_gate_level(levels_through: int, tmp_path: Path) -> None:
    config = make_config({"kl_budget": BUDGET, "method": "gate_gradient_ig", "batch_size": 8})
    whole = make_problem(planted_model(), planted_task(), make_config({}))
    scores = METHODS["gate_gradient_ig"](whole, config, Journal())

    class Stopping(RunJournal):
        saved = 0

        def save(self, state: State, *, part: str = SCORING) -> None:
            super().save(state, part=part)
            self.saved += 1
            self.stopping = self.saved == levels_through

    stopped, resumed = (make_problem(planted_model(), planted_task(), make_config({})) for _ in range(2))
    stopping = Stopping(tmp_path)
    stopping.passes = stopped.model.passes
    with pytest.raises(KeyboardInterrupt) if levels_through < IG_LEVELS else nullcontext():
        METHODS["gate_gradient_ig"](stopped, config, stopping)
    before = stopped.model.passes.backward
    journal = RunJournal(tmp_path)
    journal.passes = resumed.model.passes
    again = METHODS["gate_gradient_ig"](resumed, config, journal)
    for level in scores.levels:
        assert torch.equal(again.values[level], scores.values[level])
    assert resumed.model.passes == whole.model.passes
    assert before >= whole.model.passes.backward * levels_through / IG_LEVELS


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system counts what started a program, too")
def test_peak_memory_is_not_that_of_what_started_the_run() -> None:
    code = "from nodesieve.usage import Memory; print(Memory().peak())"
    start = f"import subprocess, sys; x = bytearray(900_000_000); subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    told = subprocess.run([sys.executable, "-c", start], check=True, capture_output=True, text=True)
    assert 10**7 < int(told.stdout) < 9 * 10**8


@pytest.mark.parametrize("part", [SCORING, POLISHING])
def test_a_run_that_was_stopped_reports_what_it_has_read_and_its_peak_and_where(part: str, tmp_path: Path) -> None:
    config = make_config({"kl_budget": BUDGET, "method": "greedy", "polish": True})

    class Stopping(RunJournal):
        """After five nodes, or one stage."""

        saved = 0

        def progress(self, step: int, total: int, **facts: float) -> None:
            self.stopping = self.stopping or (part == SCORING and step == 5)

        def save(self, state: State, *, part: str = SCORING) -> None:
            super().save(state, part=part)
            self.saved += part == POLISHING
            self.stopping = self.stopping or self.saved == 1

    whole = discover(planted_model(), planted_task(), config)
    stopping = Stopping(tmp_path)
    stopping.memory.before = 10**15
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[discover.__module__], "device_name", lambda device: "a GPU")
        with pytest.raises(KeyboardInterrupt):
            discover(planted_model(), planted_task(), config, journal=stopping)
    resumed = discover(planted_model(), planted_task(), config, journal=RunJournal(tmp_path))
    assert (whole.metrics["device"], resumed.metrics["device"]) == ("cpu", "a GPU, then cpu")
    assert resumed.circuit.fingerprint == whole.circuit.fingerprint
    assert whole.metrics["peak_memory_bytes"] < resumed.metrics["peak_memory_bytes"] == 10**15
    assert resumed.metrics["passes"]["backward"] == whole.metrics["passes"]["backward"]
    assert resumed.metrics["passes"]["forward"] >= whole.metrics["passes"]["forward"]  # what a state does not hold is read again


def _kept(nodes: NodeSpace, gone: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    masks = {level: torch.ones(nodes.shape(level), dtype=torch.bool) for level in ("head", "mlp_block")}
    for layer, head in gone:
        masks["mlp_block" if head < 0 else "head"][(layer,) if head < 0 else (layer, head)] = False
    return masks


def _all(values: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(index) for index in torch.ones_like(values).nonzero().tolist()]


@pytest.mark.parametrize("method", ["sieve", "multigranular", "nested"])
def test_searches_go_by_the_seed(method: str) -> None:
    problem = random_problem()
    options = {"method": method, "steps": 2, "batch_size": 3, "kl_budget": 0.1, "learning_dtype": "float32"}
    first, again, other = (METHODS[method](problem, make_config({**options, "seed": seed}), Journal()).values["head_dim"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_nested_learns_from_the_log_of_the_kl() -> None:
    journal = Journal()
    problem = make_problem(planted_model(), planted_task(), make_config({}))
    METHODS["nested"](problem, make_config({"method": "nested", "steps": 2, "batch_size": 8, "learning_dtype": "float32"}), journal)
    for row in journal.history:
        assert row["loss"] == pytest.approx(float(torch.tensor(row["kls"]).log1p().mean()), abs=1e-3)
        assert row["loss"] < row["kl"] - 0.01


def test_what_one_leaf_gains_others_lose() -> None:
    ranking = _Ranking(NodeSpace(layers=2, heads=3, head_dim=4, neurons=8, width=12), make_config({}), torch.device("cpu"))
    with torch.no_grad():
        for value in ranking.values.values():
            value.copy_(torch.rand(value.shape, generator=torch.Generator().manual_seed(0)))
    sampled, _ = ranking.sample(4)
    sum(sampled[leaf].sum() for leaf in ranking.leaves).backward()  # type: ignore[union-attr]
    moved = torch.cat([ranking.values[leaf].grad.flatten() for leaf in ranking.leaves])  # type: ignore[union-attr]
    assert moved.abs().max() < 1e-5  # as many are open before a step and after it


def test_each_sweep_allows_twice_as_much() -> None:
    problem = make_problem(planted_model(), planted_task(), make_config({}))
    search = _Search(problem, make_config({"kl_budget": 0.1}))
    search.end_sweep()
    assert search.tolerance == pytest.approx(2 * 0.1 / 1024)
