"""Warnings of the effects of weights: models left out by 0, variances made negative.

Reads the recipe's weights and tensor names, never values.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

from shardmix.errors import listed
from shardmix.methods.base import Params, vanishes_in_float32
from shardmix.recipe import Recipe
from shardmix.recipe.parameters import shares_of
from shardmix.recipe.recipe import WEIGHT

# Statistics that are never negative: variances and deviations (BatchNorm, buffers of data
# normalisers), sizes of a codebook's clusters, second moments of optimisers. Their logarithms may
# be.
_NEVER_NEGATIVE = re.compile(
    r"(^|[._])((?<!log_)(var|variance|std)|cluster_size|cluster_usage|exp_avg_sq)$"
)


def weight_warnings(
    recipe: Recipe, groups: Sequence[Params], names: Iterable[str]
) -> Iterator[str]:
    """Yield what to know of a recipe's weights for float tensors of these names.

    `groups` are the parameters that tensors have. Weights of 0 are told of if all tensors have
    them, negative ones if any has.
    """
    if not all(WEIGHT in own for params in groups for own in params.by_model):
        return
    shares = list(map(shares_of, groups))
    by_model = [[share[model] for share in shares] for model in range(len(recipe.models))]
    weighted = list(zip((model.source for model in recipe.models), by_model, strict=True))
    for source, weights in weighted:
        if not any(weights):
            yield f"{source}: has the weight 0: left out, none of its values is read"
        elif all(map(vanishes_in_float32, weights)):
            yield (
                f"{source}: has the weight {weights[0]!r}, which is 0 in float32: left out "
                "of all that is summed in float32; give it a larger one if it is to count"
            )
    negative = [
        (source, weight)
        for source, weights in weighted
        for weight in weights
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
