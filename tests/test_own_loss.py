"""A loss of one's own in place of the KL."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch

import nodesieve as ns
from command_line import FEW, QUICK, nodesieve
from nodesieve.batches import Batch
from nodesieve.config import make_config
from nodesieve.models import LoadedModel
from nodesieve.problem import Loss
from nodesieve.report.page import render


def answer_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    return torch.stack([-row.log_softmax(-1)[list(answers)].logsumexp(0) for row, answers in zip(logits, batch.answers, strict=True)])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda logits, batch: logits[:, 0] * math.nan, "expected a loss that gives finite numbers"),
        (lambda logits, batch: logits[:, 0].mean(), r"expected a loss that gives one number an example, shape \(\d+,\), got shape \(\)"),
        (lambda logits, batch: logits.detach()[:, 0], "expected a loss that gives a tensor with a gradient to the logits, got one without"),
        (lambda logits, batch: [0.0] * len(logits), "expected a loss that gives a tensor with a gradient to the logits, got list"),
        (lambda logits, batch: logits[:, :1], r"got shape \(\d+, 1\)"),
    ],
)
def test_a_loss_that_is_no_number_an_example_is_refused(loaded: LoadedModel, loss: Loss, message: str) -> None:
    task = ns.load_task("ioi", loaded.tokenizer, **FEW)
    with pytest.raises(ns.UserError, match=message):
        ns.discover(loaded, task, make_config(QUICK), loss=loss)


def test_the_loss_can_be_the_users_own(loaded: LoadedModel) -> None:
    task = ns.load_task("ioi", loaded.tokenizer, **FEW)
    spied = create_autospec(answer_loss, side_effect=answer_loss)
    own = ns.discover(loaded, task, make_config({**QUICK, "kl_budget": 100, "polish": True}), loss=spied)
    plain = ns.discover(loaded, task, make_config({**QUICK, "kl_budget": 100}))
    assert spied.called
    assert own.metrics["budget"]["met"]
    assert own.history[-1]["loss"] != plain.history[-1]["loss"]
    assert "kl" in own.metrics["circuit"]["test"]
    assert own.description["loss"] == "answer_loss"
    assert "<code>answer_loss</code>, a loss of its own" in render([("own", own)])
    assert "loss" not in plain.description
    assert "of its own" not in render([("plain", plain)])


def test_what_a_loss_of_ones_own_allows_is_no_kl(
    loaded: LoadedModel, model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ns.load_task("ioi", loaded.tokenizer, **FEW)
    own = replace(loaded, id=str(model_directory))
    run = ns.discover(own, task, make_config({**QUICK, "method": "sieve", "steps": 4, "kl_budget": 100, "train_size": 32}), loss=answer_loss)
    run.save(tmp_path / "run")
    assert "Training: answer_loss, open shares" in render([("own", run)])
    assert nodesieve("evaluate", tmp_path / "run", "--size-curve", "--json") == 0
    curve = json.loads(capsys.readouterr().out)["size_curve"]
    assert all(part["compactness"] is None for part in curve.values())
    assert nodesieve("evaluate", tmp_path / "run", "--size-curve") == 0
    assert "smallest share within the KL budget -" in " ".join(capsys.readouterr().out.split())
