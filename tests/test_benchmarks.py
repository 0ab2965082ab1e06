"""The benchmark scripts go on running as the code beneath them changes: every way of measuring, on tiny models. Figures are not looked at."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import nodesieve as ns
from command_line import few_prompts, nodesieve, quick_flags
from conftest import tiny_model
from nodesieve import gated_model, in_one
from nodesieve.config import DiscoverConfig
from nodesieve.gated_model import GatedModel
from nodesieve.gating import Gating
from nodesieve.levels import DEFAULT_LEVELS
from nodesieve.run import read_config
from nodesieve.tasks import ioi, words
from test_cache import make_problem as random_problem

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DOCS = BENCHMARKS.parent / "docs"
sys.path += [str(BENCHMARKS / part) for part in ("", "claims", "tracr")]
import circuits  # noqa: E402
import claims  # noqa: E402
import levers  # noqa: E402
import recover  # noqa: E402
import remembered  # noqa: E402
import scaling  # noqa: E402
import stability  # noqa: E402
import step  # noqa: E402
import what_limits  # noqa: E402
from machine import provenance  # noqa: E402
from make_other_words import OBJECTS, PLACES, TEMPLATES, UNSEEN, examples  # noqa: E402
from page import STAR, at_a_glance, before_polishing, beside_the_sieve, left_of_the_task, of_each_seed  # noqa: E402
from plan import CUT  # noqa: E402

PAGES = [
    (circuits.markdown, "circuits", DOCS / "results.md"),
    (claims.side_by_side, "claims", DOCS / "claims.md"),
    (claims.markdown, "claims", DOCS / "claims-tables.md"),
    (what_limits.markdown, "what_limits", DOCS / "trials.md"),
    (stability.markdown, "stability", DOCS / "evidence.md"),
    *((script.markdown, script.__name__, BENCHMARKS / "README.md") for script in (levers, remembered, scaling, step)),
    (recover.markdown, "tracr", BENCHMARKS / "README.md"),
]

SHAPE = "llama:hidden_size=32,intermediate_size=48,num_hidden_layers=3,num_attention_heads=4,num_key_value_heads=2,vocab_size=97"


@pytest.mark.parametrize(("shown", "results", "page"), PAGES, ids=[page.stem + "-" + name for _, name, page in PAGES])
def test_pages_show_what_was_measured(shown: Callable[[Any], str], results: str, page: Path) -> None:
    table = shown(json.loads((BENCHMARKS / "results" / f"{results}.json").read_text("utf-8")))
    assert table.strip() in page.read_text("utf-8")


def test_the_budget_stands_in_the_page() -> None:
    assert (BENCHMARKS / "results" / "budget.md").read_text("utf-8").strip() in (DOCS / "cost.md").read_text("utf-8")


def test_what_runs_agree_on_can_be_shown(model_directory: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ["--model", model_directory, "--task", few_prompts(tmp_path), *quick_flags(method="random")]
    assert nodesieve("discover", *flags, "--out", run) == 0
    assert nodesieve("stability", run, "--seeds", 2) == 0
    shown = stability.markdown({"machine": "none", "versions": {"nodesieve": "1"}, **stability.measured(run)})
    rows = [line.split(" | ")[0] for line in shown.splitlines()]
    assert rows[2:6] == ["| seed 0", "| seed 1, resampled", "| seed 2, resampled", "| kept by 2 of 3 runs"]
    assert {f"| {level}" for level in DEFAULT_LEVELS if level != "expert"} <= {*rows}


def test_no_unseen_name_is_in_the_task() -> None:
    """Nor any place, object or template of those prompts."""
    assert not {*UNSEEN} & {*words.FEMALE_NAMES, *words.MALE_NAMES, *words.FURTHER_NAMES}
    assert not {*PLACES, *OBJECTS} & {*words.PLACES, *words.OBJECTS}
    assert not {*TEMPLATES} & {*ioi.TEMPLATES}
    rows = [json.loads(line) for line in (BENCHMARKS / "data" / "ioi_unseen_names.jsonl").read_text("utf-8").splitlines()]
    assert {answer.strip() for row in rows for answer in (*row["answers"], *row["distractors"])} <= {*UNSEEN}
    assert rows == examples(UNSEEN, "ioi/unseen names")


@pytest.mark.parametrize("mode", step.MODES)
def test_every_step_can_be_measured(mode: str) -> None:
    found = step.measure(SHAPE, mode, batch=2, length=8, steps=8)
    assert found["time"] > 0
    assert found["memory"] >= 0


@pytest.mark.parametrize("name", levers.LEVERS)
def test_every_lever_can_be_taken_away(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, attribute in (
        *((GatedModel, attribute) for attribute in ("gated_logits_of_each", "start")),
        *((Gating, "edit"), (gated_model, "is_gated"), (torch.optim, "Adam")),
    ):
        monkeypatch.setattr(owner, attribute, getattr(owner, attribute))  # put back after the test, whatever the lever sets
    monkeypatch.setattr(in_one, "IN_ONE", dict(in_one.IN_ONE))
    monkeypatch.setattr(levers, "build", lambda name: tiny_model("llama").requires_grad_(False))
    assert levers.measure(name)["time"] > 0


def test_one_more_circuit_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "TIMES", 1)
    found = remembered.measure(random_problem(), DiscoverConfig())
    assert found["plain"] > 0
    assert [row["size"] for row in found["rows"]] == pytest.approx(remembered.SIZES, rel=0.2)
    assert all(row[way] > 0 for row in found["rows"] for way in remembered.WAYS)


def test_a_run_can_be_recorded(model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    flags = quick_flags(method="multigranular", steps=12, redraws=0, validation_size=32)
    assert nodesieve("discover", "--model", model_directory, "--task", "ioi", *flags, "--out", run) == 0
    monkeypatch.setattr(step, "RECORDED", tmp_path / "live.json")
    step.record(run)
    points = json.loads((tmp_path / "live.json").read_text())["points"]
    assert len(points) == step.POINTS
    assert all(0 <= share <= 1 for point in points for level, shares in point.items() if level != "step" for share in shares)


def test_the_command_line_takes_every_run_of_the_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(claims, "call", lambda *arguments: asked.append([str(argument) for argument in arguments]))
    made: list[Path] = []
    monkeypatch.setattr(claims, "ensure_run", lambda out, config: made.append(out))
    monkeypatch.setattr(claims, "within", lambda runs, task, method, seed: claims.ensure_run(runs / f"within-{method}-{seed}", DiscoverConfig()))
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "claims.json")
    for name in ("PAGE", "TABLES"):
        monkeypatch.setattr(claims, name, tmp_path / f"{name}.md")
        (tmp_path / f"{name}.md").write_text("<!-- circuits -->\n<!-- end -->\n")
    monkeypatch.setattr("sys.argv", ["claims.py", "--runs", str(tmp_path / "runs"), "--seeds", "1"])
    claims.main()
    for name, *arguments in asked:
        with importlib.import_module(f"nodesieve.cli.{name}").command.make_context(name, list(arguments)) as context:
            if context.params.get("config_file"):
                read_config(context.params["config_file"])
    outs = {arguments[arguments.index("--out") + 1] for arguments in asked if "--out" in arguments} | {str(out) for out in made}
    for part in (*claims.SETTINGS, *map(claims.slug, claims.VARIANTS), "within-coarse-0", "within-greedy-0"):
        assert any(out.endswith(f"ioi/{part}") for out in outs), part


def test_what_an_earlier_version_polished_stays_marked_as_long_as_it_is_the_same_circuit() -> None:
    one = {"method": "sieve", "seed": 0, "device": "cpu", "nodes": {"head": {"kept": 3}}, "test": {"kl": 0.2}}
    marked = {"tasks": {"ioi": [{**one, "earlier": "a word"}]}}
    again, other = {"tasks": {"ioi": [dict(one)]}}, {"tasks": {"ioi": [{**one, "test": {"kl": 0.21}}]}}
    assert claims.joined(marked, again)["tasks"] == marked["tasks"]
    assert claims.joined(marked, other)["tasks"] == other["tasks"]
    assert claims.joined(marked, other, again)["tasks"] == again["tasks"]


def test_runs_that_are_not_of_the_plan_are_left_out(
    model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: Path, *more: object) -> None:
        flags = quick_flags(redraws=0, validation_size=32, keep=0.5)
        assert nodesieve("discover", "--model", model_directory, "--task", "ioi", *flags, "--out", out, "--quiet", *more) == 0

    runs = tmp_path / "ioi"
    run(runs / "coarse-0", "--method", "random")
    run(runs / "within-coarse-0", "--within", runs / "coarse-0")
    run(runs / "sieve")
    found = claims.collected(tmp_path)
    assert [one["method"] for one in found["within"]] == ["coarse"]
    assert not found["tasks"]["ioi"]
    assert not found["variants"]
    said = capsys.readouterr().err
    assert f"left out {runs / 'coarse-0'}: it has no size_curve.json yet" in said
    assert f"left out {runs / 'sieve'}: it has other options than the plan" in said
    run(runs / "coarse-0", "--method", "random", "--overwrite", "--config", runs / "coarse-0" / "config.yaml", "--keep", 0.9)
    monkeypatch.setattr(claims, "options_of", lambda name: ns.load_run(runs / "sieve").config)
    found = claims.collected(tmp_path)
    assert not found["within"]
    assert [one["name"] for one in found["variants"]] == ["sieve"]
    assert "within-coarse-0: it was searched within another circuit" in capsys.readouterr().err


def test_what_is_known_of_another_circuit_is_not_told_of_this_one(tmp_path: Path) -> None:
    assert circuits.on_others(tmp_path, "other_words", "this") is None
    (tmp_path / "other_words.json").write_text(json.dumps({"of": "this", "circuit": {"test": {"kl": 0.5}}}))
    assert circuits.on_others(tmp_path, "other_words", "this") == {"kl": 0.5}
    assert circuits.on_others(tmp_path, "other_words", "that") is None


def test_each_set_of_versions_is_named_once() -> None:
    old, new = {"nodesieve": "1", "torch": "2"}, {"nodesieve": "1", "torch": "3"}
    assert provenance({"versions": old, "machine": "a PC"}) == "Machine: a PC. Versions: nodesieve 1, torch 2."
    assert provenance({"versions": [old, new, old]}) == "Versions: nodesieve 1, torch 2; nodesieve 1, torch 3."


def test_a_seed_on_two_machines_counts_once() -> None:
    rows = [{"method": method, "seed": seed, "device": device} for device in ("gpu", "cpu") for method in ("sieve", "nested") for seed in (0, 1)]
    alone = {"method": "fisher", "seed": 0, "device": "gpu"}
    assert of_each_seed([*rows, alone]) == [*rows[4:], alone]
    assert of_each_seed(rows[::-1]) == rows[:3:-1]


def test_the_claims_set_seeds_of_two_methods_beside_each_other() -> None:
    def row(method: str, seed: int, size: float, left: float, **more: object) -> dict[str, Any]:
        measured = {"test": {"logit_diff": left, "prob_diff": left / 2}, "full": {"logit_diff": 4.0, "prob_diff": 1.0}}
        return {"method": method, "seed": seed, "device": "cpu", "size": size, "unpolished": 2 * size, **measured, **more}

    sieve = [row("sieve", 0, 0.1, 1.0), row("sieve", 2, 0.03, 2.0, earlier=True)]
    fisher = [row("fisher", 0, 0.4, 3.0, unpolished=0.5, earlier=True), row("fisher", 1, 0.2, 3.0), row("fisher", 2, 0.04, 4.0, earlier=True)]
    tasks = {"ioi": [*sieve, *fisher], "greater_than": sieve}
    once = {"greater_than": [row("fisher", 2, 0.24, 3.0, unpolished=None)], "ioi": [row("fisher", 1, 0.3, 3.0, unpolished=None)]}
    result = {"tasks": tasks, "settings": {CUT: once}}
    assert f"| fisher | 25%{STAR} / - / 75% (40% / - / 75%) | - (- / - / 25%) | - | - |" in beside_the_sieve(result)
    assert "| fisher | 50.0% / 40.0% / 8.0% | - / - / 24.0% | - | - |" in before_polishing(result)
    assert "| sieve | 25% / - / 50% | 50% / - / 100% |" in left_of_the_task(tasks)
    assert left_of_the_task(tasks)[0] == "| left by | ioi, logit_diff | greater_than, prob_diff |"
    assert f"| sieve | 10.0% / - / 3.0%{STAR} | - | - | - |" in at_a_glance({**result, "tasks": {"ioi": tasks["ioi"]}})
    assert not any("cut once" in line for line in at_a_glance(result))


def test_what_limits_a_circuit_can_be_asked(model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    assert (
        nodesieve("discover", "--model", model_directory, "--task", "ioi", *quick_flags(keep=0.5, redraws=0, validation_size=32), "--out", run) == 0
    )
    page = tmp_path / "page.md"
    page.write_text("<!-- circuits -->\n<!-- end -->\n")
    monkeypatch.setattr(what_limits, "RESULTS", tmp_path / "found.json")
    monkeypatch.setattr(what_limits, "PAGE", page)
    monkeypatch.setattr(what_limits, "EXAMPLES", 16)
    monkeypatch.setattr("sys.argv", ["what_limits.py", str(run)])
    what_limits.main()
    found = json.loads((tmp_path / "found.json").read_text())
    nothing, *others = found["opened"]
    assert nothing["size"] == pytest.approx(ns.load_run(run).circuit.size)
    assert all(row["size"] >= nothing["size"] for row in others)
    assert {row["level"] for row in found["signal"]} == set(what_limits.ASKED)
    assert "closed, by" in page.read_text()
