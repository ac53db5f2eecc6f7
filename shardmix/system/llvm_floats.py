"""Stored floats as vectors of float32, as text of LLVM IR. Imports no LLVM."""

# A bfloat16 is the upper half of a float32.
WIDEN = {
    "BF16": """\
  %long{n} = zext <{width} x i16> %stored{n} to <{width} x i32>
  %upper{n} = shl <{width} x i32> %long{n}, {sixteen}
  %value{n} = bitcast <{width} x i32> %upper{n} to <{width} x float>""",
    "F16": "  %value{n} = fpext <{width} x half> %stored{n} to <{width} x float>",
    "F32": "  %value{n} = bitcast <{width} x float> %stored{n} to <{width} x float>",
}
"""Safetensors dtype → the instructions from `%stored{n}` to `%value{n}`; `{sixteen}` is a splat."""


def splat(bits: int, width: int) -> str:
    """Return a vector of 32-bit integers that are all the same."""
    return f"<{', '.join([f'i32 {bits}'] * width)}>"
