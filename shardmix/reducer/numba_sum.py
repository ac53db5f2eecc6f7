"""The weighted sum as compiled loops over bit patterns: bfloat16 and float32, on the CPU.

One pass a source instead of torch's three, and no torch in the process. numba does not contract a
product and a sum into one rounding (fastmath is off), so the bits are torch's. Kernels are
compiled once on a machine and cached, beside this file or in the user's cache folder.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba.extending import overload

from shardmix.plan import Run
from shardmix.safetensors_layout import element_nbytes

# bfloat16 has no type here: its bits are the upper half of a float32's.
_STORED: dict[str, npt.DTypeLike] = {"BF16": np.uint16, "F32": np.float32}
_FLOAT32_NBYTES = 4


def _widen(stored):
    """Return a stored value as float32."""
    raise TypeError("for compiled code alone")


def _rounded(value, out):
    """Return a float32 as an element of `out`, to nearest even; every NaN in one bit pattern."""
    raise TypeError("for compiled code alone")


@overload(_widen, inline="always")
def _compile_widen(stored):
    if isinstance(stored, numba.types.Float):
        return lambda stored: stored
    return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)


@overload(_rounded, inline="always")
def _compile_rounded(value, out):
    if isinstance(out.dtype, numba.types.Float):
        return lambda value, out: value if value == value else np.float32(np.nan)

    def to_bfloat16(value, out):
        bits = np.float32(value).view(np.uint32)
        odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        return np.uint16(rounded if value == value else np.uint32(0x7FC0))

    return to_bfloat16


def _start(stored, weight, total):
    for index in range(total.size):
        total[index] = weight * _widen(stored[index])


def _add(stored, weight, total):
    for index in range(total.size):
        total[index] = total[index] + weight * _widen(stored[index])


def _add_and_round(stored, weight, total, out):
    for index in range(total.size):
        out[index] = _rounded(total[index] + weight * _widen(stored[index]), out)


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is nowhere to keep a cache: each process compiles anew
        return numba.njit(nogil=True)(function)


class NumbaBackend:
    """Compiles the kernels that some runs need, and makes reducers."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self._kernels = _compiled(_start), _compiled(_add), _compiled(_add_and_round)
        # A strip of one element of every kind: then no worker compiles, and what compiling takes
        # in memory is there when memory is measured.
        reducer = self.make_reducer(strip_nbytes=_FLOAT32_NBYTES)
        for run in {(run.dtypes, run.out_dtype): run for run in runs}.values():
            reducer.begin(run, 1)
            for source in range(len(run.dtypes)):
                staging = reducer.staging(source)
                reducer.add(source, staging)
            reducer.finish()

    def make_reducer(self, *, strip_nbytes: int) -> "CompiledSum":
        """Return one worker's reducer, with all its buffers allocated."""
        return CompiledSum(*self._kernels, strip_nbytes=strip_nbytes)

    def finding(self) -> str | None:
        """Return None: where it is installed, it works."""
        return None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Leave everything as it is."""
        yield

    def peak_vram_nbytes(self) -> int:
        """Return 0: there is no GPU in it."""
        return 0


class CompiledSum:
    """The weighted sum of one worker."""

    disagreeing: frozenset[int] = frozenset()

    def __init__(
        self,
        start: Callable[..., None],
        add: Callable[..., None],
        add_and_round: Callable[..., None],
        *,
        strip_nbytes: int,
    ) -> None:
        self._start, self._add, self._add_and_round = start, add, add_and_round
        nbytes = max(strip_nbytes, _FLOAT32_NBYTES)
        self._raw = np.zeros(nbytes, dtype=np.uint8)
        self._out = np.zeros(nbytes, dtype=np.uint8)
        self._sum = np.zeros(nbytes // _FLOAT32_NBYTES, dtype=np.float32)

    def begin(self, run: Run, num_elements: int) -> None:
        """Start a strip of a run."""
        self._run = run
        self._num_elements = num_elements
        self._total = self._sum[:num_elements]

    def staging(self, source: int) -> memoryview:
        """Return the buffer to read this source's part of the strip into."""
        nbytes = self._num_elements * element_nbytes(self._run.dtypes[source])
        return self._raw[:nbytes].data

    def add(self, source: int, raw: memoryview) -> None:
        """Take in a source's bytes, in source order; the last one's sum is rounded at once."""
        run = self._run
        stored = np.frombuffer(raw, dtype=_STORED[run.dtypes[source]])
        weight = np.float32(run.weights[source])
        if source == 0:
            self._start(stored, weight, self._total)
        elif source < len(run.dtypes) - 1:
            self._add(stored, weight, self._total)
        else:
            self._add_and_round(stored, weight, self._total, self._typed_out())

    def finish(self) -> memoryview:
        """Return the strip's output bytes, valid until the next `begin`."""
        return self._typed_out().view(np.uint8).data

    def _typed_out(self) -> npt.NDArray[Any]:
        nbytes = self._num_elements * element_nbytes(self._run.out_dtype)
        return self._out[:nbytes].view(_STORED[self._run.out_dtype])
