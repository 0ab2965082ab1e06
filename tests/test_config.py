"""Options: which method they choose, and that each is read by the methods that are said to read it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import yaml

from nodesieve.cache import training_cache
from nodesieve.circuit import Circuit
from nodesieve.config import TARGET_SIZE, DiscoverConfig, choices, make_config
from nodesieve.discovery import discover
from nodesieve.errors import UserError
from nodesieve.journal import Journal
from nodesieve.method_rows import BOTH, METHOD_ROWS, PENALTIES, PRICES, READ, MethodName
from nodesieve.methods import METHODS
from nodesieve.methods.asking import Asked, ask
from nodesieve.problem import Problem
from nodesieve.run import read_config
from planted import planted_model, planted_task
from test_cache import make_problem

METHOD_NAMES = choices(MethodName)


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({}, "sieve"),
        ({"controller": "kl_budget"}, "multigranular"),  # given, be it at its default
        ({"gates_share": 0.6}, "hybrid"),
        ({"task_weight": 1.0, "penalties": {"head": 1.0}}, "sieve"),
        ({"controller": "fixed"}, "multigranular"),
        ({"log_alpha_init": {"head": 2.0}}, "multigranular"),
        ({"gates_share": 0.5, "log_alpha_init": {"head": 2.0}}, "hybrid"),
        ({"method": "sieve", "controller": "fixed"}, "sieve"),
        ({"method": "hybrid", "penalties": {"head": 1.0}}, "hybrid"),
        ({"method": "coarse", "controller": "fixed"}, "coarse"),
    ],
)
def test_options_of_learned_gates_choose_them(options: dict[str, Any], method: str) -> None:
    config = make_config(options)
    assert config.method == method
    assert make_config(config.to_dict()) == config
    assert config.penalties == {**{"sieve": PRICES, "hybrid": BOTH}.get(method, PENALTIES), **options.get("penalties", {})}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "option steps: input should be greater than or equal to 1, got -1"),
        ({"stepz": 1}, "option stepz: unexpected keyword argument, got 1"),
        ({"target_size": 0.3}, "target_size expects controller target_size, got kl_budget; for a size by any method, use keep"),
    ],
)
def test_options_in_python_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        DiscoverConfig(**options)
    assert str(error.value) == message


def test_a_target_size_is_a_size_to_keep() -> None:
    config = make_config({"controller": "target_size", "target_size": 0.3})
    assert (config.method, config.size, config.polish) == ("multigranular", 0.3, False)
    assert config.with_method("sieve", seed=0).size is None
    assert make_config({"keep": 0.2}).size == 0.2
    assert make_config({"controller": "target_size"}).size == TARGET_SIZE
    steered = make_config({"controller": "target_size", "keep": 0.2})
    assert (steered.size, steered.target_size) == (0.2, 0.2)
    assert (steered.changed({"keep": 0.3}).target_size, make_config({"controller": "target_size"}).changed({"keep": 0.3}).target_size) == (0.3, 0.3)
    assert config.changed({"seed": 1}).target_size == 0.3
    for size in (0.3, TARGET_SIZE):
        with pytest.raises(UserError, match="target_size expects controller target_size, got kl_budget"):
            make_config({"target_size": size})
    with pytest.raises(UserError, match="ask for a size"):
        make_config({"controller": "target_size", "polish": True})


def test_files_that_name_a_size_nothing_steers_to_are_read(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**make_config({}).to_dict(), "target_size": TARGET_SIZE}))  # as all were written once
    assert read_config(tmp_path) == make_config({})
    file.write_text(yaml.safe_dump({"target_size": 0.3}))
    with pytest.raises(UserError, match="target_size expects controller target_size"):
        read_config(tmp_path)


def test_another_method_gets_its_own_penalties_and_keeps_those_that_were_given() -> None:
    config = make_config({"penalties": {"head": 7.0}})
    other = config.with_method("coarse", seed=3)
    assert (other.method, other.seed) == ("coarse", 3)
    assert other.penalties == {**PENALTIES, "head": 7.0}
    assert other.with_method("sieve", seed=0) == config


def test_levels_that_are_not_given_anew_stay() -> None:
    config = make_config({"method": "hybrid", "penalties": {"head": 7.0}, "learning_rates": {"layer": 0.01}})
    other = config.changed({"penalties": {"layer": 2.0}, "learning_rates": {"head": 0.02}})
    assert other.penalties == {**BOTH, "head": 7.0, "layer": 2.0}
    assert {level: rate for level, rate in other.learning_rates.items() if level in ("layer", "head")} == {"layer": 0.01, "head": 0.02}
    with pytest.raises(UserError, match="penalties"):
        config.changed({"penalties": 3})


def test_what_has_no_effect_is_said() -> None:
    class Noting(Journal):
        notes: tuple[str, ...] = ()

        def note(self, text: str) -> None:
            self.notes += (text,)

    journal = Noting()
    discover(
        planted_model(), planted_task(), make_config({"method": "random", "controller": "fixed", "polish": False, "force": True}), journal=journal
    )
    assert [note for note in journal.notes if "no effect" in note] == [
        "--controller has no effect with --method random; it is read by multigranular, coarse"
    ]
    assert make_config({"method": "coarse", "controller": "fixed"}).unread == ()
    for levels, told in ((["head", "head_dim", "mlp_neuron"], True), (None, False), (["head"], False)):
        journal = Noting()
        options = {"method": "greedy", "polish": False, "force": True, **({"levels": levels} if levels else {})}
        discover(planted_model(), planted_task(), make_config(options), journal=journal)
        said = "method greedy gives no gates to head_dim, mlp_neuron: it looks at head alone"
        assert (said in journal.notes) == told


@pytest.mark.parametrize("method", ["random", "weight_magnitude"])
def test_a_ranking_that_nothing_has_cut_is_no_circuit_to_keep(method: str) -> None:
    with pytest.raises(KeyboardInterrupt) as stopped:
        discover(planted_model(), planted_task(), make_config({"method": method, "force": True}), journal=Journal(stopping=True))
    assert type(stopped.value) is KeyboardInterrupt


class Watched(DiscoverConfig):
    """Remembers which of its fields were read."""

    def __getattribute__(self, name: str) -> Any:
        if name in READ:
            object.__getattribute__(self, "read").add(name)
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("method", [name for name in METHOD_NAMES if name not in ("coarse", "hybrid")])  # which hand on copies to others
def test_options_are_read_by_the_methods_that_are_said_to(method: MethodName) -> None:
    read: set[str] = set()
    for controller in ("kl_budget", "target_size"):
        made = make_config({"method": method, "controller": controller, "steps": 24, "batch_size": 3, "task_weight": 0.1, "keep": 0.5})
        config = object.__new__(Watched)
        for name, value in {**{field.name: getattr(made, field.name) for field in fields(DiscoverConfig)}, "read": read}.items():
            object.__setattr__(config, name, value)
        METHODS[method](make_problem(), config, Journal())
    assert read == set(METHOD_ROWS[method].reads)


def test_every_method_can_be_asked_for() -> None:
    hint = get_type_hints(DiscoverConfig)["method"]
    assert set(choices(hint)) == {"auto", *METHOD_NAMES}
    assert set(METHODS) == set(METHOD_ROWS) == set(METHOD_NAMES)


def asked(problem: Problem, config: DiscoverConfig) -> Asked:
    cache = training_cache(problem, config, None)
    circuit = Circuit.whole(problem.nodes).without({"head": torch.zeros(1, 2, dtype=torch.long)})
    return ask(problem, circuit, config, Journal(), levels=("head_dim", "mlp_neuron"), index=range(6), cache=cache)


def test_a_loss_of_the_users_has_gradients_where_it_is_0() -> None:
    problem, config = make_problem(), make_config({"batch_size": 3, "steps": 1, "learning_dtype": "float32"})
    own = Problem(problem.model, problem.task, ablation="counterfactual", loss=lambda logits, batch: logits[:, 0] - logits[:, 0].detach())
    found = asked(own, config)
    assert found.loss == 0
    assert all(x.abs().max() > 1e-3 for x in found.gradient.values())


def test_the_sieve_asks_of_the_task_term_too() -> None:
    problem, config = make_problem(), make_config({"batch_size": 3, "steps": 1, "learning_dtype": "float32"})
    without, once, twice = (asked(problem, replace(config, task_weight=weight, task_margin=50.0)) for weight in (0.0, 0.1, 0.2))
    assert without.loss == without.kl == once.kl == twice.kl
    assert twice.loss - without.loss == pytest.approx(2 * (once.loss - without.loss))
    for level, x in without.gradient.items():
        torch.testing.assert_close(twice.gradient[level] - x, 2 * (once.gradient[level] - x))
        assert (once.gradient[level] - x).abs().max() > 1e-3
        assert torch.equal(once.fisher[level], without.fisher[level])


def test_options_that_follow_from_others_follow_from_the_new_ones() -> None:
    base = make_config({"method": "sieve", "penalties": {"mlp_output": 2.0}})
    learned = base.changed({"method": "multigranular"})
    assert learned.penalties == {**make_config({"method": "multigranular"}).penalties, "mlp_output": 2.0}
    steered = make_config({"controller": "target_size", "target_size": 0.3})
    assert (steered.polish, steered.changed({"controller": "kl_budget"}).target_size) == (False, None)
    assert steered.changed({"method": "sieve"}).polish
    assert not make_config({"polish": False}).changed({"seed": 1}).polish


@pytest.mark.parametrize(("options", "message"), [({"levels": None}, "expected a list"), ({"levels": 3}, "got 3"), ({"levels": [1]}, "got 1")])
def test_levels_are_a_list_of_names(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config(options)


@pytest.mark.parametrize("given", ["foo", 3, ["sieve"]])
def test_a_method_that_there_is_not_is_told_from_those_there_are(given: object) -> None:
    with pytest.raises(UserError, match=r"option method: expected auto or one of hybrid, sieve, .*, random, got"):
        make_config({"method": given})
