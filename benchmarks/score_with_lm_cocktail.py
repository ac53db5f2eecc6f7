"""LM-Cocktail's `mix_models_with_data` up to the weights, timed; runs where LM-Cocktail is.

    python benchmarks/score_with_lm_cocktail.py A B C --data FILE ...

Loads and scores with its own functions, in its own order, and does not merge. Prints one JSON
object.
"""

import contextlib
import json
import sys
import time

from scoring_task import read_command_line


def main() -> None:
    """Score, and print the weights and what they took."""
    models, task, examples = read_command_line(__doc__.splitlines()[0])
    from LM_Cocktail import utils
    from transformers import AutoTokenizer

    # `compute_weights` returns no losses, so the function that it calls writes them down.
    losses: list[float] = []
    whole_loss = utils.llm_loss

    def noted_loss(**arguments: object) -> float:
        losses.append(whole_loss(**arguments))
        return losses[-1]

    utils.llm_loss = noted_loss
    # Standard output is for the report; LM-Cocktail prints what it loads.
    with contextlib.redirect_stdout(sys.stderr):
        start = time.perf_counter()
        base_model = utils.load_model(models[0], model_type="decoder")
        tokenizer = AutoTokenizer.from_pretrained(models[0])
        param_list = utils.get_model_param_list(models, model_type="decoder")
        loaded = time.perf_counter()
        weights = utils.compute_weights(
            base_model,
            tokenizer=tokenizer,
            param_list=param_list,
            model_type="decoder",
            example_data=examples,
            temperature=task.temperature,
            batch_size=task.batch_size,
            max_input_length=task.max_input_length,
        )
        end = time.perf_counter()
    report = {
        "weights": weights,
        "losses": losses,
        "loading_seconds": round(loaded - start, 4),
        "seconds": round(end - loaded, 4),
    }
    json.dump(report, sys.stdout)
    print()


if __name__ == "__main__":
    main()
