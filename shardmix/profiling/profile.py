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

FIRST_BYTES = b'{"profile_version":'
"""What the file of a profile begins with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedMerge:
    """What the plan says of the merge."""

    num_models: int
    """Models merged."""
    num_tensors: int
    """Tensors in the output."""
    bytes_read: int
    """Weights to read."""
    bytes_written: int
    """Weight files to write."""
    device: str
    """cpu, cuda (all GPUs) or cuda:N."""
    io: str
    """How sources are read: mmap or pread. Mapped bytes are loaded by the sum: see `reduce`."""
    backend: str
    """What does the sums: torch or llvm."""
    workers: int
    """Threads, each with a chunk of its own."""
    strip_bytes: int
    """Size of one chunk's accumulator."""
    max_memory_bytes: int | None
    """The budget for the process's peak resident memory; null: none was given."""
    max_vram_bytes: int | None
    """The same for GPU memory."""
    reserved_bytes: int
    """Of the projected peak, what Python, libraries and the process itself take."""
    projected_peak_bytes: int
    """Resident memory of the process at its peak, at most."""
    projected_vram_bytes: int
    """GPU memory that torch will have reserved at its peak, at most, on one GPU; 0 on the CPU."""
    digest: str
    """What the output's files are hashed with: xxh3, blake3 or sha256."""
    fsync: bool
    """Files are forced to disk before the output appears."""
    plan_digest: str
    """Plans of one digest write the same bytes from the same sources."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProfile:
    """One thing that workers do, over the whole merge."""

    bytes: int
    """What passed through: source bytes of read and reduce, output bytes of the others."""
    worker_seconds: float
    """How long workers were at it, added up over all of them."""
    gb_per_second: float | None
    """10⁹ bytes a second while all workers are at it: bytes / worker_seconds × workers. Null for
    finish and other, which are not about bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Columns of one length, a row for each moment; null: not known then, or on this system."""

    interval_seconds: float
    """Between samples, about; it doubles whenever there are 4096."""
    failure: str | None
    """Why sampling ended before the merge did."""
    seconds: list[float]
    """When, counted from the beginning of the recording."""
    rss_bytes: list[int | None]
    """Resident memory of the process; what is neither of the next two is shared memory."""
    rss_anon_bytes: list[int | None]
    """Of this, anonymous memory: what was allocated."""
    rss_file_bytes: list[int | None]
    """Of this, pages of files: libraries, and sources that are memory-mapped."""
    system_page_cache_bytes: list[int | None]
    """`Cached` of /proc/meminfo: the whole system's page cache, by whatever process."""
    system_dirty_bytes: list[int | None]
    """`Dirty` of /proc/meminfo: of this, what is still to be sent to disks."""
    system_writeback_bytes: list[int | None]
    """`Writeback` of /proc/meminfo: of this, what disks are just being sent."""
    read_bytes: list[int | None]
    """Source bytes read so far."""
    reduce_bytes: list[int | None]
    """Source bytes summed so far."""
    write_bytes: list[int | None]
    """Output bytes written so far (into the page cache)."""
    digest_bytes: list[int | None]
    """Output bytes hashed so far."""
    vram_reserved_bytes: list[int | None] | None = None
    """GPU memory that torch holds, of several GPUs where it is most; null on the CPU."""
    vram_device_used_bytes: list[int | None] | None = None
    """GPU memory that the driver counts as used, of several GPUs where it is most: the whole
    device's, by all processes, contexts included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where it ran."""

    platform: str
    """System, kernel and architecture."""
    processor: str
    """Its name; empty where the system does not tell."""
    num_cores: int
    """Cores that the process may use."""
    memory_bytes: int
    """Memory of the machine."""
    python: str
    """Version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The whole file. Sizes in bytes, times in seconds."""

    profile_version: int = 1
    """Says what the fields mean; the file begins with it."""
    shardmix: str = __version__
    """Version."""
    outcome: str
    """complete, cancelled or failed: of the last two, what ran."""
    seconds: float
    """From the plan's end until the output was in place: the sum of the next three."""
    load_seconds: float
    """Loading the library that does the sums, and trying the device where it was open."""
    merge_seconds: float
    """From the first worker's start to the last one's end."""
    finish_seconds: float
    """shardmix.json, forcing folders to disk, and the rename."""
    peak_rss_bytes: int
    """Largest resident set of the process so far (VmHWM): it may be from before the merge. The
    kernel counts it less exactly than a sample: they may differ by some pages for each core."""
    peak_vram_bytes: int
    """GPU memory that torch had reserved at most, on one GPU; 0 on the CPU."""
    plan: PlannedMerge
    """What was to be done, and how."""
    stages: dict[str, StageProfile]
    """By name: read, reduce, write, digest, finish (the end of an output file: its header, and
    forcing it to disk) and other (waiting for work, checking what an earlier run left)."""
    machine: Machine
    """Where it ran."""
    samples: Samples
    """Memory and bytes over time."""

    def to_json(self) -> bytes:
        """Return the profile as JSON; `from_json` gives an equal one back."""
        return msgspec.json.encode(self)

    @staticmethod
    def from_json(encoded: bytes) -> "Profile":
        """Return the profile that `to_json` encoded."""
        return msgspec.json.decode(encoded, type=Profile)


def planned_merge(plan: MergePlan) -> PlannedMerge:
    """Return what a profile tells of a plan."""
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
