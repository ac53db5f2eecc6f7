"""The options that commands share: their names, metavars and help.

An argument's help stands in its command's docstring, since click before 8.5 has no other field for
it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_Command = Callable[..., Any]
_Parameter = Callable[[_Command], _Command]


def together(*parameters: _Parameter) -> _Parameter:
    """Return one decorator for several parameters, which `--help` lists in the order given."""

    def decorate(command: _Command) -> _Command:
        for parameter in reversed(parameters):  # the order in which stacked decorators apply
            command = parameter(command)
        return command

    return decorate


def names_of(parameters: _Parameter) -> list[str]:
    """Return the names that a function gets for these parameters, in order."""
    return [each.name for each in click.command()(parameters(lambda: None)).params if each.name]


models = click.argument("models", metavar="SOURCE=WEIGHT...", nargs=-1, required=True)
sources = click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)

source = click.argument("source", metavar="SOURCE")
output_word = click.argument("output", metavar="OUT", type=Path)

output = click.option(
    *("--output", "-o"),
    metavar="OUT",
    type=Path,
    required=True,
    help="The model folder to make.",
)
optional_output = click.option(
    *("--output", "-o"),
    metavar="OUT",
    type=Path,
    help="The model folder to make; optional.",
)
max_memory = click.option(
    "--max-memory",
    metavar="SIZE",
    help="Bound on the whole process's peak resident memory, such as 512MiB or 2GB. Default: only "
    "what speed needs.",
)
max_vram = click.option(
    "--max-vram", metavar="SIZE", help="The same bound for the memory of each GPU."
)
_DEVICES = "auto|cpu|cuda|cuda:N"
device = click.option(
    "--device",
    metavar=_DEVICES,
    default="auto",
    help="Device of the arithmetic.",
)
merge_device = click.option(
    "--device",
    metavar=_DEVICES,
    default="auto",
    help="Device of the arithmetic; cuda is all GPUs. With auto a large merge first measures if "
    "GPU or CPU is faster; a small one takes the CPU.",
)
dtype = click.option(
    "--dtype",
    metavar="keep|float32|float16|bfloat16",
    help="Output dtype; keep (the default) is each tensor's dtype in the first model.",
)
quantize = click.option(
    "--quantize",
    metavar="fp8-blocks",
    help="Write the matrices of linear layers as FP8 codes with a scale for each 128 × 128, as "
    "DeepSeek-V3 does; --dtype is then that of all other tensors.",
)
max_shard_size = click.option(
    "--max-shard-size",
    metavar="SIZE",
    help="Largest output shard, such as 5GB. Default: the first model's own shard layout.",
)
io = click.option(
    "--io",
    metavar="auto|mmap|pread",
    default="auto",
    help="Way to read sources; both are bounded and give the same bytes.",
)
backend = click.option(
    "--backend",
    metavar="auto|torch|llvm",
    default="auto",
    help="Backend of the arithmetic; llvm is faster on a CPU. Both give the same bytes.",
)
workers = click.option(
    "--workers",
    metavar="N",
    type=int,
    help="Number of threads. Default: one per core, at most eight.",
)


class _MethodOption(click.Option):
    """An option whose help follows from what merge methods declare; loaded only to print it."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        from shardmix.methods import registry

        described = registry.summaries if self.name == "method" else registry.parameter_summaries
        record = super().get_help_record(ctx)
        return record and (record[0], f"{record[1]} {described()}")


