"""Losses to merging weights: a softmax. Knows only numbers."""

import math
from collections.abc import Sequence

from shardmix.errors import RecipeError


def check_temperature(temperature: float) -> None:
    """Raise `RecipeError` if no softmax has this temperature."""
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not (is_number and temperature > 0 and math.isfinite(temperature)):
        raise RecipeError("must be a positive number", subject=f"temperature {temperature!r}")


def compute_weights(losses: Sequence[float], temperature: float = 5.0) -> list[float]:
    """Return w_i = softmax_i(-L_i / temperature): the lower a model's loss, the more it counts.

    Source: LM-Cocktail (arXiv 2311.13534), section 3. A high temperature makes the weights similar,
    a low one gives all to the best model. They sum to 1.

    Raises `RecipeError` if a loss is not finite or the temperature is not positive.

    Example:
        >>> compute_weights([1.0, 1.0])
        [0.5, 0.5]
    """
    check_temperature(temperature)
    if not losses:
        raise RecipeError(
            "no losses given; weights need at least one", remedy="give the loss of each model"
        )
    for number, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            raise RecipeError(
                f"loss {number} is {loss}; weights need finite losses",
                remedy="leave that model out",
            )
    least = min(losses)  # subtracted, so that no exponential overflows
    shares = [math.exp((least - loss) / temperature) for loss in losses]
    total = math.fsum(shares)
    return [share / total for share in shares]
