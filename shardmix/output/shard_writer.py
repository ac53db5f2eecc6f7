"""An output file that grows in a staging folder: written, hashed and claimed leaf by leaf.

Puts a writer, claims and digests together. Knows bytes and leaves, not where they come from.
"""

import itertools
from collections import defaultdict

from shardmix.anomalies import NO_ANOMALIES, AnomalySum, LeafAnomalies
from shardmix.output.file_writer import ShardWriter
from shardmix.output.journal import Claims
from shardmix.plan.merge_plan import MergePlan
from shardmix.system.hashing import LEAF_NBYTES, LeafHasher, file_hasher
from shardmix.system.held_folder import HeldFolder
from shardmix.system.timer import DIGEST, FINISH, NO_CLOCK, OTHER, WRITE, Clock


class GrowingShard:
    """One output file, for all workers; each leaf belongs to one of them."""

    def __init__(
        self,
        plan: MergePlan,
        number: int,
        folder: HeldFolder,
        claims: Claims,
        clock: Clock = NO_CLOCK,
    ) -> None:
        self._planned = plan.shards[number]
        self._number = number
        self._algorithm = plan.digest_algorithm
        self._fsync = plan.settings.fsync
        self._clock = clock
        self._claims = claims
        self._leaves = claims.leaves[number]
        # With sha256 one worker writes the whole file, from end to end.
        self._whole = file_hasher(self._algorithm)
        self._writer = ShardWriter(
            folder,
            self._planned.filename,
            file_nbytes=self._planned.file_nbytes,
            keep_cached=plan.cache_use.keeps_output,
        )

    def reused(self, leaf: int, buffer: memoryview) -> LeafAnomalies | None:
        """Return the anomalies of a leaf that an earlier merge wrote; None if it must be merged
        again.

        Its bytes are read again, through the buffer, and hashed: a claim is not enough.
        """
        claimed = self._leaves.get(leaf)
        if claimed is None:
            return None
        start = leaf * LEAF_NBYTES
        stop = min(start + LEAF_NBYTES, self._planned.file_nbytes)
        head = self._head(start, stop)
        data = self._writer.read(start + len(head), stop, buffer)
        hasher, digests = self._leaf_hasher(leaf), []
        whole = None if self._whole is None else self._whole.copy()
        for part in itertools.chain([memoryview(head)], data):
            digests += [digest for _, digest in hasher.update(part)]
            if whole is not None:
                whole.update(part)
        if digests != [claimed]:
            self._leaves.forget(leaf)
            return None
        self._whole = whole
        return self._claims.anomalies(self._number, leaf)

    def next_claimed(self, leaf: int, stop_leaf: int) -> int:
        """Return the first claimed leaf from `leaf` on, at most `stop_leaf`."""
        while leaf < stop_leaf and self._leaves.get(leaf) is None:
            leaf += 1
        return leaf

    def begin(self, first_leaf: int, stop_leaf: int) -> "GrowingLeaves":
        """Start to write a range of leaves, in order."""
        head = self._head(first_leaf * LEAF_NBYTES, stop_leaf * LEAF_NBYTES)
        return GrowingLeaves(self, self._leaf_hasher(first_leaf), memoryview(head))

    def finish(self) -> str:
        """Finish the file, once all leaves are written, and return its digest (hex)."""
        # Also if all leaves were reused: the earlier merge may have been killed just before
        # this.
        self._clock.lap(OTHER)
        self._writer.finish(self._planned.head(), fsync=self._fsync)
        self._clock.lap(FINISH, self._planned.head_nbytes())
        return self._whole.digest().hex() if self._whole else self._leaves.file_digest()

    def close(self) -> None:
        """Close the file, finished or not."""
        self._writer.close()

    def write(self, position: int, data: memoryview) -> None:
        """Write a chunk's bytes."""
        self._writer.write(position, data)
        self._clock.lap(WRITE, len(data))

    def take_in(self, data: memoryview) -> None:
        """Add bytes to the digest of the whole file, if the algorithm needs them in order."""
        if self._whole is not None:
            self._whole.update(data)

    def hashed(self, num_bytes: int) -> None:
        """Count bytes as hashed."""
        self._clock.lap(DIGEST, num_bytes)

    def claim(self, leaf: int, digest: bytes, anomalies: LeafAnomalies) -> None:
        """Claim a leaf that is written."""
        self._clock.lap(DIGEST)
        if self._fsync:
            self._writer.start_writeback(leaf * LEAF_NBYTES, LEAF_NBYTES)
        self._claims.add(self._number, leaf, digest, anomalies)
        self._clock.lap(WRITE)

    def _leaf_hasher(self, first_leaf: int) -> LeafHasher:
        nbytes = self._planned.file_nbytes
        return LeafHasher(self._algorithm, file_nbytes=nbytes, first_leaf=first_leaf)

    def _head(self, start: int, stop: int) -> bytes:
        """Return the header's bytes in a range of the file: hashed like data, but written last."""
        return self._planned.head_between(start, stop) if start < self._planned.data_start else b""


class GrowingLeaves:
    """A range of leaves that one worker writes, in order."""

    def __init__(self, shard: GrowingShard, hasher: LeafHasher, head: memoryview) -> None:
        self._shard = shard
        self._hasher = hasher
        self._anomalies: defaultdict[int, AnomalySum] = defaultdict(AnomalySum)
        self._hash(head)

    def note(self, leaf: int, anomalies: LeafAnomalies) -> None:
        """Add the anomalies of a chunk's part of a leaf; call it before the chunk is written."""
        self._anomalies[leaf].add(anomalies)

    def write(self, position: int, data: memoryview) -> None:
        """Write the next chunk's bytes, and claim each leaf that they complete."""
        self._shard.write(position, data)
        self._hash(data)

    def _hash(self, data: memoryview) -> None:
        self._shard.take_in(data)
        for leaf, digest in self._hasher.update(data):
            found = self._anomalies.pop(leaf, None)
            self._shard.claim(leaf, digest, NO_ANOMALIES if found is None else found.total())
        self._shard.hashed(len(data))
