"""A causal LM and its tokenizer, ready to be gated: on which device, in which dtype, and how its weights are known again."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nodesieve.config import FINE_BUDGET, DtypeName, choices
from nodesieve.errors import UserError
from nodesieve.weights import dtype_name, read_checkpoint, refuse_adapters, refuse_infinite, source_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nodesieve.config import DiscoverConfig

AT_ONCE = 2**22  # values of a parameter that are hashed together
DTYPES = choices(DtypeName)
IN_MEMORY = "in memory"  # what a model is called that transformers knows no name of


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer, and what identifies both in a run's files.

    Attributes:
        id: its name, as it was given.
        revision: which one that was: a commit on the hub, or the hash of a GGUF file.
        asked: the branch, tag or commit that was asked for.
    """

    id: str
    revision: str | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    asked: str | None = None

    @property
    def fingerprint(self) -> str:
        return weights_fingerprint(self.model)


def load_model(
    name: str | Path | PreTrainedModel = "smollm2-135m",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model for `nodesieve.discover`, or take one that is in memory.

    Args:
        name: `smollm2-135m`, a hub id, a local directory with safetensors, or a GGUF file; or a causal LM of transformers with its `tokenizer`,
            which is put into evaluation mode, without gradients to its weights, and stays on its device and in its dtype.
        tokenizer: of a model in memory; any other brings its own.
        revision: branch, tag or commit on the hub.
        device: a torch device, or `auto`: an NVIDIA or AMD GPU if there is one, else the CPU.
        dtype: `float32`, `bfloat16` or `float16`.
        trust_remote_code: run Python code that comes with a model from the hub.

    Raises:
        UserError: the model cannot be found, read or used.
    """
    dtype, device = dtype_name(dtype), str(device)
    if dtype not in DTYPES:
        raise UserError(f"expected a dtype of {', '.join(DTYPES)}, got {dtype!r}")
    if not isinstance(name, str | Path):
        if revision is not None or (device, dtype, trust_remote_code) != ("auto", "float32", False):
            raise UserError("expected a model in memory without revision, device, dtype and trust_remote_code, since it is taken as it is")
        return _in_memory(name, tokenizer)
    if tokenizer is not None:
        raise UserError(f"expected no tokenizer, since {str(name)!r} brings its own; give the model itself with it")
    where, name = pick_device(device), str(name)
    source, found_revision = source_of(name, revision)
    model, tokenizer = read_checkpoint(source, revision=revision, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, name=name)
    model = model.to(where).eval().requires_grad_(False)
    found_revision = found_revision or getattr(model.config, "_commit_hash", None)
    return LoadedModel(id=name, revision=found_revision, model=model, tokenizer=tokenizer, asked=revision)


def _in_memory(model: Any, tokenizer: Any) -> LoadedModel:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        hint = "; merge its adapters first (merge_and_unload)" if hasattr(model, "merge_and_unload") else ""
        raise UserError(f"expected a model's name, or a causal LM of transformers, got {type(model).__name__}{hint}")
    refuse_adapters(model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"expected the tokenizer of a model in memory beside it, got {type(tokenizer).__name__}")
    dtypes = {dtype_name(parameter.dtype) for parameter in model.parameters()}
    if len(dtypes) != 1 or not dtypes <= {*DTYPES}:
        raise UserError(f"expected weights of one dtype of {', '.join(DTYPES)}, got {', '.join(sorted(dtypes))}")
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) != 1 or devices == {"meta"}:
        raise UserError(f"expected weights on one device, got {', '.join(sorted(devices))}; load the model without device_map, or on fewer")
    name, commit = model.config._name_or_path or IN_MEMORY, getattr(model.config, "_commit_hash", None)
    refuse_infinite(model, name)
    model = model.eval().requires_grad_(False)
    asked = None if Path(name).exists() else commit  # of a directory there is one version only
    return LoadedModel(id=name, revision=commit, model=model, tokenizer=tokenizer, asked=asked)


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
