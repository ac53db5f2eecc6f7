"""The keyword arguments of a plan that concern its output."""

from pathlib import Path
from typing import TypedDict


class Outcome(TypedDict, total=False):
    """The path of an output, and the content of its provenance."""

    output: Path | None
    """The folder to make, or None if that is open."""
    digest_algorithm: str
    """Algorithm of its files' digests; default: XXH3."""
    record_paths: bool
    """True if its provenance records the sources' paths on this machine; default: False."""