method = click.option(
    "--method",
    cls=_MethodOption,
    metavar="NAME",
    help="Merge method.",
)
base_model = click.option(
    "--base-model",
    metavar="SOURCE",
    help="Base model of methods that need one. Names, dtypes, shards, config and tokenizer are "
    "then its own.",
)
parameters = click.option(
    *("-p", "--parameter", "parameters"),
    cls=_MethodOption,
    metavar="NAME=VALUE",
    multiple=True,
    help="Parameter of the method, for all models; repeatable. Values with commas between them are "
    "a gradient over the layers.",
)
normalize = click.option(
    "--normalize",
    is_flag=True,
    default=None,  # absent, it does not override the recipe's own
    help="Rescale the weights to sum to 1; short for -p normalize=true.",
)
allow_weight_sum = click.option(
    "--allow-weight-sum",
    is_flag=True,
    default=None,  # absent, it does not override the recipe's own
    help="Accept SOURCE=WEIGHT words whose sum is not 1, an error otherwise (linear only).",
)
allow_differences = click.option(
    "--allow-differences",
    metavar="KEY,...",
    multiple=True,
    callback=lambda _context, _option, words: words or None,
    help="Merge models that differ in these keys of their configs (num_attention_heads), or in "
    "tokenizer, model_type or a file that an error names; repeatable.",
)
config_from = click.option(
    "--config-from",
    metavar="SOURCE",
    help="Model that gives config, tokenizer and chat template. Default: the first model.",
)
as_adapter = click.option(
    "--as-adapter",
    is_flag=True,
    default=None,  # absent, it does not override the recipe's own
    help="Write the weighted sum of changes to the base model as a LoRA adapter for PEFT, not the "
    "model. Of adapters it is exact, and ranks add up; SOURCE=WEIGHT need not sum to 1.",
)
tokenizer_source = click.option(
    "--tokenizer-source",
    metavar="refuse|base|union|SOURCE",
    help="Vocabulary of OUT if the models' differ, to which rows are mapped by token: the base's "
    "(without one, the first model's), the union of all, or one model's. Default: refuse.",
)
pad_to_multiple_of = click.option(
    "--pad-to-multiple-of",
    metavar="N",
    type=int,
    help="Number of rows of that vocabulary: the next multiple of N. Default: as many as its "
    "source has, or its tokens need.",
)
adapter_rank = click.option(
    "--rank",
    metavar="R",
    type=int,
    help="With --as-adapter: the best approximation of this rank, matrix by matrix.",
)
required_rank = click.option(
    "--rank",
    metavar="R",
    type=int,
    required=True,
    help="Largest rank of a matrix.",
)
energy = click.option(
    "--energy",
    metavar="E",
    type=float,
    help="With --rank: the least rank up to it that keeps this share of a matrix's squared norm.",
)
skip_others = click.option(
    "--skip-others",
    is_flag=True,
    default=None,  # absent, it does not override the recipe's own
    help="With --rank: leave norms, embeddings, biases and all else that is no weight of a linear "
    "layer as in the base. Default: they are kept whole, or refused by name.",
)
overwrite = click.option(
    "--overwrite",
    is_flag=True,
    help="Replace an existing OUT, which stays until the new one is complete.",
)
share = click.option(
    "--share",
    is_flag=True,
    help="Let the umask decide who may read OUT. Default: nobody who could not read every model.",
)
no_fsync = click.option(
    "--no-fsync",
    is_flag=True,
    help="Don't force files to disk before OUT appears (for scratch disks).",
)
restart = click.option(
    "--restart",
    is_flag=True,
    help="Discard an unfinished merge to OUT, instead of going on with it.",
)
on_nonfinite = click.option(
    "--on-nonfinite",
    metavar="warn|error",
    default="warn",
    help="Reaction to NaN or Inf in the output: count them by tensor, or stop at the first.",
)
digest = click.option(
    "--digest",
    metavar="xxh3|blake3|sha256",
    default="xxh3",
    help="Digest of OUT's files, for `shardmix verify`: xxh3 finds damage at no cost, blake3 "
    "tampering too; sha256 is the Hub's, and slower.",
)
record_paths = click.option(
    "--record-paths",
    is_flag=True,
    help="Record the models' paths on this machine in OUT's shardmix.json.",
)
profile = click.option(
    "--profile",
    metavar="FILE",
    type=Path,
    help="Record memory over time and GB/s by stage: FILE.json holds the figures; FILE.svg, .png "
    "or .pdf is a picture of them, with FILE.json beside it (extra `profile`).",
)
dry_run = click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
json = click.option("--json", is_flag=True, help="Print a JSON report to standard output.")
quiet = click.option(
    "--quiet",
    "-q",
    is_flag=True,
    help="Print no progress and no summary. Warnings still go to standard error, or with --json "
    "into the report.",
)

