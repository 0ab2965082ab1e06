"""What is remembered of training examples: it is what would be computed, to 16 bits, and stays within its limit."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from conftest import tiny_model
from nodesieve.ablations import LAYER_PLACES, Corrupted
from nodesieve.batches import EncodedExample, PaddingSide, Split
from nodesieve.cache import LOOKS, Cache, remembering, training_cache
from nodesieve.circuit import Circuit
from nodesieve.config import DiscoverConfig, make_config
from nodesieve.gated_model import GatedModel
from nodesieve.journal import Journal
from nodesieve.methods import METHODS
from nodesieve.methods.hybrid import hybrid
from nodesieve.problem import Problem
from nodesieve.tasks.encode import EncodedTask


def make_problem(name: str = "llama", side: PaddingSide = "left", same: int = 0) -> Problem:
    """Six random examples of 5 to 7 tokens, the first `same` of which are the same in the corrupted prompt."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length in (5, 7, 6, 7, 5, 6):
        clean, corrupted = torch.randint(5, 50, (2, length), generator=generator).tolist()
        examples.append(
            EncodedExample(clean=tuple(clean), corrupted=(*clean[:same], *corrupted[same:]), answers=(1,), distractors=(2,), prompt=len(examples))
        )
    split = Split(examples=tuple(examples), pad_id=0, device=torch.device("cpu"), padding_side=side)
    splits = {"train": split, "validation": split}
    task = EncodedTask(name="random", splits=splits, metrics=(), skipped={}, shown=(), left_out={})
    return Problem(GatedModel(tiny_model(name)), task, ablation="counterfactual")


def config(**options: object) -> DiscoverConfig:
    return make_config({"steps": 100, "batch_size": 3, **options})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("embedding", [False, True])
