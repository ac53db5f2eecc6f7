"""What a hostile input is made of: builders that leave a folder, and the command that meets it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Words = list[str]
Build = Callable[[Path], Words]
"""Makes an input in an empty folder and returns the words of the command line that meets it."""


@dataclass(frozen=True, slots=True)
class Case:
    """A hostile input, by name."""

    name: str
    build: Build
    said: str
    """What the error has to say, among the rest."""
    status: int = 1
    """How the command has to end."""


def safetensors_file(header: str | bytes, data_nbytes: int) -> bytes:
    """Return a file of this header and so many bytes of data."""
    encoded = header if isinstance(header, bytes) else header.encode()
    return len(encoded).to_bytes(8, "little") + encoded + bytes(data_nbytes)


WEIGHTS = safetensors_file('{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1)
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"


def a_model(folder: Path, files: Mapping[str, bytes | str] | None = None) -> Path:
    """Make a model of one tensor, `w`, with other files, or without one whose content is ''."""
    for name, content in {
        "model.safetensors": WEIGHTS,
        "config.json": b"{}",
        **(files or {}),
    }.items():
        if content == "":
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def merge(folder: Path, *more: str) -> Words:
    """Return the words that merge what lies in `bad` with a model that is as it should be."""
    bad, good = folder / "bad", a_model(folder / "good")
    return ["merge", f"{bad}=0.5", f"{good}=0.5", "-o", str(folder / "output" / "out"), *more]


def a_folder(files: Mapping[str, bytes | str]) -> Build:
    """Build a model with these files."""

    def build(folder: Path) -> Words:
        a_model(folder / "bad", files)
        return merge(folder)

    return build


def a_header(header: str | bytes, data_nbytes: int) -> Build:
    """Build a model whose file has this header."""
    return a_folder({"model.safetensors": safetensors_file(header, data_nbytes)})


def a_whole_file(content: bytes) -> Build:
    """Build a model whose weight file holds this."""

    def build(folder: Path) -> Words:
        a_model(folder / "bad")
        (folder / "bad" / "model.safetensors").write_bytes(content)
        return merge(folder)

    return build


def an_index(content: bytes | str) -> Build:
    """Build a model of one shard whose index holds this."""
    return a_folder({"model.safetensors": "", SHARD: WEIGHTS, INDEX: content})


def a_weight_map(weight_map: object) -> Build:
    """Build a model of one shard whose index has this weight map."""
    return an_index(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def a_recipe(content: bytes | str, name: str = "recipe.yaml") -> Build:
    """Build a recipe that holds this."""

    def build(folder: Path) -> Words:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["merge", str(path), "-o", str(folder / "output" / "out")]

    return build


def changed(change: Callable[[Path], object], *more: str) -> Build:
    """Build a model that is as it should be, then let a function of its folder spoil it."""

    def build(folder: Path) -> Words:
        change(a_model(folder / "bad"))
        return merge(folder, *more)

    return build
