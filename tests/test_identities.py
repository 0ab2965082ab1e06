"""What must hold exactly, on a tiny model of every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import random_tokens
from nodesieve.ablations import Activations, Corrupted
from nodesieve.gated_model import GatedModel
from nodesieve.gating import Gating
from nodesieve.levels import LEVELS
from nodesieve.verify import _hooks, _without_first_layer


def zeros(model: GatedModel) -> Activations:
    return model.record(random_tokens()).map(lambda x: torch.zeros_like(x[0, 0]))


def test_open_gates_give_the_original_logits_bit_for_bit(gated: GatedModel) -> None:
    clean, corrupted = random_tokens(seed=0), random_tokens(seed=1)
    expected = gated.model(input_ids=clean.input_ids).logits[:, -1]
    got = gated.gated_logits(clean, gated.nodes.full(1.0), gated.record(corrupted))
    assert torch.equal(got, gated.logits(clean))
    torch.testing.assert_close(got, expected)


def test_everything_closed_gives_the_corrupted_run(gated: GatedModel) -> None:
    clean, corrupted = random_tokens(seed=0), random_tokens(seed=1)
    got = gated.gated_logits(clean, gated.nodes.full(0.0), gated.record(corrupted))
    assert torch.equal(got, gated.logits(corrupted))
    assert not torch.equal(got, gated.logits(clean))


@pytest.mark.parametrize("grad", [False, True])
def test_so_they_do_side_by_side_with_the_corrupted_prompts(gated: GatedModel, grad: bool) -> None:
    """As `discover` runs them: nothing of the corrupted prompts is stored beyond the layer at hand. With gradients activations are computed in one
    operation (`in_one.py`), which rounds otherwise."""
    clean, corrupted = random_tokens(seed=0), random_tokens(seed=1)
    for value, same in ((1.0, clean), (0.0, corrupted)):
        gates = {level: z.requires_grad_(grad) for level, z in gated.nodes.full(value).items()}
        got, expected = gated.gated_logits(clean, gates, Corrupted(tokens=corrupted)), gated.logits(same)
        torch.testing.assert_close(got, expected, atol=1e-5 if grad else 0, rtol=0)


def test_all_but_the_embedding_closed_gives_the_corrupted_run_where_the_last_tokens_agree(gated: GatedModel) -> None:
    clean, corrupted = random_tokens(seed=0), random_tokens(seed=1)
    corrupted.input_ids[:, -1] = clean.input_ids[:, -1]
    gates = {**gated.nodes.full(0.0), "embedding": torch.ones(1)}
    torch.testing.assert_close(gated.gated_logits(clean, gates, gated.record(corrupted)), gated.logits(corrupted))


def test_a_closed_layer_under_zero_ablation_is_a_skipped_layer(gated: GatedModel) -> None:
    clean = random_tokens()
    gates = gated.nodes.full(1.0)
    gates["layer"][0] = 0
    got = gated.gated_logits(clean, gates, zeros(gated))
    torch.testing.assert_close(got, _without_first_layer(gated, clean))
    assert (got - gated.logits(clean)).abs().max() > 1e-3


def test_one_gate_an_example_equals_one_example_at_a_time(gated: GatedModel) -> None:
    clean, corrupted = random_tokens(seed=0), random_tokens(seed=1)
    generator = torch.Generator().manual_seed(0)
    gates = {level: torch.rand(3, *gated.nodes.shape(level), generator=generator) for level in LEVELS}
    together = gated.gated_logits(clean, gates, gated.record(corrupted))
    for i in range(3):
        one = type(clean)(input_ids=clean.input_ids[i : i + 1], attention_mask=clean.attention_mask[i : i + 1])
        other = type(clean)(input_ids=corrupted.input_ids[i : i + 1], attention_mask=corrupted.attention_mask[i : i + 1])
        alone = gated.gated_logits(one, {level: z[i] for level, z in gates.items()}, gated.record(other))
        torch.testing.assert_close(together[i : i + 1], alone)


def test_left_padding_changes_nothing(gated: GatedModel) -> None:
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    tokens = type(random_tokens()).pad(rows, pad_id=0, device="cpu")
    other = type(random_tokens()).pad([row[::-1] for row in rows], pad_id=0, device="cpu")
    gates = {level: torch.rand(gated.nodes.shape(level), generator=torch.Generator().manual_seed(1)) for level in LEVELS}
    together = gated.gated_logits(tokens, gates, gated.record(other))
    for i, row in enumerate(rows):
        alone = type(tokens).pad([row], pad_id=0, device="cpu")
        reverse = type(tokens).pad([row[::-1]], pad_id=0, device="cpu")
        torch.testing.assert_close(together[i : i + 1], gated.gated_logits(alone, gates, gated.record(reverse)), atol=1e-5, rtol=1e-4)


def test_a_parent_gate_is_a_gate_on_all_its_children(gated: GatedModel) -> None:
    clean, ablation = random_tokens(seed=0), gated.record(random_tokens(seed=1))
    head, dims = gated.nodes.full(1.0), gated.nodes.full(1.0)
    head["head"][1, 2] = 0.3
    dims["head_dim"][1, 2, :] = 0.3
    torch.testing.assert_close(gated.gated_logits(clean, head, ablation), gated.gated_logits(clean, dims, ablation))
    block, outputs = gated.nodes.full(1.0), gated.nodes.full(1.0)
    block["mlp_block"][2] = 0.3
    outputs["mlp_output"][2, :] = 0.3
    torch.testing.assert_close(gated.gated_logits(clean, block, ablation), gated.gated_logits(clean, outputs, ablation))


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("level", [level for level in LEVELS if level != "expert"])
def test_gradients_agree_with_finite_differences(gated: GatedModel, level: str, side_by_side: bool) -> None:
    gated.model.double()
    clean, corrupted = random_tokens(seed=0), random_tokens(seed=1)
    ablation = Corrupted(tokens=corrupted) if side_by_side else gated.record(corrupted)
    generator = torch.Generator().manual_seed(2)
    gates = {name: 0.2 + 0.6 * torch.rand(gated.nodes.shape(name), generator=generator, dtype=torch.float64) for name in LEVELS}

    def loss(own: torch.Tensor) -> torch.Tensor:
        return gated.gated_logits(clean, {**gates, level: own}, ablation).square().mean()

    own = gates[level].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(own), own)
    index = tuple(int(i) for i in torch.unravel_index(gradient.abs().argmax(), gradient.shape))
    step = torch.zeros_like(gates[level])
    step[index] = 2e-2
    with torch.no_grad():
        slope = (loss(gates[level] + step) - loss(gates[level] - step)) / 4e-2
    torch.testing.assert_close(gradient[index], slope, rtol=2e-2, atol=1e-6)  # Llama's norms compute in float32 whatever the model's dtype


@pytest.mark.parametrize("side_by_side", [False, True])
def test_the_model_is_left_as_it_was_even_after_an_error(gated: GatedModel, monkeypatch: pytest.MonkeyPatch, side_by_side: bool) -> None:
    gated.model.train()
    gated.model.requires_grad_(True)
    hooks, state = _hooks(gated), {name: p.clone() for name, p in gated.model.state_dict().items()}
    gates = gated.nodes.full(1.0)
    corrupted = Corrupted(tokens=random_tokens(seed=1)) if side_by_side else gated.record(random_tokens(seed=1))
    calls, edit = 0, Gating.edit

    def fail_in_the_middle(self: Gating, *arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise RuntimeError("in the middle")
        return edit(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Gating, "edit", fail_in_the_middle)
        with pytest.raises(RuntimeError, match="in the middle"):
            gated.gated_logits(random_tokens(), {level: gate * 0.5 for level, gate in gates.items()}, corrupted)
    gated.gated_logits(random_tokens(), {k: v.requires_grad_(True) for k, v in gates.items()}, corrupted).sum().backward()
    assert _hooks(gated) == hooks
    assert gated.model.training
    assert all(p.requires_grad and p.grad is None for p in gated.model.parameters())
    assert all(torch.equal(p, state[name]) for name, p in gated.model.state_dict().items())
