"""The journal of a merge: the finished leaves of its output files, for the next call to go on.

One JSON value a line: first the merge's description, then a line for each leaf, 4 MiB of an output
file. A line is only a claim: before it is used, the leaf is read from the disk and hashed, and
merged again if that is not the claimed digest. So torn lines, lost writes and claims that a power
cut made false cost work, not bytes, and the journal needs no fsync. To read a finished leaf costs a
fraction of merging it; workers do both side by side. The anomalies of a leaf (NaN, Inf, integers
that differ) are in its line, so that a merge in ten pieces reports the same as a merge in one.

The first line has the plan's digest, and the words that a user would describe the merge by. Sources
are known by their weight files' path, size, times of modification and of status change (`ctime`,
which nobody can set back; the inode if a file system has none) and SHA-256 of the header; those of
the Hub by their commit. Any other merge is refused, naming the difference; `--restart` discards the
journal. Budget, workers, device, backend and the way to read may differ.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import xxhash

from shardmix._version import __version__
from shardmix.anomalies import NO_ANOMALIES, LeafAnomalies
from shardmix.dtypes import element_nbytes
from shardmix.errors import OutputError, writing_failed
from shardmix.methods import keep_first
from shardmix.methods.statistics import num_entries
from shardmix.plan.identity import MergeDescription, asked_otherwise, changed_files
from shardmix.plan.merge_plan import MergePlan
from shardmix.system.hashing import LEAF_NBYTES, LeafDigests, num_leaves
from shardmix.system.held_folder import HeldFolder

JOURNAL_NAME = "journal"
_FORMAT = 3
_STATISTICS = b'["'  # the start of a line of statistics; claims start with a number
_LONGEST_LINE_NBYTES = 64_000_000  # the first one names every file, others all anomalies of a leaf


class _Format(msgspec.Struct):
    format: int
    version: str


class _Head(_Format):
    plan_digest: str
    merge: MergeDescription
    file_nbytes: tuple[int, ...]


_LONGEST_FLOAT = float.hex(-float.fromhex("0x1.fffffffffffffp+1023"))
# A line's end, and brackets of a few statistics.
_MOST_STATISTICS_NBYTES = 1 + 16


class _StatisticsLine(msgspec.Struct, array_like=True):
    """Statistics of a tensor, which a later merge need not gather again."""

    tensor: str
    statistics: tuple[tuple[str, ...], ...]
    """The entries in hex (`float.hex`), since JSON has no NaN and no infinity."""
    check: str
    """XXH3 (hex) of the fields above, since nothing else would reveal a damaged value."""

    @classmethod
    def of(cls, tensor: str, statistics: Sequence[Sequence[float]]) -> "_StatisticsLine":
        line = cls(tensor, tuple(tuple(map(float.hex, entry)) for entry in statistics), "")
        return cls(line.tensor, line.statistics, line.computed_check())

    def computed_check(self) -> str:
        return xxhash.xxh3_64_hexdigest(msgspec.json.encode((self.tensor, self.statistics)))

    def values(self) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(map(float.fromhex, entry)) for entry in self.statistics)


class _Line(msgspec.Struct, array_like=True):
    shard: int
    leaf: int
    digest: str
    anomalies: LeafAnomalies = NO_ANOMALIES


@dataclass(frozen=True, slots=True)
class JournalSummary:
    """The claims of a journal, for a status report."""

    merge: MergeDescription
    """The merge."""
    num_bytes_done: int
    """Bytes of weight files claimed."""
    num_bytes: int
    """Bytes of all weight files."""
    num_shards_done: int
    """Output files with all leaves claimed."""
    num_shards: int
    """All output files."""


class Claim(NamedTuple):
    """A claim that a leaf is written."""

    shard: int
    """Index of its file in `MergePlan.shards`."""
    leaf: int
    """Number of the leaf."""
    digest: bytes
    """Digest of its bytes."""
    anomalies: LeafAnomalies
    """Anomalies in it."""


class Claims(Protocol):
    """Leaves that are claimed. Workers ask for them and add to them."""

    @property
    def leaves(self) -> Sequence[LeafDigests]:
        """For each output file, the leaves that are claimed; those added join them."""

    @property
    def statistics(self) -> Mapping[str, tuple[tuple[float, ...], ...]]:
        """Name of a tensor → its statistics, as far as they are known."""

    def anomalies(self, shard: int, leaf: int) -> LeafAnomalies:
        """Return the anomalies of a claimed leaf."""

    def add(self, shard: int, leaf: int, digest: bytes, anomalies: LeafAnomalies) -> None:
        """Claim a leaf whose bytes are written."""

    def taken(self, shard: int, first_leaf: int, stop_leaf: int) -> tuple[Claim, ...]:
        """Take away the claims in a range of leaves that are still to go into the journal."""

    def carried(self) -> "CarriedClaims":
        """Return the same claims, for a worker in another process."""


class CarriedClaims:
    """The claims of a journal in another process, which is told of those added here."""

    def __init__(
        self,
        leaves: Sequence[LeafDigests],
        anomalies: Mapping[str, LeafAnomalies],
        statistics: Mapping[str, tuple[tuple[float, ...], ...]],
    ) -> None:
        self.leaves = leaves
        self.statistics = statistics
        self._anomalies = anomalies
        self._added: dict[tuple[int, int], Claim] = {}

    def anomalies(self, shard: int, leaf: int) -> LeafAnomalies:
        """Return the anomalies of a claimed leaf."""
        return self._anomalies.get(f"{shard}/{leaf}", NO_ANOMALIES)

    def add(self, shard: int, leaf: int, digest: bytes, anomalies: LeafAnomalies) -> None:
        """Claim a leaf whose bytes are written."""
        self.leaves[shard].put(leaf, digest)
        self._added[shard, leaf] = Claim(shard, leaf, digest, anomalies)

    def taken(self, shard: int, first_leaf: int, stop_leaf: int) -> tuple[Claim, ...]:
        """Take away the claims in a range of leaves that are still to go into the journal."""
        keys = [(shard, leaf) for leaf in range(first_leaf, stop_leaf)]
        return tuple(self._added.pop(key) for key in keys if key in self._added)

    def carried(self) -> "CarriedClaims":
        """Return the same claims, for a worker in another process."""
        return CarriedClaims(self.leaves, self._anomalies, self.statistics)


class Journal:
    """A journal open for one merge: earlier claims, and those added."""

    def __init__(
        self,
        path: Path,
        descriptor: int,
        leaves: Sequence[LeafDigests],
        anomalies: dict[str, LeafAnomalies],
        statistics: dict[str, tuple[tuple[float, ...], ...]],
        plan_digest: str,
    ) -> None:
        self.plan_digest = plan_digest
        """Digest of the plan that it was opened for; independent of how the plan is carried out."""
        self._path = path
        self._descriptor = descriptor
        self._anomalies = anomalies
        self._lock = threading.Lock()
        self.leaves = leaves
        """For each output file, the claimed leaves; those added join them."""
        self.statistics = statistics
        """Name of a tensor → its statistics; those added join them."""

    @property
    def num_leaves_done(self) -> int:
        """Number of claimed leaves."""
        return sum(leaves.num_known for leaves in self.leaves)

    def anomalies(self, shard: int, leaf: int) -> LeafAnomalies:
        """Return the anomalies in a claimed leaf's line."""
        return self._anomalies.get(f"{shard}/{leaf}", NO_ANOMALIES)

    def add(self, shard: int, leaf: int, digest: bytes, anomalies: LeafAnomalies) -> None:
        """Claim a leaf whose bytes are written. Raises `OutputError`."""
        with self._lock:
            self._append(_Line(shard, leaf, digest.hex(), anomalies))
            self.leaves[shard].put(leaf, digest)

    def add_statistics(self, name: str, found: tuple[tuple[float, ...], ...]) -> None:
        """Add a tensor's statistics. Raises `OutputError`."""
        with self._lock:
            self._append(_StatisticsLine.of(name, found))
            self.statistics[name] = found

    def _append(self, value: msgspec.Struct) -> None:
        line = bytearray()
        msgspec.json.Encoder().encode_into(value, line)
        line += b"\n"
        try:
            _write(self._descriptor, line)
        except OSError as error:
            raise writing_failed(self._path, error) from None

    def taken(self, shard: int, first_leaf: int, stop_leaf: int) -> tuple[Claim, ...]:
        """Return nothing: what was added is in the journal."""
        return ()

    def carried(self) -> CarriedClaims:
        """Return the same claims, for a worker in another process."""
        return CarriedClaims(self.leaves, self._anomalies, self.statistics)

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # a lost claim costs work, not bytes
            os.close(self._descriptor)


