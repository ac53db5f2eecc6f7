"""Merges decoders with LM-Cocktail's own functions. Runs in an environment that has it.

    python benchmarks/merge_with_lm_cocktail.py mix_models A B C -o OUT

The model is saved here, as the functions do it, since they want a tokenizer to save along with it.
Prints one JSON object; `seconds` leaves the imports out.
"""

import argparse
import contextlib
import json
import sys
import time

import LM_Cocktail

FUNCTIONS = ("mix_models", "mix_models_by_layers")


def main() -> None:
    """Merge with equal weights, save, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("function", choices=FUNCTIONS)
    parser.add_argument("models", nargs="+", help="checkpoint folders")
    parser.add_argument("-o", "--output", required=True, help="folder to create")
    args = parser.parse_args()
    mix = getattr(LM_Cocktail, args.function)
    weights = [1 / len(args.models)] * len(args.models)
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        model = mix(args.models, model_type="decoder", weights=weights)
        model.save_pretrained(args.output)
    print(json.dumps({"seconds": round(time.perf_counter() - start, 4)}))


if __name__ == "__main__":
    main()
