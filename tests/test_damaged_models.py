"""Models whose weights or tokenizer cannot be used are refused in one line."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from command_line import nodesieve
from nodesieve.models import LoadedModel


def test_pickled_weights_are_refused_with_the_way_to_convert_them(model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "pickled"
    shutil.copytree(model_directory, directory)
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"")
    assert nodesieve("check-model", directory) == 2
    error = capsys.readouterr().err
    assert "expected weights as safetensors" in error
    assert "save_pretrained" in error
    assert error.count("\n") == 1


def test_weights_that_are_not_finite_are_refused(loaded: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = copy.deepcopy(loaded.model)
    broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    broken.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    capsys.readouterr()
    assert nodesieve("check-model", tmp_path) == 2
    assert "expected finite weights, got NaN or infinity in 'model.layers.1.mlp.up_proj.weight'" in capsys.readouterr().err


def _cut(directory: Path) -> None:
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _without_a_weight(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _narrower(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": config["intermediate_size"] // 2}))


def _without_a_tokenizer(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()


def _pointer(directory: Path) -> None:
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut, "could not load"),
        (_pointer, "a Git LFS pointer"),
        (_without_a_weight, "expected all weights of the model in .* found none for model.layers.1.mlp.up_proj.weight"),
        (_narrower, r"expected weights as the model's config says, model.layers.0.mlp.down_proj.weight of \(\d+, \d+\), got .*, and \d+ more"),
        (_without_a_tokenizer, "tokenizer"),
    ],
)
def test_damaged_models_are_refused_in_one_line(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], said: str
) -> None:
    directory = tmp_path / "damaged"
    shutil.copytree(model_directory, directory)
    damage(directory)
    assert nodesieve("check-model", directory) == 2
    error = capsys.readouterr().err
    assert re.search(said, error)
    assert error.count("\n") == 1
