"""Commands and their options. Loads the library inside a command, so that `--help` is instant."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardmix._version import __version__
from shardmix.errors import ShardmixError

if TYPE_CHECKING:
    from shardmix.recipe import ModelsArgument

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

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE=WEIGHT...",
        help="Two or more models with their weights, or one recipe.yaml. A SOURCE is a model "
        "folder, a .safetensors file, or a Hub id org/name[@revision].",
        show_default=False,
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", metavar="OUT", help="The model folder to make.", show_default=False
    ),
]
OptionalOutput = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="OUT", help="The model folder to make; may be left out."
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Bound on the whole process's peak resident memory, such as 512MiB or 2GB. "
        "Default: only what speed needs.",
    ),
]
MaxVram = Annotated[str | None, typer.Option(metavar="SIZE", help="The same for GPU memory.")]
Device = Annotated[
    str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="Where the arithmetic runs.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="keep|float32|float16|bfloat16",
        help="Output dtype; keep (the default) is each tensor's dtype in the first model.",
    ),
]
MaxShardSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Largest output shard, such as 5GB. Default: the first model's own shard layout.",
    ),
]
Io = Annotated[
    str,
    typer.Option(
        metavar="auto|mmap|pread",
        help="How sources are read; both are bounded and give the same bytes.",
    ),
]
BackendName = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="auto|torch|numba",
        help="What does the sums; numba is the faster on a CPU (extra `fast`). The same bytes.",
    ),
]
Workers = Annotated[
    int | None, typer.Option(metavar="N", help="Threads. Default: one a core, at most eight.")
]
Normalize = Annotated[bool, typer.Option("--normalize", help="Rescale the weights to sum to 1.")]
AllowWeightSum = Annotated[
    bool,
    typer.Option("--allow-weight-sum", help="Accept weights whose sum is not 1 (else an error)."),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Model that gives config, tokenizer and chat template. Default: the first model.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace an existing OUT, which stays until the new is whole."
    ),
]
NoFsync = Annotated[
    bool,
    typer.Option(
        "--no-fsync", help="Don't force files to disk before OUT appears (for scratch disks)."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print a JSON report to standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]


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
    models: Models,
    output: Output,
    max_memory: MaxMemory = None,
    max_vram: MaxVram = None,
    device: Device = "auto",
    dtype: Dtype = None,
    max_shard_size: MaxShardSize = None,
    io: Io = "auto",
    backend: BackendName = "auto",
    workers: Workers = None,
    normalize: Normalize = False,
    allow_weight_sum: AllowWeightSum = False,
    base: Base = None,
    overwrite: Overwrite = False,
    no_fsync: NoFsync = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge models into one: out = Σ weightᵢ · modelᵢ, streamed, within a memory budget."""
    with _errors_reported(json=json, quiet=quiet):
        options = _options(locals())
        if dry_run:
            _print_plan(_models(models), output, options, json=json)
            return
        from shardmix import api
        from shardmix.cli import render
        from shardmix.cli.progress import progress_display

        with progress_display(quiet=quiet) as on_progress:
            report = api.merge(_models(models), output, on_progress=on_progress, **options)
        render.merge_report(report, json=json, quiet=quiet)


@app.command(epilog="Example: `shardmix plan org/base=0.6 ./tuned=0.4 --max-memory 2GiB`")
def plan(
    models: Models,
    output: OptionalOutput = None,
    max_memory: MaxMemory = None,
    max_vram: MaxVram = None,
    device: Device = "auto",
    dtype: Dtype = None,
    max_shard_size: MaxShardSize = None,
    io: Io = "auto",
    backend: BackendName = "auto",
    workers: Workers = None,
    normalize: Normalize = False,
    allow_weight_sum: AllowWeightSum = False,
    base: Base = None,
    overwrite: Overwrite = False,
    no_fsync: NoFsync = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a merge would read, write and take, from headers alone; write nothing."""
    with _errors_reported(json=json, quiet=quiet):
        _print_plan(_models(models), output, _options(locals()), json=json, quiet=quiet)


@app.command(epilog="Example: `shardmix inspect org/name --json`")
def inspect(
    source: Annotated[
        str, typer.Argument(help="Model folder, .safetensors file or Hub id org/name[@revision].")
    ],
    all_tensors: Annotated[
        bool, typer.Option("--all", help="List every tensor, not the first 40.")
    ] = False,
    json: Json = False,
) -> None:
    """Show a checkpoint's tensors, dtypes, shapes, shards, parameter count and tied weights."""
    with _errors_reported(json=json):
        from shardmix import api
        from shardmix.cli import render

        render.model_report(api.inspect(source), json=json, all_tensors=all_tensors)


def main() -> None:
    """Run the command line; exit with 0, 1 (something to mend), 2 (usage), 130 or 143 (stopped)."""
    app()


def _print_plan(
    models: "ModelsArgument",
    output: Path | None,
    options: dict[str, Any],
    *,
    json: bool,
    quiet: bool = False,
) -> None:
    from shardmix import api
    from shardmix.cli import render

    plan = api.plan_merge(models, output, **options)
    render.plan_report(api.report_plan(plan), json=json, quiet=quiet)


def _options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the library's options from a command's arguments, which have the same names."""
    from shardmix.api import MergeOptions

    options = {name: arguments[name] for name in MergeOptions.__annotations__ if name in arguments}
    options["fsync"] = not arguments["no_fsync"]
    # An absent switch must not override a recipe's own.
    for switch in ("normalize", "allow_weight_sum"):
        options[switch] = options[switch] or None
    return options


def _models(words: list[str]) -> "ModelsArgument":
    from shardmix.recipe import RECIPE_SUFFIXES, parse_source_words

    if len(words) == 1 and words[0].endswith(RECIPE_SUFFIXES):
        return words[0]
    return parse_source_words(words)


@contextmanager
def _errors_reported(*, json: bool, quiet: bool = False) -> Iterator[None]:
    """Turn a user's mistake into one message and an exit status, without a traceback."""
    from shardmix.hub import SHOW_DOWNLOADS

    SHOW_DOWNLOADS.set(not quiet)
    signal.signal(signal.SIGTERM, _raise_once)
    signal.signal(signal.SIGINT, _raise_once)
    try:
        yield
    except ShardmixError as error:
        from shardmix.cli import render

        render.error(error, json=json)
        raise typer.Exit(error.exit_status) from None
    except _Terminated:
        typer.echo("terminated: nothing was written", err=True)
        raise typer.Exit(143) from None
    except KeyboardInterrupt:
        typer.echo("interrupted: nothing was written", err=True)
        raise typer.Exit(130) from None


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a merge as Ctrl-C does."""


def _raise_once(number: int, _frame: object) -> None:
    # A second signal must not cut the clean-up short that the first one set off.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise _Terminated if number == signal.SIGTERM else KeyboardInterrupt
