"""The file of a profile: where one may be, and what may be replaced."""

import os
from collections.abc import Sequence
from pathlib import Path

from shardmix.errors import OutputError
from shardmix.output.hidden_folder import staging_path
from shardmix.system.files import open_regular
from shardmix.system.held_folder import open_folder

FIRST_BYTES = b'{"profile_version":'
"""First bytes of a profile's file."""


def check_profile_path(path: str, output: Path | None, inputs: Sequence[Path]) -> None:
    """Refuse a profile that could not be written, or would destroy something. Opens no source.

    `path` is absolute; `inputs` are model folders and weight files. Raises `OutputError`.
    """
    file = Path(path)
    kept_clean = [] if output is None else [output, staging_path(output)]
    for folder in (*kept_clean, *(source.resolve() for source in inputs)):
        if folder == file or folder in file.parents:
            raise OutputError(
                f"a profile cannot be in {folder}",
                subject=file,
                remedy="choose a place outside it",
            )
    if not file.parent.is_dir():
        raise OutputError(f"there is no folder {file.parent}", subject=file, remedy="make it first")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise OutputError(
            "cannot be written to",
            subject=file,
            remedy="choose another place for the profile",
        )
    _check_replaceable(file)


def _check_replaceable(file: Path) -> None:
    if file.is_symlink():
        raise OutputError(
            "is a link, which a profile does not follow",
            subject=file,
            remedy="name another file",
        )
    if file.exists() and not is_profile(file):
        raise OutputError(
            "exists and is not a profile; nothing else would be replaced",
            subject=file,
            remedy="choose another name",
        )


def is_profile(file: Path) -> bool:
    """Return True if a file is a profile of a merge, by its first bytes."""
    try:
        with open_regular(file) as opened:
            return opened.read(len(FIRST_BYTES)) == FIRST_BYTES
    except OSError:
        return False


def write_profile(path: str, content: bytes) -> None:
    """Write a profile, or replace an earlier one. Raises `OutputError`."""
    file = Path(path)
    _check_replaceable(file)  # again: the first check was before the merge
    try:
        with open_folder(file.parent) as folder:
            folder.replace(file.name, content)
    except OSError as error:
        raise OutputError(
            f"the profile cannot be written ({error.strerror})",
            subject=path,
            remedy="check its permissions and its disk",
        ) from None
