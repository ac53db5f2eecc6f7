"""The options that commands share: their names, metavars and help."""

from pathlib import Path
from typing import Annotated

import typer

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
MaxVram = Annotated[
    str | None, typer.Option(metavar="SIZE", help="The same for the memory of each GPU.")
]
Device = Annotated[
    str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="Where the arithmetic runs.")
]
MergeDevice = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|cuda|cuda:N",
        help="Where the sums run; cuda is all GPUs. With auto a large merge begins by measuring "
        "whether GPU or CPU is the faster; a small one takes the CPU.",
    ),
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
        metavar="auto|torch|llvm",
        help="What does the sums; llvm is the faster on a CPU. The same bytes.",
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
Restart = Annotated[
    bool,
    typer.Option(
        "--restart",
        help="Throw away what an earlier run of a merge to OUT has left, instead of going on.",
    ),
]
OnNonfinite = Annotated[
    str,
    typer.Option(
        metavar="warn|error",
        help="What to do about NaN or Inf in the output: count them by tensor, or stop at one.",
    ),
]
Digest = Annotated[
    str,
    typer.Option(
        metavar="xxh3|blake3|sha256",
        help="What OUT's files are hashed with, for `shardmix verify`: xxh3 finds damage at no "
        "cost, blake3 tampering too; sha256 is what the Hub shows, and slower.",
    ),
]
RecordPaths = Annotated[
    bool,
    typer.Option(
        "--record-paths", help="Tell in OUT's shardmix.json where on this machine the models lie."
    ),
]
Profile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Record memory over time and GB/s by stage: FILE.json holds the figures; FILE.svg, "
        ".png or .pdf is a picture of them, with FILE.json beside it (extra `profile`).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print a JSON report to standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...",
        help="Models to score: folders or Hub ids org/name[@revision]. The first one's tokenizer "
        "encodes the examples for all.",
        show_default=False,
    ),
]
Data = Annotated[
    Path,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Examples, as a JSON list or JSON lines: {input, output} for decoders and "
        "encoder-decoders, {query, pos: [...], neg: [...]} for encoders and rerankers.",
        show_default=False,
    ),
]
WeightsFrom = Annotated[
    Path | None,
    typer.Option(
        "--weights-from",
        metavar="FILE",
        help="Compute the weights from these examples (see `shardmix score`); models are then "
        "named without =WEIGHT.",
    ),
]
_TYPES = "decoder|encoder|reranker|encoder-decoder"
ModelType = Annotated[
    str, typer.Option(metavar=_TYPES, help="What the models are.", show_default=False)
]
OptionalModelType = Annotated[
    str | None,
    typer.Option(
        metavar=_TYPES,
        help="What the models are; an encoder's output then also loads in sentence-transformers. "
        "Needed with --weights-from.",
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        metavar="T",
        help="Of the softmax over losses: high brings weights together, low gives all to the best "
        "model. Default: 5.0.",
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Examples whose token losses are averaged together, and whose passages are one "
        "another's negatives. Default: 2.",
    ),
]
MaxInputLength = Annotated[
    int | None,
    typer.Option(metavar="N", help="Tokens beyond which a text is cut off. Default: 2048."),
]
NegNumber = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Negatives drawn for each query; where there are fewer, all are used. Default: 7.",
    ),
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="Of the draw of negatives. Default: 0.")
]
Pooling = Annotated[
    str | None,
    typer.Option(
        metavar="cls|mean|lasttoken",
        help="How an encoder's text becomes one vector for scoring. Default: cls.",
    ),
]
ChatTemplate = Annotated[
    bool,
    typer.Option(
        "--chat-template", help="Put a decoder's examples into the tokenizer's chat template."
    ),
]
ScoreDtype = Annotated[
    str,
    typer.Option(
        metavar="auto|float32|bfloat16|float16",
        help="What models compute in while they are scored; auto is their own dtype.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that a model's folder brings along."),
]
