"""Compiles methods for this processor. Knows addresses, not buffers or files."""

import ctypes

import llvmlite.binding as llvm

from shardmix.compute.llvm_assembly import assembly
from shardmix.compute.llvm_kind import KernelKind
from shardmix.dtypes import BY_NAME, LLVM_DTYPES
from shardmix.system.llvm import compiled

LEAST_INFINITE = {name: BY_NAME[name].least_infinite for name in LLVM_DTYPES}
"""The least float32, as bits, that rounding makes infinite; all above are infinite, too, or NaN."""

Addresses = ctypes.Array[ctypes.c_void_p]
"""Address of each source's elements, or of the buffer to read them into."""
Factors = ctypes.Array[ctypes.c_float]
"""The method's factors, in float32."""
Descriptors = ctypes.Array[ctypes.c_int32]
"""Each source's open file."""
Positions = ctypes.Array[ctypes.c_int64]
"""Byte offset of each source's elements in its file."""

_C_LIBRARY = ctypes.CDLL(None)
_PREAD, _CLOCK = (
    ctypes.cast(function, ctypes.c_void_p)
    for function in (_C_LIBRARY.pread, _C_LIBRARY.clock_gettime)
)
_MERGING = (
    *(ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_float)),
    *(ctypes.c_void_p, ctypes.c_int64),
)
_MERGING_SIGNATURE = ctypes.CFUNCTYPE(ctypes.c_uint32, *_MERGING)
_READING_SIGNATURE = ctypes.CFUNCTYPE(
    ctypes.c_uint32,
    *(ctypes.c_void_p, ctypes.c_void_p),
    *(ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_int64)),
    *_MERGING,
    ctypes.POINTER(ctypes.c_int64),
)


class Kernel:
    """The machine code of one kind. Releases the GIL.

    Both functions return the result's largest magnitude as a float32's bits; a NaN's are the
    largest.
    """

    def __init__(self, engine: llvm.ExecutionEngine) -> None:
        self._engine = engine  # owns the code
        self._merge = _MERGING_SIGNATURE(engine.get_function_address("merge"))
        self._read = _READING_SIGNATURE(engine.get_function_address("read_and_merge"))

    def merge(self, sources: Addresses, factors: Factors, out: int, count: int) -> int:
        """Merge `count` elements of every source into the address `out`."""
        largest: int = self._merge(sources, factors, out, count)
        return largest

    def read_and_merge(
        self,
        descriptors: Descriptors,
        positions: Positions,
        sources: Addresses,
        factors: Factors,
        out: int,
        count: int,
        nanoseconds: ctypes.c_int64,
    ) -> int:
        """Read the sources from files, then merge them; sets `nanoseconds` to the time of reading.

        Returns `FAILED` if one could not be read.
        """
        largest: int = self._read(
            _PREAD,
            _CLOCK,
            descriptors,
            positions,
            sources,
            factors,
            out,
            count,
            ctypes.byref(nanoseconds),
        )
        return largest


class Kernels:
    """Compiles kernels, each once; they live as long as this object."""

    def __init__(self) -> None:
        self._kernels: dict[KernelKind, Kernel] = {}

    def kernel(self, kind: KernelKind) -> Kernel:
        """Return the kernel of a kind."""
        if kind not in self._kernels:
            self._kernels[kind] = Kernel(compiled(assembly(kind)))
        return self._kernels[kind]
