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
from pathlib import Path
from typing import Any
from unittest import mock

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
    utils.llm_loss = lambda **arguments: losses.append(whole_loss(**arguments)) or losses[-1]
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
    from accelerate.utils import OffloadedWeightsLoader
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    fetch = OffloadedWeightsLoader.__getitem__
    nbytes_read: list[int] = []

    def counted(loader: Any, key: str) -> Any:
        tensor = fetch(loader, key)
        nbytes_read.append(0 if key in loader.state_dict else tensor.nbytes)
        return tensor

    def encoded(example: dict[str, str], tokenizer: Any) -> tuple[Any, Any]:
        """LM-Cocktail's tokens and labels."""
        prompt = tokenizer.encode(example["input"])
        tokens = tokenizer.encode(f"{example['input']} {example['output']}")
        tokens.append(tokenizer.eos_token_id)
        labels = [-100] * len(prompt) + tokens[len(prompt) :]
        longest = args.max_input_length
        return torch.tensor(tokens[:longest]), torch.tensor(labels[:longest])

    def loss_of(folder: str) -> float:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        pairs = [encoded(example, tokenizer) for example in examples]
        with tempfile.TemporaryDirectory() as offload_folder, torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(
                folder, device_map="auto", max_memory=MAX_MEMORY, offload_folder=offload_folder
            )
            of_batches = []
            for start in range(0, len(pairs), args.batch_size):
                tokens, labels = zip(*pairs[start : start + args.batch_size], strict=True)
                batch = {
                    "input_ids": pad_sequence(tokens, True, tokenizer.pad_token_id),
                    "attention_mask": pad_sequence([torch.ones_like(row) for row in tokens], True),
                    "labels": pad_sequence(labels, True, -100),
                }
                of_batches.append(model(**batch, use_cache=False).loss.item())
        return sum(of_batches) / len(of_batches)

    start = time.perf_counter()
    with mock.patch.object(OffloadedWeightsLoader, "__getitem__", counted):
        losses = [loss_of(folder) for folder in args.models]
    seconds = time.perf_counter() - start
    weights = torch.softmax(-torch.tensor(losses) / args.temperature, 0).tolist()
    bytes_read = sum(nbytes_read)
    return {"weights": weights, "losses": losses, "seconds": seconds, "bytes_read": bytes_read}


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
