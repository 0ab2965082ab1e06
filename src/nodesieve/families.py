"""One row of data a model family: by module path, where the five places of `nodesieve.architectures` are. To add a family, add a row."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Family:
    """Module paths, `layers` from the model and the rest from one layer.

    Attributes:
        attention_write: the module whose output is added to the residual stream, the projection itself where not said: a norm after the
            projection, where the family has one. A factor on the way (Granite) does no harm: gating is linear.
        mlp_write: likewise.
        qkv: query, key and value projections, one fused or three.
        mlp_inputs: the matrices from the stream to the hidden neurons: one, a gate and an up projection, or both fused.
        experts: in layers that route to experts, the module that takes (hidden states, indices, weights) of the chosen ones and gives the sum of
            their weighted outputs. Such a layer has no `mlp_projection`, and its write is the MLP's own.
        norms_after_sum: norms of the residual stream itself, applied after a write is added to it; a closed layer still applies them.
        norms_after_sum_if: (option, value) of the config where only some models of the family have them.
    """

    model_types: tuple[str, ...]
    layers: str
    attention_projection: str
    mlp_projection: str
    attention_write: str = ""
    mlp_write: str = ""
    qkv: tuple[str, ...]
    mlp_inputs: tuple[str, ...]
    experts: str = ""
    norms_after_sum: tuple[str, ...] = ()
    norms_after_sum_if: tuple[str, object] | None = None


# By model type, what no check can tell: why the places that a reading finds would not be what they are called.
MISREAD = {"diffllama": "what enters its output projection are pairs of heads, whose halves would be taken for heads"}

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_LLAMA = Family(
    model_types=(
        *("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "olmo", "stablelm", "cohere", "cohere2", "granite", "smollm3"),
        *("helium", "ernie4_5", "seed_oss", "hunyuan_v1_dense", "internlm3", "ministral3", "vaultgemma", "granite_swa", "iquestcoder", "bitnet"),
        *("cwm", "exaone"),
    ),
    layers="model.layers",
    attention_projection="self_attn.o_proj",
    mlp_projection="mlp.down_proj",
    qkv=_QKV,
    mlp_inputs=("mlp.gate_proj", "mlp.up_proj"),
)
_NORM_AFTER = replace(
    _LLAMA,
    model_types=("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4"),
    attention_write="post_attention_layernorm",
    mlp_write="post_feedforward_layernorm",
)
_OPT = Family(
    model_types=("opt",),
    layers="model.decoder.layers",
    attention_projection="self_attn.out_proj",
    mlp_projection="fc2",
    qkv=_QKV,
    mlp_inputs=("fc1",),
    norms_after_sum=("self_attn_layer_norm", "final_layer_norm"),
    norms_after_sum_if=("do_layer_norm_before", False),
)

FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=("gpt2", "gpt_bigcode"),
        layers="transformer.h",
        attention_projection="attn.c_proj",
        mlp_projection="mlp.c_proj",
        qkv=("attn.c_attn",),
        mlp_inputs=("mlp.c_fc",),
    ),
    Family(
        model_types=("gpt_neo",),
        layers="transformer.h",
        attention_projection="attn.attention.out_proj",
        mlp_projection="mlp.c_proj",
        qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        mlp_inputs=("mlp.c_fc",),
    ),
    Family(
        model_types=("gpt_neox",),
        layers="gpt_neox.layers",
        attention_projection="attention.dense",
        mlp_projection="mlp.dense_4h_to_h",
        qkv=("attention.query_key_value",),
        mlp_inputs=("mlp.dense_h_to_4h",),
    ),
    Family(
        model_types=("gptj",),
        layers="transformer.h",
        attention_projection="attn.out_proj",
        mlp_projection="mlp.fc_out",
        qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        mlp_inputs=("mlp.fc_in",),
    ),
    Family(
        model_types=("codegen",),
        layers="transformer.h",
        attention_projection="attn.out_proj",
        mlp_projection="mlp.fc_out",
        qkv=("attn.qkv_proj",),
        mlp_inputs=("mlp.fc_in",),
    ),
    _OPT,
    replace(_OPT, model_types=("xglm",), layers="model.layers", norms_after_sum=()),
    replace(_OPT, model_types=("biogpt",), layers="biogpt.layers", norms_after_sum=()),
    Family(
        model_types=("bloom", "falcon"),  # their blocks return residual plus write; the projections' own outputs are the writes
        layers="transformer.h",
        attention_projection="self_attention.dense",
        mlp_projection="mlp.dense_4h_to_h",
        qkv=("self_attention.query_key_value",),
        mlp_inputs=("mlp.dense_h_to_4h",),
    ),
    Family(
        model_types=("mpt",),
        layers="transformer.blocks",
        attention_projection="attn.out_proj",
        mlp_projection="ffn.down_proj",
        qkv=("attn.Wqkv",),
        mlp_inputs=("ffn.up_proj",),
    ),
    _LLAMA,
    replace(_LLAMA, model_types=("arcee", "apertus", "apertus1p5_text", "nemotron", "jais2"), mlp_inputs=("mlp.up_proj",)),
    replace(_LLAMA, model_types=("glm",), mlp_inputs=("mlp.gate_up_proj",)),
    replace(_LLAMA, model_types=("phi3",), qkv=("self_attn.qkv_proj",), mlp_inputs=("mlp.gate_up_proj",)),
    _NORM_AFTER,
    replace(_NORM_AFTER, model_types=("gemma3",), layers="model.language_model.layers"),  # with eyes; the circuit is of the words
    replace(_LLAMA, model_types=("nanochat",), mlp_projection="mlp.fc2", mlp_inputs=("mlp.fc1",)),
    replace(_LLAMA, model_types=("mixtral", "qwen3_moe", "olmoe", "phimoe", "minimax_m2", "mellum"), mlp_write="mlp", experts="mlp.experts"),
    replace(_LLAMA, model_types=("granitemoe",), mlp_write="block_sparse_moe", experts="block_sparse_moe.experts"),
    replace(  # those of attention and one MLP alone; with routed experts beside it, its two writes are not what a layer adds
        _LLAMA, model_types=("granitemoehybrid",), mlp_projection="shared_mlp.output_linear", mlp_inputs=("shared_mlp.input_linear",)
    ),
    Family(
        model_types=("modernbert-decoder",),
        layers="model.layers",
        attention_projection="attn.Wo",
        mlp_projection="mlp.Wo",
        qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        mlp_inputs=("mlp.Wi",),
    ),
    replace(
        _LLAMA,
        model_types=("glm4",),
        attention_write="post_self_attn_layernorm",
        mlp_write="post_mlp_layernorm",
        mlp_inputs=("mlp.gate_up_proj",),
    ),
    Family(
        model_types=("starcoder2",),
        layers="model.layers",
        attention_projection="self_attn.o_proj",
        mlp_projection="mlp.c_proj",
        qkv=_QKV,
        mlp_inputs=("mlp.c_fc",),
    ),
    Family(
        model_types=("phi",),
        layers="model.layers",
        attention_projection="self_attn.dense",
        mlp_projection="mlp.fc2",
        qkv=_QKV,
        mlp_inputs=("mlp.fc1",),
    ),
    Family(
        model_types=("persimmon",),
        layers="model.layers",
        attention_projection="self_attn.dense",
        mlp_projection="mlp.dense_4h_to_h",
        qkv=("self_attn.query_key_value",),
        mlp_inputs=("mlp.dense_h_to_4h",),
    ),
)
