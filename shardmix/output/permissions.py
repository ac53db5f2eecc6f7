"""Permissions of an output: only those who could read every model in it may read it.

New files and folders have the permissions of the umask. But an output is no more readable than its
most private source: group and others lose the permissions that they lack at any file that is read
or copied. `--share` leaves everything to the umask. (safetensors itself saves with mode 0600, and
so do most trainers.) Permissions decide no byte: a merge with `--share` goes on from one without.

Reads the permissions of files, and opens none.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shardmix.conventions.adapters import parts_of
from shardmix.plan.merge_plan import MergePlan

_OWNER, _GROUP, _OTHERS = 0o700, 0o070, 0o007


@dataclass(frozen=True, slots=True)
class Readers:
    """The readers that an output's sources allow."""

    mode: int
    """The most permissions that a folder of the output may have."""
    narrowest: str
    """Path of the first source that excludes somebody; "" if none does."""

    def note(self, output: Path, umask_mode: int) -> tuple[str, ...]:
        """Say that the output is more private than the umask (here a folder's mode) would make it.

        Returns nothing if it is not.
        """
        lost = umask_mode & ~self.mode
        if not lost:
            return ()
        who = "only its owner" if lost & _GROUP else "only its owner and group"
        return (
            f"{output}: can be read by {who}, as {self.narrowest} can; with --share (share=True) "
            "by all that the umask allows",
        )


def readers_of(plan: MergePlan, *, group: int) -> Readers:
    """Return the readers that all sources of a merge allow; `group` is the group of its output.

    The files that are read count: weights and copied files (in the Hub's cache, the file behind
    each link). Of a model named as a folder, the folder with its weights counts too. The folders
    above do not count: a private home says nothing of the models in it. Raises OSError.
    """
    mode, narrowest = _OWNER | _GROUP | _OTHERS, ""
    for path in _paths(plan):
        allowed = _allowed(Path(path).stat(), group)
        if mode & ~allowed and not narrowest:
            narrowest = path
        mode &= allowed
    return Readers(mode, narrowest)


def _paths(plan: MergePlan) -> Iterator[str]:
    """Yield the paths to check, each file once."""
    folders = {
        str(Path(file.path).parent)
        for source in plan.sources
        for single_files in ([part for part in parts_of(source.path) if Path(part).is_file()],)
        for file in source.identity.files
        if file.commit is None and file.path not in single_files
    }
    yield from (file.path for file in plan.files)
    yield from sorted(folders)
    yield from (str(Path(plan.config_source_folder) / name) for name in plan.auxiliary_files)
    if plan.vocabulary is not None:
        yield from (str(Path(plan.tokenizer_folder) / name) for name in plan.vocabulary.files)


def _allowed(there: os.stat_result, group: int) -> int:
    """Return the permissions that a file (or a folder around it) leaves to a copy of `group`."""
    is_folder = stat.S_ISDIR(there.st_mode)
    of_group = bool(there.st_mode & (stat.S_IXGRP if is_folder else stat.S_IRGRP))
    of_others = bool(there.st_mode & (stat.S_IXOTH if is_folder else stat.S_IROTH))
    if there.st_gid != group:
        # A member of the one group may be anybody to the other.
        of_group = of_others = of_group and of_others
    return _OWNER | _GROUP * of_group | _OTHERS * of_others
