"""Headers that no checkpoint should have, each with what is to be said of it."""

from tests.support.hostile_inputs import Case, a_header, a_whole_file

ONE = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


def one(**changed: str) -> str:
    """Return the JSON of one tensor, `w`, a byte long, with other values of its fields."""
    fields = {"dtype": '"U8"', "shape": "[1]", "data_offsets": "[0,1]"} | changed
    return '{"w":{' + ",".join(f'"{key}":{value}' for key, value in fields.items() if value) + "}}"


def two(first: str, second: str) -> str:
    """Return the JSON of two tensors of bytes, at these offsets."""
    places = {"a": first, "b": second}
    entries = (
        f'"{name}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{place}]}}'
        for name, (size, place) in ((n, p.split(":")) for n, p in places.items())
    )
    return "{" + ",".join(entries) + "}"


_DOES_NOT_PARSE = "has a header that does not parse"
_FIELDLESS = "without a dtype, shape and data_offsets"
_TOO_LARGE = "is more than any file holds"

# name, header, bytes of data, what is said
_HEADERS: list[tuple[str, str | bytes, int, str]] = [
    ("no header at all", b"", 0, _DOES_NOT_PARSE),
    ("no JSON", b"not JSON at all!", 1, _DOES_NOT_PARSE),
    ("an array", b"[]", 0, "Expected `object`, got `array`"),
    ("null", b"null", 0, "Expected `object`, got `null`"),
    ("a text", b'"w"', 0, "Expected `object`, got `str`"),
    ("cut short", one()[:-1], 1, "Input data was truncated"),
    ("more after the end", one() + "}", 1, "trailing characters"),
    ("NUL after the end", one() + "\0\0", 1, "trailing characters"),
    ("a trailing comma", one()[:-1] + ",}", 1, _DOES_NOT_PARSE),
    ("single quotes", one().replace('"', "'"), 1, _DOES_NOT_PARSE),
    ("a comment", "/* */" + one(), 1, _DOES_NOT_PARSE),
    ("a byte order mark", b"\xef\xbb\xbf" + one().encode(), 1, _DOES_NOT_PARSE),
    ("UTF-16", one().encode("utf-16"), 1, _DOES_NOT_PARSE),
    ("a name that is not UTF-8", one().encode().replace(b"w", b"\xff\xfe"), 1, "utf-8"),
    ("an overlong NUL", one().encode().replace(b"w", b"\xc0\x80"), 1, "utf-8"),
    ("half a surrogate pair", one().replace("w", "\\ud800"), 1, "surrogate"),
    ("a NUL in a name, unescaped", one().replace("w", "\0"), 1, _DOES_NOT_PARSE),
    ("a bad escape", one().replace("w", "\\x41"), 1, "invalid escape"),
    ("NaN in a shape", one(shape="[NaN]"), 1, _DOES_NOT_PARSE),
    ("Infinity in offsets", one(data_offsets="[0,Infinity]"), 1, _DOES_NOT_PARSE),
    ("NaN in an unknown field", one(extra="NaN"), 1, _DOES_NOT_PARSE),
    ("deep unknown field", one(extra="[" * 100_000 + "]" * 100_000), 1, "recursion depth"),
    ("deep objects", '{"w":' * 50_000 + "}" * 50_000, 0, _DOES_NOT_PARSE),
    ("deep and never closed", "[" * 1_000_000, 0, _DOES_NOT_PARSE),
    ("a deep shape", one(shape="[" * 99 + "]" * 99), 1, "Expected `int`, got `array`"),
    ("a tensor that is null", '{"w":null}', 0, "got `null`"),
    ("a tensor that is a number", '{"w":3}', 0, "got `int`"),
    ("a tensor that is an array", '{"w":["U8",[1],[0,1]]}', 1, "got `array`"),
    ("an empty tensor entry", '{"w":{}}', 0, _FIELDLESS),
    ("no dtype", one(dtype=""), 1, _FIELDLESS),
    ("no shape", one(shape=""), 1, _FIELDLESS),
    ("no offsets", one(data_offsets=""), 0, _FIELDLESS),
    ("no offsets beside others", one()[:-1] + ',"v":{"dtype":"U8","shape":[]}}', 1, _FIELDLESS),
    ("a dtype that is null", one(dtype="null"), 1, "Expected `str`, got `null`"),
    ("a dtype that is a number", one(dtype="8"), 1, "Expected `str`, got `int`"),
    ("a dtype that is a list", one(dtype='["U8"]'), 1, "Expected `str`, got `array`"),
    ("an unknown dtype", one(dtype='"Q4_K"'), 1, "of the dtype 'Q4_K', which safetensors does not"),
    ("a dtype in small letters", one(dtype='"u8"'), 1, "of the dtype 'u8'"),
    ("a dtype with a NUL", one(dtype='"U8\\u0000"'), 1, "of the dtype 'U8\\x00'"),
    ("a dtype of control characters", one(dtype='"\\u001b[31m"'), 1, "of the dtype '\\x1b[31m'"),
    ("a dtype of a megabyte", one(dtype='"' + "U8" * 500_000 + '"'), 1, "of the dtype 'U8U8"),
    ("a shape that is null", one(shape="null"), 1, _FIELDLESS),
    ("a shape that is a number", one(shape="1"), 1, "got `int`"),
    ("a shape that is a text", one(shape='"1"'), 1, "got `str`"),
    ("a shape of texts", one(shape='["1"]'), 1, "Expected `int`, got `str`"),
    ("a shape of floats", one(shape="[1.0]"), 1, "Expected `int`, got `float`"),
    ("a shape in powers", one(shape="[1e0]"), 1, "Expected `int`, got `float`"),
    ("a shape of booleans", one(shape="[true]"), 1, "Expected `int`, got `bool`"),
    ("a negative shape", one(shape="[-1]"), 1, "Expected `int` >= 0"),
    ("two negative lengths", one(shape="[-1,-1]"), 1, "Expected `int` >= 0"),
    ("a leading zero", one(shape="[01]"), 1, "invalid number"),
    ("a length beyond 64 bits", one(shape="[18446744073709551617]"), 1, "Expected `int` <="),
    ("a length of 4,000 digits", one(shape=f"[{'9' * 4000}]"), 1, _DOES_NOT_PARSE),
    ("a product that overflows", one(shape="[4294967296,4294967297]"), 1, _TOO_LARGE),
    ("a product that overflows to 1", one(shape="[3,6148914691236517205,1]"), 1, _TOO_LARGE),
    ("a product beyond 64 bits", one(shape="[9223372036854775807,3,1]"), 1, _TOO_LARGE),
    ("an overflow, then zero", one(shape="[9223372036854775807,9,0]"), 1, _TOO_LARGE),
    ("bits that overflow", one(dtype='"F64"', shape="[1152921504606846976]"), 1, _TOO_LARGE),
    ("a shape of 65 dimensions", one(shape=f"[{'1,' * 64}1]"), 1, "of 65 dimensions"),
    ("a shape of a million", one(shape=f"[{'1,' * 999_999}1]"), 1, "of 1000000 dimensions"),
    ("offsets that are null", one(data_offsets="null"), 0, _FIELDLESS),
    ("one offset", one(data_offsets="[0]"), 1, "of length 2"),
    ("three offsets", one(data_offsets="[0,1,2]"), 1, "of length 2"),
    ("offsets in an object", one(data_offsets='{"0":0,"1":1}'), 1, "got `object`"),
    ("offsets that are texts", one(data_offsets='["0","1"]'), 1, "Expected `int`, got `str`"),
    ("offsets that are floats", one(data_offsets="[0.0,1.0]"), 1, "Expected `int`, got `float`"),
    ("offsets that are booleans", one(data_offsets="[false,true]"), 1, "got `bool`"),
    ("a negative offset", one(data_offsets="[-1,0]"), 1, "Expected `int` >= 0"),
    ("offsets beyond 63 bits", one(data_offsets="[0,9223372036854775808]"), 1, "`int` <="),
    ("offsets beyond the end", one(data_offsets="[0,9]"), 1, "describes"),
    ("offsets at the end of 63 bits", one(data_offsets="[0,9223372036854775807]"), 1, "describes"),
    ("offsets before the end", one(), 2, "describes"),
    ("offsets that end before they begin", two("1:1,0", "1:0,1"), 1, "ends before it begins"),
    ("a size that is not the shape's", one(shape="[2]"), 1, "than its dtype and shape come to"),
    ("a scalar of no bytes", one(shape="[]", data_offsets="[0,0]"), 0, "than its dtype and shape"),
    ("data of an empty tensor", one(shape="[0]"), 1, "than its dtype and shape come to"),
    ("a gap at the start", one(data_offsets="[1,2]"), 2, "leaves a gap"),
    ("a gap in between", two("1:0,1", "1:2,3"), 3, "'b', bytes 2 to 3, leaves a gap"),
    ("an overlap", two("2:0,2", "2:1,3"), 3, "'b', bytes 1 to 3, overlaps"),
    ("one tensor within another", two("3:0,3", "1:1,2"), 3, "overlaps"),
    ("two tensors at one place", two("1:0,1", "1:0,1"), 1, "overlaps"),
    ("data but no tensors", "{}", 8, "has 8 bytes too many at its end"),
    ("no tensors", "{}", 0, "holds no tensors"),
    ("metadata alone", '{"__metadata__":{"format":"pt"}}', 0, "holds no tensors"),
    ("four bits within a byte", one(dtype='"F4"'), 1, "which end within a byte"),
    ("four bits", one(dtype='"F4"', shape="[2]"), 1, "w [2] is F4; a weighted sum of it"),
    ("six bits", one(dtype='"F6_E2M3"', shape="[4]", data_offsets="[0,3]"), 3, "is F6_E2M3"),
    ("eight bits", one(dtype='"F8_E4M3"'), 1, "w [1] is F8_E4M3"),
    ("scales of microscaling", one(dtype='"F8_E8M0"'), 1, "w [1] is F8_E8M0"),
    ("complex numbers", one(dtype='"C64"', data_offsets="[0,8]"), 8, "w [1] is C64"),
    ("packed codes", one(shape="[1,1]"), 1, "a mark of quantised weights"),
    ("a quantised layer", one().replace("w", "layer.qweight"), 1, "a mark of quantised weights"),
    ("a tensor twice", f'{{"w":{ONE},"w":{ONE}}}', 1, "names 'w' twice"),
    ("a tensor twice, once escaped", f'{{"w":{ONE},"\\u0077":{ONE}}}', 1, "names 'w' twice"),
    (
        "a tensor twice, once empty",
        f'{{"w":{{"dtype":"F64","shape":[0],"data_offsets":[0,0]}},"w":{ONE}}}',
        1,
        "names 'w' twice",
    ),
    ("a field twice", one(dtype='"U8","dtype":"I8"'), 1, "duplicate field `dtype`"),
    ("offsets twice", one(shape='[1],"data_offsets":[0,0]'), 1, "duplicate field"),
    ("metadata twice", f'{{"__metadata__":{{}},"__metadata__":{{}},"w":{ONE}}}', 1, "twice"),
    ("metadata that is a list", f'{{"__metadata__":[],"w":{ONE}}}', 1, "got `array`"),
    ("metadata that is a text", f'{{"__metadata__":"pt","w":{ONE}}}', 1, "got `str`"),
    ("metadata of numbers", f'{{"__metadata__":{{"format":3}},"w":{ONE}}}', 1, "got `int`"),
    ("metadata of objects", f'{{"__metadata__":{{"a":{{}}}},"w":{ONE}}}', 1, "got `object`"),
    ("metadata of nulls", f'{{"__metadata__":{{"a":null}},"w":{ONE}}}', 1, "got `null`"),
    ("metadata like a tensor", f'{{"__metadata__":{ONE},"w":{ONE}}}', 1, "got `array`"),
    ("another tensor than expected", one().replace("w", "v"), 1, "tensor sets differ"),
    ("an empty name", one().replace("w", ""), 1, "tensor sets differ"),
    ("a name of a line break", one().replace("w", "a\\nerror: b"), 1, "a\\nerror: b; models of"),
    ("a name of carriage returns", one().replace("w", "a\\r\\rb"), 1, "a\\r\\rb; models of"),
    ("a name that clears the screen", one().replace("w", "\\u001b[2Jx"), 1, "\\x1b[2Jx; models of"),
    ("a name that sets the title", one().replace("w", "\\u001b]0;x\\u0007"), 1, "\\x1b]0;x\\x07"),
    ("a name with a C1 escape", one().replace("w", "\\u009b31mx"), 1, "\\x9b31mx; models of"),
    ("a name written backwards", one().replace("w", "\\u202egnp.a"), 1, "\\u202egnp.a; models of"),
    ("a name with a NUL", one().replace("w", "a\\u0000b"), 1, "a\\x00b; models of"),
    ("a name with a line separator", one().replace("w", "a\\u2028b"), 1, "a\\u2028b; models of"),
    (
        "a name with invisible tags",
        one().replace("w", "a\\udb40\\udc41"),
        1,
        "a\\U000e0041; models",
    ),
    ("a name of markup", one().replace("w", "[red]w[/red]"), 1, "[red]w[/red]; models of"),
    ("a name of two megabytes", one().replace("w", "w" * 2_000_000), 1, "wwww [...] ww"),
]