def open_journal(folder: HeldFolder, plan: MergePlan) -> Journal:
    """Open a merge's journal, new or from an earlier call of the same merge.

    Raises `OutputError` if it is another merge's, and names the difference.
    """
    path = folder.path / JOURNAL_NAME
    leaves = [LeafDigests(plan.digest_algorithm, shard.file_nbytes) for shard in plan.shards]
    head = _head(plan, plan.digest())
    try:
        descriptor = folder.open_own(JOURNAL_NAME, append=True)
        try:
            left = _read_head(folder)
            if left is None:  # new, or cut off within its first line
                os.ftruncate(descriptor, 0)
                _write(descriptor, msgspec.json.encode(head) + b"\n")
                return Journal(path, descriptor, leaves, {}, {}, head.plan_digest)
            _check_same(path, left, head)
            anomalies, statistics, valid_nbytes = _read_lines(folder, leaves)
            os.ftruncate(descriptor, valid_nbytes)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise writing_failed(path, error, "cannot be used") from None
    return Journal(path, descriptor, leaves, anomalies, statistics, head.plan_digest)


def journal_nbytes(plan: MergePlan) -> int:
    """Return the most bytes that a merge's journal takes without NaN and Inf, statistics included.

    Integers may differ between models in every leaf of their tensor.
    """
    head = msgspec.json.encode(_head(plan, "0" * 64))
    lines = 0
    for number, shard in enumerate(plan.shards):
        leaves = LeafDigests(plan.digest_algorithm, shard.file_nbytes)
        line = _Line(number, len(leaves), "00" * leaves.digest_nbytes)
        lines += len(leaves) * (len(msgspec.json.encode(line)) + 1)
        for segment in shard.merged:
            if segment.is_pending:
                count = num_entries(plan.needed_statistics(segment), len(segment.sources))
                line_of = _StatisticsLine(segment.name, ((_LONGEST_FLOAT,) * count,), "0" * 16)
                lines += len(msgspec.json.encode(line_of)) + _MOST_STATISTICS_NBYTES
            if segment.method == keep_first.NAME:
                stop = segment.out_offset + segment.num_elements * element_nbytes(segment.out_dtype)
                num_parts = num_leaves(stop) - segment.out_offset // LEAF_NBYTES
                lines += num_parts * len(
                    msgspec.json.encode(
                        {segment.name: [source.source for source in segment.sources]}
                    )
                )
    return len(head) + 1 + lines


