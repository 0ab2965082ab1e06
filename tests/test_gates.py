"""Gates, controllers, metrics: against closed forms and numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from nodesieve import gates
from nodesieve.ablations import Mean
from nodesieve.batches import Batch, Tokens
from nodesieve.config import make_config
from nodesieve.controllers import CONTROLLERS
from nodesieve.metrics import Resamples, cutoff_sharpness, faithfulness, kl_divergence, logit_difference, probability_difference, upper_bound
from nodesieve.nodes import NodeSpace

SPACE = NodeSpace(layers=2, heads=2, head_dim=3, neurons=4, width=5)


@pytest.mark.parametrize("log_alpha", [-4.0, -1.0, 0.0, 2.0])
def test_gates_are_open_as_often_as_the_closed_form_says(log_alpha: float) -> None:
    z = gates.sample(torch.full((50_000,), log_alpha), batch=1, generator=torch.Generator().manual_seed(0))
    assert float((z > 0).float().mean()) == pytest.approx(float(gates.open_probability(torch.tensor(log_alpha))), abs=0.01)
    assert z.min() >= 0
    assert z.max() <= 1


def test_samples_are_exactly_0_and_1_most_of_the_time_and_differ_between_examples() -> None:
    z = gates.sample(torch.zeros(1000), batch=2, generator=torch.Generator().manual_seed(0))
    assert ((z == 0) | (z == 1)).float().mean() > 0.3
    assert not torch.equal(z[0], z[1])


def test_straight_through_keeps_the_values_and_never_loses_the_gradient() -> None:
    log_alpha = torch.tensor([-6.0, 0.0, 6.0], requires_grad=True)
    z = gates.sample(log_alpha, batch=4, generator=torch.Generator().manual_seed(0))
    through = gates.straight_through(z, log_alpha)
    assert torch.equal(through, z)
    (gradient,) = torch.autograd.grad(through.sum(), log_alpha)
    p = gates.open_probability(log_alpha.detach())
    torch.testing.assert_close(gradient, 4 * p * (1 - p))
    assert (gradient > 0).all()


def controller(name: str, **options: object):  # type: ignore[no-untyped-def]
    return CONTROLLERS[name](make_config({"controller": name, **options}), SPACE)


def test_fixed_lambdas_stay() -> None:
    fixed = controller("fixed", lambda_init=2.0, penalties={"head": 3.0})
    assert float(fixed.penalty({"head": torch.tensor(0.5)})) == pytest.approx(3.0)
    fixed.observe(kl=100.0)
    assert fixed.strength == 2.0


def test_the_kl_budget_controller_pushes_below_its_aim_and_yields_above_it() -> None:
    eager, sorry = controller("kl_budget"), controller("kl_budget")
    for _ in range(20):
        eager.observe(kl=0.001)
        sorry.observe(kl=10.0)
    assert eager.strength > make_config({}).lambda_init > 4 * sorry.strength


def test_the_kl_budget_controller_makes_room_for_a_validation_kl_above_the_training_kl() -> None:
    narrow, wide = controller("kl_budget"), controller("kl_budget")
    for both in (narrow, wide):
        both.observe(kl=0.15)
    narrow.validated(kl=0.15)
    wide.validated(kl=0.3)
    for both in (narrow, wide):
        both.observe(kl=0.15)
    assert wide.strength < narrow.strength


def test_the_kl_budget_controller_stays_within_bounds() -> None:
    low = controller("kl_budget")
    for _ in range(1000):
        low.observe(kl=10.0)
    assert low.strength == pytest.approx(low.FLOOR * math.exp(-low.ABOVE))
    thrice, far = controller("kl_budget"), controller("kl_budget")
    for one, kl in ((thrice, 0.15), (far, 5.0)):
        one.observe(kl=0.05)
        one.validated(kl=kl)
        one.observe(kl=0.05)
    assert thrice.strength == pytest.approx(far.strength)


def test_a_stretch_is_taken_back_only_when_it_has_left_the_budget_far_behind() -> None:
    own, other = controller("kl_budget", kl_budget=0.2), controller("fixed")
    before = own.strength
    assert not own.missed(kl_upper=0.22)
    assert own.strength == before
    assert own.missed(kl_upper=0.3)
    assert own.strength < before
    assert not other.missed(kl_upper=9.0)


def test_the_target_size_controller_pushes_only_while_the_circuit_is_too_large() -> None:
    size = controller("target_size", target_size=0.5)
    shares = {level: torch.tensor(0.9, requires_grad=True) for level in ("head_dim", "mlp_neuron")}
    for _ in range(20):
        size.penalty(shares)
        size.observe(kl=0.1)
    assert size.strength > 0
    pushed = size.strength
    for _ in range(20):
        size.penalty({level: torch.tensor(0.1) for level in shares})
        size.observe(kl=0.1)
    assert size.strength < pushed


def test_the_penalty_of_the_target_size_controller_by_hand() -> None:
    size = controller("target_size", target_size=0.5)
    shares = {level: torch.tensor(0.9) for level in ("head_dim", "mlp_neuron")}
    assert float(size.penalty(shares)) == 0
    size.observe(kl=0.1)
    assert float(size.penalty(shares)) == pytest.approx(size.RATE * 0.4 * 0.4 + size.RATE * 0.4**2 * 0.4**2)


@pytest.mark.parametrize(
    ("shares", "dims", "neurons"),
    [
        ({"head_dim": 0.5, "mlp_neuron": 0.25}, 0.5, 0.25),
        ({"head": 0.9, "head_dim": 0.5}, 0.5, 1.0),  # neurons have no gates
        ({"head": 0.9, "mlp_neuron": 0.25}, 0.9, 0.25),  # dimensions go with their heads
    ],
)
def test_a_target_size_is_a_share_of_all_leaves(shares: dict[str, float], dims: float, neurons: float) -> None:
    counts = {level: SPACE.count(level) for level in ("head_dim", "mlp_neuron")}
    size = (dims * counts["head_dim"] + neurons * counts["mlp_neuron"]) / sum(counts.values())
    steered = controller("target_size", target_size=0.4)
    steered.penalty({level: torch.tensor(share) for level, share in shares.items()})
    steered.observe(kl=0.0)
    assert steered.strength == pytest.approx(steered.RATE * (size - 0.4), rel=1e-5)


@pytest.mark.parametrize("name", sorted(CONTROLLERS))
def test_a_restored_controller_goes_on_as_the_old_one(name: str) -> None:
    old, new = controller(name), controller(name)
    shares = {level: torch.tensor(0.7) for level in ("head_dim", "mlp_neuron", "head")}
    for _ in range(5):
        old.penalty(shares)
        old.observe(kl=0.4)
        old.validated(kl=0.5)
    new.restore(old.state())
    for both in (old, new):
        both.penalty(shares)
        both.observe(kl=0.2)
    assert old.strength == new.strength
    assert float(old.penalty(shares)) == float(new.penalty(shares))


def batch(answers: tuple[int, ...], distractors: tuple[int, ...]) -> Batch:
    tokens = Tokens.pad([[1]], pad_id=0, device="cpu")
    return Batch(index=torch.tensor([0]), clean=tokens, corrupted=None, answers=(answers,), distractors=(distractors,))


def test_metrics_worked_out_by_hand() -> None:
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    logits = p.log()
    assert float(kl_divergence(logits, torch.zeros(1, 4))) == pytest.approx(sum(q * math.log(4 * q) for q in p[0].tolist()), abs=1e-6)
    assert float(kl_divergence(logits, logits + 7)) == pytest.approx(0, abs=1e-6)
    assert float(logit_difference(logits, batch((0, 1), (3,)))) == pytest.approx((math.log(0.5) + math.log(0.3)) / 2 - math.log(0.05), abs=1e-5)
    assert float(probability_difference(logits, batch((0, 1), (2, 3)))) == pytest.approx(0.6)
    assert float(cutoff_sharpness(logits, batch((1, 0), (3, 2)))) == pytest.approx(0.15)
    assert all(bool(metric(logits, batch((0,), ())).isnan()) for metric in (logit_difference, probability_difference, cutoff_sharpness))


def test_tokens_that_the_full_model_rules_out_add_nothing_to_the_kl() -> None:
    full = torch.tensor([[0.0, 1.0, -math.inf]])
    circuit = torch.tensor([[1.0, 0.0, -math.inf]], requires_grad=True)
    kl = kl_divergence(full, circuit)
    torch.testing.assert_close(kl, kl_divergence(full[:, :2], circuit[:, :2]))
    (gradient,) = torch.autograd.grad(kl.sum(), circuit)
    assert bool(gradient.isfinite().all())


def test_faithfulness_is_not_clipped_and_none_without_a_span() -> None:
    assert faithfulness(circuit=3.0, full=2.0, ablated=1.0) == 2.0
    assert faithfulness(circuit=1.0, full=0.0, ablated=4.0) == 0.75  # where the model is wrong, too
    assert faithfulness(circuit=3.0, full=1.0, ablated=1.0) is None


def test_the_upper_bound_lies_above_the_mean_by_about_one_and_two_thirds_standard_errors() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 3
    expected = float(values.mean()) + 1.645 * float(values.std()) / 20
    assert upper_bound(values) == pytest.approx(expected, abs=0.02)


def test_examples_of_one_prompt_are_drawn_together() -> None:
    values = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    thrice, prompts = values.repeat_interleave(3), [i // 3 for i in range(120)]
    assert upper_bound(thrice, prompts=prompts) == pytest.approx(upper_bound(values), abs=1e-12)
    assert upper_bound(thrice) < upper_bound(values)


def test_resamples_leave_out_what_an_example_has_not_and_count_it_as_often_as_its_prompt_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against resamples that are written out. Some prompts have three examples, others one."""
    generator = torch.Generator().manual_seed(0)
    prompts = [i // 3 for i in range(120) if i % 3 == 0 or i < 60]
    values = torch.randn(len(prompts), dtype=torch.float64, generator=generator)
    gaps = values.masked_fill(torch.rand(len(prompts), generator=generator) < 0.3, float("nan"))
    resamples = Resamples([10 * prompt for prompt in prompts])
    means, ends = resamples.means(gaps), resamples.quantiles(values, 0.95)
    assert len(means) == len(ends) == Resamples.COUNT
    for draw, mean, end in zip(resamples._draws[:50].tolist(), means.tolist(), ends.tolist(), strict=False):
        found = [i for prompt in draw for i, own in enumerate(prompts) if own == prompt]
        assert mean == pytest.approx(float(gaps[found].nanmean()), abs=1e-12)
        assert end == pytest.approx(float(values[found].quantile(0.95)), abs=1e-12)
    monkeypatch.setattr(Resamples, "AT_ONCE", 1000)  # a few resamples at a time
    torch.testing.assert_close(resamples.means(gaps), means, rtol=0, atol=1e-12)
    torch.testing.assert_close(resamples.quantiles(values, 0.95), ends, rtol=0, atol=1e-12)


def test_a_prompt_with_very_many_examples_takes_no_more_memory_than_others() -> None:
    values = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    assert upper_bound(values, prompts=[max(0, i - 2000) for i in range(4000)]) > float(values.mean())  # or else gigabytes


def test_the_mean_ablation_leaves_out_padding_and_the_first_position() -> None:
    from nodesieve.ablations import Activations
    from nodesieve.batches import EncodedExample, Split

    def mean_of(corrupted: Sequence[tuple[int, ...] | None]) -> list[float]:
        pairs = enumerate(zip([(9, 1, 2), (9, 6)], corrupted, strict=True))
        examples = tuple(EncodedExample(clean=clean, corrupted=other, answers=(1,), distractors=(2,), prompt=i) for i, (clean, other) in pairs)
        split = Split(examples=examples, pad_id=50, device=torch.device("cpu"))
        return Mean(record, split).values(split.batch([0])).heads[0].tolist()

    def record(tokens: Tokens) -> Activations:
        x = tokens.input_ids.float().unsqueeze(-1)
        return Activations(embedding=x, heads={0: x}, attention_write={0: x}, neurons={0: x}, mlp_write={0: x})

    assert mean_of([(9, 4, 5), (9, 9)]) == [6.0]
    assert mean_of([None, None]) == [3.0]  # of the clean prompts where there are no others
