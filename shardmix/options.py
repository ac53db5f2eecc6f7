"""The keyword options of a merge, and the `RunSettings` that they are checked into."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TypedDict

from shardmix.errors import RecipeError
from shardmix.system.gpus import resolve_device
from shardmix.system.hashing import XXH3, check_algorithm
from shardmix.system.threads import MOST_WORKERS
from shardmix.system.units import parse_size

TORCH = "torch"
"""Backend: every dtype, on the CPU and on GPUs."""
LLVM = "llvm"
"""Backend: compiled kernels on the CPU, without torch in the process."""

WARN = "warn"
"""On NaN and Inf in the output: count and report them."""
ERROR = "error"
"""On NaN and Inf in the output: stop at the first."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """The settings of a merge that change no byte of the output."""

    device: str = "cpu"
    """cpu, cuda (all GPUs), cuda:N, or auto until the planner knows the size of the merge."""
    is_device_open: bool = False
    """True if there is a GPU that nobody asked for: the merge begins by trying if the CPU is
    faster."""
    io: str = "auto"
    """Way to read sources: mmap, pread, or auto until the planner has decided."""
    backend: str = "auto"
    """Backend of the arithmetic: TORCH, LLVM, or auto until the planner has seen the dtypes."""
    workers: int | None = None
    """Number of threads; None for as many as speed needs."""
    max_memory_nbytes: int | None = None
    """Bound on the process's peak resident memory."""
    max_vram_nbytes: int | None = None
    """Bound on the memory of each GPU."""
    overwrite: bool = False
    """Replace an existing output."""
    fsync: bool = True
    """Force files to disk before the output appears."""
    share: bool = False
    """Let the umask decide who may read the output, even if a source is private."""
    restart: bool = False
    """Discard an unfinished merge, instead of going on with it."""
    on_nonfinite: str = WARN
    """Reaction to NaN and Inf in the output: WARN or ERROR."""
    profile: str | None = None
    """Absolute path of the profile's file; None without a profile."""

    @property
    def on_cuda(self) -> bool:
        """True if the arithmetic runs on a GPU, or is assumed to."""
        return self.device.startswith("cuda")


IO_CHOICES = ("auto", "mmap", "pread")
BACKEND_CHOICES = ("auto", TORCH, LLVM)


class MergeOptions(TypedDict, total=False):
    """The keyword arguments of `merge` and `plan_merge`, all optional."""

    dtype: str | None
    """Output dtype: "keep" (each tensor's in the first model), float32, float16 or bfloat16."""
    quantize: str | None
    """Quantisation of the output's linear layers: "fp8-blocks", as DeepSeek-V3 stores them. `dtype`
    is then that of its other tensors."""
    config_from: str | PathLike[str] | None
    """Source of config, tokenizer and other auxiliary files; default: the first model."""
    max_shard_size: int | str | None
    """Largest output shard ("5GB"); default: the first model's own shard layout."""
    method: str | None
    """Merge method: linear (default), task_arithmetic, slerp, ..."""
    base_model: str | PathLike[str] | None
    """Base model, for methods that need one."""
    parameters: Mapping[str, object] | None
    """The method's parameters, such as {"lambda": 0.7}; a list is a gradient over the layers."""
    normalize: bool | None
    """Rescale the weights to sum to 1."""
    allow_weight_sum: bool | None
    """Accept weights whose sum is not 1."""
    allow_differences: Sequence[str] | str | None
    """Keys in which the models may differ although an average over them makes no sense: of their
    configs ("num_attention_heads"), "tokenizer", "quantization_config", ..."""
    pooling: str | None
    """Pooling of an encoder: cls, mean, max, mean_sqrt_len, weightedmean or lasttoken; default:
    that of its sentence-transformers modules, else cls."""
    as_adapter: bool | None
    """Write the changes to the base model as a LoRA adapter that PEFT loads, not the model."""
    rank: int | None
    """Largest rank of that adapter; default: the ranks of the models' own adapters, added up."""
    energy: float | None
    """Share of each matrix's squared norm, from 0 to 1, that the least rank must keep."""
    tokenizer_source: str | PathLike[str] | None
    """The output's vocabulary, to which rows are mapped by token: "base" (the base model's, or the
    first one's), "union" (that and the others' further tokens), or one of the models; default:
    "refuse", models with other vocabularies are refused."""
    pad_to_multiple_of: int | None
    """Number of rows of that vocabulary's tensors: the next multiple of this."""
    skip_others: bool | None
    """Leave all but weights of linear layers as it is in the base, in an adapter of a rank."""
    max_memory: int | str | None
    """Bound on the whole process's peak resident memory ("2GiB"); default: only what speed
    needs."""
    max_vram: int | str | None
    """Bound on the memory of each GPU."""
    device: str
    """cpu, cuda (all GPUs), cuda:N, or auto (default): for a large merge the faster of CPU and
    GPU."""
    io: str
    """Way to read sources: auto (default), mmap or pread. All bounded, all the same bytes."""
    backend: str
    """Backend of the arithmetic: auto (default), torch or llvm. All the same bytes."""
    workers: int | None
    """Number of threads; default: one per core, at most eight."""
    overwrite: bool
    """Replace an existing output, which stays until the new one is complete."""
    fsync: bool
    """Force everything to disk before the output appears (default); False for scratch disks."""
    share: bool
    """Let the umask decide who may read the output, even if a source is more private."""
    restart: bool
    """Discard an unfinished merge to this output, instead of going on with it."""
    on_nonfinite: str
    """Reaction to NaN or Inf in the output: "warn" (default: count them by tensor) or "error"."""
    digest: str
    """Algorithm of the output files' digests: one of `hashing.ALGORITHMS`; default xxh3."""
    record_paths: bool
    """Record the sources' paths on this machine in the output's shardmix.json."""
    profile: str | PathLike[str] | None
    """Record memory over time and speed by stage into this .json file (see docs/profile.md)."""


