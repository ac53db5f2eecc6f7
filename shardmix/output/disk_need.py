"""The disk space of a merge, counted by the code that writes: weights, all other files, journal.

Each file counts in whole blocks, so that the output takes no more than planned, and hardly less.
Anomalies in the data (NaN) are unknown beforehand; they are added as they are found.
"""

import threading
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from shardmix.anomalies import NO_ANOMALIES
from shardmix.output import journal, provenance
from shardmix.output.counted_folder import BLOCK_NBYTES, CountedFolder
from shardmix.output.destination import check_disk
from shardmix.output.model_folder import write_all_but_weights
from shardmix.plan.merge_plan import MergePlan
from shardmix.system.hashing import SHA256, digest_nbytes

if TYPE_CHECKING:
    from shardmix.output.staging import Staging

# The staging folder, and in it the lock and the marker of the rename.
_STAGING_NBYTES = 3 * BLOCK_NBYTES


def disk_needed_nbytes(plan: MergePlan) -> int:
    """Return the most disk space that a plan's output and its temporary files take.

    Raises `SourceError` if a file that goes along cannot be read.
    """
    folder = CountedFolder(Path(plan.output))
    write_all_but_weights(plan, folder)
    for shard in plan.shards:
        folder.sizes[shard.filename] = shard.file_nbytes
    digests = dict.fromkeys(folder.sizes, "00" * digest_nbytes(plan.digest_algorithm))
    any_digest = "00" * digest_nbytes(SHA256)
    provenance.write_provenance(plan, folder, digests, NO_ANOMALIES, plan_digest=any_digest)
    journal_blocks = -(-journal.journal_nbytes(plan) // BLOCK_NBYTES)
    factor_blocks = -(-plan.factors_nbytes // BLOCK_NBYTES)
    return folder.nbytes + (journal_blocks + factor_blocks) * BLOCK_NBYTES + _STAGING_NBYTES


class AnomalyRoom:
    """Checks that records of anomalies still fit on the output's disk.

    For every tensor with NaN a line goes into the journal and one into `shardmix.json`. On a disk
    that is nearly full the merge ends here and can be resumed, instead of failing hours later.
    """

    def __init__(self, plan: MergePlan, staging: "Staging") -> None:
        self._plan, self._staging = plan, staging
        self._lock = threading.Lock()
        self._nbytes = 0

    def check(self, tensors: Collection[str]) -> None:
        """Count the records of some more tensors; raise `OutputError` if the disk lacks room."""
        nbytes = sum(
            provenance.nonfinite_nbytes(name) + journal.nonfinite_nbytes(name) for name in tensors
        )
        with self._lock:
            self._nbytes += nbytes
            needed = self._plan.disk_needed_nbytes + self._nbytes
            check_disk(self._staging.output, needed, staged_nbytes=self._staging.nbytes)
