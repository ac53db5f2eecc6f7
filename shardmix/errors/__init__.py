"""One family of exceptions: whatever a user's input can cause is a `ShardmixError`.

    ShardmixError
    ├─ RecipeError            a request that makes no sense (exit status 2; all others 1)
    ├─ SourceError            a checkpoint is missing, damaged, or cannot be merged
    │  └─ SourceChangedError  a checkpoint that changed since the merge began
    ├─ MismatchError          the checkpoints do not fit one another
    ├─ BudgetError            the memory budget is too small
    ├─ DeviceError            a GPU failed
    ├─ NonfiniteError         the merged weights hold NaN or Inf
    ├─ OutputError            the output cannot be written
    └─ MergeCancelled         the merge was cancelled

The kinds let a caller tell apart the cases that it can handle. An error has parts: the subject, the
finding (with the rule), the remedy, and hints that callers add.

redaction              leaves credentials and tokens out of every message
logs                   leaves them out of log records
"""

import errno
import itertools
from collections.abc import Collection
from os import PathLike
from pathlib import Path

from shardmix.errors.redaction import without_environment, without_secrets


class ShardmixError(Exception):
    """An error that the user can mend; its text is "subject: finding; remedy; hint", on one line.

    Every part is printable and has no secrets. Code that raises an error without knowing its
    subject leaves it out; a caller names it with `of`. A caller adds its own knowledge with
    `add_hint`.

    Example:
        >>> error = ShardmixError("is empty", subject="model.safetensors", remedy="fetch it again")
        >>> str(error)
        'model.safetensors: is empty; fetch it again'
    """

    exit_status = 1

    subject: str
    """The object: a file, a tensor, an option or a key of a recipe; "" if the finding names it."""
    finding: str
    """The fault, and the rule that it breaks."""
    remedy: str
    """The way to mend it; "" if a user can do nothing."""
    hints: tuple[str, ...]
    """Callers' additions, the innermost first: saved work, and the way to go on from it."""

    def __init__(
        self,
        finding: str = "",
        *,
        subject: str | PathLike[str] = "",
        remedy: str = "",
        hints: Collection[str] = (),
    ) -> None:
        # Escaped here, so that `repr`, `args` and a pickled error don't hold secrets either.
        self.subject = printable(str(subject))
        self.finding = printable(finding)
        self.remedy = printable(remedy)
        self.hints = tuple(map(printable, hints))
        super().__init__(self.finding)

    def __str__(self) -> str:
        """Return all parts on one line."""
        parts = (self.finding, self.remedy, *self.hints)
        text = "; ".join(filter(None, parts))
        return printable(f"{self.subject}: {text}" if self.subject else text)

    def __repr__(self) -> str:
        """Return the kind and the text."""
        return f"{type(self).__name__}({str(self)!r})"

    def of(self, subject: str | PathLike[str]) -> "ShardmixError":
        """Return this error with its subject, which the caller knows.

        Example:
            >>> str(ShardmixError("is empty").of("model.safetensors"))
            'model.safetensors: is empty'
        """
        named = printable(str(subject))
        self.subject = f"{named}: {self.subject}" if self.subject else named
        return self

    def add_hint(self, hint: str) -> None:
        """Add a fact that only a caller knows, such as the work that is saved."""
        self.hints += (printable(hint),)


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


def unreadable(subject: Path | str, error: OSError, what: str = "cannot be read") -> SourceError:
    """Return the error for a file or folder that the system does not let us read."""
    return SourceError(
        f"{what} ({error.strerror or error})",
        subject=subject,
        remedy="check its permissions and its disk",
    )


def writing_failed(path: Path, error: OSError, what: str = "cannot be written") -> OutputError:
    """Return the error for a file or folder of an output; names a full disk."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"the disk is full ({error.strerror})",
            subject=path.parent,
            remedy="free some space, or write elsewhere with -o",
        )
    return OutputError(
        f"{what} ({error.strerror})", subject=path, remedy="check its permissions and its disk"
    )


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


_MOST_SHOWN = 200


def _is_large(value: object) -> bool:
    """Return True if a value has so many inner ones that its text could be of any length.

    A list may hold another one twice, and that a third one twice: forty of them, a text of a
    terabyte.
    """
    left, count = [value], 0
    while left:
        inner = left.pop()
        count += 1
        if count > _MOST_SHOWN:
            return True
        if isinstance(inner, dict):
            left += itertools.islice(inner.keys(), _MOST_SHOWN)
            left += itertools.islice(inner.values(), _MOST_SHOWN)
        elif isinstance(inner, list | tuple | set | frozenset):
            left += itertools.islice(inner, _MOST_SHOWN)
    return False


def shown(value: object, limit: int = 60) -> str:
    """Format a value of a stranger's file for a message, cut short, whatever it is."""
    if _is_large(value):
        return f"a large {type(value).__name__}"
    try:
        text = printable(repr(value))
    except (ValueError, RecursionError):  # an integer of many digits, or deep nesting
        return f"a large {type(value).__name__}"
    return text if len(text) <= limit else text[:limit] + "..."
