"""A causal LM and its tokenizer, ready to be gated: on which device, in which dtype, and how its weights are known again."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nodesieve.config import FINE_BUDGET
from nodesieve.errors import UserError
from nodesieve.weights import read_checkpoint, source_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nodesieve.config import DiscoverConfig

AT_ONCE = 2**22  # values of a parameter that are hashed together
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer, and what identifies both in a run's files."""

    id: str
    revision: str | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def fingerprint(self) -> str:
        return weights_fingerprint(self.model)


def load_model(
    name: str | Path = "smollm2-135m",
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model for `nodesieve.discover`.

    Args:
        name: `smollm2-135m`, a hub id, a local directory with safetensors, or a GGUF file.
        revision: branch, tag or commit on the hub.
        device: a torch device, or `auto`: the GPU if there is one.
        dtype: `float32`, `bfloat16` or `float16`.

    Raises:
        UserError: the model cannot be found or read.
    """
    if dtype not in DTYPES:
        raise UserError(f"expected a dtype of {', '.join(DTYPES)}, got {dtype!r}")
    where, name = pick_device(device), str(name)
    source, found_revision = source_of(name, revision)
    model, tokenizer = read_checkpoint(source, revision=revision, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, name=name)
    model = model.to(where).eval().requires_grad_(False)
    return LoadedModel(id=name, revision=found_revision or getattr(model.config, "_commit_hash", None), model=model, tokenizer=tokenizer)


def model_of(config: DiscoverConfig, *, model: str | None = None, device: str | None = None, trust_remote_code: bool = False) -> LoadedModel:
    """The model that a run's options name; `model` and `device` where they are other ones now."""
    name = config.model if model is None else model
    revision = config.revision if name == config.model else None
    return load_model(name, revision=revision, device=device or config.device, dtype=config.dtype, trust_remote_code=trust_remote_code)


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Hexadecimal SHA-256 of all values of all parameters, to 16 bits: the same on any device, and in float32 as in bfloat16."""
    found, named = hashlib.sha256(), dict(model.named_parameters())
    with ThreadPoolExecutor() as threads:
        for (name, parameter), digest in zip(named.items(), threads.map(_digest, named.values()), strict=True):
            found.update(f"{name} {tuple(parameter.shape)} {digest}".encode())
    return found.hexdigest()


def _digest(parameter: torch.Tensor) -> str:
    found = hashlib.sha256()
    for some in parameter.detach().flatten().split(AT_ONCE):  # type: ignore[no-untyped-call]
        found.update(some.to(torch.bfloat16).view(torch.int16).cpu().numpy())
    return found.hexdigest()


def pick_device(device: str) -> torch.device:
    """`auto` -> an NVIDIA or AMD GPU if there is one, else the CPU; anything else as torch reads it. On Apple's GPUs nothing has been tested."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"expected a device that torch has here ({', '.join(_devices())}), got {device!r}: {str(error).splitlines()[0]}") from error
    if found.type == "meta":
        raise UserError(f"expected a device that computes ({', '.join(_devices())}), got {device!r}")
    return found


def _devices() -> list[str]:
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def device_name(device: torch.device) -> str:
    """For people: what a GPU is called, else the kind of the device, such as `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def learning_dtype(config: DiscoverConfig, model: PreTrainedModel) -> torch.dtype:
    """The dtype that `config.learning_dtype` stands for; "auto" is bfloat16 for a float32 model on a machine with instructions for it, where the KL
    budget is not so small that rounding hides what nodes cost, else the model's own."""
    if config.learning_dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.learning_dtype)
        return dtype
    rounded = model.dtype == torch.float32 and config.kl_budget >= FINE_BUDGET and _has_bfloat16(model.device)
    return torch.bfloat16 if rounded else model.dtype


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
