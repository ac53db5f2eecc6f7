"""Commands and their options. Loads the library inside a command, so that `--help` is instant."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardmix._version import __version__
from shardmix.cli import arguments, importing, pictures
from shardmix.cli import options as opt
from shardmix.cli.ending import errors_reported, ignore_signals
from shardmix.errors import RecipeError

if TYPE_CHECKING:
    from shardmix.recipe import ModelsArgument
    from shardmix.scorer.options import ScoreOptions

app = typer.Typer(
    name="shardmix",
    help=(
        "Merge the weights of neural networks: any number of safetensors checkpoints, streamed, "
        "in as little memory as you give it."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shardmix {__version__}")
        raise typer.Exit


@app.callback()
def shardmix(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Set up nothing; commands do the work."""


@app.command(
    epilog="Example: `shardmix merge org/base=0.6 ./tuned=0.4 -o merged --max-memory 2GiB`"
)
def merge(
    models: opt.Models,
    output: opt.Output,
    max_memory: opt.MaxMemory = None,
    max_vram: opt.MaxVram = None,
    device: opt.MergeDevice = "auto",
    dtype: opt.Dtype = None,
    max_shard_size: opt.MaxShardSize = None,
    io: opt.Io = "auto",
    backend: opt.BackendName = "auto",
    workers: opt.Workers = None,
    normalize: opt.Normalize = False,
    allow_weight_sum: opt.AllowWeightSum = False,
    base: opt.Base = None,
    weights_from: opt.WeightsFrom = None,
    model_type: opt.OptionalModelType = None,
    temperature: opt.Temperature = None,
    batch_size: opt.BatchSize = None,
    max_input_length: opt.MaxInputLength = None,
    neg_number: opt.NegNumber = None,
    seed: opt.Seed = None,
    pooling: opt.Pooling = None,
    score_dtype: opt.ScoreDtype = "auto",
    chat_template: opt.ChatTemplate = False,
    trust_remote_code: opt.TrustRemoteCode = False,
    overwrite: opt.Overwrite = False,
    no_fsync: opt.NoFsync = False,
    restart: opt.Restart = False,
    on_nonfinite: opt.OnNonfinite = "warn",
    digest: opt.Digest = "xxh3",
    record_paths: opt.RecordPaths = False,
    profile: opt.Profile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Merge models into one: out = Σ weightᵢ · modelᵢ, streamed, within a memory budget."""
    with errors_reported(json=json, quiet=quiet):
        from shardmix.scorer.examples import Example, load_examples
        from shardmix.scorer.options import check_options

        profile, picture = pictures.profile_files(profile)
        options = arguments.merge_options(locals())
        scoring = arguments.score_options(locals(), dtype=score_dtype)
        if weights_from is None and scoring:
            word = arguments.first_word(scoring)
            raise RecipeError(f"{word} is for --weights-from: name the examples, too")
        examples: tuple[Example, ...] = ()
        if weights_from is not None:
            # Read once, and now: it may be a pipe.
            settings = check_options(arguments.required_model_type(model_type), scoring)
            examples = load_examples(weights_from, settings)
        if dry_run:
            is_weighted = weights_from is None
            parse = arguments.weighted_models if is_weighted else arguments.equally_weighted
            _print_plan(parse(models), output, options, model_type, json=json, quiet=quiet)
            return
        with importing():
            from shardmix import api, by_examples
            from shardmix.cli import render
            from shardmix.cli.progress import progress_display, score_display

        with score_display(quiet=quiet) as on_score, progress_display(quiet=quiet) as on_progress:
            if weights_from is None:
                report = api.merge(
                    arguments.weighted_models(models),
                    output,
                    model_type=model_type,
                    on_progress=on_progress,
                    **options,
                )
            else:
                names = [source for source, _ in arguments.equally_weighted(models)]
                report = by_examples.merge_by_examples(
                    names,
                    output,
                    examples,
                    arguments.required_model_type(model_type),
                    scoring=scoring,
                    on_score=on_score,
                    on_progress=on_progress,
                    **options,
                )
            ignore_signals()  # it is done: there is nothing left to stop
        if profile is not None and picture is not None:
            unseen = pictures.draw(profile, picture)
            report = replace(report, warnings=report.warnings + ((unseen,) if unseen else ()))
        render.merge_report(report, profile=profile, json=json, quiet=quiet)


@app.command(
    epilog="Example: `shardmix score org/base ./tuned --data examples.jsonl --model-type decoder`"
)
def score(
    sources: opt.Sources,
    data: opt.Data,
    model_type: opt.ModelType,
    temperature: opt.Temperature = None,
    batch_size: opt.BatchSize = None,
    max_input_length: opt.MaxInputLength = None,
    neg_number: opt.NegNumber = None,
    seed: opt.Seed = None,
    device: opt.Device = "auto",
    dtype: opt.ScoreDtype = "auto",
    max_memory: opt.MaxMemory = None,
    max_vram: opt.MaxVram = None,
    pooling: opt.Pooling = None,
    chat_template: opt.ChatTemplate = False,
    trust_remote_code: opt.TrustRemoteCode = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Compute merging weights from a few examples: softmax(-loss / temperature) over the models."""
    with errors_reported(json=json, quiet=quiet):
        options: ScoreOptions = {
            **arguments.score_options(locals(), dtype=dtype),
            "device": device,
            "max_memory": max_memory,
            "max_vram": max_vram,
        }
        from shardmix.cli import render
        from shardmix.cli.progress import score_display
        from shardmix.scorer import score as score_models

        with score_display(quiet=quiet) as on_progress:
            report = score_models(sources, model_type, data, on_progress=on_progress, **options)
        render.score_report(report, json=json, quiet=quiet)


@app.command(epilog="Example: `shardmix plan org/base=0.6 ./tuned=0.4 --max-memory 2GiB`")
def plan(
    models: opt.Models,
    output: opt.OptionalOutput = None,
    max_memory: opt.MaxMemory = None,
    max_vram: opt.MaxVram = None,
    device: opt.MergeDevice = "auto",
    dtype: opt.Dtype = None,
    max_shard_size: opt.MaxShardSize = None,
    io: opt.Io = "auto",
    backend: opt.BackendName = "auto",
    workers: opt.Workers = None,
    normalize: opt.Normalize = False,
    allow_weight_sum: opt.AllowWeightSum = False,
    base: opt.Base = None,
    overwrite: opt.Overwrite = False,
    no_fsync: opt.NoFsync = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Show what a merge would read, write and take, from headers alone; write nothing."""
    with errors_reported(json=json, quiet=quiet):
        _print_plan(
            arguments.weighted_models(models),
            output,
            arguments.merge_options(locals()),
            json=json,
            quiet=quiet,
        )


@app.command(epilog="Example: `shardmix verify merged --recompute`")
def verify(
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="A model folder that `shardmix merge` wrote.")
    ],
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            help="Where the digests hold, read the sources again, too, and compare every byte of "
            "weights.",
        ),
    ] = False,
    source: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Where a source lies, by its number (from 1) or name in shardmix.json; may be "
            "repeated. Those on the Hub or beside OUT are found.",
        ),
    ] = None,
    max_memory: opt.MaxMemory = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Read a merged model again, all of it, and compare it with the digests made at the merge."""
    with errors_reported(json=json, quiet=quiet, if_stopped="nothing was changed"):
        sources = arguments.places(source or [])
        from shardmix import verification
        from shardmix.cli import render
        from shardmix.cli.progress import progress_display

        with progress_display("verifying", quiet=quiet) as on_progress:
            report = verification.verify(
                output,
                recompute=recompute,
                sources=sources,
                max_memory=max_memory,
                on_progress=on_progress,
            )
        render.verify_report(report, json=json, quiet=quiet)
    if not report.is_verified:
        raise typer.Exit(1)


@app.command(epilog="Example: `shardmix status merged`")
def status(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Where a merge writes to.")],
    json: opt.Json = False,
) -> None:
    """Show what is at an output path: a whole model, or a merge at work or cut off."""
    with errors_reported(json=json):
        from shardmix import output_status
        from shardmix.cli import render

        render.status_report(output_status.status(output), json=json)


@app.command(epilog="Example: `shardmix inspect org/name --json`")
def inspect(
    source: Annotated[
        str, typer.Argument(help="Model folder, .safetensors file or Hub id org/name[@revision].")
    ],
    all_tensors: Annotated[
        bool, typer.Option("--all", help="List every tensor, not the first 40.")
    ] = False,
    json: opt.Json = False,
) -> None:
    """Show a checkpoint's tensors, dtypes, shapes, shards, parameter count and tied weights."""
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

    plan = api.plan_merge(models, output, model_type=model_type, **options)
    render.plan_report(api.report_plan(plan), json=json, quiet=quiet)
