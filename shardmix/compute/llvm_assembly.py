"""A kernel as a module of LLVM IR, and the reading before it.

The rest of a chunk after whole vectors goes through the same loop one by one. The kernel also
reads, so that a chunk needs the interpreter once, not once a source: threads wait for one another
there.

For bfloat16, float16 and float32 on little-endian machines.
"""

import time

from shardmix.compute.llvm_kind import KernelKind
from shardmix.compute.llvm_loops import INFINITY, STORED, loop, loop_of_pairs
from shardmix.dtypes import element_nbytes
from shardmix.plan.chunk_size import VECTOR

FAILED = 0xFFFFFFFF
"""Result of `read_and_merge` if it could not read all; no magnitude is as large."""

_FAST_VECTORS = """\
  %fast = call i32 @merge_pairs(ptr %sources, ptr %factors, ptr %out, i64 %whole)
  %has_nan = icmp ugt i32 %fast, {infinity}
  br i1 %has_nan, label %careful, label %then
careful:
"""

_WHOLE_AND_REST = """
define i32 @merge(ptr %sources, ptr %factors, ptr %out, i64 %count) nounwind {{
start:
  %rests = alloca ptr, i64 {num_sources}
  %whole = and i64 %count, -{vector}
  %has_whole = icmp ne i64 %whole, 0
  br i1 %has_whole, label %vectors, label %then
vectors:
{fast}  %of_whole = call i32 @merge_{vector}\
(ptr %sources, ptr %factors, ptr %out, i64 %whole)
  br label %then
then:
  %with_whole = phi i32 [0, %start], {whole_answers}
  %rest = sub i64 %count, %whole
  %has_rest = icmp ne i64 %rest, 0
  br i1 %has_rest, label %singles, label %end
singles:
{shifts}
  %rest_out = getelementptr {out_type}, ptr %out, i64 %whole
  %of_rest = call i32 @merge_1(ptr %rests, ptr %factors, ptr %rest_out, i64 %rest)
  br label %end
end:
  %with_rest = phi i32 [0, %then], [%of_rest, %singles]
  %answer = call i32 @llvm.umax.i32(i32 %with_whole, i32 %with_rest)
  ret i32 %answer
}}
declare i32 @llvm.umax.i32(i32, i32)
"""

_SHIFT = """\
  %source{n}_at = getelementptr ptr, ptr %sources, i64 {n}
  %source{n} = load ptr, ptr %source{n}_at
  %rest{n} = getelementptr {type}, ptr %source{n}, i64 %whole
  %rest{n}_at = getelementptr ptr, ptr %rests, i64 {n}
  store ptr %rest{n}, ptr %rest{n}_at"""

_READ_AND_MERGE = """
define i32 @read_and_merge(ptr %pread, ptr %clock, ptr %descriptors, ptr %positions, ptr %sources, \
ptr %factors, ptr %out, i64 %count, ptr %nanoseconds) nounwind {{
start:
  %time = alloca {{ i64, i64 }}
  %began = call i64 @now(ptr %clock, ptr %time)
  br label %read0
{reads}
read{num_sources}:
  %ended = call i64 @now(ptr %clock, ptr %time)
  %took = sub i64 %ended, %began
  store i64 %took, ptr %nanoseconds
  %answer = call i32 @merge(ptr %sources, ptr %factors, ptr %out, i64 %count)
  ret i32 %answer
failed:
  ret i32 {failed}
}}

define internal i64 @now(ptr %clock, ptr %time) nounwind {{
  %status = call i32 %clock(i32 {clock}, ptr %time)
  %seconds = load i64, ptr %time
  %rest_at = getelementptr i64, ptr %time, i64 1
  %rest = load i64, ptr %rest_at
  %whole = mul i64 %seconds, 1000000000
  %now = add i64 %whole, %rest
  ret i64 %now
}}
"""

# Less than was asked for, or an error: the caller reads once more, and finds the reason.
_READ = """\
read{n}:
  %descriptor{n}_at = getelementptr i32, ptr %descriptors, i64 {n}
  %descriptor{n} = load i32, ptr %descriptor{n}_at
  %position{n}_at = getelementptr i64, ptr %positions, i64 {n}
  %position{n} = load i64, ptr %position{n}_at
  %source{n}_at = getelementptr ptr, ptr %sources, i64 {n}
  %source{n} = load ptr, ptr %source{n}_at
  %wanted{n} = mul i64 %count, {alignment}
  %got{n} = call i64 %pread(i32 %descriptor{n}, ptr %source{n}, i64 %wanted{n}, i64 %position{n})
  %is_all{n} = icmp eq i64 %got{n}, %wanted{n}
  br i1 %is_all{n}, label %read{following}, label %failed"""


def assembly(kind: KernelKind) -> str:
    """Return a module with `merge` and `read_and_merge` for a kind of chunk."""
    dtypes, out_dtype = kind.dtypes, kind.out_dtype
    words = {
        "num_sources": len(dtypes),
        "vector": VECTOR,
        "out_type": STORED[out_dtype],
        "failed": FAILED,
        "clock": time.CLOCK_MONOTONIC,
    }
    sources = [
        {"n": n, "following": n + 1, "type": STORED[dtype], "alignment": element_nbytes(dtype)}
        for n, dtype in enumerate(dtypes)
    ]

    def of_each(part: str) -> str:
        return "\n".join(part.format_map(source) for source in sources)

    reads, shifts = map(of_each, (_READ, _SHIFT))
    loops = [loop(kind, width) for width in (VECTOR, 1)]
    fast, whole_answers = "", "[%of_whole, %vectors]"
    if kind.is_weighted_sum and set(dtypes) | {out_dtype} == {"BF16"}:
        loops.append(loop_of_pairs(len(dtypes)))
        fast = _FAST_VECTORS.format(infinity=INFINITY)
        whole_answers = "[%fast, %vectors], [%of_whole, %careful]"
    words |= {"fast": fast, "whole_answers": whole_answers}
    return "".join(
        [
            *loops,
            _WHOLE_AND_REST.format_map(words | {"shifts": shifts}),
            _READ_AND_MERGE.format_map(words | {"reads": reads}),
        ]
    )
