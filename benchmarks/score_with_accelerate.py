"""Scores decoders with transformers and accelerate's disk offload, batch by batch.

    python benchmarks/score_with_accelerate.py A B --data FILE ...

What one writes when a model doesn't fit into memory: each batch, padded to its longest example,
is one forward pass, which reads from disk all that `max_memory` has no room for. Losses and
weights are LM-Cocktail's. Prints one JSON object.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from scoring_task import ScoringTask, read_command_line

MAX_MEMORY = {"cpu": "500MB"}


class CountedReads:
    """The bytes that accelerate fetches from disk, from when this is made."""

    def __init__(self) -> None:
        from accelerate.utils import OffloadedWeightsLoader

        self.nbytes = 0
        fetch = OffloadedWeightsLoader.__getitem__

        def counted(loader: Any, key: str) -> Any:
            tensor = fetch(loader, key)
            if key not in loader.state_dict:
                self.nbytes += tensor.nbytes
            return tensor

        OffloadedWeightsLoader.__getitem__ = counted


def batches(
    examples: list[dict[str, str]], tokenizer: Any, task: ScoringTask
) -> Iterator[dict[str, Any]]:
    """Arguments of each forward pass: LM-Cocktail's tokens and labels, without its padding."""
    import torch

    def tokens_and_labels(example: dict[str, str]) -> tuple[list[int], list[int]]:
        prompt = tokenizer.encode(example["input"])
        tokens = tokenizer.encode(f"{example['input']} {example['output']}")
        tokens.append(tokenizer.eos_token_id)
        labels = [-100] * len(prompt) + tokens[len(prompt) :]
        return tokens[: task.max_input_length], labels[: task.max_input_length]

    def padded(rows: list[list[int]], value: int) -> Any:
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

    for start in range(0, len(examples), task.batch_size):
        pairs = [tokens_and_labels(example) for example in examples[start:][: task.batch_size]]
        tokens, labels = map(list, zip(*pairs, strict=True))
        yield {
            "input_ids": padded(tokens, tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in tokens], 0),
            "labels": padded(labels, -100),
        }


def loss_of(folder: str, task: ScoringTask, examples: list[dict[str, str]]) -> float:
    """Mean of the batches' losses."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as offload_folder, torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(
            folder, device_map="auto", max_memory=MAX_MEMORY, offload_folder=offload_folder
        )
        losses = [
            model(**batch, use_cache=False).loss.item()
            for batch in batches(examples, tokenizer, task)
        ]
    return sum(losses) / len(losses)


def main() -> None:
    """Score one model after the other, and print the weights and what they took."""
    models, task, examples = read_command_line(__doc__.splitlines()[0])
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    reads = CountedReads()
    start = time.perf_counter()
    losses = [loss_of(model, task, examples) for model in models]
    seconds = time.perf_counter() - start
    weights = torch.softmax(-torch.tensor(losses) / task.temperature, 0).tolist()
    report = {
        "weights": weights,
        "losses": losses,
        "seconds": round(seconds, 4),
        "bytes_read": reads.nbytes,
    }
    json.dump(report, sys.stdout)
    print()


if __name__ == "__main__":
    main()
