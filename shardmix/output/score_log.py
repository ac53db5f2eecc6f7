"""The scores so far, stored beside a merge's journal for the next call.

Losses differ in the last digits by how examples were put into batches, and so by budget, threads
and device. A merge that goes on needs the weights that it began with. One JSON value a line: the
scoring's identity, then each model's score, then the report. Knows files, not scores.
"""

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields

import msgspec

from shardmix.errors import OutputError, writing_failed
from shardmix.plan.merge_plan import FileIdentity, MergePlan
from shardmix.system.held_folder import HeldFolder

SCORES_NAME = "scores"
_MOST_NBYTES = 256_000_000
_HEAD, _REPORT = -1, 0


@dataclass(frozen=True, slots=True)
class ScoringIdentity:
    """All that decides the losses of models on examples, except for their last digits."""

    examples: str
    """SHA-256 (hex) of the examples, in order."""
    options: Mapping[str, object]
    """Scoring options that matter, by name."""
    models: tuple[str, ...]
    """Public names, in order."""
    weights: tuple[tuple[object, ...], ...]
    """Identity of each weight file."""
    others: tuple[tuple[str, str], ...]
    """(Path, digest) of config, tokenizer and all else that goes along with the weights."""

    def digest(self) -> str:
        """Return the SHA-256 (hex) of all fields."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()

    def difference(self, now: "ScoringIdentity") -> str:
        """Describe the difference to another scoring."""
        names = {
            "examples": "the examples are others",
            "models": "the models are others",
            "weights": "a model's weight files are not what they were",
            "others": "a model's config or tokenizer is not what it was",
        }
        for name, finding in names.items():
            if getattr(self, name) != getattr(now, name):
                return finding
        changed = [
            f"{name} {self.options.get(name)} then, {now.options.get(name)} now"
            for name in sorted({*self.options, *now.options})
            if self.options.get(name) != now.options.get(name)
        ]
        return ", ".join(changed).replace("_", " ")


def known_by(file: FileIdentity) -> tuple[object, ...]:
    """Return a weight file's identity, without fields that may change while it stays the same."""
    parts = {field.name: getattr(file, field.name) for field in fields(file)}
    stamp = parts.pop("stamp")
    if stamp is not None:
        parts["stamp"] = stamp.ctime_ns or stamp.inode
    return tuple(parts.values())


def weight_files(plan: MergePlan) -> tuple[tuple[object, ...], ...]:
    """Return the identities of all weight files of a plan."""
    return tuple(known_by(file) for file in plan.file_identities())


class _Line(msgspec.Struct, array_like=True):
    identity: str
    model: int  # from 1; or _HEAD, or _REPORT
    content: msgspec.Raw


class ScoreLog:
    """Scores of one scoring, earlier ones and new ones."""

    def __init__(self, folder: HeldFolder, identity: ScoringIdentity) -> None:
        self._folder = folder
        self._identity = identity
        self._digest = identity.digest()
        self._found: dict[int, bytes] = {}
        self._before: ScoringIdentity | None = None
        try:
            self._descriptor = folder.open_own(SCORES_NAME, append=True)
            try:
                self._read()
                if _HEAD not in self._found:
                    self._add(_HEAD, msgspec.json.encode(identity))
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise writing_failed(folder.path / SCORES_NAME, error, "cannot be used") from None

    @property
    def num_models(self) -> int:
        """Number of models with a score."""
        return sum(model > 0 for model in self._found)

    @property
    def difference(self) -> str:
        """Difference to another scoring stored there before this one; "" if there was none."""
        return "" if self._before is None else self._before.difference(self._identity)

    @property
    def report(self) -> bytes | None:
        """The report, once all models are scored."""
        return self._found.get(_REPORT)

    def get(self, model: int) -> bytes | None:
        """Return a model's score (by number, from 1), or None."""
        return self._found.get(model)

    def put(self, model: int, score: bytes) -> None:
        """Store a model's score: JSON of one line. Raises `OutputError`."""
        self._put(model, score)

    def put_report(self, report: bytes) -> None:
        """Store the report: JSON of one line. Raises `OutputError`."""
        self._put(_REPORT, report)

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # a lost score costs work, not bytes
            os.close(self._descriptor)

    def _put(self, model: int, content: bytes) -> None:
        try:
            self._add(model, content)
        except OSError as error:
            raise writing_failed(self._folder.path / SCORES_NAME, error) from None

    def _add(self, model: int, content: bytes) -> None:
        line = msgspec.json.encode(_Line(self._digest, model, msgspec.Raw(content))) + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]
        self._found[model] = content

    def _read(self) -> None:
        """Read the lines up to the first torn one."""
        end = 0
        with self._folder.open_regular(SCORES_NAME) as file:
            content = file.read(_MOST_NBYTES)
        for encoded in content.splitlines(keepends=True):
            line = _decoded(encoded)
            if line is None:
                break
            end += len(encoded)
            if line.identity == self._digest:
                self._found[line.model] = bytes(line.content)
            elif line.model == _HEAD:
                with suppress(ValueError, RecursionError):
                    self._before = msgspec.json.decode(line.content, type=ScoringIdentity)
        os.ftruncate(self._descriptor, end)


def num_models_scored(folder: HeldFolder) -> int:
    """Return the number of models with scores in a staging folder. Raises OSError."""
    if folder.entry(SCORES_NAME) is None:
        return 0
    with suppress(OutputError), folder.open_regular(SCORES_NAME) as file:
        lines = map(_decoded, file.read(_MOST_NBYTES).splitlines(keepends=True))
        whole = [line for line in lines if line is not None]
        return len({line.model for line in whole if line.identity == whole[-1].identity} - {-1, 0})
    return 0


def _decoded(encoded: bytes) -> _Line | None:
    """Return a line, or None if it is torn."""
    if not encoded.endswith(b"\n"):
        return None
    try:
        return msgspec.json.decode(encoded, type=_Line)
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return None