data = click.option(
    "--data",
    metavar="FILE",
    type=Path,
    required=True,
    help="Examples, as a JSON list or JSON lines: {input, output} for decoders and "
    "encoder-decoders, {query, pos: [...], neg: [...]} for encoders and rerankers.",
)
weights_from = click.option(
    "--weights-from",
    metavar="FILE",
    type=Path,
    help="Compute the weights from these examples (see `shardmix score`); models are then named "
    "without =WEIGHT.",
)
_MODEL_TYPES = "decoder|encoder|reranker|encoder-decoder"
model_type = click.option(
    "--model-type", metavar=_MODEL_TYPES, required=True, help="Type of the models."
)
optional_model_type = click.option(
    "--model-type",
    metavar=_MODEL_TYPES,
    help="Type of the models; an encoder's output then also loads in sentence-transformers. "
    "Needed with --weights-from.",
)
temperature = click.option(
    "--temperature",
    metavar="T",
    type=float,
    help="Temperature of the softmax over losses: a high one makes the weights similar, a low one "
    "gives all to the best model. Default: 5.0.",
)
batch_size = click.option(
    "--batch-size",
    metavar="N",
    type=int,
    help="Examples whose token losses are averaged together, and whose passages are one another's "
    "negatives. Default: 2.",
)
max_input_length = click.option(
    "--max-input-length",
    metavar="N",
    type=int,
    help="Longest text in tokens; the rest is cut off. Default: 2048.",
)
neg_number = click.option(
    "--neg-number",
    metavar="N",
    type=int,
    help="Negatives drawn for each query; if there are fewer, all are used. Default: 7.",
)
seed = click.option("--seed", metavar="N", type=int, help="Seed for drawing negatives. Default: 0.")
pooling = click.option(
    "--pooling",
    metavar="cls|mean|max|...",
    help="Way to pool the states of a text's tokens into an encoder's vector (also mean_sqrt_len, "
    "weightedmean, lasttoken). Default: that of its sentence-transformers modules, else cls.",
)
chat_template = click.option(
    "--chat-template",
    is_flag=True,
    help="Put a decoder's examples into the tokenizer's chat template.",
)
trust_remote_code = click.option(
    "--trust-remote-code", is_flag=True, help="Run code that comes in a model's folder."
)


def _score_dtype(name: str) -> _Parameter:
    return click.option(
        name,
        "score_dtype",
        metavar="auto|float32|float16|bfloat16",
        default="auto",
        help="Dtype that models compute in while they are scored; auto is their own.",
    )


score_dtype = _score_dtype("--dtype")
merge_score_dtype = _score_dtype("--score-dtype")  # --dtype is the output's

# Options of a merge and of its plan.
merging = together(
    max_memory,
    max_vram,
    merge_device,
    dtype,
    quantize,
    max_shard_size,
    io,
    backend,
    workers,
    method,
    base_model,
    parameters,
    normalize,
    allow_weight_sum,
    allow_differences,
    pooling,
    config_from,
    as_adapter,
    tokenizer_source,
    pad_to_multiple_of,
    adapter_rank,
    energy,
    skip_others,
)
# Options of a conversion, which has one source and no arithmetic but rounding.
converting = together(
    max_memory,
    dtype,
    quantize,
    max_shard_size,
    io,
    backend,
    workers,
    allow_differences,
    config_from,
    tokenizer_source,
    pad_to_multiple_of,
)
# Options of an extraction, whose method and base are decided.
extracting = together(
    max_memory,
    dtype,
    backend,
    allow_differences,
    required_rank,
    energy,
    skip_others,
)
# Options of losses, and of the weights computed from them.
scoring = together(
    temperature,
    batch_size,
    max_input_length,
    neg_number,
    seed,
    chat_template,
    trust_remote_code,
)