def nonfinite_nbytes(name: str) -> int:
    """Return the most bytes that a line takes more for a tensor with NaN or Inf."""
    most = 10**15
    return len(msgspec.json.encode({name: (most, most, most)}))


def summarise(folder: HeldFolder) -> JournalSummary | None:
    """Return the claims of a staging folder's journal, or None if it is missing or empty.

    Raises OSError, and `OutputError` if it is not a file.
    """
    if folder.entry(JOURNAL_NAME) is None:
        return None
    head = _read_head(folder)
    if head is None:
        return None
    counts = list(map(num_leaves, head.file_nbytes))
    done: list[set[int]] = [set() for _ in counts]
    with folder.open_regular(JOURNAL_NAME) as file:
        file.readline(_LONGEST_LINE_NBYTES)
        while encoded := file.readline(_LONGEST_LINE_NBYTES):
            if encoded.startswith(_STATISTICS):
                continue
            try:
                line = msgspec.json.decode(encoded, type=_Line)
            except (ValueError, RecursionError):  # torn; msgspec's errors are ValueErrors
                break
            if 0 <= line.shard < len(done):
                done[line.shard].add(line.leaf)
    return JournalSummary(
        merge=head.merge,
        num_bytes_done=min(sum(map(len, done)) * LEAF_NBYTES, sum(head.file_nbytes)),
        num_bytes=sum(head.file_nbytes),
        num_shards_done=sum(
            len(leaves) == count for leaves, count in zip(done, counts, strict=True)
        ),
        num_shards=len(counts),
    )


