"""What there is to tell of merged data besides its bytes: NaN, Inf, and integers that differ."""

from dataclasses import dataclass
from functools import lru_cache

import msgspec


class LeafAnomalies(msgspec.Struct, array_like=True, frozen=True):
    """The findings in one range of an output file; mostly there are none."""

    nonfinite: dict[str, tuple[int, int, int]] = {}
    """Tensor → its NaNs, its Infs, and how many of those Infs came of rounding."""
    disagreeing: dict[str, tuple[int, ...]] = {}
    """Integer tensor → the models that differ from the first."""

    def __bool__(self) -> bool:
        return bool(self.nonfinite or self.disagreeing)


NO_ANOMALIES = LeafAnomalies()


@dataclass(frozen=True, slots=True)
class NonfiniteCounts:
    """How many elements of some output are not finite."""

    num_nan: int
    """NaNs."""
    num_inf: int
    """Infinities of either sign, those that overflowed among them."""
    num_overflowed: int
    """Infinities whose sum was finite: rounding it to the output's dtype made them."""


class AnomalySum:
    """The findings of several ranges as those of one, added up as they come.

    What is added costs no more for what was there before: all of a model may be NaN.
    """

    def __init__(self) -> None:
        self._nonfinite: dict[str, tuple[int, int, int]] = {}
        self._disagreeing: dict[str, set[int]] = {}

    def has_nonfinite(self, name: str) -> bool:
        """Tell whether a tensor holds NaN or Inf in what was added."""
        return name in self._nonfinite

    def add(self, findings: LeafAnomalies) -> None:
        """Take in what was found in one more range."""
        for name, counts in findings.nonfinite.items():
            there = self._nonfinite.get(name)
            if there is not None:
                nan, inf, overflowed = there
                counts = nan + counts[0], inf + counts[1], overflowed + counts[2]
            self._nonfinite[name] = counts  # mostly the very object, shared between sums
        for name, models in findings.disagreeing.items():
            self._disagreeing.setdefault(name, set()).update(models)

    def count(self, name: str, counts: NonfiniteCounts) -> None:
        """Take in what was counted in one more part of a tensor, if it is not nothing."""
        if counts.num_nan or counts.num_inf:
            triple = _triple(counts.num_nan, counts.num_inf, counts.num_overflowed)
            self.add(LeafAnomalies(nonfinite={name: triple}))

    def total(self) -> LeafAnomalies:
        """Return all of it, not copied: nothing more may be added."""
        return LeafAnomalies(
            self._nonfinite,
            {name: tuple(sorted(models)) for name, models in self._disagreeing.items()},
        )


@lru_cache(maxsize=512)
def _triple(num_nan: int, num_inf: int, num_overflowed: int) -> tuple[int, int, int]:
    """Return counts as one tuple wherever they are the same: tensors of one shape often have."""
    return num_nan, num_inf, num_overflowed
