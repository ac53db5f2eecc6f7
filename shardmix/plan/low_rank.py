"""The report of an adapter's factors: rank and error, parameter by parameter."""

import math
from dataclasses import dataclass

from shardmix.plan.factoring import LowRankFacts


@dataclass(frozen=True, slots=True)
class ParameterError:
    """The factors of one parameter, and what they lack. Norms are Frobenius norms."""

    name: str
    """Name of the parameter."""
    rank: int
    """Rank of its factors; 0 if it did not change."""
    relative_error: float
    """Norm of the change minus the factors' product, as measured, over the change's norm."""
    energy: float
    """Share of the squared norm that the factors keep."""
    norm: float
    """Norm of the change."""


@dataclass(frozen=True, slots=True)
class LowRankReport:
    """The share of changes that an adapter keeps, and what it lacks."""

    relative_error: float
    """Error of all factors together, over the norm of all changes that they stand for."""
    parameters: tuple[ParameterError, ...]
    """Each parameter with factors, in order."""
    kept_whole: tuple[str, ...]
    """Parameters that changed and are kept whole, without error."""
    left_out: tuple[str, ...]
    """Parameters that changed and are left as in the base."""
    computed_by: tuple[str, ...]
    """Libraries that computed the factors."""


def describe_low_rank(facts: LowRankFacts) -> LowRankReport:
    """Return the report of an adapter's factors."""
    error = math.sqrt(math.fsum(each.error**2 for each in facts.records))
    norm = math.sqrt(math.fsum(each.norm**2 for each in facts.records))
    return LowRankReport(
        relative_error=error / norm if norm else 0.0,
        parameters=tuple(
            ParameterError(
                name=each.name,
                rank=each.rank,
                relative_error=each.error / each.norm if each.norm else 0.0,
                energy=1 - (each.error / each.norm) ** 2 if each.norm else 1.0,
                norm=each.norm,
            )
            for each in facts.records
        ),
        kept_whole=facts.whole,
        left_out=facts.left,
        computed_by=facts.computed_by,
    )
