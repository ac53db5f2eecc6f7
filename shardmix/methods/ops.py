"""The operations that methods are written with: each is rounded by itself, so that bits agree.

A method's `combine` is one function of arrays. Backends hand in what runs it: torch on the CPU or a
GPU, or a tracer that turns it into a compiled loop. Every operation is one IEEE rounding in all of
them, so all give the same bits.
"""

from typing import Protocol, TypeVar

A = TypeVar("A")
"""An array of elements, or a mask of them; what it is belongs to the backend."""


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
    """Counts what a method does with an element: how many results it makes, of them masks."""

    def __init__(self) -> None:
        self.num_results = 0
        self.num_masks = 0

    def _result(self, *_: None) -> None:
        self.num_results += 1

    add = sub = mul = div = abs = select = _result

    def less(self, a: None, b: None) -> None:
        """Count a mask."""
        self.num_masks += 1
