"""An output file's `__metadata__`: the first model's entries that are still true.

The format leaves such texts to whoever writes a file: `format`, modelspec's title and licence,
settings of a training. Knows names of entries, not files.
"""

import re
from collections.abc import Iterable, Mapping

from shardmix.errors import shown

DEFAULT_METADATA: Mapping[str, str] = {"format": "pt"}
"""Default entries; transformers refuses a file without a format."""

# Digests of the first model's file, and the models it was merged from, are false of the output.
# https://github.com/Stability-AI/ModelSpec and kohya's sd-scripts (sshs_model_hash).
_FALSE_OF_A_MERGE = re.compile(
    r"(^|[._-])(hash|sha\d+|md5|crc\d+|blake\d?|checksum|digest|autov\d|merged_from|"
    r"sd_merge_\w+|mecha_recipe)([._-]|$)",
    re.IGNORECASE,
)


def merged_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the entries of a source file's metadata that stay true, in the same order.

    A format is added if there is none.
    """
    kept = {key: text for key, text in metadata.items() if not _FALSE_OF_A_MERGE.search(key)}
    return {**kept, **{key: text for key, text in DEFAULT_METADATA.items() if key not in kept}}


def format_only(metadata: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return only the format of files' metadata, for output files laid out in another way."""
    formats = (entries["format"] for entries in metadata if "format" in entries)
    return {"format": next(formats, DEFAULT_METADATA["format"])}


def lost_metadata(
    source: str,
    *,
    before: Iterable[Mapping[str, str]],
    after: Iterable[Mapping[str, str]],
    is_laid_out_anew: bool,
) -> list[str]:
    """Name the entries of a source's files that no output file has: one sentence, or none."""
    there = {key for entries in before for key in entries}
    kept = {key for entries in after for key in entries}
    lost = sorted(there - kept)
    if not lost:
        return []
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    reason = "the output's files have another layout" if is_laid_out_anew else "not true of a merge"
    return [
        f"{source}: of its files' metadata, {shown(lost[0])}{more} left out ({reason}); the "
        "source's own files still say so"
    ]
