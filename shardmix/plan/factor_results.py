"""Factors that were computed, for the plan of the adapter that is made of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shardmix.plan.factoring import FactorRecord, LowRankFacts
from shardmix.sources.stored_factors import FactorFile


@dataclass(frozen=True, slots=True)
class FactorResults:
    """All results of a factoring."""

    records: Mapping[str, FactorRecord]
    """Name of a parameter → its result."""
    file: FactorFile
    """The factors."""
    computed_by: tuple[str, ...]
    """Libraries that computed them."""
    peak_nbytes: int
    """Upper bound of the process's memory meanwhile."""

    def facts(
        self, records: Iterable[FactorRecord], *, whole: Iterable[str], left: Iterable[str] = ()
    ) -> LowRankFacts:
        """Return all that is known of the adapter that is made of them.

        `records` are those of its parameters with factors; `whole` names those that are kept whole,
        and `left` those that stay as in the base.
        """
        return LowRankFacts(
            records=tuple(records),
            whole=tuple(whole),
            left=tuple(left),
            computed_by=self.computed_by,
            digest=self.file.digest,
            nbytes=self.file.file.nbytes,
            peak_nbytes=self.peak_nbytes,
        )
