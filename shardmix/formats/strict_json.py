"""JSON that came with a model: config, modules, index. Strictly read, and bounded in size.

Anything that two readers might understand differently (a key given twice, half a character) is
refused. Knows JSON and the format of an index; nothing of tensors.
"""

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from shardmix.errors import SourceError, one_line, shown
from shardmix.system.files import LFS_FINDING, LFS_REMEDY, is_lfs_pointer, read_regular
from shardmix.system.memory import check_room

# As Python objects, JSON may take 26 times its length ("[[],[],..."), so whole files are small.
MAX_JSON_NBYTES = 4_000_000
_MAX_JSON_DEPTH = 64
_MAX_INDEX_NBYTES = 100_000_000  # as for headers: about a million tensors
_SMALL_INDEX_NBYTES = 1_000_000
_PAIR_NBYTES = 250  # two short strings, their tuple, their entry in a growing dict
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class _Index(msgspec.Struct):
    """The fields of an index that matter here."""

    weight_map: msgspec.Raw
    """Tensor name → file, relative to the model's folder."""


def read_json(path: Path, *, expected: type = dict) -> Any:
    """Read a JSON object (or list) from a small file; raise `SourceError` if it is not one."""
    content = _read(path, MAX_JSON_NBYTES)
    try:
        decoded = json.loads(content.decode(), object_pairs_hook=_without_duplicates)
        if _ESCAPED_SURROGATE.search(content):
            json.dumps(decoded, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"not valid JSON ({one_line(error)})", subject=path, remedy="fetch it again"
        ) from None
    if not isinstance(decoded, expected):
        raise SourceError(
            f"must hold a JSON {'list' if expected is list else 'object'}, not "
            f"{type(decoded).__name__}",
            subject=path,
            remedy="fetch it again",
        )
    if content.count(b"{") + content.count(b"[") > _MAX_JSON_DEPTH and _is_deep(decoded):
        raise SourceError(
            f"nests deeper than {_MAX_JSON_DEPTH} levels; no model's JSON does",
            subject=path,
            remedy="fetch it again",
        )
    return decoded


def read_index(path: Path, *, max_memory: int | None = None) -> dict[str, str]:
    """Return the weight map of a sharded model's index: tensor name → file in the same folder.

    Raises `SourceError` also if it names a file outside of that folder, and `BudgetError` if
    `max_memory` (bytes, for the whole process) might not suffice to decode it.
    """
    purpose = "to decode it"
    if path.is_file() and path.stat().st_size > _SMALL_INDEX_NBYTES:
        check_room(path.stat().st_size, max_memory=max_memory, subject=path, purpose=purpose)
    content = _read(path, _MAX_INDEX_NBYTES)
    if len(content) > _SMALL_INDEX_NBYTES:
        needed = 4 * len(content) + _PAIR_NBYTES * content.count(b":")
        check_room(needed, max_memory=max_memory, subject=path, purpose=purpose)
    try:
        raw = msgspec.json.decode(content, type=_Index).weight_map
        weight_map = msgspec.json.decode(raw, type=dict[str, str])
        # Each pair has a colon. If there are more, or an escape, a key may occur twice.
        is_plain = b"\\" not in content and content.count(b'"weight_map"') == 1
        if not (is_plain and bytes(raw).count(b":") == len(weight_map)):
            json.loads(content, object_pairs_hook=_without_duplicates)
    except msgspec.ValidationError as error:
        raise SourceError(
            f"has no weight_map from tensor names to files ({one_line(error)})",
            subject=path,
            remedy="fetch it again",
        ) from None
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"not valid JSON ({one_line(error)})", subject=path, remedy="fetch it again"
        ) from None
    if not weight_map:
        raise SourceError(
            "has no weight_map from tensor names to files",
            subject=path,
            remedy="fetch it again",
        )
    # An index is called as its files are: model.safetensors.index.json.
    suffix = Path(path.name.removesuffix(".index.json")).suffix
    for name in set(weight_map.values()):
        finding = file_name_finding(name)
        if finding is not None:
            raise SourceError(
                f"names {shown(name)}, which {finding}; an index names files only in "
                "its own folder",
                subject=path,
                remedy="fetch it again",
            )
        if not name.endswith(suffix):
            raise SourceError(
                f"names {shown(name)}, which is not a {suffix} file",
                subject=path,
                remedy="fetch or save the model in safetensors",
            )
    return weight_map


def file_name_finding(name: str) -> str | None:
    """Return why a stranger's file name cannot lie within a folder, or None if it can."""
    path = PurePosixPath(name)
    if not path.parts:
        return "is no file name"
    if not name.isprintable():
        return "has control characters in it"
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        return "lies outside the model's folder"
    return None


def _read(path: Path, max_nbytes: int) -> bytes:
    try:
        content = read_regular(path, max_nbytes=max_nbytes)
    except OSError as error:
        raise SourceError(
            f"cannot be read ({error.strerror})",
            subject=path,
            remedy="check its permissions, and that it is the model's own",
        ) from None
    if is_lfs_pointer(content):
        raise SourceError(LFS_FINDING, subject=path, remedy=LFS_REMEDY)
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {shown(key)} is given twice")
            seen.add(key)
    return content


def _is_deep(content: object) -> bool:
    """Return True if containers nest deeper than allowed, without recursion."""
    level = [content]
    for _ in range(_MAX_JSON_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)  # type: ignore[attr-defined]
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True
