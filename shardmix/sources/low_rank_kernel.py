"""W + scaling · left·right as machine code: the bits of `low_rank.add_product`, ten times faster.

The result is computed in tiles of a few rows and columns, which stay in registers while the loop
runs over the rank; so left and right are read from the caches a few times, not once an element.
"""

import ctypes
import importlib.util

import numpy as np

from shardmix.dtypes import BY_NAME, LLVM_DTYPES, element_nbytes
from shardmix.formats.stored_floats import Floats, Stored
from shardmix.system.llvm_floats import WIDEN, splat
from shardmix.system.threads import made_once

# Sums of a tile fill half of the registers of AVX-512, and all of AVX2's. The rest of the columns
# goes one by one.
_ROWS = 8
_WIDTHS = (16, 1)

_TILE = """
define internal void @tile_{rows}_{width}(ptr %values, i64 %value_step, ptr %out, i64 %out_step, \
ptr %left, ptr %right, i64 %right_step, i64 %rank, float %scaling) alwaysinline nounwind {{
start:
  %right0 = load <{width} x float>, ptr %right, align 4
{first}
  %is_one = icmp eq i64 %rank, 1
  br i1 %is_one, label %end, label %loop
loop:
  %k = phi i64 [1, %start], [%next, %loop]
{sums}
  %offset = mul i64 %k, %right_step
  %right_at = getelementptr float, ptr %right, i64 %offset
  %row = load <{width} x float>, ptr %right_at, align 4
{products}
  %next = add i64 %k, 1
  %is_done = icmp eq i64 %next, %rank
  br i1 %is_done, label %end, label %loop
end:
{totals}
{last}
  ret void
}}
"""

_SPLAT = """\
  %{name}_one = insertelement <{width} x float> poison, float {value}, i64 0
  %{name} = shufflevector <{width} x float> %{name}_one, <{width} x float> poison, \
<{width} x i32> zeroinitializer"""

_FIRST = """\
  %left{n}_offset = mul i64 %rank, {n}
  %left{n}_at = getelementptr float, ptr %left, i64 %left{n}_offset
  %left{n}_value = load float, ptr %left{n}_at, align 4
{splat}
  %first{n} = fmul <{width} x float> %left{n}, %right0"""

_SUM = "  %sum{n} = phi <{width} x float> [%first{n}, %start], [%more{n}, %loop]"

_PRODUCT = """\
  %factor{n}_at = getelementptr float, ptr %left{n}_at, i64 %k
  %factor{n}_value = load float, ptr %factor{n}_at, align 4
{splat}
  %product{n} = fmul <{width} x float> %factor{n}, %row
  %more{n} = fadd <{width} x float> %sum{n}, %product{n}"""

_TOTAL = "  %total{n} = phi <{width} x float> [%first{n}, %start], [%more{n}, %loop]"

_LAST = """\
  %scaled{n} = fmul <{width} x float> %total{n}, %scale
  %value{n}_offset = mul i64 %value_step, {n}
  %value{n}_at = getelementptr {type}, ptr %values, i64 %value{n}_offset
  %stored{n} = load <{width} x {type}>, ptr %value{n}_at, align {alignment}
{widen}
  %result{n} = fadd <{width} x float> %value{n}, %scaled{n}
  %out{n}_offset = mul i64 %out_step, {n}
  %out{n}_at = getelementptr float, ptr %out, i64 %out{n}_offset
  store <{width} x float> %result{n}, ptr %out{n}_at, align 4"""

