"""The operations that methods are written with: each one is rounded separately, so bits agree.

A method's `combine` is one function of arrays. Backends pass in the operations: torch on the CPU or
a GPU, or a tracer that turns it into a compiled loop. Every operation is one IEEE rounding in all
of them, so all give the same bits.
"""

from typing import Protocol, TypeVar

A = TypeVar("A")
"""An array of elements, or a mask of them; its type belongs to the backend."""


class Ops(Protocol[A]):
    """Operations on arrays of one length. A second argument may be a number: one of the factors."""

    def add(self, a: A, b: A) -> A:
        """Return a + b."""

    def sub(self, a: A, b: A) -> A:
        """Return a - b."""

    def mul(self, a: A, b: A) -> A:
        """Return a · b."""

    def div(self, a: A, b: A) -> A:
        """Return a / b."""

    def abs(self, a: A) -> A:
        """Return |a|."""

    def less(self, a: A, b: A) -> A:
        """Return the mask of elements with a < b; false if either is NaN."""

    def select(self, mask: A, a: A, b: A) -> A:
        """Return a's element if the mask is true, else b's."""


class CountingOps:
    """Counts what a method does with an element. It stands for every array itself."""

    num_results = 0
    """Number of arrays that the method makes."""
    num_masks = 0
    """Number of masks that it makes."""

    def _result(self, *_: "CountingOps") -> "CountingOps":
        self.num_results += 1
        return self

    add = sub = mul = div = abs = select = _result

    def less(self, a: "CountingOps", b: "CountingOps") -> "CountingOps":
        """Count a mask."""
        self.num_masks += 1
        return self
