"""Anomalies of merged data: NaN, Inf, and integers that differ between models."""

from dataclasses import dataclass
from functools import lru_cache

import msgspec


class LeafAnomalies(msgspec.Struct, array_like=True, frozen=True):
    """The anomalies in one range of an output file; mostly there are none."""

    nonfinite: dict[str, tuple[int, int, int]] = {}
    """Tensor → its NaNs, its Infs, and the Infs among them that came from rounding."""
    disagreeing: dict[str, tuple[int, ...]] = {}
    """Integer tensor → the models that differ from the first."""

    def __bool__(self) -> bool:
        return bool(self.nonfinite or self.disagreeing)


NO_ANOMALIES = LeafAnomalies()


@dataclass(frozen=True, slots=True)
class NonfiniteCounts:
    """The number of elements of an output that are not finite."""

    num_nan: int
    """NaNs."""
    num_inf: int
    """Infinities of either sign, overflowed ones included."""
    num_overflowed: int
    """Infinities whose sum was finite: rounding to the output's dtype made them."""


class AnomalySum:
    """The anomalies of several ranges, added up as they come.

    Adding costs no more for those added before, even if all of a model is NaN.
    """

    def __init__(self) -> None:
        self._nonfinite: dict[str, tuple[int, int, int]] = {}
        self._disagreeing: dict[str, set[int]] = {}

    def has_nonfinite(self, name: str) -> bool:
        """Return True if an added range has NaN or Inf in this tensor."""
        return name in self._nonfinite

    def add(self, anomalies: LeafAnomalies) -> None:
        """Add the anomalies of one more range."""
        for name, counts in anomalies.nonfinite.items():
            there = self._nonfinite.get(name)
            if there is not None:
                nan, inf, overflowed = there
                counts = nan + counts[0], inf + counts[1], overflowed + counts[2]
            self._nonfinite[name] = counts  # mostly the same object, shared between sums
        for name, models in anomalies.disagreeing.items():
            self._disagreeing.setdefault(name, set()).update(models)

    def count(self, name: str, counts: NonfiniteCounts) -> None:
        """Add the counts of one more part of a tensor, if there are any."""
        if counts.num_nan or counts.num_inf:
            triple = _triple(counts.num_nan, counts.num_inf, counts.num_overflowed)
            self.add(LeafAnomalies(nonfinite={name: triple}))

    def total(self) -> LeafAnomalies:
        """Return the sum, not copied: nothing more may be added."""
        return LeafAnomalies(
            self._nonfinite,
            {name: tuple(sorted(models)) for name, models in self._disagreeing.items()},
        )


@lru_cache(maxsize=512)
def _triple(num_nan: int, num_inf: int, num_overflowed: int) -> tuple[int, int, int]:
    """Return counts as a shared tuple: tensors of one shape often have the same."""
    return num_nan, num_inf, num_overflowed