# All rows of some columns: tiles of several rows, then the rest one by one.
_COLUMNS = """
define internal i64 @columns_{width}(i64 %first, ptr %values, i64 %value_step, ptr %out, \
i64 %out_step, ptr %left, ptr %right, i64 %right_step, i64 %rows, i64 %columns, i64 %rank, \
float %scaling) nounwind {{
start:
  br label %next_columns
next_columns:
  %column = phi i64 [%first, %start], [%stop, %end]
  %stop = add i64 %column, {width}
  %fits = icmp sle i64 %stop, %columns
  br i1 %fits, label %begin, label %done
begin:
  %right_at = getelementptr float, ptr %right, i64 %column
  br label %several
several:
  %row = phi i64 [0, %begin], [%row_stop, %several_rows]
  %row_stop = add i64 %row, {rows}
  %are_several = icmp sle i64 %row_stop, %rows
  br i1 %are_several, label %several_rows, label %one
several_rows:
{several}
  br label %several
one:
  %single = phi i64 [%row, %several], [%single_stop, %one_row]
  %is_one = icmp slt i64 %single, %rows
  br i1 %is_one, label %one_row, label %end
one_row:
{one}
  %single_stop = add i64 %single, 1
  br label %one
end:
  br label %next_columns
done:
  ret i64 %column
}}
"""

_CALL = """\
  %value_row{n} = mul i64 {row}, %value_step
  %value_element{n} = add i64 %value_row{n}, %column
  %values{n} = getelementptr {type}, ptr %values, i64 %value_element{n}
  %out_row{n} = mul i64 {row}, %out_step
  %out_element{n} = add i64 %out_row{n}, %column
  %out{n} = getelementptr float, ptr %out, i64 %out_element{n}
  %left_row{n} = mul i64 {row}, %rank
  %left{n} = getelementptr float, ptr %left, i64 %left_row{n}
  call void @tile_{n}_{width}(ptr %values{n}, i64 %value_step, ptr %out{n}, i64 %out_step, \
ptr %left{n}, ptr %right_at, i64 %right_step, i64 %rank, float %scaling)"""

_MAIN = """
define internal void @add_rows(ptr %values, i64 %value_step, ptr %out, i64 %out_step, ptr %left, \
ptr %right, i64 %right_step, i64 %rows, i64 %columns, i64 %rank, float %scaling) nounwind {{
{calls}
  ret void
}}
"""

_MAIN_CALL = """\
  %column{number} = call i64 @columns_{width}(i64 {first}, ptr %values, i64 %value_step, \
ptr %out, i64 %out_step, ptr %left, ptr %right, i64 %right_step, i64 %rows, i64 %columns, \
i64 %rank, float %scaling)"""

# Elements that follow one another: the end of a row, whole rows, the start of a row.
_RANGE = """
define void @add_range(ptr %values, ptr %out, i64 %count, i64 %column, ptr %left, ptr %right, \
i64 %columns, i64 %rank, float %scaling) nounwind {{
start:
  %is_inside = icmp ne i64 %column, 0
  %until_end = sub i64 %columns, %column
  %least = call i64 @llvm.smin.i64(i64 %until_end, i64 %count)
  %head = select i1 %is_inside, i64 %least, i64 0
  %head_right = getelementptr float, ptr %right, i64 %column
  call void @add_rows(ptr %values, i64 0, ptr %out, i64 0, ptr %left, ptr %head_right, \
i64 %columns, i64 1, i64 %head, i64 %rank, float %scaling)
  %rest = sub i64 %count, %head
  %skipped = zext i1 %is_inside to i64
  %left_skipped = mul i64 %skipped, %rank
  %whole_left = getelementptr float, ptr %left, i64 %left_skipped
  %whole_values = getelementptr {type}, ptr %values, i64 %head
  %whole_out = getelementptr float, ptr %out, i64 %head
  %rows = sdiv i64 %rest, %columns
  call void @add_rows(ptr %whole_values, i64 %columns, ptr %whole_out, i64 %columns, \
ptr %whole_left, ptr %right, i64 %columns, i64 %rows, i64 %columns, i64 %rank, float %scaling)
  %done = mul i64 %rows, %columns
  %tail = sub i64 %rest, %done
  %tail_values = getelementptr {type}, ptr %whole_values, i64 %done
  %tail_out = getelementptr float, ptr %whole_out, i64 %done
  %left_done = mul i64 %rows, %rank
  %tail_left = getelementptr float, ptr %whole_left, i64 %left_done
  call void @add_rows(ptr %tail_values, i64 0, ptr %tail_out, i64 0, ptr %tail_left, ptr %right, \
i64 %columns, i64 1, i64 %tail, i64 %rank, float %scaling)
  ret void
}}
declare i64 @llvm.smin.i64(i64, i64)
"""

