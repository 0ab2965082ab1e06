"""On the real model: it loads from its package, the gates fit it, and it does the built-in tasks. Run with `make test-slow`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import nodesieve as ns
from nodesieve import cli
from nodesieve.config import make_config
from nodesieve.evaluation import evaluate_circuit
from nodesieve.gated_model import GatedModel
from nodesieve.models import LoadedModel
from nodesieve.nodes import NodeSpace
from nodesieve.problem import make_problem
from nodesieve.verify import verify

pytestmark = pytest.mark.slow
TASKS = [
    ("ioi", 0.97),
    ("greater_than", 0.9),
    ("gendered_pronoun", 0.97),
    ("subject_verb_agreement", 0.97),
    ("docstring", 0.97),
    ("induction", 0.95),
    ("capital_city", 0.97),
]


@pytest.fixture(scope="module")
def smollm() -> LoadedModel:
    return ns.load_model("smollm2-135m")


def test_its_nodes_are_those_of_the_paper_s_count(smollm: LoadedModel) -> None:
    assert GatedModel(smollm.model).nodes == NodeSpace(layers=30, heads=9, head_dim=64, neurons=1536, width=576)


def test_the_gates_fit(smollm: LoadedModel) -> None:
    assert [check.name for check in verify(GatedModel(smollm.model)) if not check.passed] == []


@pytest.mark.parametrize(("name", "accuracy"), TASKS)
def test_it_does_the_tasks(smollm: LoadedModel, name: str, accuracy: float) -> None:
    problem = make_problem(smollm, ns.load_task(name, smollm.tokenizer), ns.DiscoverConfig(), splits=("test",))
    everything = ns.Circuit.whole(problem.nodes)
    evaluation = evaluate_circuit(problem, everything)
    assert evaluation.full["test"]["accuracy"] >= accuracy
    assert evaluation.circuit["test"]["kl"] == 0
    assert evaluation.ablated["test"]["kl"] > 0.5


def test_files_of_each_shape_go_through_discover_and_evaluate(smollm: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = ns.load_task("ioi", smollm.tokenizer, train_size=300, redraws=0).splits["train"]
    rows = [{"clean": e.clean, "corrupted": e.corrupted, "answers": list(e.answers), "distractors": list(e.distractors)} for e in examples]
    ids = [(smollm.tokenizer(e.answers[0])["input_ids"][0], smollm.tokenizer(e.distractors[0])["input_ids"][0]) for e in examples]
    tagged = [{"clean": f"{r['clean']} <predict>{r['answers'][0][1:]}</predict>", "corrupted": r["corrupted"]} for r in rows]
    shapes = {
        "prompts.json": json.dumps({"prompts": [{"corrupt": r["corrupted"], "wrong_answers": r["distractors"], **r} for r in rows]}, indent=1),
        "ids.csv": csv_with_ids(rows, ids),
        "tags.jsonl": "".join(json.dumps(row) + "\n" for row in tagged),
    }
    for name, content in shapes.items():
        (tmp_path / name).write_text(content, "utf-8")
        out = tmp_path / f"run-{name}"
        assert command("discover", "--task", tmp_path / name, "--out", out, "--steps", 3, "--keep", 0.5, "--quiet") == 0
        assert command("evaluate", out) == 0
        shown = json.loads((out / "circuit.json").read_text("utf-8"))["examples"]["shown"][0]
        assert shown.endswith(tuple(repr(e.answers[0]) for e in examples)) or " not " in shown
    other = csv_with_ids(rows, [((7 * a + 1) % 49_000, (7 * d + 1) % 49_000) for a, d in ids])
    beyond = csv_with_ids(rows, [(a + 50_000, d) for a, d in ids])
    for content, message in ((other, "expected a full model that does the task"), (beyond, "expected token ids from 0 to")):
        (tmp_path / "other.csv").write_text(content, "utf-8")
        capsys.readouterr()
        assert command("discover", "--task", tmp_path / "other.csv", "--out", tmp_path / "refused") == 2
        error = capsys.readouterr().err
        assert message in error
        assert "for another tokenizer" in error


def csv_with_ids(rows: list[dict[str, Any]], ids: list[tuple[int, int]]) -> str:
    lines = [f'"{row["clean"]}","{row["corrupted"]}",{a},{d}\n' for row, (a, d) in zip(rows, ids, strict=True)]
    return "clean,corrupted,correct_idx,incorrect_idx\n" + "".join(lines)


def command(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["nodesieve", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    return int(stop.value.code or 0)


def test_a_short_run_closes_most_heads_at_a_low_kl(smollm: LoadedModel) -> None:
    run = ns.discover(smollm, ns.load_task("ioi", smollm.tokenizer, redraws=0), make_config({"steps": 50, "kl_budget": 0.5}))
    assert run.metrics["budget"]["met"]
    assert run.metrics["nodes"]["head"]["kept"] < 135
    assert run.metrics["circuit"]["test"]["kl"] < 0.6
