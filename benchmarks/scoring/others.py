"""Scores decoders with other programs: each runs in an environment that has it.

    python -m benchmarks.scoring.others lm-cocktail A B C --data FILE ...

Prints one JSON object: weights, losses, and `seconds` of scoring, which leave the imports out.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.scoring.task import read_examples

MAX_MEMORY = {"cpu": "500MB"}
Examples = list[dict[str, str]]


def lm_cocktail(args: argparse.Namespace, examples: Examples) -> dict[str, Any]:
    """Score as LM-Cocktail's `mix_models_with_data` does, with its own functions, in its order."""
    from LM_Cocktail import utils
    from transformers import AutoTokenizer

    # `compute_weights` returns no losses, so the function that it calls writes them down.
    losses: list[float] = []
    whole_loss = utils.llm_loss

    def noted_loss(**arguments: object) -> float:
        losses.append(whole_loss(**arguments))
        return losses[-1]

    utils.llm_loss = noted_loss
    start = time.perf_counter()
    base_model = utils.load_model(args.models[0], model_type="decoder")
    tokenizer = AutoTokenizer.from_pretrained(args.models[0])
    param_list = utils.get_model_param_list(args.models, model_type="decoder")
    loaded = time.perf_counter()
    weights = utils.compute_weights(
        base_model,
        tokenizer=tokenizer,
        param_list=param_list,
        model_type="decoder",
        example_data=examples,
        temperature=args.temperature,
        batch_size=args.batch_size,
        max_input_length=args.max_input_length,
    )
    seconds = {"loading_seconds": loaded - start, "seconds": time.perf_counter() - loaded}
    return {"weights": weights, "losses": losses, **seconds}


def accelerate(args: argparse.Namespace, examples: Examples) -> dict[str, Any]:
    """Score as one writes it when a model doesn't fit into memory: accelerate's disk offload.

    Each batch, padded to its longest example, is one forward pass, which reads from disk all that
    `MAX_MEMORY` has no room for. Losses and weights are LM-Cocktail's.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    reads = CountedReads()
    start = time.perf_counter()
    losses = []
    for folder in args.models:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with tempfile.TemporaryDirectory() as offload_folder, torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(
                folder, device_map="auto", max_memory=MAX_MEMORY, offload_folder=offload_folder
            )
            of_batches = [
                model(**batch, use_cache=False).loss.item()
                for batch in batches(examples, tokenizer, args)
            ]
        losses.append(sum(of_batches) / len(of_batches))
    seconds = time.perf_counter() - start
    weights = torch.softmax(-torch.tensor(losses) / args.temperature, 0).tolist()
    return {"weights": weights, "losses": losses, "seconds": seconds, "bytes_read": reads.nbytes}


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
    examples: Examples, tokenizer: Any, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield each forward pass's arguments: LM-Cocktail's tokens and labels, not its padding."""
    import torch

    def tokens_and_labels(example: dict[str, str]) -> tuple[list[int], list[int]]:
        prompt = tokenizer.encode(example["input"])
        tokens = tokenizer.encode(f"{example['input']} {example['output']}")
        tokens.append(tokenizer.eos_token_id)
        labels = [-100] * len(prompt) + tokens[len(prompt) :]
        return tokens[: args.max_input_length], labels[: args.max_input_length]

    def padded(rows: list[list[int]], value: int) -> Any:
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

    for start in range(0, len(examples), args.batch_size):
        pairs = [tokens_and_labels(example) for example in examples[start:][: args.batch_size]]
        tokens, labels = map(list, zip(*pairs, strict=True))
        yield {
            "input_ids": padded(tokens, tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in tokens], 0),
            "labels": padded(labels, -100),
        }


PROGRAMS = {"lm-cocktail": lm_cocktail, "accelerate": accelerate}


def main() -> None:
    """Score, and print the weights and what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("models", nargs="+", help="checkpoint folders")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--temperature", type=float, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--max-input-length", type=int, required=True)
    args = parser.parse_args()
    # Standard output is for the report; some print what they load.
    with contextlib.redirect_stdout(sys.stderr):
        report = PROGRAMS[args.program](args, read_examples(args.data))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
