"""Source models whose every byte follows from names, by integer arithmetic and SHAKE-128.

Uses no random generator and no writer of another library, so that the same bytes come out of every
version of them.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FLOATS = {"F64": (11, 52), "F32": (8, 23), "F16": (5, 10), "BF16": (8, 7)}
"""Bits of exponent and mantissa of each float dtype."""
_INTEGER_NBYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}
}

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name → dtype and shape, in the order in which they lie in a file."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model folder to be made."""

    seed: str
    """Decides the values of all tensors; models with other seeds have other values."""
    tensors: Tensors
    """All tensors, those of modules included."""
    config: Mapping[str, Any] | None = field(default_factory=lambda: {"model_type": "test"})
    """Content of config.json; None: there is none."""
    files: Mapping[str, Sequence[str]] | None = None
    """Weight file → names of its tensors, in order; None: all in model.safetensors."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Path → content of the other JSON files."""
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    """`__metadata__` of each weight file."""
    bits: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """Tensor → element → its bits, for values that are chosen by hand."""
    integer_seed: str = "all models"
    """Decides the values of integers and booleans; equal in models unless they are to differ."""

    def save(self, folder: Path) -> Path:
        """Write the folder, or nothing if it is there already."""
        if folder.exists():
            return folder
        files = self.files or {"model.safetensors": list(self.tensors)}
        for filename, names in files.items():
            path = folder / filename
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._file_bytes(names))
        stems = {name.partition("-0")[0] for name in files if "-of-" in name}
        for stem in stems:
            weight_map = {name: each for each, names in files.items() for name in names}
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
        configs = {} if self.config is None else {"config.json": self.config}
        for name, content in {**configs, **self.others}.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not as shardmix writes JSON: what it copies is then told from what it writes anew.
            path.write_text(json.dumps(content, indent=4))
        return folder

    def _file_bytes(self, names: Sequence[str]) -> bytes:
        header: dict[str, Any] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        pieces = []
        end = 0
        for name in names:
            dtype, shape = self.tensors[name]
            pieces.append(self._values(name, dtype, math.prod(shape)))
            start, end = end, end + len(pieces[-1])
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return b"".join([len(text).to_bytes(8, "little"), text, *pieces])

    def _values(self, name: str, dtype: str, num_elements: int) -> bytes:
        if dtype in FLOATS:
            values = float_bits(f"{self.seed}/{name}", dtype, num_elements)
        else:
            nbytes = _INTEGER_NBYTES[dtype]
            stream = _stream(f"{self.integer_seed}/{name}", num_elements * nbytes)
            values = np.frombuffer(stream, f"<u{nbytes}").copy()
            if dtype == "BOOL":
                values &= 1
        for element, bits in self.bits.get(name, {}).items():
            values[element] = bits
        return values.tobytes()


def float_bits(seed: str, dtype: str, num_elements: int) -> np.ndarray:
    """Return the bits of finite values, most between 2^-8 and 16.

    Every 11th is subnormal and every 17th is a zero, of either sign.
    """
    num_exponent, num_mantissa = FLOATS[dtype]
    raw = np.frombuffer(_stream(seed, num_elements * 8), "<u8")
    bias = (1 << (num_exponent - 1)) - 1
    exponent = (raw >> np.uint64(53)) % np.uint64(12) + np.uint64(bias - 8)
    mantissa = raw & np.uint64((1 << num_mantissa) - 1)
    exponent[::11] = 0
    exponent[::17] = 0
    mantissa[::17] = 0
    sign = (raw >> np.uint64(52)) & np.uint64(1)
    width = 1 + num_exponent + num_mantissa
    bits = sign << np.uint64(width - 1) | exponent << np.uint64(num_mantissa) | mantissa
    return bits.astype(f"<u{width // 8}")


def _stream(seed: str, nbytes: int) -> bytes:
    """Return bytes that look random, the same for the same text on every machine."""
    return hashlib.shake_128(seed.encode()).digest(nbytes)
