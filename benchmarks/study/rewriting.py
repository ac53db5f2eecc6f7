"""The family of decoders: a base that knows half of the verbs, and fine-tunes on one task each.

The base is trained on all eight tasks of `study_sentences`, as a chat model has met many tasks,
but with half of the verbs. Each fine-tune sees all verbs, in one task. Knows nothing of merging.
"""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks.study.decoder import (
    DecoderTraining,
    Example,
    exact_match,
    load_decoder,
    new_decoder,
    save_decoder,
    train_decoder,
    train_tokenizer,
)
from benchmarks.study.mixing import NUM_EXAMPLES, Family
from benchmarks.study.sentences import (
    TASKS,
    Action,
    Actions,
    Person,
    make_example,
    make_sentences,
    read_people,
    read_verbs,
    split_actions,
)

NUM_BASE = 20_000
NUM_TUNING = 4_000
NUM_TESTS = 200
"""Examples: of all tasks together, of one task, of a test."""
BASE_RATE = 1e-3
TUNING_RATE = 5e-4


def prepare_decoders(work_dir: Path, seed: int) -> Family:
    """Train the base, then a fine-tune a task, and return the family."""
    people = read_people()
    actions = split_actions(read_verbs(), seed)
    folders = {"base": work_dir / "base"}
    _train_base(folders["base"], people, actions, seed)
    tests: dict[str, list[Example]] = {}
    for task in TASKS:
        examples = _make(task, people, actions.train, NUM_TUNING, f"{seed} tuning {task}")
        folders[task] = work_dir / task
        model, tokenizer = load_decoder(folders["base"])
        seconds = train_decoder(model, tokenizer, examples, DecoderTraining(TUNING_RATE, seed=seed))
        save_decoder(model, tokenizer, folders[task])
        print(f"decoder {task}: fine-tuned on {NUM_TUNING} examples in {seconds:.0f} s", flush=True)
        tests[task] = _make(task, people, actions.held_out, NUM_TESTS, f"{seed} test {task}")

    def draw_examples(task: str, draw: int) -> list[Example]:
        return _make(task, people, actions.train, NUM_EXAMPLES, f"{seed} draw {task} {draw}")

    def measure(folder: Path, test: str) -> float:
        return exact_match(folder, tests[test])

    return Family(
        name="decoder",
        model_type="decoder",
        pooling="cls",
        folders=folders,
        development_tasks=("perfect", "future", "where"),
        other_tests=(),
        draw_examples=draw_examples,
        mix_folder=work_dir / "mix",
        measure=measure,
    )


def _train_base(folder: Path, people: list[Person], actions: Actions, seed: int) -> None:
    draw = random.Random(seed)
    tasks = list(TASKS)
    sentences = make_sentences(people, actions.known, NUM_BASE, f"{seed} base")
    examples = [make_example(draw.choice(tasks), sentence) for sentence in sentences]
    # The pieces of words are those of all verbs; what to do with them is left to learn.
    sentences = make_sentences(people, actions.train, NUM_TUNING, f"{seed} tokenizer")
    tokenizer = train_tokenizer([make_example(draw.choice(tasks), each) for each in sentences])
    model = new_decoder(tokenizer, seed)
    seconds = train_decoder(model, tokenizer, examples, DecoderTraining(BASE_RATE, seed=seed))
    save_decoder(model, tokenizer, folder)
    print(
        f"decoder base: {model.num_parameters() / 1e6:.1f} M parameters, trained on {NUM_BASE} "
        f"examples in {seconds:.0f} s",
        flush=True,
    )


def _make(
    task: str, people: list[Person], actions: list[Action], num_examples: int, seed: str
) -> list[Example]:
    sentences = make_sentences(people, actions, num_examples, seed)
    return [make_example(task, sentence) for sentence in sentences]
