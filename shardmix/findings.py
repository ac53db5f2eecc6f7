"""What there is to tell of merged data besides its bytes: NaN, Inf, and integers that differ."""

from collections.abc import Iterable

import msgspec


class LeafFindings(msgspec.Struct, array_like=True, frozen=True):
    """The findings in one range of an output file; mostly there are none."""

    nonfinite: dict[str, tuple[int, int, int]] = {}
    """Tensor → its NaNs, its Infs, and how many of those Infs came of rounding."""
    disagreeing: dict[str, tuple[int, ...]] = {}
    """Integer tensor → the models that differ from the first."""

    def __bool__(self) -> bool:
        return bool(self.nonfinite or self.disagreeing)


NOTHING_FOUND = LeafFindings()


def combined(findings: Iterable[LeafFindings]) -> LeafFindings:
    """Return the findings of several ranges as those of one."""
    nonfinite: dict[str, tuple[int, int, int]] = {}
    disagreeing: dict[str, set[int]] = {}
    for found in findings:
        for name, counts in found.nonfinite.items():
            nan, inf, overflowed = nonfinite.get(name, (0, 0, 0))
            nonfinite[name] = (nan + counts[0], inf + counts[1], overflowed + counts[2])
        for name, models in found.disagreeing.items():
            disagreeing.setdefault(name, set()).update(models)
    return LeafFindings(
        nonfinite, {name: tuple(sorted(models)) for name, models in disagreeing.items()}
    )
