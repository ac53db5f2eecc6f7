"""Sizes: "2GiB" to bytes and back."""

import re
from fractions import Fraction

from shardmix.errors import RecipeError, shown

_TOO_MUCH = 1 << 63
KIB, MIB = 1 << 10, 1 << 20

_FACTORS = {
    "": 1,
    "B": 1,
    **{unit + "B": 1000**power for power, unit in enumerate("KMGT", start=1)},
    **{unit + "IB": 1024**power for power, unit in enumerate("KMGT", start=1)},
}
_SIZE = re.compile(r"\s*(\d{1,40}(?:\.\d{1,40})?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Return the bytes that a size means: `"512MiB"` is 512 × 2**20, `"2GB"` is 2 × 10**9.

    An integer, or only digits, count bytes. Raises `RecipeError` for anything else.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        num_bytes = text
    else:
        match = _SIZE.fullmatch(text) if isinstance(text, str) else None
        factor = _FACTORS.get(match[2].upper()) if match else None
        if match is None or factor is None:
            raise RecipeError(
                "not a size",
                subject=f"size {shown(text)}",
                remedy="write a number and a unit, such as 512MiB, 2GB or 1.5GiB",
            )
        num_bytes = int(Fraction(match[1]) * factor)
    if num_bytes >= _TOO_MUCH:
        raise RecipeError(
            "more bytes than any machine has",
            subject=f"size {shown(text)}",
            remedy="write a smaller one",
        )
    if num_bytes <= 0:
        raise RecipeError("must be more than zero", subject=f"size {shown(text)}")
    return num_bytes


def format_size(num_bytes: float) -> str:
    """Format a size for people: three figures, powers of 1000 (`"2.20 GB"`), as disks count."""
    units = ["TB", "GB", "MB", "kB", "B"]
    while abs(num_bytes) >= 999.5 and len(units) > 1:
        num_bytes /= 1000
        units.pop()
    unit = units[-1]
    if unit == "B":
        return f"{num_bytes:.0f} B"
    decimals = 2 if abs(num_bytes) < 9.995 else 1 if abs(num_bytes) < 99.95 else 0
    return f"{num_bytes:.{decimals}f} {unit}"


def format_mib(num_bytes: int) -> str:
    """Format a memory size as it is typed for `--max-memory`: whole MiB, rounded up."""
    return f"{-(-num_bytes // MIB)}MiB"