_SIGNATURE = ctypes.CFUNCTYPE(
    None,
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
    *(ctypes.c_void_p, ctypes.c_void_p),
    *(ctypes.c_int64, ctypes.c_int64, ctypes.c_float),
)


def assembly(dtype: str) -> str:
    """Return the module for weights stored in a dtype."""
    parts = []
    for width in _WIDTHS:
        parts += [_tile(dtype, rows, width) for rows in (_ROWS, 1)]
        words = {"width": width, "type": BY_NAME[dtype].llvm_name}
        several = _CALL.format_map(words | {"n": _ROWS, "row": "%row"})
        one = _CALL.format_map(words | {"n": 1, "row": "%single"})
        parts.append(_COLUMNS.format_map(words | {"rows": _ROWS, "several": several, "one": one}))
    calls = [
        _MAIN_CALL.format(number=number, width=width, first=f"%column{number - 1}" if number else 0)
        for number, width in enumerate(_WIDTHS)
    ]
    ends = (_MAIN.format(calls="\n".join(calls)), _RANGE.format(type=BY_NAME[dtype].llvm_name))
    return "".join([*parts, *ends])


def _tile(dtype: str, rows: int, width: int) -> str:
    words = {
        "rows": rows,
        "width": width,
        "type": BY_NAME[dtype].llvm_name,
        "alignment": element_nbytes(dtype),
        "sixteen": splat(16, width),
    }

    def of_each(part: str, splat_of: str = "") -> str:
        lines = []
        for n in range(rows):
            more: dict[str, object] = {"n": n}
            if splat_of:
                name = f"{splat_of}{n}"
                more["splat"] = _SPLAT.format(name=name, width=width, value=f"%{name}_value")
            more["widen"] = WIDEN[dtype].format_map(words | more)
            lines.append(part.format_map(words | more))
        return "\n".join(lines)

    return _TILE.format_map(
        words
        | {
            "first": of_each(_FIRST, "left"),
            "sums": of_each(_SUM),
            "products": of_each(_PRODUCT, "factor"),
            "totals": of_each(_TOTAL),
            "last": _SPLAT.format(name="scale", width=width, value="%scaling")
            + "\n"
            + of_each(_LAST),
        }
    )


class Kernel:
    """The machine code for weights stored in one dtype. Releases the GIL."""

    def __init__(self, dtype: str) -> None:
        from shardmix.system.llvm import compiled  # planning needs none of it

        self._engine = compiled(assembly(dtype))  # owns the code
        self._call = _SIGNATURE(self._engine.get_function_address("add_range"))

    def add_range(
        self,
        values: Stored,
        out: Floats,
        column: int,
        left: Floats,
        right: Floats,
        scaling: float,
    ) -> None:
        """Set `out`, elements that follow one another, to `values` + scaling · left·right.

        The first one is at `column` of the first row of `left` (rows, rank); `right` is (rank,
        columns). All are contiguous, in float32 except for the values; the bits are those of
        `low_rank.add_product`.
        """
        rank, num_columns = right.shape
        self._call(
            values.ctypes.data,
            out.ctypes.data,
            out.size,
            column,
            left.ctypes.data,
            right.ctypes.data,
            num_columns,
            rank,
            float(np.float32(scaling)),
        )


@made_once
def kernel(dtype: str) -> Kernel | None:
    """Return the kernel for weights stored in a dtype; None if there is none here."""
    if dtype not in LLVM_DTYPES or importlib.util.find_spec("llvmlite") is None:
        return None
    from shardmix.system.llvm import finding

    return Kernel(dtype) if finding() is None else None
