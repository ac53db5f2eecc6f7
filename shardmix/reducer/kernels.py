"""The weighted sum as LLVM IR, and as machine code for this processor: one pass over all sources.

One kernel for each combination of dtypes. It works on vectors of 64 elements, which LLVM maps to
whatever registers there are; what is left of a strip goes through the same loop one by one. Nothing
allows LLVM to contract a product and a sum into one rounding, so the bits are those of separate
operations (https://llvm.org/docs/LangRef.html#fast-math-flags).

For bfloat16, float16 and float32 on little-endian machines.
"""

import ctypes
import platform
from collections.abc import Callable, Sequence

import llvmlite.binding as llvm

from shardmix.reducer import VECTOR
from shardmix.safetensors_layout import element_nbytes

LEAST_INFINITE = {"BF16": 0x7F7F8000, "F16": 0x477FF000, "F32": 0x7F800000}
"""The least float32, as bits, that rounding makes infinite; all above are infinite, too, or NaN."""

_STORED = {"BF16": "i16", "F16": "half", "F32": "float"}

_LOOP = """
define i32 @weighted_sum_{width}(ptr %sources, ptr %weights, ptr %out, i64 %count) nounwind {{
start:
{arguments}
  br label %loop
loop:
  %i = phi i64 [0, %start], [%next, %loop]
  %largest = phi <{width} x i32> [zeroinitializer, %start], [%larger, %loop]
{sum}
  %bits = bitcast <{width} x float> {total} to <{width} x i32>
  %magnitude = and <{width} x i32> %bits, {magnitude_mask}
  %is_larger = icmp ugt <{width} x i32> %magnitude, %largest
  %larger = select <{width} x i1> %is_larger, <{width} x i32> %magnitude, <{width} x i32> %largest
  %is_nan = icmp ugt <{width} x i32> %magnitude, {infinity}
{rounding}
  %out_at = getelementptr {out_type}, ptr %out, i64 %i
  store <{width} x {out_type}> %rounded, ptr %out_at, align {out_alignment}
  %next = add i64 %i, {width}
  %is_done = icmp uge i64 %next, %count
  br i1 %is_done, label %end, label %loop
end:
  %answer = call i32 @llvm.vector.reduce.umax.v{width}i32(<{width} x i32> %larger)
  ret i32 %answer
}}
declare i32 @llvm.vector.reduce.umax.v{width}i32(<{width} x i32>)
"""

_ARGUMENT = """\
  %source{n}_at = getelementptr ptr, ptr %sources, i64 {n}
  %source{n} = load ptr, ptr %source{n}_at
  %weight{n}_at = getelementptr float, ptr %weights, i64 {n}
  %weight{n} = load float, ptr %weight{n}_at
  %single{n} = insertelement <{width} x float> poison, float %weight{n}, i64 0
  %weights{n} = shufflevector <{width} x float> %single{n}, <{width} x float> poison, \
<{width} x i32> zeroinitializer"""

_LOAD = """\
  %at{n} = getelementptr {type}, ptr %source{n}, i64 %i
  %stored{n} = load <{width} x {type}>, ptr %at{n}, align {alignment}"""

# A bfloat16 is the upper half of a float32.
_WIDEN = {
    "BF16": """\
  %long{n} = zext <{width} x i16> %stored{n} to <{width} x i32>
  %upper{n} = shl <{width} x i32> %long{n}, {sixteen}
  %value{n} = bitcast <{width} x i32> %upper{n} to <{width} x float>""",
    "F16": "  %value{n} = fpext <{width} x half> %stored{n} to <{width} x float>",
    "F32": "  %value{n} = bitcast <{width} x float> %stored{n} to <{width} x float>",
}

_PRODUCT = "  %product{n} = fmul <{width} x float> %weights{n}, %value{n}"
_SUM = "  %sum{n} = fadd <{width} x float> {total}, %product{n}"

