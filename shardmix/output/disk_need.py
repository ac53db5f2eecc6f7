"""The disk that a merge will take, asked of those who write: weights, all beside them, journal.

Each file counts in whole blocks, so that the output takes no more than was told, and hardly less.
What may be found in the data (NaN) is not known before; it is added as it is found.
"""

import threading
from collections.abc import Collection
from pathlib import Path

from shardmix.anomalies import NO_ANOMALIES
from shardmix.output import journal, provenance
from shardmix.output.counted_folder import BLOCK_NBYTES, CountedFolder
from shardmix.output.destination import check_disk
from shardmix.output.model_folder import write_all_but_weights
from shardmix.output.staging import Staging
from shardmix.plan.merge_plan import MergePlan

_LONGEST_DIGEST = "0" * 64
# The staging folder, and in it the lock and the marker of the moment of the rename.
_STAGING_NBYTES = 3 * BLOCK_NBYTES


def disk_needed_nbytes(plan: MergePlan) -> int:
    """Return what a plan's output and what is beside it meanwhile take, at most.

    Raises `SourceError` if a file that goes along cannot be read.
    """
    folder = CountedFolder(Path(plan.output))
    write_all_but_weights(plan, folder)
    for shard in plan.shards:
        folder.sizes[shard.filename] = shard.file_nbytes
    digests = dict.fromkeys(folder.sizes, _LONGEST_DIGEST)
    provenance.write_provenance(plan, folder, digests, NO_ANOMALIES, plan_digest=_LONGEST_DIGEST)
    journal_blocks = -(-journal.journal_nbytes(plan) // BLOCK_NBYTES)
    return folder.nbytes + journal_blocks * BLOCK_NBYTES + _STAGING_NBYTES


class AnomalyRoom:
    """Sees to it that what is found in the data still has room on the output's disk.

    Of every tensor that holds NaN a line goes into the journal and one into `shardmix.json`. On a
    disk that is all but full the merge ends here, with what is done kept, and not hours later.
    """

    def __init__(self, plan: MergePlan, staging: Staging) -> None:
        self._plan, self._staging = plan, staging
        self._lock = threading.Lock()
        self._nbytes = 0

    def check(self, tensors: Collection[str]) -> None:
        """Count what is told of some more tensors; raise `OutputError` if that has no room."""
        nbytes = sum(
            provenance.nonfinite_nbytes(name) + journal.nonfinite_nbytes(name) for name in tensors
        )
        with self._lock:
            self._nbytes += nbytes
            needed = self._plan.disk_needed_nbytes + self._nbytes
            check_disk(self._staging.output, needed, staged_nbytes=self._staging.nbytes)
