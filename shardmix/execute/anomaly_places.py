"""Which tensors of an output hold what a reducer found in a chunk: by name, and by leaf.

Only for the rare chunk in which something was found.
"""

from collections.abc import Iterator

from shardmix.anomalies import AnomalySum, LeafAnomalies
from shardmix.compute.backend import Reducer
from shardmix.dtypes import element_nbytes
from shardmix.execute.tasks import Chunk, TensorPlaces
from shardmix.system.digests import LEAF_NBYTES


def chunk_anomalies(
    chunk: Chunk, reducer: Reducer, places: TensorPlaces
) -> Iterator[tuple[int, LeafAnomalies]]:
    """Yield (leaf, findings) for the chunk that a reducer has just finished."""
    width = element_nbytes(chunk.segment.out_dtype)
    first = chunk.out_position
    stop = first + chunk.num_elements * width
    for leaf in range(first // LEAF_NBYTES, -(-stop // LEAF_NBYTES)):
        start_in_leaf = max(first, leaf * LEAF_NBYTES)
        stop_in_leaf = min(stop, (leaf + 1) * LEAF_NBYTES)
        found = AnomalySum()
        if reducer.disagreeing:
            models = (
                chunk.segment.sources[source].source for source in sorted(reducer.disagreeing)
            )
            found.add(LeafAnomalies(disagreeing={chunk.segment.name: tuple(models)}))
        if not reducer.is_finite:
            for name, start, end in places.between(start_in_leaf, stop_in_leaf):
                part = (start - first) // width, (end - first) // width
                found.count(name, reducer.count_nonfinite(*part))
        yield leaf, found.total()
