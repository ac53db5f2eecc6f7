"""The loops of kernels as LLVM IR: elements are loaded, widened, merged, rounded and stored.

One pass over all sources, in vectors of elements, which LLVM maps to the registers of the machine.
The code between loading and rounding is the method's (`llvm_trace`), except for weighted sums of
bfloat16, whose loop is written by hand.
"""

from shardmix.compute.llvm_kind import KernelKind
from shardmix.compute.llvm_trace import traced
from shardmix.dtypes import BY_NAME, LLVM_DTYPES, element_nbytes
from shardmix.plan.chunk_size import VECTOR
from shardmix.system.llvm_floats import WIDEN, splat

INFINITY = BY_NAME["F32"].infinity or 0
STORED = {name: BY_NAME[name].llvm_name for name in LLVM_DTYPES}

_LOOP = """
define internal i32 @merge_{width}\
(ptr %sources, ptr %factors, ptr %out, i64 %count) nounwind {{
start:
{arguments}
  br label %loop
loop:
  %i = phi i64 [0, %start], [%next, %loop]
  %largest = phi <{width} x i32> [zeroinitializer, %start], [%larger, %loop]
{merging}
  %bits = bitcast <{width} x float> {merged} to <{width} x i32>
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
declare <{width} x float> @llvm.fabs.v{width}f32(<{width} x float>)
"""

_SOURCE = """\
  %source{n}_at = getelementptr ptr, ptr %sources, i64 {n}
  %source{n} = load ptr, ptr %source{n}_at"""

_FACTOR = """\
  %factor{n}_at = getelementptr float, ptr %factors, i64 {n}
  %single{n} = load float, ptr %factor{n}_at
  %first{n} = insertelement <{width} x float> poison, float %single{n}, i64 0
  %factor{n} = shufflevector <{width} x float> %first{n}, <{width} x float> poison, \
<{width} x i32> zeroinitializer"""

_LOAD = """\
  %at{n} = getelementptr {type}, ptr %source{n}, i64 %i
  %stored{n} = load <{width} x {type}>, ptr %at{n}, align {alignment}"""

# To nearest even, and every NaN as one bit pattern (quiet, positive), whatever made it.
ROUND = {
    "BF16": """\
  %shifted = lshr <{width} x i32> %bits, {sixteen}
  %odd = and <{width} x i32> %shifted, {one}
  %nearly = add <{width} x i32> %bits, {almost_half}
  %raised = add <{width} x i32> %nearly, %odd
  %high = lshr <{width} x i32> %raised, {sixteen}
  %finite = trunc <{width} x i32> %high to <{width} x i16>
  %rounded = select <{width} x i1> %is_nan, <{width} x i16> {nan}, <{width} x i16> %finite""",
    "F16": """\
  %half = fptrunc <{width} x float> {merged} to <{width} x half>
  %rounded = select <{width} x i1> %is_nan, <{width} x half> {nan}, <{width} x half> %half""",
    "F32": """\
  %rounded = select <{width} x i1> %is_nan, <{width} x float> {nan}, <{width} x float> {merged}""",
}
NAN = {"BF16": "i16 32704", "F16": "half 0xH7E00", "F32": "float 0x7FF8000000000000"}

# If all is bfloat16: two elements as one 32-bit lane, the first in its lower half. That saves
# the shuffles and half of the shifts. A NaN becomes anything; the answer shows that there is one.
_LOOP_OF_PAIRS = """
define internal i32 @merge_pairs(ptr %sources, ptr %factors, ptr %out, i64 %count) \
nounwind {{
start:
{arguments}
  br label %loop
loop:
  %i = phi i64 [0, %start], [%next, %loop]
  %largest = phi <{lanes} x i32> [zeroinitializer, %start], [%larger, %loop]
{sums}
{low}
{high}
  %larger_low = call <{lanes} x i32> @llvm.umax.v{lanes}i32\
(<{lanes} x i32> %largest, <{lanes} x i32> %magnitude_low)
  %larger = call <{lanes} x i32> @llvm.umax.v{lanes}i32\
(<{lanes} x i32> %larger_low, <{lanes} x i32> %magnitude_high)
  %lower = lshr <{lanes} x i32> %rounded_low, {sixteen}
  %upper = and <{lanes} x i32> %rounded_high, {upper_half}
  %pair = or <{lanes} x i32> %upper, %lower
  %out_at = getelementptr i16, ptr %out, i64 %i
  store <{lanes} x i32> %pair, ptr %out_at, align 2
  %next = add i64 %i, {vector}
  %is_done = icmp uge i64 %next, %count
  br i1 %is_done, label %end, label %loop
end:
  %answer = call i32 @llvm.vector.reduce.umax.v{lanes}i32(<{lanes} x i32> %larger)
  ret i32 %answer
}}
declare <{lanes} x i32> @llvm.umax.v{lanes}i32(<{lanes} x i32>, <{lanes} x i32>)
declare i32 @llvm.vector.reduce.umax.v{lanes}i32(<{lanes} x i32>)
"""

