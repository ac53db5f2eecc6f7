"""The LM-Cocktail functions: mix models by given weights, or by weights from a few examples.

    from shardmix import mix_models, mix_models_with_data, mix_models_by_layers

Thin: `api` merges, `scoring` scores, transformers loads the result. Names, arguments and their
order are those of LM_Cocktail (arXiv 2311.13534), so that a program changes only its import.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

from shardmix import api
from shardmix._typing import Unpack
from shardmix.conventions.model_types import MODEL_TYPES, check_model_type
from shardmix.errors import RecipeError, SourceError, one_line
from shardmix.options import MergeOptions
from shardmix.recipe.build import build_recipe
from shardmix.reports.merge_report import MergeReport
from shardmix.score_and_merge import merge_by_examples
from shardmix.scoring.examples import ExamplesArgument, load_examples
from shardmix.scoring.options import ScoreOptions, check_options
from shardmix.sources.hub import check_endpoint
from shardmix.sources.resolve import ResolvedSource, resolve_all

Source = str | PathLike[str]


def mix_models(
    model_names_or_paths: Sequence[Source],
    model_type: str,
    weights: Sequence[float],
    output_path: Source | None = None,
    *,
    trust_remote_code: bool = False,
    quiet: bool = False,
    **options: Unpack[MergeOptions],
) -> Any:
    """Mix models by the given weights, and return the new model, loaded by transformers.

    Args:
        model_names_or_paths: model folders or Hub ids; the first gives config and tokenizer.
        model_type: decoder, encoder, reranker or encoder-decoder.
        weights: one a model; their sum must be 1 (see `normalize`, `allow_weight_sum`).
        output_path: path of the new model; replaces an existing model, as LM-Cocktail does
            (`overwrite=False` refuses). None: the model does not stay on disk.
        trust_remote_code: run code that comes in a model's folder (LM-Cocktail does).
        quiet: don't print the weights, as LM-Cocktail does.
        options: see `MergeOptions` (`max_memory`, `device`, `dtype`, ...).

    Raises:
        ShardmixError: as `merge`.

    Example:
        >>> model = mix_models(["org/base", "./tuned"], "decoder", [0.7, 0.3], "./mixed")
    """
    _check_names(model_names_or_paths)
    if len(weights) != len(model_names_or_paths):
        raise RecipeError(
            f"{len(weights)} weights given for {len(model_names_or_paths)} models",
            remedy="give one each",
        )
    names = list(map(str, model_names_or_paths))
    pairs = list(zip(names, weights, strict=True))
    # Before the model's config is needed, which may be a download.
    build_recipe(
        pairs,
        normalize=options.get("normalize"),
        allow_weight_sum=options.get("allow_weight_sum"),
        model_type=model_type,
    )

    def merge(output: Path, resolved: Mapping[str, ResolvedSource]) -> MergeReport:
        mixing = _mixing(options, output_path)
        return api.merge_resolved(pairs, output, model_type, mixing, resolved=resolved)

    return _mixed(
        merge, names, model_type, output_path, trust_remote_code=trust_remote_code, quiet=quiet
    )


def mix_models_by_layers(
    model_names_or_paths: Sequence[Source],
    model_type: str,
    weights: Sequence[float],
    output_path: Source | None = None,
    *,
    trust_remote_code: bool = False,
    quiet: bool = False,
    **options: Unpack[MergeOptions],
) -> Any:
    """Mix models as `mix_models` does; here both stream.

    LM-Cocktail has this function for models that do not fit into memory together.
    """
    return mix_models(
        model_names_or_paths,
        model_type,
        weights,
        output_path,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
        **options,
    )


def mix_models_with_data(
    model_names_or_paths: Sequence[Source],
    model_type: str,
    example_data: ExamplesArgument | None = None,
    temperature: float = 5.0,
    batch_size: int = 2,
    max_input_length: int = 2048,
    neg_number: int = 7,
    output_path: Source | None = None,
    *,
    example_ata: ExamplesArgument | None = None,
    seed: int = 0,
    chat_template: bool = False,
    score_dtype: str = "auto",
    trust_remote_code: bool = False,
    quiet: bool = False,
    **options: Unpack[MergeOptions],
) -> Any:
    """Mix models by weights from a few examples, and return the new model.

    w_i = softmax_i(-L_i / temperature), L_i the loss of model i on the examples. Source:
    LM-Cocktail (arXiv 2311.13534), section 3.

    Args:
        model_names_or_paths: model folders or Hub ids; the first gives config and tokenizer.
        model_type: decoder, encoder, reranker or encoder-decoder.
        example_data: five or so of `{"input": str, "output": str}` for decoders and
            encoder-decoders, of `{"query": str, "pos": [str], "neg": [str]}` for the others; or the
            path of a JSON or JSON lines file of them.
        temperature: a high one makes the weights similar, a low one gives all to the best model.
        batch_size: examples whose token losses are averaged together, and which are one another's
            negatives.
        max_input_length: longest text in tokens; the rest is cut off.
        neg_number: negatives drawn for each query; if there are fewer, all are used.
        output_path: as for `mix_models`.
        example_ata: `example_data` under its name in LM-Cocktail 0.0.4.
        seed: seed for drawing negatives.
        chat_template: put a decoder's examples into the tokenizer's chat template.
        score_dtype: dtype that models compute in for scoring: auto (their own dtype), float32,
            bfloat16 or float16.
        trust_remote_code: run code that comes in a model's folder (LM-Cocktail does).
        quiet: don't print the weights, as LM-Cocktail does.
        options: see `MergeOptions`; `max_memory`, `max_vram`, `device` and `pooling` hold for
            scoring, too.

    Raises:
        ShardmixError: as `merge` and `shardmix.scoring.score`; about examples before any model is
            opened.

    Example:
        >>> examples = [{"input": "Is it good? 'a charming film' Answer:", "output": "yes"}]
        >>> model = mix_models_with_data(["org/base", "./tuned"], "decoder", examples)
    """
    _check_names(model_names_or_paths)
    given = [each for each in (example_data, example_ata) if each is not None]
    if len(given) != 1:
        raise RecipeError(
            "example_data and example_ata are one argument, and both are given"
            if given
            else "no example_data given",
            remedy="give one of them" if given else "give a few examples, five or so",
        )
    names = list(map(str, model_names_or_paths))
    scoring: ScoreOptions = {
        "temperature": temperature,
        "batch_size": batch_size,
        "max_input_length": max_input_length,
        "neg_number": neg_number,
        "seed": seed,
        "chat_template": chat_template,
        "dtype": score_dtype,
        "trust_remote_code": trust_remote_code,
    }

    asked: ScoreOptions = {**scoring, "pooling": options.get("pooling")}
    loaded = load_examples(given[0], check_options(model_type, asked))

    def merge(output: Path, resolved: Mapping[str, ResolvedSource]) -> MergeReport:
        mixing = _mixing(options, output_path)
        return merge_by_examples(
            names, output, loaded, model_type, scoring=scoring, resolved=resolved, **mixing
        )

    return _mixed(
        merge, names, model_type, output_path, trust_remote_code=trust_remote_code, quiet=quiet
    )


def _mixing(options: MergeOptions, output_path: Source | None) -> MergeOptions:
    """Return the options of LM-Cocktail's way to merge: an existing output is replaced.

    A model that is deleted once it is loaded need not reach the disk.
    """
    return {"overwrite": True, "fsync": output_path is not None, **options}


def _mixed(
    merge: Callable[[Path, Mapping[str, ResolvedSource]], MergeReport],
    names: list[str],
    model_type: str,
    output_path: Source | None,
    *,
    trust_remote_code: bool,
    quiet: bool,
) -> Any:
    """Merge into the output path, or into a temporary folder, and load the result."""
    resolved = resolve_all(names)
    _check_loadable(resolved[names[0]], model_type, trust_remote_code=trust_remote_code)
    workspace = (
        nullcontext(None)
        if output_path is not None
        else tempfile.TemporaryDirectory(prefix="shardmix-")
    )
    with workspace as folder:
        output = Path(output_path) if output_path is not None else Path(folder or "") / "mixed"
        report = merge(output, resolved)
        if not quiet:
            print("***weight for each model***: ")
            for name, weight in zip(names, report.weights, strict=True):
                print(name, weight)
            if output_path is not None:
                print(f"Saved the new model to {output}")
        auto_class = getattr(_transformers(), MODEL_TYPES[model_type].auto_class)
        return auto_class.from_pretrained(str(output), trust_remote_code=trust_remote_code)


def _check_loadable(model: ResolvedSource, model_type: str, *, trust_remote_code: bool) -> None:
    """Refuse, before the merge, a model that could not be loaded as this type afterwards."""
    check_model_type(model_type)
    transformers = _transformers()
    source, folder = model.text, model.fetch(with_weights=False).path
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code
        )
    except Exception as error:  # configs of strangers fail in every possible way
        raise SourceError(
            f"its config cannot be loaded ({one_line(error)})",
            subject=source,
            remedy="check its config.json, or fetch it again",
        ) from None
    auto_class = MODEL_TYPES[model_type].auto_class
    known = type(config) in getattr(transformers, auto_class)._model_mapping
    if not known and auto_class not in getattr(config, "auto_map", {}):
        raise SourceError(
            f"is a {config.model_type} model, which {auto_class} does not load",
            subject=source,
            remedy=f"check the model type, {model_type!r}",
        )


def _transformers() -> Any:
    check_endpoint()
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"the new model is loaded by {error.name}, which is not installed",
            remedy="pip install 'shardmix[models]'",
        ) from None
    return transformers


def _check_names(model_names_or_paths: Sequence[Source]) -> None:
    if isinstance(model_names_or_paths, str | PathLike) or len(model_names_or_paths) < 2:
        raise RecipeError("mixing takes a list of two models or more", remedy="give one")
