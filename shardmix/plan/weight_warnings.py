"""Warnings of the effects of weights: models left out by 0, variances made negative.

Reads the recipe's weights and tensor names, never values.
"""

import re
from collections.abc import Iterable, Iterator

from shardmix.errors import listed
from shardmix.methods.base import vanishes_in_float32
from shardmix.recipe import Recipe
from shardmix.recipe.parameters import source_weights

# Statistics that are never negative: variances and deviations (BatchNorm, buffers of data
# normalisers), sizes of a codebook's clusters, second moments of optimisers. Their logarithms may
# be.
_NEVER_NEGATIVE = re.compile(
    r"(^|[._])((?<!log_)(var|variance|std)|cluster_size|cluster_usage|exp_avg_sq)$"
)


def weight_warnings(recipe: Recipe, names: Iterable[str]) -> Iterator[str]:
    """Yield warnings about a recipe's weights for float tensors of these names."""
    weighted = [
        (source, weight)
        for source, weight in zip(recipe.sources, source_weights(recipe), strict=True)
        if weight is not None
    ]
    for source, weight in weighted:
        if weight == 0:
            yield f"{source}: has the weight 0: left out, none of its values is read"
        elif vanishes_in_float32(weight):
            yield (
                f"{source}: has the weight {weight!r}, which is 0 in float32: left out "
                "of all that is summed in float32; give it a larger one if it is to count"
            )
    negative = [
        (source, weight)
        for source, weight in weighted
        if weight < 0 and not vanishes_in_float32(weight)
    ]
    if not negative:
        return
    found = [name for name in names if _NEVER_NEGATIVE.search(name)]
    if found:
        yield (
            f"{listed(found, 1)}: is a variance or a count, which is never negative, but the "
            f"weight {negative[0][1]!r} of {negative[0][0]} may make it so, and its square "
            "root NaN; compute such statistics anew from data, or use weights of 0 and more"
        )
