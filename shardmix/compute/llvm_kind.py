"""The kinds of kernels."""

from typing import NamedTuple

from shardmix.methods.registry import merge_method
from shardmix.plan.merge_plan import Segment


class KernelKind(NamedTuple):
    """The properties that a kernel is compiled for."""

    method: str
    """Name of the method."""
    num_factors: int
    """Number of its factors."""
    dtypes: tuple[str, ...]
    """Safetensors dtype of each source."""
    are_changes: tuple[bool, ...]
    """For each source, True if its values are changes to the base model."""
    out_dtype: str
    """Safetensors dtype of the output."""

    @classmethod
    def of(cls, segment: Segment, out_dtype: str | None = None) -> "KernelKind":
        """Return the kind for a segment, or for the segment with another output dtype."""
        return cls(
            method=segment.method,
            num_factors=len(segment.factors) or segment.num_pending,
            dtypes=segment.dtypes,
            are_changes=segment.are_changes,
            out_dtype=out_dtype or segment.out_dtype,
        )

    @property
    def is_weighted_sum(self) -> bool:
        """True if it is Σ factorᵢ · sourceᵢ."""
        return merge_method(self.method).is_weighted_sum
