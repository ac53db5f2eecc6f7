"""The weighted sum as compiled loops over bit patterns: bfloat16 and float32, on the CPU.

One pass a source instead of torch's three, and no torch in the process. numba does not contract a
product and a sum into one rounding (fastmath is off), so the bits are torch's. Kernels are
compiled once on a machine and cached, beside this file or in the user's cache folder.

The compiled loops don't look at NaNs. The last one keeps the sum's largest magnitude instead, which
takes no longer and finds infinities as well; a strip that has either is rounded anew, in numpy.
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
from shardmix.reducer.nonfinite import NonfiniteCounts, count_nonfinite, pieces
from shardmix.safetensors_layout import element_nbytes

# bfloat16 has no type here: its bits are the upper half of a float32's.
_STORED: dict[str, npt.DTypeLike] = {"BF16": np.uint16, "F32": np.float32}
_FLOAT32_NBYTES = 4
# The least float32, as bits, that rounding makes infinite; all above are infinite, too, or NaN.
_LEAST_INFINITE = {"BF16": 0x7F7F8000, "F32": 0x7F800000}
_NAN = {"BF16": np.uint16(0x7FC0), "F32": np.float32(np.nan)}


def _widen(stored):
    """Return a stored value as float32."""
    raise TypeError("for compiled code alone")


def _rounded(bits, out):
    """Return a float32, given as bits, as an element of `out`, to nearest even; not for NaNs."""
    raise TypeError("for compiled code alone")


@overload(_widen, inline="always")
def _compile_widen(stored):
    if isinstance(stored, numba.types.Float):
        return lambda stored: stored
    return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)


@overload(_rounded, inline="always")
def _compile_rounded(bits, out):
    if isinstance(out.dtype, numba.types.Float):
        return lambda bits, out: np.uint32(bits).view(np.float32)

    def to_bfloat16(bits, out):
        odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))

    return to_bfloat16


def _start(stored, weight, total):
    for index in range(total.size):
        total[index] = weight * _widen(stored[index])


def _add(stored, weight, total):
    for index in range(total.size):
        total[index] = total[index] + weight * _widen(stored[index])


def _add_and_round(stored, weight, total, out):
    """Round the whole sum; return its largest magnitude, as bits, where a NaN is the largest."""
    largest = np.uint32(0)
    for index in range(total.size):
        bits = np.float32(total[index] + weight * _widen(stored[index])).view(np.uint32)
        out[index] = _rounded(bits, out)
        largest = max(largest, np.uint32(bits & np.uint32(0x7FFFFFFF)))
    return largest


def _add_and_round_any(stored, weight, total, out, nan):
    """Do the same in numpy, with every NaN in one bit pattern, and keep the sum in `total`."""
    for piece in pieces(0, total.size):
        values, part = stored[piece], total[piece]
        if values.dtype == np.uint16:
            values = (values.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            part += weight * values
        if out.dtype == np.uint16:
            bits = part.view(np.uint32)
            out[piece] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        else:
            out[piece] = part
        out[piece][np.isnan(part)] = nan


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
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
    is_finite = True

    def __init__(
        self,
        start: Callable[..., None],
        add: Callable[..., None],
        add_and_round: Callable[..., int],
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
            out = self._typed_out()
            largest = self._add_and_round(stored, weight, self._total, out)
            self.is_finite = largest < _LEAST_INFINITE[run.out_dtype]
            if not self.is_finite:  # anew, and now, while the source's bytes are there
                _add_and_round_any(stored, weight, self._total, out, _NAN[run.out_dtype])

    def finish(self) -> memoryview:
        """Return the strip's output bytes, valid until the next `begin`."""
        return self._typed_out().view(np.uint8).data

    def count_nonfinite(self, start: int, stop: int) -> NonfiniteCounts:
        """Count in a range of elements of the strip last finished."""
        # `_total` lacks the last source where the strip is finite, but then nothing asks for it.
        out, total = self.finish(), self._total
        return count_nonfinite(out, self._run.out_dtype, total.__getitem__, start, stop)

    def _typed_out(self) -> npt.NDArray[Any]:
        nbytes = self._num_elements * element_nbytes(self._run.out_dtype)
        return self._out[:nbytes].view(_STORED[self._run.out_dtype])
