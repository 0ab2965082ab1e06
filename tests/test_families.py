"""The contract that every registered family keeps: a new row is tested by being there."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from conftest import MODEL_TYPES, VOCABULARY, random_tokens, tiny_config, tiny_model
from nodesieve.ablations import Corrupted, Routed
from nodesieve.architectures import guess, locate
from nodesieve.batches import PaddingSide, Tokens
from nodesieve.circuit import Circuit, count_parameters
from nodesieve.cli.check_model import command
from nodesieve.errors import Trying, UnknownFamilyWarning, UserError
from nodesieve.families import FAMILIES
from nodesieve.gated_model import GatedModel
from nodesieve.levels import LEVELS
from nodesieve.models import LoadedModel
from nodesieve.verify import gate, verify


def test_there_are_many_families_and_each_has_one_row() -> None:
    assert len(MODEL_TYPES) == len(set(MODEL_TYPES)) >= 28


def test_every_check_passes(any_model: GatedModel) -> None:
    assert [check for check in verify(any_model) if not check.passed] == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_what_one_example_at_a_time_gives(any_model: GatedModel, side: PaddingSide) -> None:
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]]
    generator = torch.Generator().manual_seed(1)
    gates = {level: torch.rand(any_model.nodes.shape(level), generator=generator) for level in LEVELS}
    clean, corrupted = (Tokens.pad(some, pad_id=0, device="cpu", side=side) for some in (rows, [row[::-1] for row in rows]))
    together = any_model.gated_logits(clean, gates, any_model.record(corrupted))
    for i, row in enumerate(rows):
        alone, other = (Tokens.pad([tokens], pad_id=0, device="cpu") for tokens in (row, row[::-1]))
        torch.testing.assert_close(together[i : i + 1], any_model.gated_logits(alone, gates, any_model.record(other)), atol=2e-5, rtol=1e-3)


def test_layer_by_layer_beside_the_corrupted_prompts_gives_the_same_gradients(any_model: GatedModel) -> None:
    """Stored activations, layers computed again, corrupted prompts in lockstep, and both: one loss, one gradient."""
    clean, corrupted = random_tokens(seed=0), Tokens(input_ids=random_tokens(seed=1).input_ids, attention_mask=random_tokens().attention_mask)
    stored = any_model.record(corrupted)
    generator = torch.Generator().manual_seed(2)
    drawn, other = ({level: torch.rand(any_model.nodes.shape(level), generator=generator) for level in LEVELS} for _ in range(2))
    found = []
    for values in (stored, Corrupted(tokens=corrupted)):
        for recompute in (False, True):
            gates = {level: z.clone().requires_grad_() for level, z in drawn.items()}
            logits, beside = any_model.gated_logits_of_each(clean, [gates, other], values, recompute=recompute)
            assert not beside.requires_grad
            logits.square().sum().backward()
            found.append({"logits": logits.detach(), "beside": beside, **{level: gates[level].grad for level in any_model.nodes.levels}})
    assert all("forward" not in places.layer.__dict__ for places in any_model.architecture.places)
    for name, plain in found[0].items():
        for again in found[1:]:
            torch.testing.assert_close(again[name], plain)


def test_circuits_that_agree_up_to_a_layer_share_what_lies_below(any_model: GatedModel) -> None:
    """Each gives what it gives alone; layers run once for the corrupted prompts, and once for each stream that has parted by then."""
    clean, corrupted = random_tokens(seed=0), Tokens(input_ids=random_tokens(seed=1).input_ids, attention_mask=random_tokens().attention_mask)
    generator = torch.Generator().manual_seed(2)
    trunk = {level: (torch.rand(any_model.nodes.shape(level), generator=generator) > 0.2).float() for level in LEVELS}
    trunk["embedding"].fill_(1.0)
    last = any_model.nodes.layers - 1
    in_the_last, everywhere = ({level: z.clone() for level, z in trunk.items()} for _ in range(2))
    in_the_last["mlp_output"][last, 0] = 1 - trunk["mlp_output"][last, 0]
    everywhere["head_dim"].zero_()
    each = [trunk, in_the_last, everywhere, trunk]
    alone = [any_model.gated_logits(clean, gates, Corrupted(tokens=corrupted)) for gates in each]

    ran = [0] * any_model.nodes.layers
    with ExitStack() as stack:
        for number, places in enumerate(any_model.architecture.places):

            def count(_module: nn.Module, _args: object, number: int = number) -> None:
                ran[number] += 1

            stack.callback(places.attention_projection.register_forward_pre_hook(count).remove)
        together = any_model.gated_logits_of_each(clean, each, Corrupted(tokens=corrupted))
    for own, other in zip(together, alone, strict=True):
        assert torch.equal(own, other)
    assert ran == [3] * last + [4]


def test_a_pass_goes_on_from_layers_that_have_run(any_model: GatedModel) -> None:
    clean, corrupted = random_tokens(seed=0), Tokens(input_ids=random_tokens(seed=1).input_ids, attention_mask=random_tokens().attention_mask)
    values = any_model.record(corrupted)
    generator = torch.Generator().manual_seed(2)
    gates = {level: (torch.rand(any_model.nodes.shape(level), generator=generator) > 0.2).float() for level in LEVELS}
    last = any_model.nodes.layers - 1
    changed = {level: z.clone() for level, z in gates.items()}
    changed["mlp_output"][last] = 1 - gates["mlp_output"][last]
    with torch.no_grad():
        whole = any_model.gated_logits(clean, changed, values)
        with any_model.listening() as outputs:
            before = any_model.gated_logits(clean, gates, values)
        with any_model.going_on(outputs[:last]), any_model.listening() as again:
            found = any_model.gated_logits(clean, changed, values)
    assert torch.equal(found, whole)
    assert not torch.equal(found, before)
    assert len(outputs) == len(again) == any_model.nodes.layers
    assert all(one is other for one, other in zip(outputs[:last], again, strict=False))  # handed out, not computed
    assert all("forward" not in places.layer.__dict__ for places in any_model.architecture.places)


def test_a_last_layer_that_works_at_the_answer_alone_changes_nothing(any_model: GatedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    clean, corrupted = random_tokens(seed=0), Tokens(input_ids=random_tokens(seed=1).input_ids, attention_mask=random_tokens().attention_mask)
    generator = torch.Generator().manual_seed(2)
    drawn = {level: torch.rand(any_model.nodes.shape(level), generator=generator) for level in LEVELS}
    found = []
    for alone in (True, False):
        if not alone:
            monkeypatch.setattr(any_model, "_answer_alone", lambda tokens: False)
        for values in (any_model.record(corrupted), Corrupted(tokens=corrupted)):
            gates = {level: z.clone().requires_grad_() for level, z in drawn.items()}
            logits = any_model.gated_logits(clean, gates, values)
            logits.square().sum().backward()
            found.append({"logits": logits.detach(), **{level: gates[level].grad for level in any_model.nodes.levels}})
    for name, whole in found[-1].items():
        for other in found[:-1]:
            torch.testing.assert_close(other[name], whole)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_forward_pass_that_a_layer_was_given_comes_back(recompute: bool) -> None:
    """As accelerate gives each module one where a model lies on several devices."""
    model = GatedModel(tiny_model("llama"))
    layers = [places.layer for places in model.architecture.places]
    given = [layer.forward for layer in layers]
    for layer, forward in zip(layers, given, strict=True):
        layer.forward = forward
    corrupted = Tokens(input_ids=random_tokens(seed=1).input_ids, attention_mask=random_tokens().attention_mask)
    for values in (model.record(corrupted), Corrupted(tokens=corrupted)):
        gates = {level: z.requires_grad_() for level, z in model.nodes.full(0.5).items()}
        model.gated_logits(random_tokens(), gates, values, recompute=recompute).sum().backward()
        assert [layer.__dict__.get("forward") for layer in layers] == given


def test_the_full_circuit_has_the_parameters_of_every_projection(any_model: GatedModel) -> None:
    everything = Circuit.whole(any_model.nodes)
    count = count_parameters(everything, any_model.architecture)
    modules = [module for places in any_model.architecture.places for module in places.layer.modules()]
    own = [list(module.parameters(recurse=False)) for module in modules]
    assert count.kept == count.total == sum(p.numel() for parameters in own if any(p.dim() > 1 for p in parameters) for p in parameters)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_gates_on_experts_are_gates_on_their_weighted_outputs(name: str) -> None:
    model = GatedModel(tiny_model(name))
    tokens, other = random_tokens(seed=0), random_tokens(seed=1)
    own, ablation = model.record(tokens), model.record(other)
    z = torch.rand(3, *model.nodes.shape("expert"), generator=torch.Generator().manual_seed(2))
    x, a = own.experts[0], ablation.experts[0]
    assert isinstance(x, Routed)
    assert isinstance(a, Routed)
    gate = z[:, 0].reshape(3, 1, -1, 1)
    expected = (gate * x.dense() + (1 - gate) * a.dense()).sum(2)
    got = x.write(x.gated(z[:, :1])) + a.write(a.gated(1 - z[:, :1]))
    torch.testing.assert_close(got.reshape(expected.shape), expected)
    torch.testing.assert_close(x.dense().sum(2), own.mlp_write[0])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe-mixed"])
def test_all_experts_closed_is_the_block_closed(name: str) -> None:
    model = GatedModel(tiny_model(name))
    tokens, other = random_tokens(seed=0), random_tokens(seed=1)
    for values in (model.record(other), model.record(other).map(lambda x: torch.zeros_like(x[0, 0]))):
        experts, block = model.nodes.full(1.0), model.nodes.full(1.0)
        experts["expert"][2] = 0
        block["mlp_block"][2] = 0
        torch.testing.assert_close(model.gated_logits(tokens, experts, values), model.gated_logits(tokens, block, values))


class Unheard(LlamaForCausalLM):
    """A model like Llama under a name that no row has."""


def unheard_of(name: str = "llama") -> nn.Module:
    model = tiny_model(name)
    model.config.model_type = "unheard_of"
    return model


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "glm4", "gptj", "falcon", "phi", "starcoder2", "mpt", "gpt2"])
def test_a_model_without_a_row_is_read_by_structure(name: str) -> None:
    model = unheard_of(name)
    with pytest.warns(UnknownFamilyWarning, match="'unheard_of' is not known"):
        found = gate(model).architecture
    row = next(row for row in FAMILIES if name in row.model_types)
    expected = locate(model, row)
    assert found.places == expected.places
    assert found.nodes == expected.nodes
    assert found.parameters == expected.parameters


def test_a_write_before_its_norm_is_noticed() -> None:
    model = unheard_of("gemma2")
    plain = [architecture for architecture in guess(model) if architecture.family.mlp_write == ""]
    failed = [check.name for check in verify(GatedModel(model, plain[0])) if not check.passed]
    assert failed == ["the two writes of a layer are what it adds to the residual stream"]


def test_what_any_layer_adds_beside_its_two_writes_is_noticed() -> None:
    gated = GatedModel(tiny_model("llama"))
    added = "the two writes of a layer are what it adds to the residual stream"
    last = gated.architecture.places[-1]
    hook = last.layer.register_forward_hook(lambda module, args, output: output + 0.1)
    failed = {check.name: check.detail for check in verify(gated) if not check.passed}
    hook.remove()
    assert "elsewhere in layer 2" in failed[added]
    for module in (last.attention_write, last.mlp_projection):
        assert module is not None
        nn.init.zeros_(module.get_parameter("weight"))
    assert [check.name for check in verify(gated) if not check.passed] == []  # a layer that writes nothing is no harm


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_where_nothing_of_a_level_is_left_its_gates_need_do_nothing(name: str) -> None:
    gated = GatedModel(tiny_model(name))
    for places in gated.architecture.places:
        assert places.mlp_projection is not None
        nn.init.zeros_(places.mlp_projection.get_parameter("weight"))
    checks = list(verify(gated))
    assert [check.name for check in checks if not check.passed] == []
    assert [check.name for check in checks if "none of them does anything" in check.name] == [
        f"closing one {level} changes the logits (not checked: none of them does anything)" for level in ("mlp_neuron", "mlp_output")
    ]
    nn.init.ones_(gated.architecture.places[1].mlp_projection.get_parameter("weight")[:, :1])  # type: ignore[union-attr]
    assert any(check.name.startswith("closing one mlp_neuron (mlp_neuron.1.") and check.passed for check in verify(gated))


def test_layers_that_are_one_module_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[2] = model.model.layers[0]
    with pytest.raises(UserError, match="expected layers of llama that are modules of their own, got 3 that are 2"):
        gate(model)


@pytest.mark.parametrize("model_type", ["mamba", "rwkv", "deepseek_v3", "kolibri1"])
def test_a_model_that_fits_nothing_is_refused_in_one_line(model_type: str) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    with pytest.raises(UserError, match=r"expected a model of a known family .* got .*; add a row") as error:
        gate(model)
    assert "\n" not in str(error.value)


def test_a_device_without_memory_left_says_nothing_of_the_model() -> None:
    for error in (RuntimeError("shapes"), StopIteration(), KeyError("layer")):
        with Trying():
            raise error
    with pytest.raises(torch.OutOfMemoryError), Trying():
        raise torch.OutOfMemoryError
    with pytest.raises(ZeroDivisionError), Trying():
        raise ZeroDivisionError


def test_what_layers_know_of_the_prompt_beside_the_stream_is_noticed() -> None:
    """Else corrupted prompts would advance through layers that know the clean ones."""
    model = tiny_model("llama")
    table, ids = torch.randn(VOCABULARY, model.model.layers[1].self_attn.v_proj.out_features), []
    model.model.register_forward_pre_hook(lambda _m, _args, given: ids.append(given["input_ids"]), with_kwargs=True)
    model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda _m, _args, values: values + table[ids[-1]])
    for model_type in ("llama", "unheard-of"):
        model.config.model_type = model_type
        with pytest.raises(UserError, match=r"where the corrupted prompts advance|does not fit by structure"):
            gate(model)


def test_a_model_of_a_known_name_whose_layers_are_called_otherwise_is_read_by_structure() -> None:
    model = tiny_model("llama")
    model.config.model_type = "gpt2"
    with pytest.warns(UnknownFamilyWarning, match=r"'gpt2' is not known as it is here; its structure was read as self_attn.o_proj"):
        assert gate(model).architecture.places[0].attention_projection is model.model.layers[0].self_attn.o_proj


@pytest.mark.parametrize(
    ("error", "said"),
    [(KeyError(0), r"^could not run this model of llama with gates .*: KeyError\(0\)$"), (UserError("in a line"), "^in a line$")],
)
def test_a_known_model_that_cannot_be_run_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(GatedModel, "logits", fail)
    with pytest.raises(UserError, match=said):
        gate(tiny_model("llama"))


def test_hooks_of_the_library_itself_are_not_taken_for_ones_left_behind() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    model.config.output_hidden_states = model.config.output_attentions = True
    assert [check.name for check in verify(GatedModel(model)) if not check.passed] == []


def test_a_model_whose_heads_would_be_taken_apart_is_refused() -> None:
    with pytest.raises(UserError, match="models of type diffllama are not supported: what enters its output projection are pairs of heads"):
        gate(tiny_model("diffllama"))


@pytest.mark.parametrize("name", ["o_proj", "q_proj", "gate_proj"])
def test_an_adapter_around_a_projection_is_no_projection(name: str) -> None:
    class Wrapped(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.weight = base, base.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x)

    model = tiny_model("llama")
    for layer in model.model.layers:
        block = layer.mlp if name == "gate_proj" else layer.self_attn
        setattr(block, name, Wrapped(getattr(block, name)))
    with pytest.raises(UserError, match=r"expected projections that are nn.Linear or Conv1D, got Wrapped; merge adapters"):
        gate(model)


def test_a_copy_in_16_bits_shares_nothing_and_ties_what_was_tied() -> None:
    model = GatedModel(tiny_model("llama-tied"))
    rounded = model.in_dtype(torch.bfloat16).model
    assert rounded.lm_head.weight is rounded.model.embed_tokens.weight
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.float32}
    same = GatedModel(tiny_model("llama-tied")).in_dtype(torch.float32).model
    with torch.no_grad():
        same.lm_head.weight.zero_()
    assert same.model.embed_tokens.weight.count_nonzero() == 0 < model.model.lm_head.weight.count_nonzero()


def test_every_model_type_is_in_the_docs() -> None:
    root = Path(__file__).parents[1]
    listed = (root / "docs" / "models.md").read_text("utf-8")
    assert [name for name in MODEL_TYPES if f"`{name}`" not in listed] == []
    for page in ("README.md", "CHANGELOG.md"):
        assert f"{len(MODEL_TYPES)} model types of {len(FAMILIES)} families" in (root / page).read_text("utf-8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sink", [0.0, 300.0])
def test_rounding_of_a_deep_stream_is_not_taken_for_what_comes_from_elsewhere(dtype: torch.dtype, sink: float) -> None:
    torch.manual_seed(0)
    config = tiny_config("llama")
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 32, 64, 96
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = sink  # as attention sinks make
    gated = gate(model.to(dtype))
    hook = gated.architecture.places[5].layer.register_forward_hook(lambda module, args, output: output + (4 if sink else 0.5))
    failed = {check.name: check.detail for check in verify(gated) if not check.passed}
    hook.remove()
    assert "comes from elsewhere in layer 5" in failed["the two writes of a layer are what it adds to the residual stream"]


def test_layers_that_are_no_attention_and_mlp_are_refused_for_that() -> None:
    own = tiny_config("granitemoehybrid")
    config = type(own)(**{**own.to_dict(), "layer_types": ["attention", "mamba", "attention"]})
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"whose layers are not alike, as where another kind of block \(Mamba's\) stands in for attention"):
        gate(model)


def test_all_checks_of_a_model_that_is_read_by_structure_are_shown(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loaded.model.config, "model_type", "gpt2")
    monkeypatch.setattr("nodesieve.models.load_model", lambda *_, **__: loaded)
    with pytest.warns(UnknownFamilyWarning, match="not known as it is here"):
        command.callback("here", None, "auto", "float32", False)  # type: ignore[misc]
    assert "FAILED" not in capsys.readouterr().out


def test_gradients_are_looked_at_where_float16_can_hold_them() -> None:
    model = tiny_model("llama", vocabulary=20_000)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    assert [check.name for check in verify(GatedModel(model.half())) if not check.passed] == []
