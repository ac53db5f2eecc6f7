"""Eight rewriting tasks over English sentences, made by rules from real words.

A sentence says who does what to what and where. Each task asks for one change: another
tense, the passive, a question. Knows nothing of models.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"

ADJECTIVES = ("young", "old", "tall", "busy", "happy", "clever", "quiet", "careful", "hungry")
PLACES = (
    "in the kitchen",
    "in the garden",
    "in the village",
    "in the street",
    "near the river",
    "near the station",
    "near the bridge",
    "at the market",
    "at the school",
    "at the harbour",
    "behind the church",
    "behind the shop",
)


@dataclass(frozen=True, slots=True)
class Verb:
    """A transitive verb and what it may be done to."""

    stem: str
    """As in `to write`."""
    past: str
    """As in `wrote`."""
    participle: str
    """As in `has written`."""
    objects: tuple[str, ...]
    """Nouns that make sense after it."""

    @property
    def third_person(self) -> str:
        """As in `writes`."""
        if self.stem.endswith(("s", "x", "sh", "ch", "z")):
            return f"{self.stem}es"
        if self.stem.endswith("y") and self.stem[-2] not in "aeiou":
            return f"{self.stem[:-1]}ies"
        return f"{self.stem}s"


Action = tuple[Verb, str]
"""A verb and its object."""


@dataclass(frozen=True, slots=True)
class Person:
    """A noun for a person."""

    singular: str
    """As in `a thief`."""
    plural: str
    """As in `two thieves`."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """The parts of one statement in the present tense."""

    person: Person
    adjective: str
    verb: Verb
    thing: str
    place: str

    @property
    def subject(self) -> str:
        """Such as `the young baker`."""
        return f"the {self.adjective} {self.person.singular}"

    @property
    def object(self) -> str:
        """Such as `the cake`."""
        return f"the {self.thing}"

    def __str__(self) -> str:
        """Return the statement, with no full stop."""
        return f"{self.subject} {self.verb.third_person} {self.object} {self.place}"


def _past(s: Sentence) -> str:
    return f"{s.subject} {s.verb.past} {s.object} {s.place}"


def _perfect(s: Sentence) -> str:
    return f"{s.subject} has {s.verb.participle} {s.object} {s.place}"


def _passive(s: Sentence) -> str:
    return f"{s.object} is {s.verb.participle} by {s.subject} {s.place}"


def _negative(s: Sentence) -> str:
    return f"{s.subject} does not {s.verb.stem} {s.object} {s.place}"


def _question(s: Sentence) -> str:
    return f"does {s.subject} {s.verb.stem} {s.object} {s.place} ?"


def _future(s: Sentence) -> str:
    return f"{s.subject} will {s.verb.stem} {s.object} {s.place}"


def _plural(s: Sentence) -> str:
    return f"the {s.adjective} {s.person.plural} {s.verb.stem} {s.object} {s.place}"


def _where(s: Sentence) -> str:
    return s.place


TASKS: dict[str, Callable[[Sentence], str]] = {
    "past": _past,
    "perfect": _perfect,
    "passive": _passive,
    "negative": _negative,
    "question": _question,
    "future": _future,
    "plural": _plural,
    "where": _where,
}
"""What each task makes of a sentence, by the word that asks for it."""


def make_example(task: str, sentence: Sentence) -> dict[str, str]:
    """Return the sentence as an example of `task`, in the form that `shardmix score` reads."""
    return {"input": f"{task} : {sentence} =", "output": TASKS[task](sentence)}


def read_verbs() -> list[Verb]:
    """Read the verbs and what may be done by them."""
    return [
        Verb(row["verb"], row["past"], row["participle"], tuple(row["objects"].split(",")))
        for row in _read_table(DATA / "verbs.tsv")
    ]


def read_people() -> list[Person]:
    """Read who the sentences are about."""
    return [Person(row["person"], row["plural"]) for row in _read_table(DATA / "people.tsv")]


@dataclass(frozen=True, slots=True)
class Actions:
    """What may be done to what, for the base, for fine-tuning and for tests."""

    known: list[Action]
    """What the base is trained on: half of the verbs."""
    train: list[Action]
    """What fine-tuning sees: every verb, with some of its objects."""
    held_out: list[Action]
    """What tests are made of: every verb, with an object that no training has shown after it."""


def split_actions(verbs: list[Verb], seed: int) -> Actions:
    """Keep one object of each verb for tests, and half of the verbs from the base."""
    draw = random.Random(seed)
    known = {verb.stem for verb in draw.sample(verbs, k=len(verbs) // 2)}
    train: list[Action] = []
    held_out: list[Action] = []
    for verb in verbs:
        kept = draw.choice(verb.objects)
        train += [(verb, thing) for thing in verb.objects if thing != kept]
        held_out.append((verb, kept))
    return Actions([action for action in train if action[0].stem in known], train, held_out)


def make_sentences(
    people: list[Person], actions: list[Action], num_sentences: int, seed: str
) -> list[Sentence]:
    """Make that many different sentences; each draws its parts at random."""
    draw = random.Random(seed)
    # A dict keeps order, which a set of strings does not from one process to the next.
    sentences: dict[Sentence, None] = {}
    while len(sentences) < num_sentences:
        verb, thing = draw.choice(actions)
        sentence = Sentence(
            person=draw.choice(people),
            adjective=draw.choice(ADJECTIVES),
            verb=verb,
            thing=thing,
            place=draw.choice(PLACES),
        )
        sentences[sentence] = None
    return list(sentences)


def _read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))
