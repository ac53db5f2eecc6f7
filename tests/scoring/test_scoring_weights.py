import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmix.errors import RecipeError
from shardmix.scoring import compute_weights

LOSSES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12)


@given(LOSSES, st.floats(1e-3, 1e3))
def test_weights_are_softmax_of_losses(losses, temperature):
    """Weights are the softmax of negative losses."""
    scaled = -np.array(losses, dtype=np.longdouble) / temperature
    shares = np.exp(scaled - scaled.max())
    assert compute_weights(losses, temperature) == pytest.approx(
        (shares / shares.sum()).astype(float), abs=1e-12
    )


@given(LOSSES)
def test_they_sum_to_one(losses):
    assert math.fsum(compute_weights(losses, 5.0)) == pytest.approx(1.0, abs=1e-15)


def test_default_temperature_is_lm_cocktails():
    """The default temperature is LM-Cocktail's."""
    assert compute_weights([1.0, 2.0]) == compute_weights([1.0, 2.0], 5.0)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf])
def test_a_temperature_must_be_positive(temperature):
    with pytest.raises(RecipeError, match=r"temperature .*must be a positive number"):
        compute_weights([1.0, 2.0], temperature)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_infinite_loss_gives_no_weights(loss):
    """A loss that is not finite gives no weights."""
    with pytest.raises(RecipeError, match="loss 2 is"):
        compute_weights([1.0, loss])