# name, what the file holds, what is said
_FILES: list[tuple[str, bytes, str]] = [
    ("an empty file", b"", "is empty, not a safetensors file"),
    ("seven bytes", b"\x02\0\0\0\0\0\0", "is 7 bytes long, too short"),
    ("a length alone", b"\x02\0\0\0\0\0\0\0", "claims a header of 2 bytes but the file has 8"),
    ("a length of zero", bytes(8), _DOES_NOT_PARSE),
    ("a length of all ones", b"\xff" * 8 + b"{}", "claims a header of 18446744073709551615 bytes"),
    ("a length of 2^63", (2**63).to_bytes(8, "little") + b"{}", "claims a header of 922337203"),
    ("a length of a gigabyte", (2**30).to_bytes(8, "little") + b"{}", "claims a header of 1073741"),
    ("one byte more than there is", b"\x03" + bytes(7) + b"{}", "claims a header of 3 bytes"),
    ("a big-endian length", bytes(7) + b"\x02{}", "claims a header of 144115188075855872 bytes"),
    ("a pickle", b"\x80\x02}q\x00." + bytes(64), "is a pickle, as torch.save once wrote"),
    ("a zip file", b"PK\x03\x04" + bytes(64), "is a zip archive, as torch.save writes"),
    ("GGUF", b"GGUF\x03\0\0\0" + bytes(64), "is a GGUF file"),
    (
        "a pointer of Git LFS",
        b"version https://git-lfs.github.com/spec/v1\n",
        "is a Git LFS pointer",
    ),
    ("a page of HTML", b"<!DOCTYPE html><html>Not found</html>", "is a web page (HTML or XML)"),
    ("a page after a mark of UTF-8", b"\xef\xbb\xbf\n<html>" + bytes(9), "is a web page"),
    ("three bytes of a page", b"<a>", "is a web page"),
    ("an error in JSON", b'{"error":"Repository not found"}', "is JSON text, such as a server"),
    ("HDF5", b"\x89HDF\r\n\x1a\n" + bytes(64), "is an HDF5 file, as Keras writes"),
]

CASES: list[Case] = [
    *(Case(f"header: {name}", a_header(h, size), said) for name, h, size, said in _HEADERS),
    *(Case(f"file: {name}", a_whole_file(content), said) for name, content, said in _FILES),
]
