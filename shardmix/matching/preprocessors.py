"""Differences in the preparation of pictures and sounds: `preprocessor_config.json`. Warnings."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardmix.errors import SourceError, listed, printable
from shardmix.formats.strict_json import read_json
from shardmix.matching.differences import Difference, same_number, shown_value
from shardmix.system.files import refuse_link_outside

NAME = "preprocessor_config.json"
_NUM_NAMED = 4
_ABOUT_THE_CODE = ("auto_map", "use_fast", "device", "return_tensors", "processor_class")


def preprocessor_differences(
    folders: Sequence[tuple[str, Path]], *, output: int = 0
) -> list[Difference]:
    """Return the settings that differ from the output's, which are those of `folders[output]`.

    A folder is given by its model's name and its path. A setting that one of them leaves out, or
    writes in another version's form, is no difference.
    """
    contents = {}
    for number, (name, folder) in enumerate(folders):
        if os.path.lexists(folder / NAME):
            try:
                refuse_link_outside(folder, folder / NAME)
                contents[number] = read_json(folder / NAME)
            except SourceError as error:
                return [_told(f"{error}; how {name} prepares its inputs was not compared")]
    if output not in contents:
        return []
    first, found = folders[output][0], []
    for number, content in contents.items():
        keys = _differing(contents[output], content)
        if keys:
            name = folders[number][0]
            words = [
                f"{printable(key)} ({shown_value(contents[output][key])} in {first}, "
                f"{shown_value(content[key])} in {name})"
                for key in keys
            ]
            found.append(
                _told(f"{NAME}: {listed(words, _NUM_NAMED)}", f"the output takes that of {first}")
            )
    return found


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [
        key
        for key, value in one.items()
        if key in other
        and not same_number(value, other[key])
        and isinstance(value, dict) == isinstance(other[key], dict)
        and not (key.startswith("_") or key.endswith("_type") or key in _ABOUT_THE_CODE)
    ]


def _told(finding: str, consequence: str = "") -> Difference:
    return Difference(NAME, finding, consequence, is_refused=False)
