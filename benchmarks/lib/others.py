"""Merges and scorings by other programs: each runs in an environment that has it.

Prints one JSON object; `seconds` leaves the imports out. Merges have equal weights.
"""

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

Report = dict[str, Any]


def naive(args: argparse.Namespace) -> Report:
    """Merge as one does by hand: load a shard of every model, add in float32, round, save.

    Needs checkpoints of one layout; rounds to the first one's dtypes.
    """
    from safetensors.torch import load_file, save_file

    start = time.perf_counter()
    args.output.mkdir(parents=True)
    first_model = Path(args.models[0])
    for path in sorted(first_model.glob("*.safetensors")):
        loaded = [load_file(f"{model}/{path.name}") for model in args.models]
        merged = {}
        for name, first in loaded[0].items():
            total = first.float() / len(loaded)
            for tensors in loaded[1:]:
                total += tensors[name].float() / len(loaded)
            merged[name] = total.to(first.dtype)
        save_file(merged, args.output / path.name, metadata={"format": "pt"})
        del loaded, first, tensors, merged, total
    for path in first_model.glob("*.json"):
        shutil.copy(path, args.output)
    return {"seconds": time.perf_counter() - start}


def mix_models(args: argparse.Namespace, function: str = "mix_models") -> Report:
    """Merge by one of LM-Cocktail's own functions, for decoders.

    The model is saved here, as the functions do it, since they want a tokenizer to save with it.
    """
    import LM_Cocktail

    start = time.perf_counter()
    weights = [1 / len(args.models)] * len(args.models)
    mix = getattr(LM_Cocktail, function)
    mix(args.models, model_type="decoder", weights=weights).save_pretrained(str(args.output))
    return {"seconds": time.perf_counter() - start}


def sd_mecha(args: argparse.Namespace) -> Report:
    """Merge two single files by sd-mecha: sums in float32, as by default, to bfloat16."""
    import sd_mecha
    import torch

    start = time.perf_counter()
    args.output.mkdir(parents=True)
    # Absolute paths: it looks for others in its own folders of models.
    folders = map(Path, (*args.models, args.output))
    files = [(folder / "model.safetensors").resolve() for folder in folders]
    first, second = map(sd_mecha.model, files[:2])
    mixed = sd_mecha.weighted_sum(first, second, alpha=0.5)
    sd_mecha.merge(mixed, output=files[2], output_dtype=torch.bfloat16)
    return {"seconds": time.perf_counter() - start}


def lm_cocktail(args: argparse.Namespace) -> Report:
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
        example_data=json.loads(args.data.read_text()),
        temperature=args.temperature,
        batch_size=args.batch_size,
        max_input_length=args.max_input_length,
    )
    seconds = {"loading_seconds": loaded - start, "seconds": time.perf_counter() - loaded}
    return {"weights": weights, "losses": losses, **seconds}


def accelerate(args: argparse.Namespace) -> Report:
    """Score as one does when a model doesn't fit into memory: accelerate's disk offload.

    Each batch, padded to its longest example, is one forward pass, which reads from disk all that
    500 MB have no room for. Losses and weights are LM-Cocktail's.
    """
    import torch
    import transformers
    from accelerate.utils import OffloadedWeightsLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.lib.batches import batch_of

    transformers.utils.logging.disable_progress_bar()
    examples = json.loads(args.data.read_text())
    fetch = OffloadedWeightsLoader.__getitem__
    nbytes_read: list[int] = []

    def counted(loader: Any, key: str) -> Any:
        tensor = fetch(loader, key)
        nbytes_read.append(0 if key in loader.state_dict else tensor.nbytes)
        return tensor

    def loss_of(folder: str) -> float:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with tempfile.TemporaryDirectory() as offload, torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                device_map="auto",
                max_memory={"cpu": "500MB"},
                offload_folder=offload,
            )
            of_batches = []
            for start in range(0, len(examples), args.batch_size):
                some = examples[start : start + args.batch_size]
                batch = batch_of(some, tokenizer, args.max_input_length)
                of_batches.append(model(**batch, use_cache=False).loss.item())
        return sum(of_batches) / len(of_batches)

    start = time.perf_counter()
    with mock.patch.object(OffloadedWeightsLoader, "__getitem__", counted):
        losses = [loss_of(folder) for folder in args.models]
    seconds = time.perf_counter() - start
    weights = torch.softmax(-torch.tensor(losses) / args.temperature, 0).tolist()
    bytes_read = sum(nbytes_read)
    return {"weights": weights, "losses": losses, "seconds": seconds, "bytes_read": bytes_read}


PROGRAMS = {
    "naive": naive,
    "mix_models": mix_models,
    "mix_models_by_layers": lambda args: mix_models(args, "mix_models_by_layers"),
    "sd-mecha": sd_mecha,
    "lm-cocktail": lm_cocktail,
    "accelerate": accelerate,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("models", nargs="+", help="checkpoint folders")
    parser.add_argument("-o", "--output", type=Path, help="of a merge: folder to create")
    parser.add_argument("--data", type=Path, help="of a scoring, as all below: a list of examples")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--max-input-length", type=int)
    args = parser.parse_args()
    # Standard output is for the report; some print what they load.
    with contextlib.redirect_stdout(sys.stderr):
        report = PROGRAMS[args.program](args)
    print(json.dumps(report))
