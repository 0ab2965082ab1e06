"""How certain the full model is of its answer after each IOI template: what the templates were chosen by.

Prints, for each template of `ioi` and for the prompts of other words, the mean probability of the right name, the share of prompts in which it
is the likeliest token, and the mean entropy of the next token in nats; on training names of seed 0, 256 prompts a template. The same
for templates of your own.

    python benchmarks/certainty.py
    python benchmarks/certainty.py --template "When {a} and {b} went to the {place}, {s} gave a {object} to"
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import nodesieve as ns
from nodesieve.config import DiscoverConfig
from nodesieve.models import LoadedModel
from nodesieve.problem import make_problem
from nodesieve.tasks import ioi
from nodesieve.tasks.base import SPLITS, SplitName, Task, build
from nodesieve.tasks.encode import is_one_token

EXAMPLES = 256
OTHER_WORDS = Path(__file__).parent / "data" / "ioi_other_words.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--template", nargs="*", default=ioi.TEMPLATES, help="with {a}, {b}, {s}, {place} and {object}")
    options = parser.parse_args()
    loaded = ns.load_model(options.model)
    print("| template | p(answer) | likeliest | entropy, nats |\n|---|---|---|---|")
    for template in options.template:
        print(line(loaded, template, of_template(loaded, template), "train"), flush=True)
    if tuple(options.template) == ioi.TEMPLATES:
        print(line(loaded, "other templates and words", ns.load_task(OTHER_WORDS, loaded.tokenizer), "test"))


def of_template(loaded: LoadedModel, template: str) -> Task:
    """The IOI task of one template."""
    one = replace(ioi.IOI, example=partial(ioi.example, templates=(template,)))
    return build(one, is_token=partial(is_one_token, loaded.tokenizer), seed=0, sizes=dict.fromkeys(SPLITS, EXAMPLES))


@torch.no_grad()
def line(loaded: LoadedModel, name: str, task: Task, split: SplitName) -> str:
    problem = make_problem(loaded, task, DiscoverConfig(force=True), splits=(split,))
    rows = []
    for batch in problem.task[split].batches(32):
        p = problem.model.logits(batch.clean).softmax(-1)
        for row, answers in zip(p, batch.answers, strict=True):
            right = row[list(answers)].sum()
            entropy = -(row * row.clamp(min=1e-30).log()).sum()
            rows.append([float(right), float(row.argmax() in answers), float(entropy)])
    mean = torch.tensor(rows).mean(0).tolist()
    return f"| {name} | {mean[0]:.2f} | {mean[1]:.2f} | {mean[2]:.2f} |"


if __name__ == "__main__":
    main()
