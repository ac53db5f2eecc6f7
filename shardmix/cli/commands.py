"""Commands and their options.

Each loads the library only when it is called, so that `--help` is instant.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardmix._version import __version__
from shardmix.cli import arguments, pictures, rare_collections
from shardmix.cli import options as opt
from shardmix.cli.exit import errors_reported, ignore_signals
from shardmix.errors import RecipeError, printable

if TYPE_CHECKING:
    from shardmix.recipe.build import ModelsArgument
    from shardmix.scoring.examples import Example
    from shardmix.scoring.options import ScoreOptions


class _InOrder(click.Group):
    """Lists its commands in order of definition."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:  # it quotes words of the command line
            error.message = printable(error.message)  # type: ignore[misc]
            raise


@click.group(
    name="shardmix",
    cls=_InOrder,
    help=(
        "Merge the weights of neural networks: any number of safetensors checkpoints, streamed, "
        "in as little memory as you give it."
    ),
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(
    __version__,
    prog_name="shardmix",
    message="%(prog)s %(version)s",
    help="Print the version.",
)
def app() -> None:
    """Set up nothing; commands do the work."""


def _command(*, example: str) -> Callable[[Callable[..., None]], click.Command]:
    """Return a decorator that adds a command, with a whole line in the list of commands."""

    def add(function: Callable[..., None]) -> click.Command:
        summary = (function.__doc__ or "").partition("\n")[0]
        epilog = f"Example:\n\n\b\n    {example}"
        return app.command(short_help=summary, epilog=epilog)(function)

    return add


@_command(example="shardmix merge org/base=0.6 ./tuned=0.4 -o merged --max-memory 2GiB")
@opt.models
@opt.output
@opt.merging
@opt.weights_from
@opt.optional_model_type
@opt.scoring
@opt.merge_score_dtype
@opt.overwrite
@opt.share
@opt.no_fsync
@opt.restart
@opt.on_nonfinite
@opt.digest
@opt.record_paths
@opt.profile
@opt.dry_run
@opt.json
@opt.quiet
def merge(
    models: tuple[str, ...],
    output: Path,
    *,
    weights_from: Path | None,
    model_type: str | None,
    score_dtype: str,
    profile: Path | None,
    dry_run: bool,
    json: bool,
    quiet: bool,
    **others: Any,
) -> None:
    """Merge models into one, such as out = Σ weightᵢ · modelᵢ, streamed, within a memory budget.

    SOURCE=WEIGHT... is two or more models with their weights, or one recipe.yaml in mergekit's
    language. A SOURCE is a model folder, a .safetensors file, or a Hub id org/name[@revision]; with
    a method that has no weights, it stands alone. SOURCE+ADAPTER is a model with a LoRA adapter,
    and may be the only one.
    """
    with errors_reported(json=json, quiet=quiet):
        figures, picture = pictures.profile_files(profile)
        options = arguments.merge_options(others) | {"profile": figures}
        scoring = arguments.score_options(others, dtype=score_dtype)
        if weights_from is None and scoring:
            word = arguments.first_word(scoring)
            raise RecipeError(f"{word} is for --weights-from", remedy="name the examples, too")
        examples: tuple[Example, ...] = ()
        if weights_from is not None:
            from shardmix.scoring.examples import load_examples
            from shardmix.scoring.options import check_options

            # Read once, and now: it may be a pipe.
            settings = check_options(arguments.required_model_type(model_type), scoring)
            examples = load_examples(weights_from, settings)
        if dry_run:
            planned = (
                arguments.models_of(models, options)
                if weights_from is None
                else arguments.equally_weighted(models)
            )
            _print_plan(planned, output, options, model_type, json=json, quiet=quiet)
            return
        with rare_collections():
            from shardmix import api
            from shardmix.cli import render
            from shardmix.cli.progress import progress_display, score_display

        with score_display(quiet=quiet) as on_score, progress_display(quiet=quiet) as on_progress:
            if weights_from is None:
                with rare_collections():
                    report = api.merge(
                        arguments.models_of(models, options),
                        output,
                        model_type=model_type,
                        on_progress=on_progress,
                        **options,
                    )
            else:
                from shardmix import score_and_merge

                names = [source for source, _ in arguments.equally_weighted(models)]
                report = score_and_merge.merge_by_examples(
                    names,
                    output,
                    examples,
                    arguments.required_model_type(model_type),
                    scoring=scoring,
                    on_score=on_score,
                    on_progress=on_progress,
                    **options,
                )
            ignore_signals()  # all is done: nothing is left to stop
        if figures is not None and picture is not None:
            unseen = pictures.draw(figures, picture)
            report = replace(report, warnings=report.warnings + ((unseen,) if unseen else ()))
        render.merge_report(report, profile=figures, json=json, quiet=quiet)


@_command(example="shardmix convert ./pytorch_model.bin ./converted --dtype bfloat16")
@opt.source
@opt.output_word
@opt.converting
@opt.overwrite
@opt.share
@opt.no_fsync
@opt.restart
@opt.digest
@opt.record_paths
@opt.json
@opt.quiet
def convert(source: str, output: Path, *, json: bool, quiet: bool, **others: Any) -> None:
    """Store one model anew in safetensors, bit for bit unless --dtype changes it.

    SOURCE is anything that `merge` reads: a folder or file of torch.save, a quantised model, a
    model with an adapter (SOURCE+ADAPTER). Names lose what wrappers added to them.
    """
    _write("convert", source, output, json=json, quiet=quiet, others=others)


@_command(example="shardmix extract org/base ./tuned --rank 16 -o adapter")
@click.argument("base", metavar="BASE")
@click.argument("tuned", metavar="TUNED")
@opt.output
@opt.extracting
@opt.overwrite
@opt.share
@opt.no_fsync
@opt.restart
@opt.digest
@opt.record_paths
@opt.json
@opt.quiet
def extract(base: str, tuned: str, output: Path, *, json: bool, quiet: bool, **others: Any) -> None:
    """Write what a model changed in its base as a LoRA adapter of a given rank, for PEFT.

    BASE and TUNED are anything that `merge` reads. Each changed weight of a linear layer becomes
    factors by its singular values; the report, and OUT's low_rank.json, have the error of each.
    """
    _write("extract", base, tuned, output, json=json, quiet=quiet, others=others)


def _write(
    function: str, *positional: str | Path, json: bool, quiet: bool, others: dict[str, Any]
) -> None:
    """Call a function of the library that writes an output without scoring, and render it."""
    with errors_reported(json=json, quiet=quiet):
        options = arguments.merge_options(others)
        with rare_collections():
            from shardmix import api
            from shardmix.cli import render
            from shardmix.cli.progress import progress_display

        with progress_display(quiet=quiet) as on_progress:
            report = getattr(api, function)(*positional, on_progress=on_progress, **options)
            ignore_signals()  # all is done: nothing is left to stop
        render.merge_report(report, profile=None, json=json, quiet=quiet)


@_command(example="shardmix score org/base ./tuned --data examples.jsonl --model-type decoder")
@opt.sources
@opt.data
@opt.model_type
@opt.scoring
@opt.pooling
@opt.score_dtype
@opt.device
@opt.max_memory
@opt.max_vram
@opt.json
@opt.quiet
def score(
    sources: tuple[str, ...],
    *,
    data: Path,
    model_type: str,
    score_dtype: str,
    pooling: str | None,
    device: str,
    max_memory: str | None,
    max_vram: str | None,
    json: bool,
    quiet: bool,
    **others: Any,
) -> None:
    """Compute merging weights from a few examples: softmax(-loss / temperature) over the models.

    SOURCE... are the models to score: folders or Hub ids org/name[@revision], or one recipe.yaml
    that names them. Each reads the examples by its own tokenizer.
    """
    with errors_reported(json=json, quiet=quiet):
        options: ScoreOptions = {
            **arguments.score_options(others, dtype=score_dtype),
            "device": device,
            "max_memory": max_memory,
            "max_vram": max_vram,
            "pooling": pooling,
        }
        from shardmix.cli import render
        from shardmix.cli.progress import score_display
        from shardmix.scoring import score as score_models

        with score_display(quiet=quiet) as on_progress:
            named = arguments.scored_sources(sources)
            report = score_models(named, model_type, data, on_progress=on_progress, **options)
        render.score_report(report, json=json, quiet=quiet)


@_command(example="shardmix plan org/base=0.6 ./tuned=0.4 --max-memory 2GiB")
@opt.models
@opt.optional_output
@opt.merging
@opt.overwrite
@opt.no_fsync
@opt.json
@opt.quiet
def plan(
    models: tuple[str, ...], output: Path | None, *, json: bool, quiet: bool, **others: Any
) -> None:
    """Show what a merge would read, write and need, from headers only; write nothing.

    SOURCE=WEIGHT... is two or more models with their weights, or one recipe.yaml in mergekit's
    language. A SOURCE is a model folder, a .safetensors file, or a Hub id org/name[@revision]; with
    a method that has no weights, it stands alone. SOURCE+ADAPTER is a model with a LoRA adapter,
    and may be the only one.
    """
    with errors_reported(json=json, quiet=quiet):
        options = arguments.merge_options(others)
        planned = arguments.models_of(models, options)
        _print_plan(planned, output, options, json=json, quiet=quiet)


@_command(example="shardmix verify merged --recompute")
@click.argument("output", metavar="OUT", type=Path)
@click.option(
    "--recompute",
    is_flag=True,
    help="If the digests match, also read the sources again and compare every byte of weights.",
)
@click.option(
    "--source",
    metavar="NAME=PATH",
    multiple=True,
    help="Path of a source, by its number (from 1) or name in shardmix.json; repeatable. "
    "Sources on the Hub or beside OUT are found.",
)
@opt.max_memory
@opt.json
@opt.quiet
def verify(
    output: Path,
    *,
    recompute: bool,
    source: tuple[str, ...],
    max_memory: str | None,
    json: bool,
    quiet: bool,
) -> None:
    """Read all of a merged model again, and compare it with the digests made at the merge.

    OUT is a model folder that `shardmix merge` wrote.
    """
    with errors_reported(json=json, quiet=quiet, if_stopped="nothing was changed"):
        sources = arguments.source_paths(source)
        from shardmix.cli import render
        from shardmix.cli.progress import progress_display
        from shardmix.verification import verify

        with progress_display("verifying", quiet=quiet) as on_progress:
            report = verify.verify(
                output,
                recompute=recompute,
                sources=sources,
                max_memory=max_memory,
                on_progress=on_progress,
            )
        render.verify_report(report, json=json, quiet=quiet)
    if not report.is_verified:
        raise click.exceptions.Exit(1)


@_command(example="shardmix status merged")
@click.argument("output", metavar="OUT", type=Path)
@opt.json
def status(output: Path, *, json: bool) -> None:
    """Show the state of an output path: a complete model, or a merge in progress or cut off.

    OUT is the output of a merge.
    """
    with errors_reported(json=json):
        from shardmix.cli import render
        from shardmix.verification import status

        render.status_report(status.status(output), json=json)


@_command(example="shardmix inspect org/name --json")
@click.argument("source")
@click.option("--all", "all_tensors", is_flag=True, help="List every tensor, not the first 40.")
@opt.json
def inspect(source: str, *, all_tensors: bool, json: bool) -> None:
    """Show a checkpoint's tensors, dtypes, shapes, shards, parameter count and tied weights.

    SOURCE is a model folder, .safetensors file or Hub id org/name[@revision].
    """
    with errors_reported(json=json):
        from shardmix import api
        from shardmix.cli import render

        render.model_report(api.inspect(source), json=json, all_tensors=all_tensors)


def _print_plan(
    models: "ModelsArgument",
    output: Path | None,
    options: dict[str, Any],
    model_type: str | None = None,
    *,
    json: bool,
    quiet: bool = False,
) -> None:
    from shardmix import api
    from shardmix.cli import render

    with rare_collections():
        plan = api.plan_merge(models, output, model_type=model_type, **options)
    render.plan_report(api.report_plan(plan), json=json, quiet=quiet)
