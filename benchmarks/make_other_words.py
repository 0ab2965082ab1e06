"""Writes data/ioi_other_words.jsonl: IOI prompts of other templates, names, places and objects than the built-in task has.

The file was written once, before any result was measured on it, and is for one use: does a circuit hold on words and phrasings that
neither its training, validation nor test data had? Run from the repository's root; the same file comes out each time.
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
PLACES = "barn workshop gallery chapel arena palace temple terminal warehouse courtyard campus tavern pier inn".split()
OBJECTS = "violin medal wallet jacket ladder trophy notebook puzzle mirror pillow poster rose shell stamp".split()


def main() -> None:
    rng = random.Random("ioi/other words")
    rows: dict[str, dict[str, object]] = {}
    while len(rows) < 200:
        template, (subject, other, *strangers) = rng.choice(TEMPLATES), rng.sample(NAMES, 5)
        a, b = rng.choice([(subject, other), (other, subject)])
        setting = {"place": rng.choice(PLACES), "object": rng.choice(OBJECTS)}
        clean = template.format(a=a, b=b, s=subject, **setting)
        corrupted = template.format(a=strangers[0], b=strangers[1], s=strangers[2], **setting)
        rows[clean] = {"clean": clean, "corrupted": corrupted, "answers": [f" {other}"], "distractors": [f" {subject}"], "split": "test"}
    path = Path(__file__).parent / "data" / "ioi_other_words.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), "utf-8")
    print(f"{len(rows)} examples in {path}")


if __name__ == "__main__":
    main()
