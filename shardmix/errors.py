"""One family of exceptions: whatever a user's input can cause is a `ShardmixError`.

A message names the object, the finding, the rule and the remedy. The kinds exist so that a caller
can tell apart what it can do something about; `exit_status` is what the command line leaves with.
"""

import errno
import itertools
from collections.abc import Collection
from pathlib import Path

from shardmix.redaction import without_environment, without_secrets


class ShardmixError(Exception):
    """Something the user can mend; the message says how."""

    exit_status = 1

    def __init__(self, message: str = "", *more: object) -> None:
        # Here, so that `repr`, `args` and a pickled error don't hold secrets either.
        super().__init__(without_secrets(str(message)), *more)

    def __str__(self) -> str:
        """Return the message, escaped: it names what strangers named."""
        return printable(super().__str__())


class RecipeError(ShardmixError):
    """What was asked for makes no sense: weights, options or a recipe file."""

    exit_status = 2


class SourceError(ShardmixError):
    """A checkpoint is missing, damaged, or of a kind that cannot be merged."""


class SourceChangedError(SourceError):
    """A checkpoint is not what it was when the merge began."""


class MismatchError(ShardmixError):
    """The checkpoints are each fine, but do not fit one another."""


class BudgetError(ShardmixError):
    """The memory budget is too small to work in."""


class DeviceError(ShardmixError):
    """A GPU failed while it was at work, or had too little memory left."""


class NonfiniteError(ShardmixError):
    """The merged weights hold NaN or Inf, and that was to be an error."""


class OutputError(ShardmixError):
    """The output cannot be written where it was asked for."""


class MergeCancelled(ShardmixError):  # noqa: N818 - it is an outcome, not a fault
    """The merge was cancelled through its cancel event; what is done is kept for another run."""


def writing_failed(path: Path, error: OSError, what: str = "cannot be written") -> OutputError:
    """Return the error for a file or folder of an output; a full disk is called by its name."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"{path.parent}: the disk is full ({error.strerror}); free some space, or write "
            "elsewhere with -o"
        )
    return OutputError(f"{path}: {what} ({error.strerror})")


def one_line(error: BaseException | None, limit: int = 200) -> str:
    """Return what an error of someone else's says, on one line and cut short, for a message."""
    # Secrets first: half a URL cannot be told from a word.
    text = " ".join(without_environment(str(error)).split())
    return printable(text[:limit]) or type(error).__name__


def printable(text: str) -> str:
    """Return text with what a terminal would obey escaped, and without secrets.

    Names come from strangers' files: control characters, newlines and marks that turn the direction
    of writing are escaped. Places come from users: credentials in URLs and tokens are left out.
    """
    text = without_secrets(text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def is_unicode(text: str) -> bool:
    """Tell whether a text is one, and not the bytes of a file name that are none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def listed(names: Collection[str], most: int = 5) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(itertools.islice(names, most)) + more


def shown(value: object, limit: int = 60) -> str:
    """Return a value of a stranger's file for a message, cut short, whatever it is."""
    try:
        text = printable(repr(value))
    except (ValueError, RecursionError):  # an integer of many digits, or deep nesting
        return f"a large {type(value).__name__}"
    return text if len(text) <= limit else text[:limit] + "..."
