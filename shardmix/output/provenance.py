"""`shardmix.json`: the models that an output was made from, and the digests of its files.

It names the models (by Hub id and commit, or by name and their files' sizes and header hashes), the
weights in full precision, versions, the plan's digest, and each file's own. It has no time, no
host, and no path of the machine unless `--record-paths` asks for it: the same merge writes the same
bytes. The model card has no digest, since people edit it. The last field is the SHA-256 of all
bytes before it: it reveals later edits. Whoever makes that digest again changes the SHA-256 of the
file, which merge, `verify` and `status` print.

A file read back may come from anyone.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import msgspec

from shardmix._version import __version__
from shardmix.anomalies import LeafAnomalies
from shardmix.errors import RecipeError, SourceError, one_line, unreadable, writing_failed
from shardmix.output.counted_folder import CountedFolder
from shardmix.plan.merge_plan import MergePlan, PlannedSource
from shardmix.recipe import Recipe
from shardmix.recipe.build import checked
from shardmix.recipe.yaml_file import recipe_from_dict, recipe_to_dict
from shardmix.system.files import open_regular
from shardmix.system.hashing import ALGORITHMS, LEAF_NBYTES, file_digest
from shardmix.system.held_folder import HeldFolder

PROVENANCE_NAME = "shardmix.json"
_FORMAT = 2
EDITED = (
    "is not as the merge wrote it, since its digest of itself does not hold: the models, weights "
    "and digests that it tells may be others; take it from a copy, or merge again"
)
"""The error for a file whose seal does not hold."""
_MAX_NBYTES = 64_000_000
_END = b'"\n}\n'
_SEALED = re.compile(rb'"sha256_above": "([0-9a-f]{64})' + _END + rb"\Z")
NOT_DIGESTED = ("README.md", PROVENANCE_NAME)
"""People may edit a model card; the other file has a digest of itself."""


class SourceFileRecord(msgspec.Struct, frozen=True):
    """One weight file of a source."""

    name: str
    """Its path within the model's folder."""
    bytes: int
    """Its size."""
    header_sha256: str
    """SHA-256 (hex) of its header."""


class AdapterRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """An adapter that was applied to a model."""

    name: str
    """Hub id with revision, or the name of its folder."""
    hub_id: str | None = None
    """`org/name`, if it came from the Hub."""
    commit: str | None = None
    """The commit on the Hub."""


class SourceRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One model that was merged."""

    name: str
    """Hub id with revision, or the name of the folder or file."""
    files: tuple[SourceFileRecord, ...]
    """Its weight files, in name order."""
    hub_id: str | None = None
    """`org/name`, if it came from the Hub."""
    commit: str | None = None
    """The commit on the Hub."""
    path: str | None = None
    """Its path, if that was to be recorded; with adapters, the text that opens them all."""
    adapters: tuple[AdapterRecord, ...] = ()
    """The adapters that were applied to it, in order."""

    @property
    def base_name(self) -> str:
        """Its name without those of its adapters."""
        return self.name.removesuffix("".join(f"+{adapter.name}" for adapter in self.adapters))


class FileRecord(msgspec.Struct, frozen=True):
    """One file of the output."""

    bytes: int
    """Its size."""
    digest: str
    """Its digest (hex), by the algorithm of `Digests`."""


class Digests(msgspec.Struct, frozen=True):
    """The digests of the output's files."""

    algorithm: str
    """One of `hashing.ALGORITHMS`."""
    leaf_bytes: int
    """Size of the leaves that files are hashed in, unless the digest is the whole file's."""
    files: dict[str, FileRecord]
    """Path within the output → file."""


class NonfiniteRecord(msgspec.Struct, frozen=True):
    """The values of a merged tensor that are not finite."""

    nan: int
    """Number of NaNs."""
    inf: int
    """Number of infinities."""
    overflowed: int
    """Number of infinities that rounding to the output's dtype made."""


