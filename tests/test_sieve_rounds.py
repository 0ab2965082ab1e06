"""Single rounds of the sieve: what is asked and of which circuit, in which order nodes go, what may be spent, and which heads are tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from nodesieve.cache import training_cache
from nodesieve.circuit import Circuit
from nodesieve.config import make_config
from nodesieve.journal import Journal
from nodesieve.methods.asking import Asked, ask
from nodesieve.methods.looks import Looks
from nodesieve.methods.sieve import _Round, _Sieve, sieve
from nodesieve.problem import Problem
from nodesieve.tasks.base import SplitName
from test_cache import make_problem as random_problem
from test_polish import Additive
from test_sieve import BUDGET, config


def test_what_is_asked_is_asked_at_the_circuit_and_of_each_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodesieve.methods.asking.log_p_of_a_drawn_token", lambda logits, *_: logits[:, 0])
    problem = random_problem()
    circuit = Circuit.whole(problem.nodes).without({"head_dim": torch.tensor([[0, 0, 0], [1, 2, 3]]), "mlp_output": torch.tensor([[0, 1]])})

    def asked(size: int) -> Asked:
        options = make_config({"batch_size": size, "steps": 1, "learning_dtype": "float32"})
        cache = training_cache(problem, options, None)
        return ask(problem, circuit, options, Journal(), levels=("head_dim", "mlp_neuron"), index=range(6), cache=cache)

    one, three = asked(1), asked(3)
    (kl,) = problem.losses([circuit], "train")
    assert one.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    for level in one.fisher:
        torch.testing.assert_close(one.fisher[level], three.fisher[level], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(one.gradient[level], three.gradient[level], rtol=1e-3, atol=1e-6)


def test_what_closing_would_cost_least_goes_first(problem: Problem) -> None:
    run = _Sieve(problem, config(levels=["mlp_neuron"]))
    run.fisher, run.gradient = ({"mlp_neuron": torch.full(problem.nodes.shape("mlp_neuron"), x)} for x in (1.0, 0.0))
    run.gradient["mlp_neuron"][0, 2], run.gradient["mlp_neuron"][1, 1] = 50.0, -50.0  # without the one the KL falls, without the other it rises
    run.fisher["mlp_neuron"][1, 4] = 0.0
    chosen = run._cheapest(2.5 / problem.nodes.count("mlp_neuron"), 10.0).chosen["mlp_neuron"]
    assert chosen.nonzero().tolist() == [[0, 2], [1, 4]]
    assert chosen[0, 2] < chosen[1, 4]


def test_nodes_go_by_what_they_cost_for_their_price(problem: Problem) -> None:
    prices = _Sieve(problem, config(levels=["head_dim", "mlp_neuron"], penalties={"head_dim": 3.0, "mlp_neuron": 1.0})).prices
    whole, nodes = Circuit.whole(problem.nodes), problem.nodes
    costs = {"head_dim": torch.full(nodes.shape("head_dim"), 1.0), "mlp_neuron": torch.full(nodes.shape("mlp_neuron"), 0.9)}
    price, order = prices.order(whole, costs)
    assert price[0] == pytest.approx(2 * float(price[-1]))
    assert order.tolist() == list(range(len(price)))  # dimensions cost more, but not twice as much


def test_what_is_left_stands_in_the_order_in_which_it_would_go(problem: Problem) -> None:
    run = _Sieve(problem, config(levels=["mlp_neuron"]))
    run.gradient = {"mlp_neuron": torch.zeros(problem.nodes.shape("mlp_neuron"))}
    run.fisher = {"mlp_neuron": torch.rand(problem.nodes.shape("mlp_neuron"), generator=torch.Generator().manual_seed(0))}
    assert torch.equal(run.scores().values["mlp_neuron"].flatten().argsort(), run.fisher["mlp_neuron"].flatten().argsort())


def test_a_round_spends_its_part_of_what_is_left(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    spent: list[float] = []
    monkeypatch.setattr(_Sieve, "_taken", lambda run, most: spent.append(most))
    run = _Sieve(problem, config())
    run.looks.kl, run.looks.kl_upper = 0.0, 0.2 * BUDGET
    for run.round in (0, 9, 11):
        run.close()
    run.round, run.looks.kl_upper = 0, 1.5 * BUDGET
    run.close()
    assert spent == pytest.approx([(1 - 0.01 ** (1 / 12)) * 0.8 * BUDGET, 1.5 / 3 * 0.8 * BUDGET, 0.8 * BUDGET, 0.0])


def test_what_is_known_is_averaged_over_the_rounds(problem: Problem) -> None:
    run = _Sieve(problem, config())
    for run.round, x, known in ((0, 1.0, 1.0), (1, 0.0, 0.5), (9, 1.0, 0.65)):
        run.learn(Asked(loss=0.0, kl=0.0, gradient={"head": torch.full((2, 3), x)}, fisher={"head": torch.full((2, 3), x)}))
        assert float(run.gradient["head"][0, 0]) == float(run.fisher["head"][0, 0]) == pytest.approx(known)


class Cut(Additive):
    within = None

    def looks(self, circuits: Sequence[Circuit], split: SplitName, *, first: int | None = None, skip: int = 0) -> list[torch.Tensor]:
        return [kl[: len(self.task["validation"])] for kl in super().looks(circuits, split, first=first)]


@pytest.mark.parametrize(("cost", "left"), [(0.001 * BUDGET, 0), (0.05 * BUDGET, 6)])
def test_a_trial_takes_no_head_that_costs_something(problem: Problem, cost: float, left: int) -> None:
    additive: Any = Cut(problem, head=cost, neuron=0.0)
    run = _Sieve(additive, config(), cache=object())  # type: ignore[arg-type]
    run.fisher = run.gradient = {"head": torch.zeros(problem.nodes.shape("head"))}
    run.looks.begin(run.circuit)
    run.close_heads(_Round(Journal(), run))
    assert run.circuit.kept("head") == left


def test_heads_are_tried_three_rounds_apart(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def close_heads(run: _Sieve, journal: Any) -> None:
        tried.append(run.round)
        run.tried = run.round

    monkeypatch.setattr(_Sieve, "close_heads", close_heads)
    journal = Journal()
    sieve(problem, config(), journal)
    assert tried == list(range(3, len(journal.history), 3)) != []


def test_what_all_of_the_split_refuses_stays_open(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    additive: Any = Cut(problem, head=0.0, neuron=0.0)
    run = _Sieve(additive, config(), cache=object())  # type: ignore[arg-type]
    run.fisher = run.gradient = {"head": torch.zeros(problem.nodes.shape("head"))}
    run.looks.begin(run.circuit)
    asked: list[int] = []
    monkeypatch.setattr(Looks, "agree", lambda looks, look, most: asked.append(look.candidate.circuit.kept("head")))
    run.close_heads(_Round(Journal(), run))
    assert asked == [0, 3]  # all six, then half of them
    assert run.circuit.kept("head") == 6


def test_the_sieve_reads_other_examples_in_another_order_by_the_seed(problem: Problem) -> None:
    first, again, other = (_Sieve(problem, config(batch_size=1, seed=seed))._next_examples() for seed in (0, 0, 1))
    assert first == again != other
    orders = [problem.task["train"].training_batch(0, 8, seed).index.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_rounds_end_where_a_trial_of_heads_leaves_nothing_to_ask_about(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_of_them(run: _Sieve, journal: Journal) -> None:
        gone = run.circuit.without({"head": run.circuit.masks["head"].nonzero()})
        run.went = {level: torch.where(mask, run.went[level], run.round - 0.5) for level, mask in gone.masks.items()}
        run.circuit = gone

    monkeypatch.setattr(_Sieve, "close_heads", all_of_them)
    journal = Journal()
    scores = sieve(problem, config(levels=("head",)), journal)
    assert len(journal.history) >= 1
    assert not scores.circuit(0.0).kept("head")


@pytest.mark.parametrize("levels", [("mlp_block", "expert"), ("mlp_block", "mlp_neuron"), ("layer", "head", "expert")])
def test_blocks_are_asked_about_where_a_layer_of_the_other_kind_has_no_gates_below(levels: tuple[str, ...]) -> None:
    """Layers 0 and 2 have experts, layer 1 has neurons."""
    problem, journal = random_problem("qwen3_moe-mixed"), Journal()
    options = make_config({"method": "sieve", "levels": levels, "steps": 48, "batch_size": 3, "kl_budget": 0.03, "learning_dtype": "float32"})
    circuit = sieve(problem, options, journal).circuit(0.0)
    shares = {level: circuit.kept(level) / problem.nodes.count(level) for level in levels}
    assert shares == pytest.approx(journal.history[-1]["open"])
    assert any(0 < share < 1 for share in shares.values())
