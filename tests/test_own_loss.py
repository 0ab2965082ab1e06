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
from nodesieve.report.plots import ranking_curves, training_curves


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


def test_a_ranking_is_learned_alike_from_a_loss_below_0(loaded: LoadedModel) -> None:
    task, options = ns.load_task("ioi", loaded.tokenizer, **FEW), make_config({**QUICK, "method": "nested", "kl_budget": 100})
    runs = [ns.discover(loaded, task, options, loss=loss) for loss in (answer_loss, lambda logits, batch: answer_loss(logits, batch) - 32)]
    for level in runs[0].scores.levels:
        assert torch.allclose(runs[0].scores.values[level], runs[1].scores.values[level], atol=1e-3)
    assert all(row["kl"] < 0 and row["loss"] < 0 for row in runs[1].history)
    assert "\N{MINUS SIGN}" in ranking_curves(runs[1].history, 100.0)  # on the axis
    told = [{"step": step, "kl": kl, "open": {"head": 1.0}, "lambda": 1.0} for step, kl in enumerate((-3.0, -4.0), 1)]
    assert "\N{MINUS SIGN}" in training_curves(told, 1.0)
    assert "\N{MINUS SIGN}" not in training_curves([{**row, "kl": 1.0} for row in told], 1.0)


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