def run_settings(options: MergeOptions) -> RunSettings:
    """Return the options that change no byte of the output, checked. Raises `RecipeError`."""
    io = options.get("io", "auto")
    if io not in IO_CHOICES:
        raise RecipeError(f"must be one of {', '.join(IO_CHOICES)}", subject=f"io {io!r}")
    backend = options.get("backend", "auto")
    if backend not in BACKEND_CHOICES:
        raise RecipeError(
            f"must be one of {', '.join(BACKEND_CHOICES)}", subject=f"backend {backend!r}"
        )
    on_nonfinite = options.get("on_nonfinite", WARN)
    if on_nonfinite not in (WARN, ERROR):
        raise RecipeError(f"must be {WARN} or {ERROR}", subject=f"on_nonfinite {on_nonfinite!r}")
    workers = options.get("workers")
    if workers is not None and not 1 <= workers <= MOST_WORKERS:
        raise RecipeError(f"must be from 1 to {MOST_WORKERS}", subject=f"workers {workers}")
    max_memory, max_vram = options.get("max_memory"), options.get("max_vram")
    return RunSettings(
        device=_device(options.get("device", "auto")),
        io=io,
        backend=backend,
        workers=workers,
        max_memory_nbytes=None if max_memory is None else parse_size(max_memory),
        max_vram_nbytes=None if max_vram is None else parse_size(max_vram),
        overwrite=options.get("overwrite", False),
        fsync=options.get("fsync", True),
        share=options.get("share", False),
        restart=options.get("restart", False),
        on_nonfinite=on_nonfinite,
        profile=_profile_path(options.get("profile")),
    )


def _device(asked: str) -> str:
    """Return the device, or auto if there is a choice."""
    device = resolve_device(asked)
    return asked if asked == "auto" and device != "cpu" else device


def digest_algorithm(options: MergeOptions) -> str:
    """Return the algorithm of the output files' digests. Raises `RecipeError`."""
    algorithm = options.get("digest", XXH3)
    check_algorithm(algorithm)
    return algorithm


def _profile_path(profile: str | PathLike[str] | None) -> str | None:
    if profile is None:
        return None
    try:
        path = Path(profile).expanduser()
        # Not the file itself: a profile is not written through a link.
        path = path.parent.resolve() / path.name
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, ~nobody
        raise RecipeError(
            f"cannot be a path ({error})",
            subject=f"profile {str(profile)!r}",
            remedy="choose another",
        ) from None
    if path.suffix != ".json":
        raise RecipeError("must end in .json", subject=f"profile {str(profile)!r}")
    return str(path)
