"""The memory of a merge: the chunk and the workers that fit the budgets.

    projected peak = reserved + workers × (BUFFERS_PER_WORKER × chunk + a little + mapped pages
                                           + the sources' own readers)
    projected VRAM = held already + workers of one GPU × (VRAM_BUFFERS_PER_WORKER × chunk, as torch
                     rounds it)

`reserved` is the memory of the process once the backend is loaded and the headers are read. `plan`
must not import torch, so it adds an estimate for the library. `merge` plans again, with the
measured figure, before it reads anything. Memory of a larger program around the merge counts as
well: a budget is one for the whole process. Memory that it had before and gave back does not.

Buffers are allocated once per worker, so the peak does not depend on the number and size of models,
tensors or shards. Headers and the plan are the exception: they take memory with the number of
tensors (two models of 60,000: 30 MB, or 50 MB if tensors are nowhere neighbours; of 300,000: 320
MB). They exist before chunks are sized, and so count as `reserved`. Later products of the plan go
out piece by piece: its digest a segment at a time, headers a MiB, index and `shardmix.json` a line,
a report's JSON an item.

Knows only sizes: no files, no tensors, no torch (it checks if torch is loaded, and the kind of its
build, without importing it).
"""

import sys
from dataclasses import dataclass, replace

from shardmix.errors import BudgetError
from shardmix.methods.statistics import PIECE_NUM_ELEMENTS
from shardmix.options import LLVM, TORCH, RunSettings
from shardmix.sources.base import MAX_MAPPED_AT_ONCE
from shardmix.system.gpus import cuda_in_use, gpu_names, num_devices, torch_has_cuda_build
from shardmix.system.memory import resident_nbytes
from shardmix.system.threads import num_cores
from shardmix.system.units import KIB, MIB, format_mib

# Four buffers of one chunk in flight. In torch: the bytes of one source, their float32 values,
# the float32 accumulator and the rounded output, none larger than the accumulator, which sizes the
# chunk. In kernels these four hold all sources (`chunk_num_elements`). On a GPU two chunks are in
# flight: the host has two pinned buffers for sources, used in turn, and an output for each chunk.
BUFFERS_PER_WORKER = 4

# On the GPU: two input buffers, one float32 scratch, two accumulators, two outputs.
VRAM_BUFFERS_PER_WORKER = 7

# The fastest measured: large enough to hide the interpreter (torch makes three passes of a dozen
# calls), small enough for the caches. For a GPU it is assumed, not measured: copies of 8 MiB take
# far longer than queueing them, and page-locking larger buffers is a cost of each merge.
BEST_CHUNK_NBYTES = {"llvm": 1 * MIB, "torch": 2 * MIB, "cuda": 16 * MIB}
LEAST_CHUNK_NBYTES = 64 * KIB
# Up to this size a chunk grows to hold a whole tensor whose statistics are needed: four buffers for
# each worker, so a tensor of 100 MB of source bytes is read once.
_LARGEST_WHOLE_NBYTES = 32 * MIB
_FLOAT64_NBYTES = 8

# Memory of a library once imported and first used, for planning in a process that has not loaded
# it. Measured: 190-195 MiB for the CPU build of torch 2.13, 70 MiB for llvmlite 0.50 with a kernel.
# A CUDA build's libraries and a CUDA context add to torch. Before a merge starts, the measured
# figure replaces these.
_LIBRARY_NBYTES = {"torch": 200 * MIB, "llvm": 80 * MIB}
_MODULES = {"torch": "torch", "llvm": "llvmlite"}
_TORCH_CUDA_BUILD_NBYTES = 450 * MIB
# Of the first GPU, and of each other one: assumed, not measured.
_CUDA_CONTEXT_NBYTES = 600 * MIB
_NEXT_CUDA_CONTEXT_NBYTES = 200 * MIB

# Room for a merge's needs beyond the imports: thread stacks, allocator slack, the model card,
# the progress display; and for each worker its stack and its own reader.
_RUN_NBYTES = 16 * MIB
_WORKER_NBYTES = 4 * MIB
# Anomalies of a tensor with NaN: in sums by leaf and over all, in a line of the journal, in the
# report. Measured for 50,000 to 90,000 tensors that all have some: 220 bytes a tensor, partly
# covered by the room above.
_ANOMALIES_NBYTES = 128
# A fault maps neighbours of its page: up to a huge page at either end of a chunk.
_MAPPED_NBYTES = 4 * MIB

# The same command's memory differs by some MiB from one call to the next: a budget that is named
# as enough must be enough the next time.
_BETWEEN_RUNS_NBYTES = 4 * MIB

# The most of a GPU's free memory that is taken without a bound.
_VRAM_SHARE = 0.9

