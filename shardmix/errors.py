"""One family of exceptions: whatever a user's input can cause is a `ShardmixError`.

A message names the object, the finding, the rule and the remedy. The kinds let a caller tell apart
the cases that it can handle. `exit_status` is the command line's exit status.
"""

import errno
import itertools
from collections.abc import Collection
from pathlib import Path

from shardmix.redaction import without_environment, without_secrets


class ShardmixError(Exception):
    """An error that the user can mend; the message says how."""

    exit_status = 1

    def __init__(self, message: str = "", *more: object) -> None:
        # Here, so that `repr`, `args` and a pickled error don't hold secrets either.
        super().__init__(without_secrets(str(message)), *more)

    def __str__(self) -> str:
        """Return the message, escaped, since it contains strangers' names."""
        return printable(super().__str__())


class RecipeError(ShardmixError):
    """A request that makes no sense: weights, options or a recipe file."""

    exit_status = 2


class SourceError(ShardmixError):
    """A checkpoint that is missing, damaged, or of a kind that cannot be merged."""


class SourceChangedError(SourceError):
    """A checkpoint that changed since the merge began."""


class MismatchError(ShardmixError):
    """Checkpoints that are each fine, but do not fit one another."""


class BudgetError(ShardmixError):
    """A memory budget that is too small to work in."""


class DeviceError(ShardmixError):
    """A GPU that failed during a merge, or had too little memory left."""


class NonfiniteError(ShardmixError):
    """Merged weights with NaN or Inf, if these were to be an error."""


class OutputError(ShardmixError):
    """An output that cannot be written as asked."""


class MergeCancelled(ShardmixError):  # noqa: N818 - it is an outcome, not a fault
    """A merge cancelled through its cancel event; what is done is saved for the next call."""


def writing_failed(path: Path, error: OSError, what: str = "cannot be written") -> OutputError:
    """Return the error for a file or folder of an output; names a full disk."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"{path.parent}: the disk is full ({error.strerror}); free some space, or write "
            "elsewhere with -o"
        )
    return OutputError(f"{path}: {what} ({error.strerror})")


def one_line(error: BaseException | None, limit: int = 200) -> str:
    """Return another library's error text on one line, cut short, for a message."""
    # Secrets first: half a URL cannot be told from a word.
    text = " ".join(without_environment(str(error)).split())
    return printable(text[:limit]) or type(error).__name__


def printable(text: str) -> str:
    """Return text with control characters escaped and secrets left out.

    Names come from strangers' files: control characters, newlines and marks that change the
    direction of writing are escaped. Paths and URLs come from users: credentials and tokens are
    left out.
    """
    text = without_secrets(text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def is_unicode(text: str) -> bool:
    """Return True if a text is valid Unicode; a file name may be bytes that are not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def listed(names: Collection[str], most: int = 5) -> str:
    """Return the first few names, and the number of the rest."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(itertools.islice(names, most)) + more


def shown(value: object, limit: int = 60) -> str:
    """Format a value of a stranger's file for a message, cut short, whatever it is."""
    try:
        text = printable(repr(value))
    except (ValueError, RecursionError):  # an integer of many digits, or deep nesting
        return f"a large {type(value).__name__}"
    return text if len(text) <= limit else text[:limit] + "..."