class Provenance(msgspec.Struct, frozen=True, omit_defaults=True):
    """The whole `shardmix.json`."""

    format: int
    """Version of this layout."""
    shardmix: str
    """Version of shardmix."""
    torch: str
    """Version of torch."""
    safetensors: str
    """Version of safetensors."""
    plan: str
    """SHA-256 (hex) of all that decides the output's bytes."""
    recipe: dict[str, Any]
    """The recipe, in its language; models by their names in `sources`."""
    sources: tuple[SourceRecord, ...]
    """The models, in order: the base model, if there is one, then the recipe's."""
    config_from: str
    """Name of the model that gave config, tokenizer and the other auxiliary files."""
    digests: Digests
    """Digests of the output's files."""
    config_source_commit: str | None = None
    """Commit of that model, if it came from the Hub."""
    nonfinite: dict[str, NonfiniteRecord] = {}
    """NaN and Inf in the output, by tensor."""
    sha256_above: str = ""
    """SHA-256 (hex) of all bytes of the file before this value, which ends it."""


@dataclass(frozen=True, slots=True)
class Seal:
    """The digest that a `shardmix.json` has of itself."""

    sha256: str
    """SHA-256 (hex) of the whole file, as `sha256sum` shows it."""
    holds: bool
    """True if its own digest is right: nobody edited the file without making it again."""


def write_provenance(
    plan: MergePlan,
    folder: HeldFolder | CountedFolder,
    known_digests: Mapping[str, str],
    anomalies: LeafAnomalies,
    *,
    plan_digest: str,
) -> str:
    """Write an output's `shardmix.json`, as its last file, and return its SHA-256 (hex).

    `known_digests` are those of files that need not be read for them. Raises `OutputError`.
    """
    try:
        files = dict(_file_records(plan, folder, known_digests))
        provenance = Provenance(
            format=_FORMAT,
            shardmix=__version__,
            torch=_installed("torch"),
            safetensors=_installed("safetensors"),
            plan=plan_digest,
            recipe=recipe_to_dict(plan.public_recipe),
            sources=tuple(_source_record(plan, source) for source in plan.sources),
            config_from=plan.config_source_name,
            config_source_commit=plan.config_source_commit,
            digests=Digests(plan.digest_algorithm, LEAF_NBYTES, files),
        )
        text = msgspec.json.format(msgspec.json.encode(provenance), indent=2)
        with folder.create(PROVENANCE_NAME) as file:
            hasher = hashlib.sha256()
            for part in _sealed(text, anomalies, hasher):
                hasher.update(part)
                file.write(part)
            return hasher.hexdigest()
    except OSError as error:
        raise writing_failed(folder.path / PROVENANCE_NAME, error) from None


def _sealed(text: bytes, anomalies: LeafAnomalies, hasher: "hashlib._Hash") -> Iterator[bytes]:
    """Yield the parts of the file; the caller hashes each part before it takes the next."""
    yield text.removesuffix(b"\n}")
    yield from _nonfinite_lines(anomalies)
    yield b',\n  "sha256_above": "'
    yield hasher.hexdigest().encode() + _END