_LOAD_PAIR = """\
  %at{n} = getelementptr i16, ptr %source{n}, i64 %i
  %pair{n} = load <{lanes} x i32>, ptr %at{n}, align 2
  %bits{n}_low = shl <{lanes} x i32> %pair{n}, {sixteen}
  %bits{n}_high = and <{lanes} x i32> %pair{n}, {upper_half}"""

_PRODUCT_OF_HALF = """\
  %value{n}_{half} = bitcast <{lanes} x i32> %bits{n}_{half} to <{lanes} x float>
  %product{n}_{half} = fmul <{lanes} x float> %factor{n}, %value{n}_{half}"""

_SUM_OF_HALF = "  %sum{n}_{half} = fadd <{lanes} x float> {total}_{half}, %product{n}_{half}"

_ROUND_HALF = """\
  %bits_{half} = bitcast <{lanes} x float> {total}_{half} to <{lanes} x i32>
  %magnitude_{half} = and <{lanes} x i32> %bits_{half}, {magnitude_mask}
  %last_{half} = and <{lanes} x i32> %bits_{half}, {last_kept}
  %is_odd_{half} = icmp ne <{lanes} x i32> %last_{half}, zeroinitializer
  %almost_{half} = select <{lanes} x i1> %is_odd_{half}, <{lanes} x i32> {one_half}, \
<{lanes} x i32> {almost_half}
  %rounded_{half} = add <{lanes} x i32> %bits_{half}, %almost_{half}"""


def loop_of_pairs(num_sources: int) -> str:
    """Return the IR of the loop for only bfloat16."""
    lanes = VECTOR // 2
    words = {
        "lanes": lanes,
        "vector": VECTOR,
        "sixteen": splat(16, lanes),
        "upper_half": splat(0xFFFF0000, lanes),
        "last_kept": splat(0x10000, lanes),
        "one_half": splat(0x8000, lanes),
        "almost_half": splat(0x7FFF, lanes),
        "magnitude_mask": splat(0x7FFFFFFF, lanes),
    }
    arguments = _arguments(num_sources, num_sources, lanes)
    halves = [words | {"half": half} for half in ("low", "high")]
    lines, total = [], ""
    for n in range(num_sources):
        lines.append(_LOAD_PAIR.format_map(words | {"n": n}))
        for half in halves:
            lines.append(_PRODUCT_OF_HALF.format_map(half | {"n": n}))
            if n:
                lines.append(_SUM_OF_HALF.format_map(half | {"n": n, "total": total}))
        total = f"%sum{n}" if n else "%product0"
    low, high = (_ROUND_HALF.format_map(half | {"total": total}) for half in halves)
    return _LOOP_OF_PAIRS.format_map(
        words | {"arguments": arguments, "sums": "\n".join(lines), "low": low, "high": high}
    )


def loop(kind: KernelKind, width: int) -> str:
    """Return the IR of the loop over `width` elements at once; needs at least that many."""
    words = {
        "width": width,
        "sixteen": splat(16, width),
        "one": splat(1, width),
        "almost_half": splat(0x7FFF, width),
        "magnitude_mask": splat(0x7FFFFFFF, width),
        "infinity": splat(INFINITY, width),
        "nan": f"<{', '.join([NAN[kind.out_dtype]] * width)}>",
    }
    lines = [
        part.format_map(words | {"n": n, "type": STORED[dtype], "alignment": element_nbytes(dtype)})
        for n, dtype in enumerate(kind.dtypes)
        for part in (_LOAD, WIDEN[dtype])
    ]
    merging, words["merged"] = traced(
        kind,
        [f"%value{n}" for n in range(len(kind.dtypes))],
        [f"%factor{n}" for n in range(kind.num_factors)],
        width,
    )
    return _LOOP.format_map(
        words
        | {
            "arguments": _arguments(len(kind.dtypes), kind.num_factors, width),
            "merging": "\n".join([*lines, merging]),
            "rounding": ROUND[kind.out_dtype].format_map(words),
            "out_type": STORED[kind.out_dtype],
            "out_alignment": element_nbytes(kind.out_dtype),
        }
    )


def _arguments(num_sources: int, num_factors: int, width: int) -> str:
    """Return the IR that loads the addresses of sources, and factors into vectors."""
    sources = [_SOURCE.format(n=n) for n in range(num_sources)]
    factors = [_FACTOR.format(n=n, width=width) for n in range(num_factors)]
    return "\n".join([*sources, *factors])
