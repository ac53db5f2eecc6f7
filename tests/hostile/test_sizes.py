"""Headers and indexes of a million tensors: judged, decoded or refused in bounded memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shardmix.errors import BudgetError, SourceError
from shardmix.formats.safetensors_header import decode_header
from shardmix.sources.headers import _MEMORY_PER_HEADER_BYTE
from shardmix.sources.resolve import open_source
from tests.support.hostile_inputs import INDEX, SHARD, a_model
from tests.support.models import random_model, save_model
from tests.support.sampling import sample

_NUM_TENSORS = 1_000_000
_MOST_NBYTES = 300_000_000

# Prints the error, if there is one, and what the process took at its peak.
_RUN = """
import sys
from click.testing import CliRunner
from shardmix.cli.commands import app
from shardmix.system.memory import peak_resident_nbytes, resident_nbytes
before = resident_nbytes()
result = CliRunner().invoke(app, sys.argv[1:])
print(result.stderr.strip())
print(result.exit_code, before, peak_resident_nbytes())
"""
_OPEN = """
import sys
from shardmix.sources.resolve import open_source
from shardmix.system.memory import peak_resident_nbytes, resident_nbytes
before = resident_nbytes()
print(len(open_source(sys.argv[1]).tensors))
print(0, before, peak_resident_nbytes())
"""


def run(code: str, *words: object) -> tuple[str, int, int]:
    """Return what a fresh process says, its size before and at its peak."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    said, numbers = done.stdout.strip().rsplit("\n", 1)
    _, before, peak = map(int, numbers.split())
    return said, before, peak


def entry(name: str, start: int, stop: int, dtype: str = "U8") -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":[1],"data_offsets":[{start},{stop}]}}'


@pytest.fixture(scope="module")
def many() -> str:
    """Return the entries of a million tensors but one, each a byte long."""
    return ",".join(entry(f"t{n}", n, n + 1) for n in range(_NUM_TENSORS - 1))


def save(folder: Path, header: str, *, data_nbytes: int = _NUM_TENSORS) -> Path:
    """Save a model of this header, its data a hole in the file."""
    encoded = header.encode()
    a_model(folder, {"model.safetensors": len(encoded).to_bytes(8, "little") + encoded})
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + data_nbytes)
    return folder


LAST = _NUM_TENSORS - 1


FAULTS = {
    "overlap": (entry("t", LAST - 1, _NUM_TENSORS), "overlaps the one before it"),
    "twice": (entry("t0", LAST, _NUM_TENSORS), "names 't0' twice"),
    "dtype": (
        entry("t", LAST, _NUM_TENSORS, dtype="Q4"),
        "of the dtype 'Q4', which safetensors does",
    ),
    "cut short": (entry("t", LAST, _NUM_TENSORS)[:-1], "has a header that does not parse"),
}


@pytest.mark.parametrize("fault", sample("last faults of a header", FAULTS, 2))
def test_last_fault_is_found_in_few_bytes(tmp_path, many, fault):
    """A fault at the end of a million tensors is found in little memory."""
    end, finding = FAULTS[fault]
    bad = save(tmp_path / "bad", f"{{{many},{end}}}")
    said, _, peak = run(_RUN, "merge", f"{bad}=0.5", f"{bad}=0.5", "-o", tmp_path / "out")
    assert said.startswith(f"error: {bad}/model.safetensors: ")
    assert finding in said
    assert "\n" not in said
    assert peak < _MOST_NBYTES


def test_million_tensors_open_as_reckoned(tmp_path, many):
    """A million tensors are opened in what is reckoned with."""
    header = f"{{{many},{entry('t', LAST, _NUM_TENSORS)}}}"
    said, before, peak = run(_OPEN, save(tmp_path, header))
    assert said == str(_NUM_TENSORS)
    assert peak - before < _MEMORY_PER_HEADER_BYTE * len(header) / 2


def test_million_shapes_open_as_reckoned(tmp_path):
    """So are shapes that are all different."""
    shapes = ([0, n % 600 + 300, n // 600 + 300] for n in range(200_000))
    entries = (
        f'"{n:x}":{{"dtype":"U8","shape":{shape},"data_offsets":[0,0]}}'
        for n, shape in enumerate(shapes)
    )
    header = f"{{{','.join(entries)}}}"
    said, before, peak = run(_OPEN, save(tmp_path, header, data_nbytes=0))
    assert said == "200000"
    assert peak - before < _MEMORY_PER_HEADER_BYTE * len(header)


@pytest.mark.parametrize("command", [["plan"], ["merge", "-o", "out"]])
def test_header_too_large_is_refused_unread(tmp_path, many, command):
    """What a header may take is refused before it is taken."""
    model = save(tmp_path / "model", f"{{{many},{entry('t', LAST, _NUM_TENSORS)}}}")
    budget = ["--max-memory", "512MiB"]
    said, before, peak = run(_RUN, *command, f"{model}=0.5", f"{model}=0.5", *budget)
    assert said.startswith(f"error: {model}/model.safetensors: to decode its header of ")
    assert "but --max-memory is 512MiB; later steps may take more; raise" in said
    assert peak - before < 40_000_000


def test_an_index_is_held_to_the_budget_too(tmp_path):
    weight_map = {f"model.layers.{n}.weight": SHARD for n in range(50_000)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BudgetError, match=r"index\.json: to decode it may take"):
        open_source(str(tmp_path), max_memory=1)
    with pytest.raises(SourceError, match="which is not in the folder"):
        open_source(str(tmp_path))


def test_few_tensors_are_left_to_the_planner(tmp_path):
    """A model of few tensors is left to the planner, which names the least that works."""
    save_model(tmp_path, random_model(1))
    assert len(open_source(str(tmp_path), max_memory=1).tensors) == 8


def test_pieces_read_as_the_whole_header(monkeypatch):
    """A long header is read in pieces and a short one as a whole, to the same end."""
    names = ["a", "}", '},"', "},", "{", '\\"', "ä", "", "__metadata", '"},"b":{"']
    tensors = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1], "more": {"x": [{}]}}
        for n, name in enumerate(names)
    }
    for indent in (None, 1):
        header = json.dumps({"__metadata__": {"a": "}"}, **tensors}, indent=indent).encode()
        file_nbytes = 8 + len(header) + len(names)
        whole = decode_header(header, file_nbytes=file_nbytes)
        assert whole.names == names
        for piece_nbytes in range(2, len(header), 3):
            monkeypatch.setattr("shardmix.formats.safetensors_header._PIECE_NBYTES", piece_nbytes)
            parts = decode_header(header, file_nbytes=file_nbytes)
            assert (parts.names, parts.shapes) == (whole.names, whole.shapes)
            assert parts.starts.tolist() == whole.starts.tolist()
        monkeypatch.undo()


def test_indivisible_header_is_refused(monkeypatch):
    """A long header that cannot be divided is refused."""
    monkeypatch.setattr("shardmix.formats.safetensors_header._PIECE_NBYTES", 100)
    monkeypatch.setattr("shardmix.formats.safetensors_header._MOST_UNDIVIDED_NBYTES", 200)
    header = f"{{{entry('a' * 300, 0, 1)}}}".encode()
    with pytest.raises(SourceError, match="cannot be read in parts"):
        decode_header(header, file_nbytes=9 + len(header))
    with pytest.raises(SourceError, match="does not parse"):
        decode_header(header[:-1], file_nbytes=8 + len(header))