def _head(plan: MergePlan, plan_digest: str) -> _Head:
    return _Head(
        _FORMAT,
        __version__,
        plan_digest,
        MergeDescription.of(plan),
        tuple(shard.file_nbytes for shard in plan.shards),
    )


def _write(descriptor: int, data: bytes | bytearray) -> None:
    """Append all bytes, by as many calls as needed."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def _read_head(folder: HeldFolder) -> _Head | None:
    with folder.open_regular(JOURNAL_NAME) as file:
        encoded = file.readline(_LONGEST_LINE_NBYTES)
    if not encoded.endswith(b"\n"):
        return None
    try:
        _check_format(folder.path / JOURNAL_NAME, msgspec.json.decode(encoded, type=_Format))
        return msgspec.json.decode(encoded, type=_Head)
    except (ValueError, RecursionError):
        return None


def _read_lines(
    folder: HeldFolder, leaves: Sequence[LeafDigests]
) -> tuple[dict[str, LeafAnomalies], dict[str, tuple[tuple[float, ...], ...]], int]:
    """Read the claims into `leaves`.

    Returns their anomalies, the statistics of tensors, and the end of the last good line.
    """
    anomalies: dict[str, LeafAnomalies] = {}
    statistics: dict[str, tuple[tuple[float, ...], ...]] = {}
    with folder.open_regular(JOURNAL_NAME) as file:
        end = len(file.readline(_LONGEST_LINE_NBYTES))
        while encoded := file.readline(_LONGEST_LINE_NBYTES):
            if encoded.startswith(_STATISTICS):
                found = _statistics(encoded)
                if found is None:
                    break
                statistics[found.tensor] = found.values()
                end += len(encoded)
                continue
            try:
                line = msgspec.json.decode(encoded, type=_Line)
                digest = bytes.fromhex(line.digest)
            except (ValueError, RecursionError):  # torn; msgspec's errors are ValueErrors
                break
            if not encoded.endswith(b"\n"):
                break
            if not 0 <= line.shard < len(leaves) or not leaves[line.shard].fits(line.leaf, digest):
                break
            leaves[line.shard].put(line.leaf, digest)
            key = f"{line.shard}/{line.leaf}"
            anomalies.pop(key, None)
            if line.anomalies:
                anomalies[key] = line.anomalies
            end += len(encoded)
    return anomalies, statistics, end


def _statistics(encoded: bytes) -> _StatisticsLine | None:
    """Return a line of statistics, or None if it is torn or spoilt."""
    try:
        line = msgspec.json.decode(encoded, type=_StatisticsLine)
        line.values()
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return None
    is_whole = encoded.endswith(b"\n") and line.check == line.computed_check()
    return line if is_whole else None


def _check_format(path: Path, then: _Format) -> None:
    if then.format != _FORMAT:
        raise OutputError(
            f"was left by shardmix {then.version}, whose journal this one cannot read",
            subject=path.parent,
            remedy="go on with that version, or throw it away with --restart (restart=True)",
        )


def _check_same(path: Path, then: _Head, now: _Head) -> None:
    differences = asked_otherwise(then.merge, now.merge)
    remedy = "give the same merge again to go on from there, or throw it away with --restart"
    if not differences:
        differences = changed_files(then.merge, now.merge)
        remedy = "throw it away with --restart"
        if not differences and then.plan_digest == now.plan_digest:
            return
    found = "; ".join(differences[:3]) or f"shardmix {then.version} planned it otherwise"
    if len(differences) > 3:
        found += f"; and {len(differences) - 3} more differences"
    raise OutputError(
        f"holds the beginning of another merge: {found}",
        subject=path.parent,
        remedy=f"{remedy} (restart=True)",
    )
