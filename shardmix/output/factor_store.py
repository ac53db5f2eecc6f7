"""The factors of matrices so far, stored beside a merge's journal for the next call.

LAPACK's last bits differ between machines and numbers of threads, so factors are computed once: a
call that goes on takes these, and an adapter is never made of two computations of one matrix. One
file: a line of JSON that describes the work, then for each parameter a line and the bytes of its
factors (A, then B, in float32). Each is written whole and forced to the disk before it counts. What
follows the last whole one is cut off.
"""

import os
from collections.abc import Sequence
from contextlib import suppress

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from shardmix.errors import OutputError, writing_failed
from shardmix.output.hidden_folder import FACTORS
from shardmix.plan.factoring import Factoring, FactorRecord
from shardmix.plan.identity import MergeDescription, asked_otherwise, changed_files
from shardmix.plan.merge_plan import MergePlan
from shardmix.sources.stored_factors import FactorFile, StoredFactor
from shardmix.system.held_folder import HeldFolder

_FORMAT = 1
_LONGEST_LINE_NBYTES = 64_000_000
_PIECE_NBYTES = 1 << 20


class _Head(msgspec.Struct):
    format: int
    merge: MergeDescription
    names: tuple[str, ...]


class _Line(msgspec.Struct, array_like=True):
    record: FactorRecord
    shapes: tuple[tuple[int, ...], ...]
    nbytes: int
    digest: str
    computed_by: str
    check: str = ""

    def computed_check(self) -> str:
        values = self.record, self.shapes, self.nbytes, self.digest, self.computed_by
        return xxhash.xxh3_64_hexdigest(msgspec.json.encode(values))


class FactorStore:
    """The factors of one plan, earlier ones and new ones."""

    def __init__(self, folder: HeldFolder, plan: MergePlan, *, computed_by: str) -> None:
        """Open a plan's store, new or from an earlier call of the same merge.

        `computed_by` names the library that computes new factors. Raises `OutputError` if it is
        another merge's, and names the difference.
        """
        if plan.factoring is None:
            raise AssertionError("nothing is to be factored")
        self._path = folder.path / FACTORS
        self._fsync = plan.settings.fsync
        self.records: dict[str, FactorRecord] = {}
        """Name of a parameter → its result."""
        self._factors: dict[str, StoredFactor] = {}
        self._digest = xxhash.xxh3_128()
        self._computed_by = computed_by
        self.computed_by: dict[str, None] = {}
        """The libraries that computed factors; several if a call went on elsewhere."""
        try:
            self._descriptor = folder.open_own(FACTORS)
            try:
                self._end = self._read(plan, plan.factoring)
                os.ftruncate(self._descriptor, self._end)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise writing_failed(self._path, error, "cannot be used") from None

    def _read(self, plan: MergePlan, factoring: Factoring) -> int:
        """Read all whole entries; return their end."""
        names = tuple(each.name for each in factoring.differences)
        names += tuple(each.name for each in factoring.products)
        head = _Head(_FORMAT, MergeDescription.of(plan), names)
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            encoded = file.readline(_LONGEST_LINE_NBYTES)
            left = _decoded(encoded)
            if left is None:  # new, or cut off within its first line
                os.ftruncate(self._descriptor, 0)
                self._end = 0
                self._append(msgspec.json.encode(head) + b"\n")
                return self._end
            self._check_same(left, head)
            end = len(encoded)
            while encoded := file.readline(_LONGEST_LINE_NBYTES):
                line = _line(encoded)
                if line is None or not self._holds(file.tell(), line):
                    break
                self._take(line, end + len(encoded))
                end += len(encoded) + line.nbytes
                file.seek(end)
        return end

    def _check_same(self, then: _Head, now: _Head) -> None:
        differences = asked_otherwise(then.merge, now.merge) or changed_files(then.merge, now.merge)
        if then.names != now.names and not differences:
            differences = ["other parameters are to be factored"]
        if differences:
            raise OutputError(
                f"holds the beginning of another merge: {'; '.join(differences[:3])}",
                subject=self._path.parent,
                remedy="give the same merge again to go on from there, or throw it away with "
                "--restart (restart=True)",
            )

    def _holds(self, start: int, line: _Line) -> bool:
        """Return True if the bytes of an entry's factors are those that were written."""
        hasher, position, stop = xxhash.xxh3_128(), start, start + line.nbytes
        while position < stop:
            data = os.pread(self._descriptor, min(_PIECE_NBYTES, stop - position), position)
            if not data:
                return False
            hasher.update(data)
            position += len(data)
        return bool(hasher.hexdigest() == line.digest)

    def _take(self, line: _Line, start: int) -> None:
        name = line.record.name
        self.records[name] = line.record
        self.computed_by.setdefault(line.computed_by)
        self._digest.update(f"{name} {line.digest}\n".encode())
        if line.shapes:
            self._factors[name] = StoredFactor(name, line.shapes, start)

    def add(self, record: FactorRecord, factors: Sequence[npt.NDArray[np.float32]]) -> None:
        """Add a parameter's result and its factors, A and B. Raises `OutputError`."""
        parts = [np.ascontiguousarray(each) for each in factors]
        hasher = xxhash.xxh3_128()
        content = [part.reshape(-1).view(np.uint8).data for part in parts if part.size]
        for each in content:
            hasher.update(each)
        shapes = tuple(part.shape for part in parts)
        nbytes = sum(part.nbytes for part in parts)
        line = _Line(record, shapes, nbytes, hasher.hexdigest(), self._computed_by)
        line.check = line.computed_check()
        encoded = msgspec.json.encode(line) + b"\n"
        start = self._end + len(encoded)
        try:
            self._append(encoded, *content)
        except OSError as error:
            raise writing_failed(self._path, error) from None
        self._take(line, start)

    def _append(self, *parts: bytes | memoryview) -> None:
        for part in parts:
            left = memoryview(part)
            while left:
                count = os.pwrite(self._descriptor, left[: 1 << 30], self._end)
                left, self._end = left[count:], self._end + count
        if self._fsync:
            os.fsync(self._descriptor)

    def finished(self) -> FactorFile:
        """Return the file of all factors, for sources that read it."""
        return FactorFile.of(
            str(self._path.absolute()),
            os.fstat(self._descriptor),
            tuple(self._factors.values()),
            digest=self._digest.hexdigest(),
        )

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            os.close(self._descriptor)


def _decoded(encoded: bytes) -> _Head | None:
    try:
        head = msgspec.json.decode(encoded, type=_Head)
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return None
    return head if encoded.endswith(b"\n") and head.format == _FORMAT else None


def _line(encoded: bytes) -> _Line | None:
    """Return a line, or None if it is torn or spoilt."""
    try:
        line = msgspec.json.decode(encoded, type=_Line)
    except (ValueError, RecursionError):
        return None
    is_whole = encoded.endswith(b"\n") and line.check == line.computed_check()
    return line if is_whole else None
