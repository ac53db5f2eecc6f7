"""A model's place: a folder or file on this machine, or a repository on the Hub.

Asks nobody: `sources.hub` does, and is loaded only for a repository.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from shardmix.conventions.file_kinds import LeftOut
from shardmix.errors import printable
from shardmix.system.files import read_regular

SHOW_DOWNLOADS = ContextVar("SHOW_DOWNLOADS", default=False)
"""True if downloads show progress bars on standard error; a library prints nothing."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MOST_COMMIT_NBYTES = 100
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[^@\s]+)?")


@dataclass(frozen=True, slots=True)
class LocalSource:
    """A source on this machine."""

    path: Path
    """A model folder, or one `.safetensors` file."""
    hub_id: str | None = None
    """`org/name`, if it came from the Hub."""
    commit: str | None = None
    """Commit of its files, if it came from the Hub."""
    left_out: tuple[LeftOut, ...] = ()
    """Files of its repository that were not fetched."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository on the Hub at one commit: whoever fetches from it gets files of that commit."""

    repo_id: str
    """`org/name`."""
    revision: str | None
    """The branch, tag or commit that the user named."""
    commit: str | None
    """The commit that it stood for; None only for a mirror that does not say."""
    sizes: Mapping[str, int] = field(default_factory=dict, repr=False, hash=False)
    """The repository's files, with their sizes in bytes; 0 if unknown."""
    unreachable: str = ""
    """Reason that the Hub could not be asked, so that only the local cache counts."""

    @property
    def name(self) -> str:
        """Its name in messages."""
        revision = "" if self.revision is None else f"@{printable(self.revision)}"
        return f"{self.repo_id}{revision}"


def is_hub_id(text: str) -> bool:
    """Tell whether a text looks like `org/name` or `org/name@revision`."""
    return _HUB_ID.fullmatch(text) is not None


def snapshot(path: Path) -> Path:
    """Return the snapshot that a repository's folder in the Hub's cache stands for, or the path."""
    snapshots = path / "snapshots"
    if not (path.name.startswith("models--") and snapshots.is_dir()):
        return path
    with suppress(OSError, ValueError):
        commit = read_regular(path / "refs" / "main", max_nbytes=_MOST_COMMIT_NBYTES)
        if _COMMIT.fullmatch(commit.decode().strip()):
            main = snapshots / commit.decode().strip()
            if main.is_dir():
                return main
    all_of_them = [snapshot for snapshot in snapshots.iterdir() if snapshot.is_dir()]
    return all_of_them[0] if len(all_of_them) == 1 else path