def read_provenance(folder: Path) -> tuple[Provenance, Seal]:
    """Read an output's `shardmix.json`, and check its seal.

    Raises `SourceError` if it is missing or malformed.
    """
    path = folder / PROVENANCE_NAME
    try:
        with open_regular(path) as file:
            return parse_provenance(file, path)
    except FileNotFoundError:
        raise SourceError(
            f"has no {PROVENANCE_NAME}, which a merge by shardmix writes; there is nothing to "
            "verify it against",
            subject=folder,
            remedy="name the output of a merge",
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None


def parse_provenance(file: BinaryIO, path: Path) -> tuple[Provenance, Seal]:
    """Read an open `shardmix.json`, called `path`. Raises `SourceError` if it is malformed.

    A file whose seal does not hold is still returned: the output's files are compared with it.
    """
    encoded = file.read(_MAX_NBYTES + 1)
    try:
        provenance = msgspec.json.decode(encoded, type=Provenance)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise SourceError(
            f"is not a merge's {PROVENANCE_NAME} ({one_line(error)})",
            subject=path,
            remedy="merge again",
        ) from None
    digests = provenance.digests
    if provenance.format != _FORMAT or digests.leaf_bytes != LEAF_NBYTES:
        raise SourceError(
            f"was written by shardmix {provenance.shardmix} in a format that {__version__} does "
            "not know",
            subject=path,
            remedy="verify it with that version",
        )
    if digests.algorithm not in ALGORITHMS:
        raise SourceError(
            f"names the digest {digests.algorithm!r}, which is unknown",
            subject=path,
            remedy="verify it with the version that wrote it",
        )
    for name in digests.files:
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or "\0" in name or not relative.parts:
            raise SourceError(
                f"names {name!r}, which lies outside the model's folder",
                subject=path,
                remedy="merge again",
            )
    if not any(name.endswith(".safetensors") for name in digests.files):
        raise SourceError(
            "names no weight file, which every merge writes; there is nothing to verify the "
            "model against",
            subject=path,
            remedy="merge again",
        )
    return provenance, _seal(encoded)


def recorded_recipe(provenance: Provenance, path: Path) -> Recipe:
    """Return the recipe that a `shardmix.json` at `path` tells of; models by public name.

    Raises `SourceError` if it is none, or has more or fewer models than there are sources.
    """
    try:
        recipe = recipe_from_dict(provenance.recipe)
        # By number: two models may have one public name, and one of them be the base model.
        numbered = recipe.with_sources([str(n) for n in range(len(recipe.sources))])
        recipe = checked(numbered, may_be_one=True)
    except RecipeError:
        raise SourceError(
            f"its recipe is none that shardmix {__version__} understands",
            subject=path,
            remedy="take the file from a copy, or merge again",
        ) from None
    if len(recipe.sources) != len(provenance.sources):
        raise SourceError(
            f"its recipe has {len(recipe.sources)} models, but it tells of "
            f"{len(provenance.sources)} sources",
            subject=path,
            remedy="take the file from a copy, or merge again",
        )
    return recipe.with_sources([source.name for source in provenance.sources])


def _seal(encoded: bytes) -> Seal:
    value = _SEALED.search(encoded)
    holds = value is not None and (
        hashlib.sha256(memoryview(encoded)[: value.start(1)]).hexdigest().encode() == value[1]
    )
    return Seal(hashlib.sha256(encoded).hexdigest(), holds)


def _file_records(
    plan: MergePlan, folder: HeldFolder | CountedFolder, known_digests: Mapping[str, str]
) -> list[tuple[str, FileRecord]]:
    """Return every file's record, by name; shards were hashed while they were written."""
    if isinstance(folder, CountedFolder):
        sizes = folder.sizes
    else:
        sizes = {name: there.st_size for name, there in folder.files()}
    records = []
    for name, nbytes in sorted(sizes.items()):
        if name in NOT_DIGESTED:
            continue
        digest = known_digests.get(name)
        if digest is None:
            assert isinstance(folder, HeldFolder)
            with folder.open_regular(name) as file:
                digest = file_digest(file.fileno(), plan.digest_algorithm)
        records.append((name, FileRecord(nbytes, digest)))
    return records


def nonfinite_nbytes(name: str) -> int:
    """Return the most bytes that `shardmix.json` takes for a tensor with NaN or Inf."""
    most = 10**15
    anomalies = LeafAnomalies(nonfinite={name: (most, most, most)})
    return sum(map(len, _nonfinite_lines(anomalies)))


def _nonfinite_lines(anomalies: LeafAnomalies) -> Iterator[bytes]:
    """Yield the last field a tensor at a time: it may be longer than a plan."""
    for number, name in enumerate(sorted(anomalies.nonfinite)):
        yield b"," if number else b',\n  "nonfinite": {'
        record = msgspec.json.encode(NonfiniteRecord(*anomalies.nonfinite[name]))
        indented = msgspec.json.format(record, indent=2).replace(b"\n", b"\n    ")
        yield b"\n    " + msgspec.json.encode(name) + b": " + indented
    if anomalies.nonfinite:
        yield b"\n  }"


def _source_record(plan: MergePlan, source: PlannedSource) -> SourceRecord:
    identity = source.identity
    is_local = None in (identity.hub_id, *(adapter.hub_id for adapter in identity.adapters))
    return SourceRecord(
        name=source.name,
        hub_id=identity.hub_id,
        commit=identity.commit,
        path=source.path if plan.record_paths and is_local else None,
        adapters=tuple(
            AdapterRecord(adapter.name, adapter.hub_id, adapter.commit)
            for adapter in identity.adapters
        ),
        files=tuple(
            SourceFileRecord(file.name, file.nbytes, file.header_sha256) for file in identity.files
        ),
    )


def _installed(package: str) -> str:
    with suppress(PackageNotFoundError):
        return version(package)
    return ""
