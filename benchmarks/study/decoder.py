"""The family of decoders: a base that knows half of the verbs, and fine-tunes on one task each.

All are Llamas of three million parameters, made from nothing, as is their tokenizer. The base is
trained on all eight tasks of `sentences`, as a chat model has met many tasks, but with half of the
verbs. Each fine-tune sees all verbs, in one task. Knows nothing of merging.
"""

import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from benchmarks.lib.batches import IGNORED, Example, batch_of
from benchmarks.study.mixing import NUM_EXAMPLES, Family
from benchmarks.study.sentences import TASKS, Action, make_actions, make_example, make_sentences

NUM_BASE = 20_000
NUM_TUNING = 4_000
NUM_TESTS = 200
"""Examples: of all tasks together, of one task, of a test."""
BASE_RATE = 1e-3
TUNING_RATE = 5e-4
"""Peak rates; reached after a twentieth of the steps, then falling linearly to nearly zero."""
BATCH_SIZE = 32
TEST_BATCH_SIZE = 100
SPECIAL = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
Decoder = tuple[LlamaForCausalLM, PreTrainedTokenizerBase]


def prepare_decoders(work_dir: Path, seed: int) -> Family:
    """Train the base, then a fine-tune a task, and return the family."""
    actions = make_actions(seed)
    folders = {name: work_dir / name for name in ("base", *TASKS)}

    def examples_of(task: str, whose: list[Action], count: int, what: str) -> list[Example]:
        """Make examples of one task, or each of any."""
        sentences = make_sentences(whose, count, f"{seed} {what}")
        return [make_example(task or draw.choice(list(TASKS)), each) for each in sentences]

    draw = random.Random(seed)
    examples = examples_of("", actions.known, NUM_BASE, "base")
    # The pieces of words are those of all verbs; what to do with them is left to learn.
    base = new_decoder(examples_of("", actions.train, NUM_TUNING, "tokenizer"), seed)
    train_decoder(base, examples, BASE_RATE, seed, folders["base"])
    tests: dict[str, list[Example]] = {}
    for task in TASKS:
        examples = examples_of(task, actions.train, NUM_TUNING, f"tuning {task}")
        train_decoder(load_decoder(folders["base"]), examples, TUNING_RATE, seed, folders[task])
        tests[task] = examples_of(task, actions.held_out, NUM_TESTS, f"test {task}")

    def draw_examples(task: str, number: int) -> list[Example]:
        return examples_of(task, actions.train, NUM_EXAMPLES, f"draw {task} {number}")

    return Family(
        name="decoder",
        pooling="cls",
        folders=folders,
        development_tasks=("perfect", "future", "where"),
        other_tests=(),
        draw_examples=draw_examples,
        mix_folder=work_dir / "mix",
        measure=lambda folder, test: exact_match(folder, tests[test]),
    )


def new_decoder(examples: list[Example], seed: int) -> Decoder:
    """Return random weights, and a tokenizer whose pieces are whole words or parts of one."""
    tokens = Tokenizer(models.BPE(unk_token=SPECIAL["unk"]))
    # The space goes with the word that follows it, so that pieces join without a rule.
    tokens.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=list(SPECIAL.values()))
    texts = (f"{example['input']} {example['output']}" for example in examples)
    tokens.train_from_iterator(texts, trainer)
    names = {f"{name}_token": token for name, token in SPECIAL.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, **names)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
    del ids["unk_token_id"]
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **CONFIG, **ids)), tokenizer


def load_decoder(folder: Path) -> Decoder:
    """Load a model folder."""
    model = LlamaForCausalLM.from_pretrained(folder)
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


def train_decoder(
    decoder: Decoder, examples: list[Example], rate: float, seed: int, folder: Path
) -> None:
    """Train by one pass over the examples, and save.

    Only tokens of the output, and its end, count in the loss.
    """
    model, tokenizer = decoder
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=rate,
        total_steps=-(-len(examples) // BATCH_SIZE),
        pct_start=0.05,
        anneal_strategy="linear",
        # AdamW keeps its own momentum; only the rate is to change.
        cycle_momentum=False,
    )
    shuffled = random.Random(seed).sample(examples, k=len(examples))
    started = time.perf_counter()
    model.train()
    for start in range(0, len(shuffled), BATCH_SIZE):
        loss = model(**batch_of(shuffled[start : start + BATCH_SIZE], tokenizer)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    seconds = time.perf_counter() - started
    told = f"{model.num_parameters() / 1e6:.1f} M parameters, {len(examples)} examples"
    print(f"decoder {folder.name}: trained, {told}, {seconds:.0f} s", flush=True)
    for part in decoder:
        part.save_pretrained(folder)


@torch.no_grad()
def exact_match(folder: Path, examples: list[Example]) -> float:
    """Return the percentage of examples whose whole output greedy decoding would give.

    Greedy decoding gives the output exactly if every token of it, and its end, is the most
    probable after the ones before it; one pass with the right tokens given shows that.
    """
    model, tokenizer = load_decoder(folder)
    num_right = 0
    for start in range(0, len(examples), TEST_BATCH_SIZE):
        batch = batch_of(examples[start : start + TEST_BATCH_SIZE], tokenizer)
        labels = batch.pop("labels")[:, 1:]
        right = (model(**batch).logits[:, :-1].argmax(dim=-1) == labels) | (labels == IGNORED)
        num_right += int(right.all(dim=1).sum())
    return 100 * num_right / len(examples)
