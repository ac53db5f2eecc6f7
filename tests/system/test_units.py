import pytest

from shardmix.errors import RecipeError
from shardmix.system.units import format_mib, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1", 1),
        (4096, 4096),
        ("512MiB", 512 * 2**20),
        ("2GB", 2 * 10**9),
        ("2 gb", 2 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("70TB", 70 * 10**12),
        ("100b", 100),
    ],
)
def test_sizes_read_decimal_or_binary_units(text, num_bytes):
    """Sizes are read as decimal or binary units."""
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "GB", "2XB", "-1GB", "1e9", "0", 0, -5, "2GB 3", "9" * 400, 2**70, True, 1.5]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(RecipeError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_600, "1.00 MB"),
        (2_200_000_000, "2.20 GB"),
        (141_000_000_000, "141 GB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_sizes_are_shown_in_three_figures(num_bytes, text):
    assert format_size(num_bytes) == text


def test_size_rounds_up_to_be_typed_back():
    """A memory size is rounded up so that it can be typed back."""
    assert format_mib(2**20 + 1) == "2MiB"
    assert parse_size(format_mib(2**20 + 1)) >= 2**20 + 1
