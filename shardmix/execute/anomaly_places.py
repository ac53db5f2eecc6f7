"""Which tensors of an output hold what a reducer found in a strip: by name, and by leaf.

Only for the rare strip in which something was found.
"""

from collections.abc import Iterator

from shardmix.anomalies import FindingsSum, LeafFindings
from shardmix.compute.backend import Reducer
from shardmix.execute.tasks import Strip, TensorPlaces
from shardmix.formats.safetensors_layout import element_nbytes
from shardmix.system.digests import LEAF_NBYTES


def strip_findings(
    strip: Strip, reducer: Reducer, places: TensorPlaces
) -> Iterator[tuple[int, LeafFindings]]:
    """Yield (leaf, findings) for the strip that a reducer has just finished."""
    width = element_nbytes(strip.run.out_dtype)
    first = strip.out_position
    stop = first + strip.num_elements * width
    for leaf in range(first // LEAF_NBYTES, -(-stop // LEAF_NBYTES)):
        start_in_leaf = max(first, leaf * LEAF_NBYTES)
        stop_in_leaf = min(stop, (leaf + 1) * LEAF_NBYTES)
        found = FindingsSum()
        if reducer.disagreeing:
            models = (strip.run.models[source] for source in sorted(reducer.disagreeing))
            found.add(LeafFindings(disagreeing={strip.run.name: tuple(models)}))
        if not reducer.is_finite:
            for name, start, end in places.between(start_in_leaf, stop_in_leaf):
                part = (start - first) // width, (end - first) // width
                found.count(name, reducer.count_nonfinite(*part))
        yield leaf, found.total()
