"""Merges by other programs: each runs in an environment that has it.

    python -m benchmarks.compare.others naive A B C -o OUT

Equal weights. Prints one JSON object; `seconds` leaves the imports out.
"""

import argparse
import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

Merge = Callable[[list[Path], Path], None]


def naive() -> Merge:
    """Return what one writes by hand: load a shard of every model, add in float32, round, save.

    Needs checkpoints of one layout; rounds to the first one's dtypes.
    """
    from safetensors.torch import load_file, save_file

    def merge_shard(sources: list[Path], target: Path) -> None:
        loaded = [load_file(path) for path in sources]
        merged = {}
        for name, first in loaded[0].items():
            total = first.float() / len(loaded)
            for tensors in loaded[1:]:
                total += tensors[name].float() / len(loaded)
            merged[name] = total.to(first.dtype)
        save_file(merged, target, metadata={"format": "pt"})

    def merge(models: list[Path], output: Path) -> None:
        output.mkdir(parents=True)
        for path in sorted(models[0].glob("*.safetensors")):
            merge_shard([model / path.name for model in models], output / path.name)
        for path in models[0].glob("*.json"):
            shutil.copy(path, output)

    return merge


def lm_cocktail(function: str) -> Merge:
    """Return one of LM-Cocktail's own functions, for decoders.

    The model is saved here, as the functions do it, since they want a tokenizer to save with it.
    """
    import LM_Cocktail

    def merge(models: list[Path], output: Path) -> None:
        weights = [1 / len(models)] * len(models)
        mix = getattr(LM_Cocktail, function)
        mixed = mix([str(model) for model in models], model_type="decoder", weights=weights)
        mixed.save_pretrained(str(output))

    return merge


def sd_mecha() -> Merge:
    """Return sd-mecha's merge of two single files: sums in float32, as by default, to bfloat16."""
    import sd_mecha
    import torch

    def merge(models: list[Path], output: Path) -> None:
        output.mkdir(parents=True)
        # Absolute paths: it looks for others in its own folders of models.
        files = [(folder / "model.safetensors").resolve() for folder in (*models, output)]
        first, second = map(sd_mecha.model, files[:2])
        mixed = sd_mecha.weighted_sum(first, second, alpha=0.5)
        sd_mecha.merge(mixed, output=files[2], output_dtype=torch.bfloat16)

    return merge


PROGRAMS: dict[str, Callable[[], Merge]] = {
    "naive": naive,
    "mix_models": lambda: lm_cocktail("mix_models"),
    "mix_models_by_layers": lambda: lm_cocktail("mix_models_by_layers"),
    "sd-mecha": sd_mecha,
}


def main() -> None:
    """Merge and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("models", type=Path, nargs="+", help="checkpoint folders")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to create")
    args = parser.parse_args()
    # Standard output is for the report; some print what they load.
    with contextlib.redirect_stdout(sys.stderr):
        merge = PROGRAMS[args.program]()
        start = time.perf_counter()
        merge(args.models, args.output)
    print(json.dumps({"seconds": round(time.perf_counter() - start, 4)}))


if __name__ == "__main__":
    main()