# To nearest even, and every NaN as one bit pattern (quiet, positive), whatever made it.
_ROUND = {
    "BF16": """\
  %shifted = lshr <{width} x i32> %bits, {sixteen}
  %odd = and <{width} x i32> %shifted, {one}
  %nearly = add <{width} x i32> %bits, {almost_half}
  %raised = add <{width} x i32> %nearly, %odd
  %high = lshr <{width} x i32> %raised, {sixteen}
  %finite = trunc <{width} x i32> %high to <{width} x i16>
  %rounded = select <{width} x i1> %is_nan, <{width} x i16> {nan}, <{width} x i16> %finite""",
    "F16": """\
  %half = fptrunc <{width} x float> {total} to <{width} x half>
  %rounded = select <{width} x i1> %is_nan, <{width} x half> {nan}, <{width} x half> %half""",
    "F32": """\
  %rounded = select <{width} x i1> %is_nan, <{width} x float> {nan}, <{width} x float> {total}""",
}
_NAN = {"BF16": "i16 32704", "F16": "half 0xH7E00", "F32": "float 0x7FF8000000000000"}

Addresses = ctypes.Array[ctypes.c_void_p]
"""Where each source's elements are."""
Weights = ctypes.Array[ctypes.c_float]
"""Each source's weight, in float32."""
Kernel = Callable[[Addresses, Weights, int, int], int]
"""(sources, weights, address of the output, number of elements) → the sum's largest magnitude as a
float32's bits, where a NaN is the largest of all. Releases the GIL."""

_SIGNATURE = ctypes.CFUNCTYPE(
    ctypes.c_uint32,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_float),
    ctypes.c_void_p,
    ctypes.c_int64,
)


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
        self._engines: list[llvm.ExecutionEngine] = []
        self._kernels: dict[tuple[tuple[str, ...], str], Kernel] = {}

    def kernel(self, dtypes: Sequence[str], out_dtype: str) -> Kernel:
        """Return the kernel for sources of these dtypes (names as in safetensors)."""
        key = tuple(dtypes), out_dtype
        if key not in self._kernels:
            self._kernels[key] = self._compiled(*key)
        return self._kernels[key]

    def _compiled(self, dtypes: tuple[str, ...], out_dtype: str) -> Kernel:
        text = "".join(_assembly(dtypes, out_dtype, width) for width in (VECTOR, 1))
        module = llvm.parse_assembly(text)
        module.verify()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
        )
        engine = llvm.create_mcjit_compiler(module, machine)  # to which the machine now belongs
        engine.finalize_object()
        self._engines.append(engine)
        vectors, singles = (
            _SIGNATURE(engine.get_function_address(f"weighted_sum_{width}"))
            for width in (VECTOR, 1)
        )
        widths = [element_nbytes(dtype) for dtype in dtypes]
        out_width = element_nbytes(out_dtype)

        def weighted_sum(sources: Addresses, weights: Weights, out: int, count: int) -> int:
            whole = count - count % VECTOR
            largest: int = vectors(sources, weights, out, whole) if whole else 0
            if whole == count:
                return largest
            starts = (at + whole * width for at, width in zip(sources, widths, strict=True))
            rest = (ctypes.c_void_p * len(widths))(*starts)
            last: int = singles(rest, weights, out + whole * out_width, count - whole)
            return max(largest, last)

        return weighted_sum


def _assembly(dtypes: Sequence[str], out_dtype: str, width: int) -> str:
    """Return the IR of the loop that takes `width` elements at once; at least that many."""

    def splat(constant: str) -> str:
        return f"<{', '.join([constant] * width)}>"

    words = {
        "width": width,
        "sixteen": splat("i32 16"),
        "one": splat("i32 1"),
        "almost_half": splat(f"i32 {0x7FFF}"),
        "magnitude_mask": splat(f"i32 {0x7FFFFFFF}"),
        "infinity": splat(f"i32 {0x7F800000}"),
        "nan": splat(_NAN[out_dtype]),
    }
    lines, total = [], ""
    for n, dtype in enumerate(dtypes):
        words |= {
            "n": n,
            "type": _STORED[dtype],
            "alignment": element_nbytes(dtype),
            "total": total,
        }
        lines += [part.format_map(words) for part in (_LOAD, _WIDEN[dtype], _PRODUCT)]
        if n:
            lines.append(_SUM.format_map(words))
        total = f"%sum{n}" if n else "%product0"
    words["total"] = total
    return _LOOP.format_map(
        words
        | {
            "arguments": "\n".join(_ARGUMENT.format(n=n, width=width) for n in range(len(dtypes))),
            "sum": "\n".join(lines),
            "rounding": _ROUND[out_dtype].format_map(words),
            "out_type": _STORED[out_dtype],
            "out_alignment": element_nbytes(out_dtype),
        }
    )
