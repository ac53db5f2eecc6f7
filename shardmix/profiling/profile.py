"""The profile of a merge: memory over time and speed by stage. Its field names are the JSON's.

Names no path of the machine, and no model. Writes no file.
"""

import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from shardmix._version import __version__
from shardmix.plan.merge_plan import MergePlan
from shardmix.system.threads import num_cores
from shardmix.system.timer import FINISH, STAGES, StageClock

COMPLETE, CANCELLED, FAILED = "complete", "cancelled", "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedMerge:
    """The plan of the merge."""

    num_models: int
    """Models merged."""
    num_tensors: int
    """Tensors of the output."""
    bytes_read: int
    """Weight bytes to read."""
    bytes_written: int
    """Bytes of weight files to write."""
    device: str
    """cpu, cuda (all GPUs) or cuda:N."""
    io: str
    """Way to read sources: mmap or pread. Mapped bytes are loaded during the arithmetic: see
    `reduce`."""
    backend: str
    """Backend of the arithmetic: torch or llvm."""
    workers: int
    """Threads, each with a chunk of its own."""
    strip_bytes: int
    """Size of one chunk's accumulator."""
    max_memory_bytes: int | None
    """The budget for the process's peak resident memory; null without one."""
    max_vram_bytes: int | None
    """The budget for GPU memory; null without one."""
    reserved_bytes: int
    """The part of the projected peak that Python, libraries and the process itself take."""
    projected_peak_bytes: int
    """Upper bound of the process's peak resident memory."""
    projected_vram_bytes: int
    """Upper bound of the GPU memory that torch reserves, on one GPU; 0 on the CPU."""
    digest: str
    """Algorithm of the output files' digests: one of `hashing.ALGORITHMS`."""
    fsync: bool
    """True if files are forced to disk before the output appears."""
    plan_digest: str
    """Digest of the plan; plans with the same digest write the same bytes from the same sources."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProfile:
    """One stage of the workers, over the whole merge."""

    bytes: int
    """Bytes that passed through: source bytes of read and reduce, output bytes of the others."""
    worker_seconds: float
    """Time that workers spent at it, summed over all workers."""
    gb_per_second: float | None
    """10⁹ bytes a second with all workers at it: bytes / worker_seconds × workers. Null for finish
    and other, which have no bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Columns of equal length, a row for each moment; null if unknown then, or on this system."""

    interval_seconds: float
    """Approximate time between samples; it doubles whenever there are 4096."""
    failure: str | None
    """Reason if sampling ended before the merge did, else null."""
    seconds: list[float]
    """Time of each sample, from the beginning of the recording."""
    rss_bytes: list[int | None]
    """Resident memory of the process: the next two columns, and shared memory."""
    rss_anon_bytes: list[int | None]
    """Part of it: anonymous memory, which was allocated."""
    rss_file_bytes: list[int | None]
    """Part of it: pages of files, such as libraries and memory-mapped sources."""
    system_page_cache_bytes: list[int | None]
    """`Cached` of /proc/meminfo: the whole system's page cache, of all processes."""
    system_dirty_bytes: list[int | None]
    """`Dirty` of /proc/meminfo: the part of it that is not yet sent to disks."""
    system_writeback_bytes: list[int | None]
    """`Writeback` of /proc/meminfo: the part of it that is being sent to disks."""
    read_bytes: list[int | None]
    """Source bytes read so far."""
    reduce_bytes: list[int | None]
    """Source bytes merged so far."""
    write_bytes: list[int | None]
    """Output bytes written so far (into the page cache)."""
    digest_bytes: list[int | None]
    """Output bytes hashed so far."""
    vram_reserved_bytes: list[int | None] | None = None
    """GPU memory that torch holds; the largest of several GPUs; null on the CPU."""
    vram_device_used_bytes: list[int | None] | None = None
    """GPU memory in use by the driver's count: the whole device's, by all processes, contexts
    included; the largest of several GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine of the merge."""

    platform: str
    """System, kernel and architecture."""
    processor: str
    """Name of the processor; empty if the system does not tell."""
    num_cores: int
    """Cores that the process may use."""
    memory_bytes: int
    """Memory of the machine."""
    python: str
    """Version of Python."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The whole file. Sizes in bytes, times in seconds."""

    profile_version: int = 1
    """Version of the fields' meaning; the file begins with it."""
    shardmix: str = __version__
    """Version of shardmix."""
    outcome: str
    """complete, cancelled or failed; after the last two, the figures are of the part that ran."""
    seconds: float
    """Time from the plan's end until the output was complete: the sum of the next three."""
    load_seconds: float
    """Time to load the backend's library, and to try the device if it was still open."""
    merge_seconds: float
    """Time from the first worker's start to the last one's end."""
    finish_seconds: float
    """Time for shardmix.json, forcing folders to disk, and the rename."""
    peak_rss_bytes: int
    """Largest resident set of the process so far (VmHWM), perhaps from before the merge. The kernel
    counts it less exactly than a sample: they may differ by some pages for each core."""
    peak_vram_bytes: int
    """Peak GPU memory that torch had reserved, on one GPU; 0 on the CPU."""
    plan: PlannedMerge
    """The plan and its settings."""
    stages: dict[str, StageProfile]
    """Stages by name: read, reduce, write, digest, finish (the end of an output file: its header,
    and forcing it to disk) and other (waiting for a task, checking an earlier merge's files)."""
    machine: Machine
    """The machine of the merge."""
    samples: Samples
    """Memory and bytes over time."""

    def to_json(self) -> bytes:
        """Return the profile as JSON; `from_json` returns an equal one."""
        return msgspec.json.encode(self)

    @staticmethod
    def from_json(encoded: bytes) -> "Profile":
        """Return the profile that `to_json` encoded."""
        return msgspec.json.decode(encoded, type=Profile)


def planned_merge(plan: MergePlan) -> PlannedMerge:
    """Return the plan's part of a profile."""
    settings, memory = plan.settings, plan.memory
    return PlannedMerge(
        num_models=plan.num_models,
        num_tensors=plan.num_tensors,
        bytes_read=plan.read_nbytes,
        bytes_written=plan.write_nbytes,
        device=settings.device,
        io=settings.io,
        backend=settings.backend,
        workers=memory.workers,
        strip_bytes=memory.chunk_nbytes,
        max_memory_bytes=settings.max_memory_nbytes,
        max_vram_bytes=settings.max_vram_nbytes,
        reserved_bytes=memory.reserved_nbytes,
        projected_peak_bytes=memory.projected_peak_nbytes,
        projected_vram_bytes=memory.projected_vram_nbytes,
        digest=plan.digest_algorithm,
        fsync=settings.fsync,
        plan_digest=plan.digest(),
    )


def stage_profiles(clock: StageClock, *, workers: int) -> dict[str, StageProfile]:
    """Return each stage's bytes, time and speed, by name."""
    profiles = {}
    for stage, (name, nbytes, seconds) in enumerate(
        zip(STAGES, clock.nbytes(), clock.seconds(), strict=True)
    ):
        has_speed = stage < FINISH and seconds > 0
        profiles[name] = StageProfile(
            bytes=nbytes,
            worker_seconds=seconds,
            gb_per_second=nbytes / seconds * workers / 1e9 if has_speed else None,
        )
    return profiles


def this_machine() -> Machine:
    """Return the facts of this machine."""
    return Machine(
        platform=platform.platform(),
        processor=_processor(),
        num_cores=num_cores(),
        memory_bytes=int(psutil.virtual_memory().total),
        python=platform.python_version(),
    )


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
