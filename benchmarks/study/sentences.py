"""Eight rewriting tasks over English sentences, made by rules from real words.

A sentence says who does what to what and where. Each task asks for one change: another
tense, the passive, a question. Knows nothing of models. The words are in `data/`.
"""

import csv
import json
import random
from pathlib import Path
from typing import NamedTuple

Words = dict[str, str]
"""The parts of a sentence, by their names in the tasks."""
Action = tuple[Words, str]
"""A verb's forms, and its object."""

DATA = Path(__file__).parent / "data"
RULES = json.loads((DATA / "sentences.json").read_text())
TASKS: dict[str, str] = RULES["tasks"]
"""What each task makes of a sentence, by the word that asks for it."""


class Actions(NamedTuple):
    """What may be done to what, for the base, for fine-tuning and for tests."""

    known: list[Action]
    """What the base is trained on: half of the verbs."""
    train: list[Action]
    """What fine-tuning sees: every verb, with some of its objects."""
    held_out: list[Action]
    """What tests are made of: every verb, with an object that no training has shown after it."""


def make_actions(seed: int) -> Actions:
    """Keep one object of each verb for tests, and half of the verbs from the base."""
    verbs = _read_table("verbs")
    draw = random.Random(seed)
    known = [verb["verb"] for verb in draw.sample(verbs, k=len(verbs) // 2)]
    train: list[Action] = []
    held_out: list[Action] = []
    for verb in verbs:
        verb["verbs"] = third_person(verb["verb"])
        things = verb.pop("objects").split(",")
        kept = draw.choice(things)
        train += [(verb, thing) for thing in things if thing != kept]
        held_out.append((verb, kept))
    return Actions([action for action in train if action[0]["verb"] in known], train, held_out)


def third_person(stem: str) -> str:
    """Return such as `writes`."""
    if stem.endswith(("s", "x", "sh", "ch", "z")):
        return f"{stem}es"
    if stem.endswith("y") and stem[-2] not in "aeiou":
        return f"{stem[:-1]}ies"
    return f"{stem}s"


def make_sentences(actions: list[Action], num_sentences: int, seed: str) -> list[Words]:
    """Make that many different sentences; each draws its parts at random."""
    people = _read_table("people")
    draw = random.Random(seed)
    sentences: dict[str, Words] = {}
    while len(sentences) < num_sentences:
        verb, thing = draw.choice(actions)
        words = verb | {"thing": thing} | draw.choice(people)
        words["adjective"] = draw.choice(RULES["adjectives"])
        words["place"] = draw.choice(RULES["places"])
        sentences[RULES["statement"].format_map(words)] = words
    return list(sentences.values())


def make_example(task: str, words: Words) -> dict[str, str]:
    """Return the sentence as an example of `task`, in the form that `shardmix score` reads."""
    statement = RULES["statement"].format_map(words)
    return {"input": f"{task} : {statement} =", "output": TASKS[task].format_map(words)}


def _read_table(name: str) -> list[Words]:
    with (DATA / f"{name}.tsv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))
