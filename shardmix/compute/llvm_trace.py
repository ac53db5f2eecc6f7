"""A method's `combine` as LLVM IR on vectors of float32.

Runs the method once, with names of IR values instead of arrays, and records the instructions. No
flag allows LLVM to contract operations, so each one is rounded separately
(https://llvm.org/docs/LangRef.html#fast-math-flags).
"""

from collections.abc import Sequence

from shardmix.compute.llvm_kind import KernelKind
from shardmix.methods.base import combined
from shardmix.methods.registry import merge_method


def traced(
    kind: KernelKind, values: Sequence[str], factors: Sequence[str], width: int
) -> tuple[str, str]:
    """Return the instructions that combine IR values, and the name of the result.

    `values` and `factors` name vectors of `width` floats.
    """
    ops = _TracingOps(width)
    result = combined(merge_method(kind.method), ops, values, factors, kind.are_changes)
    return "\n".join(ops.lines), result


class _TracingOps:
    """Writes an instruction for each operation; a mask is a vector of bits."""

    def __init__(self, width: int) -> None:
        self._floats = f"<{width} x float>"
        self._masks = f"<{width} x i1>"
        self._magnitudes = f"@llvm.fabs.v{width}f32"
        self.lines: list[str] = []

    def add(self, a: str, b: str) -> str:
        """Write a + b."""
        return self._written(f"fadd {self._floats} {a}, {b}")

    def sub(self, a: str, b: str) -> str:
        """Write a - b."""
        return self._written(f"fsub {self._floats} {a}, {b}")

    def mul(self, a: str, b: str) -> str:
        """Write a · b."""
        return self._written(f"fmul {self._floats} {a}, {b}")

    def div(self, a: str, b: str) -> str:
        """Write a / b."""
        return self._written(f"fdiv {self._floats} {a}, {b}")

    def abs(self, a: str) -> str:
        """Write |a|."""
        return self._written(f"call {self._floats} {self._magnitudes}({self._floats} {a})")

    def less(self, a: str, b: str) -> str:
        """Write the comparison a < b."""
        return self._written(f"fcmp olt {self._floats} {a}, {b}")

    def select(self, mask: str, a: str, b: str) -> str:
        """Write the choice between a and b."""
        return self._written(f"select {self._masks} {mask}, {self._floats} {a}, {self._floats} {b}")

    def _written(self, instruction: str) -> str:
        name = f"%merged{len(self.lines)}"
        self.lines.append(f"  {name} = {instruction}")
        return name
