"""Tracr's compiled programs as a causal LM that gates can be put on, with a task for each.

The model is what Tracr compiles (see compile.py): embeddings of tokens and positions, layers of attention and ReLU MLPs that add to the stream, no
norms. An answer is a word of its own, "=VALUE", and is read at the prompt's last word. Where the program answers with one of several values, the
logit of each is 10 times its residual dimension; where it answers with a number v, the logit of the value c is -100 (v - c)^2 less what all
share, which is linear in v. So the KL is a smooth measure of how far the answer has moved.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from nodesieve.architectures import locate
from nodesieve.circuit import Circuit
from nodesieve.families import Family
from nodesieve.gated_model import GatedModel
from nodesieve.levels import DEFAULT_LEVELS
from nodesieve.models import LoadedModel
from nodesieve.nodes import LevelTensors
from nodesieve.problem import Problem
from nodesieve.tasks.base import SPLITS, Example, Task
from nodesieve.tasks.encode import encode

HERE = Path(__file__).parent
CATEGORICAL, NUMERICAL = 10.0, 100.0
MOVED = 1e-3  # nats
AT_ONCE = 32
NEVER = -1000.0  # the logit of a word that is no answer

# name -> what the program says at the last word
PROGRAMS: dict[str, Callable[[tuple[str, ...]], str]] = {
    "x-proportion": lambda words: spoken(words.count("x") / len(words)),
    "reverse": lambda words: words[0],
    "sort": lambda words: max(words),
    "hist": lambda words: str(words.count(words[-1])),
    "pattern": lambda words: str(words[-2:] == ("a", "b")),
}


def spoken(answer: object) -> str:
    return f"{answer:.3f}" if isinstance(answer, float) else str(answer)


FAMILY = Family(
    model_types=("tracr",),
    layers="model.layers",
    attention_projection="self_attn.o_proj",
    mlp_projection="mlp.down_proj",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    mlp_inputs=("mlp.up_proj",),
)


@dataclass(frozen=True, kw_only=True)
class Program:
    loaded: LoadedModel
    task: Task

    def problem(self, ablation: str) -> Problem:
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        encoded = encode(self.task, tokenizer, aligned=True, device=torch.device("cpu"), vocabulary=model.config.vocab_size)
        return Problem(GatedModel(model, locate(model, FAMILY)), encoded, ablation=ablation, batch_size=len(self.task.splits["test"]))


def load_program(name: str, *, seed: int = 0) -> Program:
    with safe_open(HERE / f"{name}.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    answers = [f"={spoken(answer)}" for answer in about["answers"]]
    vocabulary = {word: number for number, word in enumerate([*about["words"], *answers, "[UNK]"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", pad_token="compiler_pad")
    model = _model(about, tensors, vocabulary=len(vocabulary))
    return Program(loaded=LoadedModel(id=f"tracr/{name}", revision=None, model=model, tokenizer=tokenizer), task=_task(name, about, seed=seed))


def _task(name: str, about: dict[str, Any], *, seed: int) -> Task:
    """Pairs of prompts with different answers; among clean prompts every answer is about as frequent as the words allow."""
    rng, says = random.Random(seed), PROGRAMS[name]
    by_answer: dict[str, list[tuple[str, ...]]] = {}
    for words in itertools.product(about["choices"], repeat=about["length"]):
        by_answer.setdefault(says(words), []).append(words)
    for prompts in by_answer.values():
        rng.shuffle(prompts)
    order = [prompt for row in itertools.zip_longest(*by_answer.values()) for prompt in row if prompt is not None]
    examples = []
    for words in order[:240]:
        other = rng.choice([answer for answer in by_answer if answer != says(words)])
        texts = (" ".join([about["bos"], *prompt]) for prompt in (words, rng.choice(by_answer[other])))
        examples.append(Example(clean=next(texts), corrupted=next(texts), answers=(f"={says(words)}",), distractors=(f"={other}",)))
    rng.shuffle(examples)
    third = len(examples) // 3
    return Task(
        name=f"tracr/{name}",
        splits={"train": tuple(examples[:third]), "validation": tuple(examples[third : 2 * third]), "test": tuple(examples[2 * third :])},
    )


def truth(problem: Problem) -> LevelTensors:
    """The nodes that the program needs under the problem's ablation, (*shape(level)): closed alone, they move the answer of some prompt of any split.

    What is needed depends on what a closed node holds. Prompts are equally long, so whatever a program computes about lengths and positions
    alone is the same on the corrupted prompt and is not needed under `counterfactual`; under `mean` it is not where it is the same at all
    positions; under `zero` it is. Compiled programs do nothing twice, so nodes that are needed are needed alone: that the others together are
    not is tested.
    """
    nodes = problem.nodes
    whole = Circuit.whole(nodes)
    found: LevelTensors = {}
    for level in DEFAULT_LEVELS:
        found[level] = torch.zeros_like(whole.masks[level])
        indices = [tuple(index) for index in whole.masks[level].nonzero().tolist()]
        for start in range(0, len(indices), AT_ONCE):
            some = indices[start : start + AT_ONCE]
            circuits = [whole.without({level: torch.tensor([index])}) for index in some]
            for split in SPLITS:
                for index, kl in zip(some, problem.losses(circuits, split), strict=True):
                    found[level][index] |= float(kl.max()) > MOVED
    return found


class TracrConfig(PretrainedConfig):  # type: ignore[misc]
    model_type = "tracr"


def _model(about: dict[str, Any], tensors: dict[str, Tensor], *, vocabulary: int) -> TracrForCausalLM:
    sizes = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "width": "hidden_size", "neurons": "intermediate_size"}
    config = TracrConfig(
        **{theirs: about[ours] for ours, theirs in sizes.items()},
        head_dim=about["head_dim"],
        causal=about["causal"],
        vocab_size=vocabulary,
        max_position_embeddings=len(tensors["position_embedding"]),
    )
    model = TracrForCausalLM(config)
    layers: Any = model.model.layers
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight[: len(tensors["token_embedding"])] = tensors["token_embedding"]
        model.model.embed_positions.weight.copy_(tensors["position_embedding"])
        for number, layer in enumerate(layers):
            modules = {"q": layer.self_attn.q_proj, "k": layer.self_attn.k_proj, "v": layer.self_attn.v_proj, "o": layer.self_attn.o_proj}
            for key, module in {**modules, "up": layer.mlp.up_proj, "down": layer.mlp.down_proj}.items():
                module.weight.copy_(tensors[f"{number}.{key}.weight"])
                module.bias.copy_(tensors[f"{number}.{key}.bias"])
        first = len(about["words"])
        model.lm_head.bias.fill_(NEVER)
        for number, answer in enumerate(about["answers"]):
            row = first + number
            if about["numerical"]:
                model.lm_head.weight[row, about["output"][0]] = 2 * NUMERICAL * answer
                model.lm_head.bias[row] = -NUMERICAL * answer**2
            else:
                model.lm_head.weight[row, about["output"][number]] = CATEGORICAL
                model.lm_head.bias[row] = 0
    model.eval().requires_grad_(False)
    return model


class Attention(nn.Module):
    def __init__(self, config: TracrConfig) -> None:
        super().__init__()
        inner = config.num_attention_heads * config.head_dim
        self.heads, self.causal = config.num_attention_heads, config.causal
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(config.hidden_size, inner) for _ in range(3))
        self.o_proj = nn.Linear(inner, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        seen = mask[:, None, None, :].bool().expand(-1, 1, x.shape[1], -1)
        if self.causal:
            seen = seen & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~seen, -1e30).softmax(-1)
        written: Tensor = self.o_proj((weights @ v).transpose(1, 2).flatten(2))
        return written


class MLP(nn.Module):
    def __init__(self, config: TracrConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        written: Tensor = self.down_proj(self.up_proj(x).relu())
        return written


class Layer(nn.Module):
    def __init__(self, config: TracrConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(x, mask)
        written: Tensor = x + self.mlp(x)
        return written


class Decoder(nn.Module):
    def __init__(self, config: TracrConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class TracrForCausalLM(PreTrainedModel):  # type: ignore[misc]
    """Modules are named as Llama's are."""

    config_class = TracrConfig

    def __init__(self, config: TracrConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, use_cache: bool = False, past_key_values: None = None
    ) -> CausalLMOutput:
        positions = position_ids.clamp(max=self.config.max_position_embeddings - 1)
        x = self.model.embed_tokens(input_ids) + self.model.embed_positions(positions)
        for layer in self.model.layers:
            x = layer(x, attention_mask)
        return CausalLMOutput(logits=self.lm_head(x))