def test_what_is_remembered_is_what_is_computed(tmp_path: Path, side: PaddingSide, embedding: bool) -> None:
    problem = make_problem(side=side)
    cache = training_cache(problem, config(), tmp_path)
    gates = {level: torch.rand(problem.nodes.shape(level), generator=torch.Generator().manual_seed(1)) for level in problem.nodes.full(1.0)}
    if not embedding:
        gates["embedding"] = torch.ones(1)
    for index in ([0, 1, 2], [3, 4, 5]):
        batch = problem.task["train"].batch(index)
        values = cache.values(batch)
        assert isinstance(values, Corrupted)
        problem.model.gated_logits(batch.clean, gates, values)
        cache.answers(batch)
    bytes_by_now = cache.bytes
    for index in ([5, 1, 0], [2, 3, 4], [4, 0, 2]):  # other batches, padded otherwise
        batch = problem.task["train"].batch(index)
        values = cache.values(batch)
        assert isinstance(values, Corrupted)
        assert values.held is not None
        truth = problem.model.record(batch.corrupted)  # type: ignore[arg-type]
        real = batch.clean.attention_mask.bool()
        for layer in range(problem.nodes.layers):
            held = values.held(layer, 0)
            for place in LAYER_PLACES:
                torch.testing.assert_close(getattr(held, place)[layer][real], getattr(truth, place)[layer][real], rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(cache.answers(batch), problem.model.logits(batch.clean), atol=1e-5, rtol=1e-4)
        got = problem.model.gated_logits(batch.clean, gates, values)
        torch.testing.assert_close(got, problem.model.gated_logits(batch.clean, gates, truth), rtol=2e-2, atol=1e-2)
    assert cache.bytes == bytes_by_now
    assert list(tmp_path.iterdir()) == []  # the file has no name


@pytest.mark.parametrize("recompute", [False, True])
def test_the_first_time_is_as_the_second(tmp_path: Path, recompute: bool) -> None:
    """Else a run that was stopped, which has nothing in its cache, would not go on as it had begun."""
    problem = make_problem()
    cache = training_cache(problem, config(), tmp_path)
    batch = problem.task["train"].batch([0, 1, 2])
    gates = {level: x.repeat(3, *[1] * x.dim()).requires_grad_() for level, x in problem.nodes.full(0.5).items()}
    first, second = (problem.model.gated_logits(batch.clean, gates, cache.values(batch), recompute=recompute) for _ in range(2))
    exact = problem.model.gated_logits(batch.clean, gates, problem.ablation.values(batch))
    assert (second - exact).abs().max() > 1e-4
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    one, other = (torch.autograd.grad(logits.square().sum(), gates["head_dim"])[0] for logits in (first, second))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_limit_too_low_for_activations_keeps_answers_and_one_of_zero_nothing(tmp_path: Path) -> None:
    problem = make_problem()
    batch = problem.task["train"].batch([0, 1, 2])
    everything = training_cache(problem, config(), tmp_path)
    problem.model.gated_logits(batch.clean, problem.nodes.full(0.5), everything.values(batch))
    everything.answers(batch)
    for limit, answers in ((everything.bytes / (1 - LOOKS) * 1e-9, True), (0.0, False)):
        cache = training_cache(problem, config(cache_limit=limit), tmp_path)
        for _ in range(2):
            values = cache.values(batch)
            assert isinstance(values, Corrupted)
            problem.model.gated_logits(batch.clean, problem.nodes.full(0.5), values)
            cache.answers(batch)
        assert (cache.bytes > 0) == answers
        assert cache.bytes < everything.bytes


def test_examples_that_come_up_once_are_not_kept(tmp_path: Path) -> None:
    problem = make_problem()
    cache = training_cache(problem, config(steps=2), tmp_path)
    batch = problem.task["train"].batch([0, 1, 2])
    problem.model.gated_logits(batch.clean, problem.nodes.full(0.5), cache.values(batch))
    cache.answers(batch)
    assert cache.bytes == 0


def test_rounds_find_what_gates_have_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, caches = make_problem(), []
    made = Cache.__init__
    monkeypatch.setattr(Cache, "__init__", lambda cache, *args, **kwargs: (caches.append(cache), made(cache, *args, **kwargs))[1])
    journal = Journal(scratch=tmp_path)
    hybrid(problem, config(method="hybrid", kl_budget=0.01, gates_share=0.6), journal)
    assert len(journal.history) > 60  # steps of gates, and rounds
    (cache,) = caches
    assert cache.bytes > 0


@pytest.mark.parametrize("same", [0, 4])
def test_looks_read_the_corrupted_prompts_of_validation_once(tmp_path: Path, same: int) -> None:
    problem = make_problem(same=same)
    problem.remember = remembering(config(), tmp_path)
    circuits = [Circuit.whole(problem.nodes).without({"head": torch.tensor([[layer, 0]])}) for layer in range(2)]
    truth = problem.losses(circuits, "validation", cut=True)
    for first, corrupted in ((3, 3), (6, 6), (2, 0), (6, 0)):
        before = problem.model.passes.forward
        looks = problem.looks(circuits, "validation", first=first)
        assert problem.model.passes.forward - before == first * len(circuits) + corrupted
        for look, kl in zip(looks, truth, strict=True):
            torch.testing.assert_close(look, kl[:first], rtol=5e-2, atol=1e-4)


def test_looks_read_what_prompts_begin_with_once(tmp_path: Path) -> None:
    problem, widths = make_problem(same=4), list[int]()
    problem.remember = remembering(config(), tmp_path)
    circuits = [Circuit.whole(problem.nodes).without({"head": torch.tensor([[layer, 0]])}) for layer in range(2)]
    truth = problem.losses(circuits, "validation", cut=True)
    whole = problem.task["validation"].batch(range(6))
    assert whole.corrupted is not None
    assert problem.model.start(whole.clean, whole.corrupted) == 4  # that this model can go on from there is found out on the way
    embed = problem.model.model.get_input_embeddings()
    embed.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    for _ in range(3):
        looks = problem.looks(circuits, "validation")
    assert widths[:1] == [7]  # the first time, whole prompts are read: what closed nodes hold is not known yet
    assert widths.count(4) == 1  # then what they begin with, padding included
    assert set(widths[widths.index(4) + 1 :]) == {3}
    for look, kl in zip(looks, truth, strict=True):
        torch.testing.assert_close(look, kl, rtol=5e-2, atol=1e-4)


def test_what_prompts_begin_with_is_kept_where_there_is_room(tmp_path: Path) -> None:
    problem = make_problem(same=4)
    split = problem.task["validation"]
    batch = split.batch(range(6))

    def filled(limit: float) -> tuple[Cache, Corrupted]:
        cache = Cache(problem, split, limit=limit, directory=tmp_path, answers=False, prefixes=True)
        problem.model.gated_logits(batch.clean, problem.nodes.full(0.5), cache.values(batch))
        values = cache.values(batch)
        assert isinstance(values, Corrupted)
        assert values.prefix is not None
        return cache, values

    cache, values = filled(limit=1e9)
    activations = cache.bytes
    assert values.prefix is not None
    first, second = values.prefix(), values.prefix()
    assert first is not None
    assert second is not None
    assert first.get_seq_length() == 4
    assert cache.bytes > activations
    assert all(torch.equal(one, other) for one, other in zip(first.tensors(), second.tensors(), strict=True))
    cache, values = filled(limit=activations)
    assert values.prefix is not None
    assert values.prefix() is None
    assert cache.bytes == activations


@pytest.mark.parametrize("side", ["left", "right"])
def test_measuring_reads_the_corrupted_prompts_of_validation_once_and_changes_no_bit(tmp_path: Path, side: PaddingSide) -> None:
    problem = make_problem(side=side)
    circuits = [Circuit.whole(problem.nodes).without({"head": torch.tensor([[layer, 0]])}) for layer in range(2)]
    truth = problem.losses(circuits, "validation", cut=True)
    problem.remember = remembering(config(), tmp_path)
    for corrupted in (6, 0):
        before = problem.model.passes.forward
        measured = problem.measured(circuits, "validation")
        assert problem.model.passes.forward - before == 6 * len(circuits) + corrupted
        assert all(torch.equal(kl, true) for kl, true in zip(measured, truth, strict=True))
    looks = problem.looks(circuits, "validation")  # of their own cache
    assert not any(torch.equal(kl, true) for kl, true in zip(looks, truth, strict=True))


@pytest.mark.parametrize("method", ["sieve", "multigranular", "hybrid", "nested"])
def test_training_examples_leave_the_disk_before_circuits_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """What is remembered to measure with takes their share of the limit."""
    made: list[weakref.ref[Cache]] = []
    make = Cache.__init__
    monkeypatch.setattr(Cache, "__init__", lambda cache, *args, **options: (made.append(weakref.ref(cache)), make(cache, *args, **options))[1])
    scores = METHODS[method](make_problem(), config(method=method, kl_budget=0.01), Journal(scratch=tmp_path))
    assert scores.levels
    assert made
    assert not any(cache() for cache in made)


def test_experts_are_computed_anew(tmp_path: Path) -> None:
    problem = make_problem("mixtral")
    cache = training_cache(problem, config(), tmp_path)
    batch = problem.task["train"].batch([0, 1, 2])
    for _ in range(2):
        values = cache.values(batch)
        assert isinstance(values, Corrupted)
        problem.model.gated_logits(batch.clean, problem.nodes.full(0.5), values)
