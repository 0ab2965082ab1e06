"""Writes IOI prompts of other templates, places and objects than the built-in task has: data/ioi_other_words.jsonl, ioi_unseen_names.jsonl.

For one question: does a circuit hold on words and phrasings that neither its training, validation nor test data had? Each file was written before any
result was measured on it. The first is the older. Its names are in no split as it is drawn first, but 46 of its 60 came into the task later, among
the further names of training prompts that are drawn anew; the second has only names that were never in the task. Run from the repository's root; the
same files come out each time.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

TEMPLATES = (
    "It was late when {a} and {b} reached the {place}, so {s} lent a {object} to",
    "Once upon a time, {a} and {b} lived near a {place}. One day {s} gave a {object} to",
    "The meeting of {a} and {b} at the {place} had just ended. Quietly, {s} handed a {object} to",
    "In the {place}, {a} and {b} were chatting for hours. After that, {s} sold a {object} to",
    "Everybody at the {place} saw {a} and {b} laughing before {s} passed a {object} to",
)
NAMES = """
    Alex Alison Allen Calvin Cameron Casey Charlie Clark Clinton Cooper Dana Elliott Ellis Emerson Finn Franklin Griffin Harper
    Harrison Harvey Hudson Jackie Jackson Jamie Jon Kay Kent Kirk Kurt Lincoln Lorenzo Luther Lynn Marc Marcus Marshall Morgan
    Morris Murray Parker Perry Preston Quinn Ray Riley Rob Robin Ruby Russ Shannon Shelley Spencer Stewart Taylor Tommy Tony
    Tucker Walker Wallace Wilson
""".split()
UNSEEN = """
    Alison Ari Brock Clinton Dalton Elias Eliza Elliott Griffin Harvey Jan Jen Jo Kay Kerry Lou Luther Lynn Mackenzie Mae Marc Pam Raphael
    Ray Reid Rob Rod Ruby Sammy Shannon Shelley Sid Whitney
""".split()
PLACES = "barn workshop gallery chapel arena palace temple terminal warehouse courtyard campus tavern pier inn".split()
OBJECTS = "violin medal wallet jacket ladder trophy notebook puzzle mirror pillow poster rose shell stamp".split()


def main() -> None:
    for name, names, seed in (("ioi_other_words", NAMES, "ioi/other words"), ("ioi_unseen_names", UNSEEN, "ioi/unseen names")):
        path = Path(__file__).parent / "data" / f"{name}.jsonl"
        rows = examples(names, seed)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        print(f"{len(rows)} examples in {path}")


def examples(names: list[str], seed: str) -> list[dict[str, object]]:
    rng = random.Random(seed)
    rows: dict[str, dict[str, object]] = {}
    while len(rows) < 200:
        template, (subject, other, *strangers) = rng.choice(TEMPLATES), rng.sample(names, 5)
        a, b = rng.choice([(subject, other), (other, subject)])
        setting = {"place": rng.choice(PLACES), "object": rng.choice(OBJECTS)}
        clean = template.format(a=a, b=b, s=subject, **setting)
        corrupted = template.format(a=strangers[0], b=strangers[1], s=strangers[2], **setting)
        rows[clean] = {"clean": clean, "corrupted": corrupted, "answers": [f" {other}"], "distractors": [f" {subject}"], "split": "test"}
    return list(rows.values())


if __name__ == "__main__":
    main()
