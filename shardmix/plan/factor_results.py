"""Factors that were computed, for the plan of the adapter that is made of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from shardmix.plan.factoring import FactorRecord
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