_MOST_DEFAULT_WORKERS = 8


def reserved_nbytes(*libraries: str, num_devices: int = 0, num_tensors: int = 0) -> int:
    """Return the process's memory before any chunk, with its libraries loaded.

    Libraries, torch or llvm, do the arithmetic, on `num_devices` GPUs. Resident memory counts, so
    that a budget is one for the whole process, even if shardmix is called from a larger program.
    Each of the output's tensors may turn out to have NaN.
    """
    reserved = resident_nbytes() + _RUN_NBYTES + num_tensors * _ANOMALIES_NBYTES
    for library in libraries:
        if _MODULES[library] not in sys.modules:
            cuda_build = library == "torch" and torch_has_cuda_build()
            reserved += _TORCH_CUDA_BUILD_NBYTES if cuda_build else _LIBRARY_NBYTES[library]
    if num_devices and cuda_in_use() is None:
        reserved += _CUDA_CONTEXT_NBYTES + (num_devices - 1) * _NEXT_CUDA_CONTEXT_NBYTES
    return reserved


@dataclass(frozen=True, slots=True)
class VramUse:
    """The use of a GPU's memory before a merge; of several GPUs the least favourable figures."""

    held_nbytes: int = 0
    """Bytes that torch holds in this process. They count: a budget is one for the whole process."""
    spare_nbytes: int | None = None
    """Bytes available beside that; None if CUDA is not in use yet, so that they are unknown."""


NOTHING_HELD = VramUse()


def vram_use(device: str) -> VramUse:
    """Return the use of memory of cuda (all GPUs) or cuda:N; gives torch's cache back."""
    cuda = None if device == "cpu" else cuda_in_use()
    if cuda is None:
        return NOTHING_HELD
    watched = gpu_names(cuda, device)
    if not watched:  # another check reports that there is no such GPU
        return NOTHING_HELD
    cuda.empty_cache()
    return VramUse(
        max(int(cuda.memory_reserved(name)) for name in watched),
        min(int(cuda.mem_get_info(name)[0] * _VRAM_SHARE) for name in watched),
    )


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory of a merge. All sizes in bytes."""

    reserved_nbytes: int
    """Memory before the first chunk: interpreter, libraries and the plan itself."""
    chunk_nbytes: int
    """Size of one chunk's accumulator; no other buffer of the chunk is larger."""
    workers: int
    """Threads, each with a chunk of its own."""
    projected_peak_nbytes: int
    """Upper bound of the process's peak resident memory."""
    projected_vram_nbytes: int
    """Upper bound of the GPU memory that torch reserves, on one GPU; 0 on the CPU."""


