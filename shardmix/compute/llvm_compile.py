"""Compiles weighted sums for this processor. Knows addresses, not buffers or files."""

import ctypes
import platform
from collections.abc import Sequence

import llvmlite.binding as llvm

from shardmix.compute.llvm_assembly import assembly

LEAST_INFINITE = {"BF16": 0x7F7F8000, "F16": 0x477FF000, "F32": 0x7F800000}
"""The least float32, as bits, that rounding makes infinite; all above are infinite, too, or NaN."""

Addresses = ctypes.Array[ctypes.c_void_p]
"""Where each source's elements are, or are to be read to."""
Weights = ctypes.Array[ctypes.c_float]
"""Each source's weight, in float32."""
Descriptors = ctypes.Array[ctypes.c_int32]
"""Each source's open file."""
Positions = ctypes.Array[ctypes.c_int64]
"""Where in its file each source's elements are, in bytes."""

_C_LIBRARY = ctypes.CDLL(None)
_PREAD, _CLOCK = (
    ctypes.cast(function, ctypes.c_void_p)
    for function in (_C_LIBRARY.pread, _C_LIBRARY.clock_gettime)
)
_SUMMING = (
    *(ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_float)),
    *(ctypes.c_void_p, ctypes.c_int64),
)
_SUM_SIGNATURE = ctypes.CFUNCTYPE(ctypes.c_uint32, *_SUMMING)
_READING_SIGNATURE = ctypes.CFUNCTYPE(
    ctypes.c_uint32,
    *(ctypes.c_void_p, ctypes.c_void_p),
    *(ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_int64)),
    *_SUMMING,
    ctypes.POINTER(ctypes.c_int64),
)


class Kernel:
    """The machine code for one combination of dtypes. Releases the GIL.

    Both functions return the sum's largest magnitude as a float32's bits, where a NaN is the
    largest of all.
    """

    def __init__(self, engine: llvm.ExecutionEngine) -> None:
        self._engine = engine  # whose the code is
        self._sum = _SUM_SIGNATURE(engine.get_function_address("weighted_sum"))
        self._read = _READING_SIGNATURE(engine.get_function_address("read_and_sum"))

    def weighted_sum(self, sources: Addresses, weights: Weights, out: int, count: int) -> int:
        """Sum `count` elements of every source into the address `out`."""
        largest: int = self._sum(sources, weights, out, count)
        return largest

    def read_and_sum(
        self,
        descriptors: Descriptors,
        positions: Positions,
        sources: Addresses,
        weights: Weights,
        out: int,
        count: int,
        nanoseconds: ctypes.c_int64,
    ) -> int:
        """Read the sources from files, then sum them; `nanoseconds` becomes what reading took.

        Returns `FAILED` where one could not be read.
        """
        largest: int = self._read(
            _PREAD,
            _CLOCK,
            descriptors,
            positions,
            sources,
            weights,
            out,
            count,
            ctypes.byref(nanoseconds),
        )
        return largest


def finding() -> str | None:
    """Say why kernels cannot be had on this processor, or None if they can."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return None
    if machine not in ("x86_64", "amd64"):
        return f"it is not tried on {machine} processors"
    if not llvm.get_host_cpu_features().get("f16c"):
        return "this processor lacks the instructions f16c"
    return None


class Kernels:
    """Compiles kernels, each once; what it compiled lives as long as it does."""

    def __init__(self) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self._kernels: dict[tuple[tuple[str, ...], str], Kernel] = {}

    def kernel(self, dtypes: Sequence[str], out_dtype: str) -> Kernel:
        """Return the kernel for sources of these dtypes (names as in safetensors)."""
        key = tuple(dtypes), out_dtype
        if key not in self._kernels:
            self._kernels[key] = self._compiled(*key)
        return self._kernels[key]

    def _compiled(self, dtypes: tuple[str, ...], out_dtype: str) -> Kernel:
        module = llvm.parse_assembly(assembly(dtypes, out_dtype))
        module.verify()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
        )
        engine = llvm.create_mcjit_compiler(module, machine)  # to which the machine now belongs
        engine.finalize_object()
        return Kernel(engine)