def fit_memory(
    *,
    reserved: int,
    num_devices: int = 0,
    vram: VramUse = NOTHING_HELD,
    best_chunk: int,
    small_chunk: int | None = None,
    workers: int | None = None,
    max_memory: int | None = None,
    max_vram: int | None = None,
    mapped_views: int = 0,
    reader_nbytes: int = 0,
    num_shared_bases: int = 0,
) -> MemoryPlan:
    """Choose the chunk, at most the best one, and the workers, so that both budgets hold.

    Without a budget a chunk has the size that speed needs (`best_chunk`). A tight budget first
    shrinks the chunk down to `small_chunk` (by default an eighth of the best), then takes workers
    away (unless their number was asked for), then shrinks the chunk further. `num_devices` are the
    GPUs that share the workers, 0 on the CPU. The bound of each is `max_vram`, or else its free
    memory by `vram`. `mapped_views` is the number of sources that one chunk may have mapped.
    `reader_nbytes` is the memory of the sources' own readers for each worker, without the chunks
    that they keep of `num_shared_bases`.

    Raises `BudgetError` if not even one smallest chunk fits, naming the least that works.
    """
    most_workers = workers or default_workers(num_devices=num_devices)
    fewest_workers = most_workers if workers else 1
    best_chunk_of_parts = best_chunk if small_chunk is None else 8 * small_chunk
    small_chunk = best_chunk_of_parts // 8
    choices = [
        *((most_workers, size) for size in _halvings(best_chunk, small_chunk)),
        *((count, small_chunk) for count in range(most_workers - 1, fewest_workers - 1, -1)),
        *((fewest_workers, size) for size in _halvings(small_chunk // 2, LEAST_CHUNK_NBYTES)),
    ]
    most_vram = max_vram
    if max_vram is None and vram.spare_nbytes is not None:
        most_vram = vram.held_nbytes + vram.spare_nbytes
    for count, size in choices:
        # A chunk of a whole tensor is so large that what is mapped of it counts, too.
        mapped = mapped_views if size > best_chunk_of_parts else 0
        buffers = count * (BUFFERS_PER_WORKER + mapped + num_shared_bases) * size
        beside = _WORKER_NBYTES + mapped_views * _MAPPED_NBYTES + reader_nbytes
        peak = reserved + buffers + count * beside
        busiest = -(-count // num_devices) if num_devices else 0
        on_gpu = busiest * _vram_nbytes(VRAM_BUFFERS_PER_WORKER * size)
        on_gpu += vram.held_nbytes if busiest else 0
        fits_memory = max_memory is None or peak <= max_memory
        if fits_memory and (most_vram is None or on_gpu <= most_vram):
            return MemoryPlan(
                reserved_nbytes=reserved,
                chunk_nbytes=size,
                workers=count,
                projected_peak_nbytes=peak,
                projected_vram_nbytes=on_gpu,
            )
    # The last choice is the smallest; its memory is the least that works.
    workers_remedy = f", or ask for fewer than {workers} workers" if (workers or 1) > 1 else ""
    remedy = f"raise the budget{workers_remedy}"
    if not fits_memory:
        short, given, least = "--max-memory", max_memory, peak + _BETWEEN_RUNS_NBYTES
        share = f" ({format_mib(reserved)} of it for Python, libraries and what the process holds)"
    else:
        short, given, least = "--max-vram", most_vram, on_gpu
        share = f" ({format_mib(vram.held_nbytes)} of it held already)" if vram.held_nbytes else ""
        if max_vram is None:
            short, remedy = "memory of the GPU to be had:", "free some of it, or use --device cpu"
    raise BudgetError(
        f"too small; the least that works here is {format_mib(least)}{share}",
        subject=f"{short} {format_mib(given or 0)}",
        remedy=remedy,
    )


def default_workers(*, num_devices: int = 0) -> int:
    """Return the default number of workers: one per core, at most eight; two per GPU."""
    return max(2 * num_devices, min(num_cores(), _MOST_DEFAULT_WORKERS))


def _halvings(size: int, least: int) -> list[int]:
    sizes = []
    while size >= least:
        sizes.append(size)
        size //= 2
    return sizes


def _vram_nbytes(buffers_nbytes: int) -> int:
    """Return the bytes that torch's caching allocator reserves for one worker.

    It takes 2 MiB from the driver for up to 1 MiB, 20 MiB for up to 10 MiB, else whole 2 MiB; whole
    20 MiB if it has expandable segments, as many programs set. A worker has streams, and so memory,
    of its own. Source: c10/cuda/CUDACachingAllocator.cpp.
    """
    unit = 2 * MIB if buffers_nbytes <= MIB else 20 * MIB
    return -(-buffers_nbytes // unit) * unit + 2 * MIB


@dataclass(frozen=True, slots=True)
class ReaderMemory:
    """The memory of sources' own readers, which decode tensors."""

    worker_nbytes: int = 0
    """Memory of a worker's readers, besides the buffers of a chunk."""
    num_shared_bases: int = 0
    """Number of bases whose bytes are kept for several sources: each takes a chunk's size."""
    uses_kernels: bool = False
    """True if they compile kernels, so that llvmlite is loaded whatever the backend."""


@dataclass(frozen=True, slots=True)
class Gathering:
    """The memory that a method needs for statistics of whole tensors."""

    whole_chunk_nbytes: int
    """Size of a chunk that holds the largest of these tensors, so that it is read only once."""
    num_sources: int
    """Largest number of sources of one tensor."""
    num_tensors: int
    """Number of these tensors."""
    num_entries: int
    """Number of entries of all their statistics."""
    num_group_entries: int
    """Largest number of entries of all groups of one tensor."""

    @property
    def kept_nbytes(self) -> int:
        """Memory of the statistics themselves: of all tensors, and of the groups of one."""
        num_floats = self.num_entries + self.num_group_entries
        return num_floats * _FLOAT_OBJECT_NBYTES + self.num_tensors * _STATISTICS_NBYTES

    @property
    def worker_nbytes(self) -> int:
        """Memory of a worker's pieces: as stored, as float64, and their products."""
        return (2 * self.num_sources + 2) * PIECE_NUM_ELEMENTS * _FLOAT64_NBYTES


@dataclass(frozen=True, slots=True)
class CodingMemory:
    """The memory that a quantised output needs."""

    band_chunk_nbytes: int
    """Size of a chunk that holds the largest band of blocks, so that it is merged only once."""
    num_scales: int
    """Largest number of scales of one band."""
    most_known_nbytes: int
    """Memory of all scales, if they are kept until they are written."""

    @property
    def worker_nbytes(self) -> int:
        """Memory of a worker: scratch, and the scales of two bands, each found in two arrays."""
        from shardmix.formats.output_coding import SCRATCH_NBYTES  # few outputs are quantised

        return SCRATCH_NBYTES + 4 * self.num_scales * _FLOAT32_NBYTES + SCALES_AT_ONCE_NBYTES


SCALES_AT_ONCE_NBYTES = 64 * KIB
"""Scales that are written at once."""
KNOWN_SCALES_NBYTES = 16 * MIB
"""The most memory of scales that are found and not yet written. Others are found again."""
TENSOR_SCALES_NBYTES = 1024
"""Memory of a tensor's entry among known scales: its key, arrays and place in a dictionary."""
_FLOAT32_NBYTES = 4

# A float of Python in a tuple; a tensor's name and tuples in a dictionary.
_FLOAT_OBJECT_NBYTES = 40
_STATISTICS_NBYTES = 400


def plan_memory(
    settings: RunSettings,
    *,
    num_tensors: int,
    readers: ReaderMemory | None = None,
    gathering: Gathering | None = None,
    coding: CodingMemory | None = None,
    earlier_peak: int = 0,
    later_nbytes: int = 0,
) -> MemoryPlan:
    """Fit chunks and workers to the budgets and to the process's present memory.

    `num_tensors` are the output's: of each there may be something to tell. `readers` are the
    sources' own. `gathering` is for methods that need statistics, `coding` for quantised outputs.
    `earlier_peak` is the peak of what this process does before, such as factors, and `later_nbytes`
    what that will leave behind.

    Where the device is still open, to the GPU's, with the peak of whichever takes more. Raises
    `BudgetError` where one smallest chunk does not fit.
    """
    found = _planned(settings, num_tensors, readers, gathering, coding, later_nbytes)
    return replace(found, projected_peak_nbytes=max(found.projected_peak_nbytes, earlier_peak))


def _planned(
    settings: RunSettings,
    num_tensors: int,
    readers: ReaderMemory | None,
    gathering: Gathering | None,
    coding: CodingMemory | None,
    later_nbytes: int,
) -> MemoryPlan:
    num_gpus = num_devices(settings.device)
    readers = ReaderMemory() if readers is None else readers
    if not settings.is_device_open:
        libraries = {settings.backend, LLVM} if readers.uses_kernels else {settings.backend}
        reserved = reserved_nbytes(*libraries, num_devices=num_gpus, num_tensors=num_tensors)
        reserved += later_nbytes
        return _fitted(settings, reserved, num_gpus, readers, gathering, coding)
    # Both are tried in one process, with the libraries of both.
    reserved = reserved_nbytes(TORCH, LLVM, num_devices=num_gpus, num_tensors=num_tensors)
    reserved += later_nbytes
    on_gpu = _fitted(settings, reserved, num_gpus, readers, gathering, coding)
    # torch's chunks are larger than the kernels', so either fits into this one's memory.
    cpu_settings = replace(settings, device="cpu", backend=TORCH)
    on_cpu = _fitted(cpu_settings, reserved, 0, readers, gathering, coding)
    peak = max(on_gpu.projected_peak_nbytes, on_cpu.projected_peak_nbytes)
    return replace(on_gpu, projected_peak_nbytes=peak)


def _fitted(
    settings: RunSettings,
    reserved: int,
    num_gpus: int,
    readers: ReaderMemory,
    gathering: Gathering | None,
    coding: CodingMemory | None,
) -> MemoryPlan:
    reader_nbytes = readers.worker_nbytes
    best_chunk = BEST_CHUNK_NBYTES["cuda" if settings.on_cuda else settings.backend]
    whole = 0
    if gathering is not None:
        reserved += gathering.kept_nbytes
        reader_nbytes += gathering.worker_nbytes
        whole = gathering.whole_chunk_nbytes
    if coding is not None:
        reserved += min(KNOWN_SCALES_NBYTES, coding.most_known_nbytes)
        reader_nbytes += coding.worker_nbytes
        whole = max(whole, coding.band_chunk_nbytes)
    if whole and not settings.on_cuda:
        whole = min(1 << (whole - 1).bit_length(), _LARGEST_WHOLE_NBYTES)
    return fit_memory(
        reserved=reserved,
        num_devices=num_gpus,
        vram=vram_use(settings.device),
        best_chunk=best_chunk if settings.on_cuda else max(best_chunk, whole),
        small_chunk=best_chunk // 8,
        workers=settings.workers,
        max_memory=settings.max_memory_nbytes,
        max_vram=settings.max_vram_nbytes,
        mapped_views=MAX_MAPPED_AT_ONCE if settings.io == "mmap" else 0,
        reader_nbytes=reader_nbytes,
        num_shared_bases=readers.num_shared_bases,
    )
