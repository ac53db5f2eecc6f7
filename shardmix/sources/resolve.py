"""A source's text → its value, once: a local path, or a commit on the Hub; and then a `Source`.

Whoever plans, scores or merges is handed the value, so that all see the same commit, even if a
branch moves in between. The kinds of sources are a table here. `BASE+ADAPTER` is a model with an
adapter applied; of `BASE+A+B`, A is applied first.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shardmix.conventions.adapters import divided
from shardmix.dtypes import CODE_DTYPES, DTYPE_RANK
from shardmix.errors import SourceError, is_unicode, one_line
from shardmix.errors.redaction import without_user
from shardmix.sources.base import ModelFolder, Opening, Source, SourceKind
from shardmix.sources.checkpoint import checkpoint_folder, open_checkpoint
from shardmix.sources.dcp_folders import dcp_folder, dcp_folders
from shardmix.sources.headers import Headers
from shardmix.sources.located import LocalSource, Repository, is_hub_id, snapshot


def _decode_quantised(source: Source) -> Source | None:
    """Decode a model with tensors that may be codes; return None for others."""
    ranks = [DTYPE_RANK[dtype] for dtype in CODE_DTYPES]
    if not np.isin(source.tensors.dtype_ranks, ranks).any():
        return None
    # Imported here: other models need none of it.
    from shardmix.sources.quantised import decode_quantised

    return decode_quantised(source)


def _open_dcp(opening: Opening) -> Source | None:
    """Open a distributed checkpoint of torch; return None for other models."""
    folders = dcp_folders(opening.located)
    if folders is None:
        return None
    # Imported here: other models need none of it.
    from shardmix.sources.dcp import open_dcp

    return open_dcp(opening, *folders)


KINDS = (SourceKind(_open_dcp, dcp_folder), SourceKind(open_checkpoint, checkpoint_folder))
"""The kinds of sources; the first that knows a model wins."""
DECODERS: tuple[Callable[[Source], Source | None], ...] = (_decode_quantised,)
"""Functions that wrap an opened source whose tensors are codes, or return None if none are."""


@dataclass(frozen=True, slots=True)
class ResolvedSource:
    """The model that a text stood for when it was resolved. Can be pickled."""

    text: str
    """The text, as the user wrote it."""
    path: Path | None = None
    """A local folder or file."""
    repository: Repository | None = None
    """A commit on the Hub."""
    base: "ResolvedSource | None" = None
    """The model that this is an adapter on; None for a model."""

    def fetch(self, *, with_weights: bool = True) -> LocalSource:
        """Return its files on this machine, downloading those that are not there yet.

        Without weights only the files that go along with them are fetched; of an adapter on a
        model, the model's. Raises `SourceError`.
        """
        if self.base is not None and not with_weights:
            return self.base.fetch(with_weights=False)
        if self.repository is not None:
            from shardmix.sources.hub import fetch, fetch_adapter

            if self.base is not None:
                return fetch_adapter(self.repository)
            return fetch(self.repository, with_weights=with_weights)
        if self.path is None:
            raise AssertionError(f"{self.text}: neither a path nor a repository")
        return LocalSource(self.path)


def resolve(text: str) -> ResolvedSource:
    """Return the model that a text stands for at this moment. Downloads nothing.

    Anything that exists on disk is local; `org/name` or `org/name@revision` is a Hub id, and its
    commit is decided here. Otherwise a `+` divides a model from an adapter on it: as in mergekit
    the last one, unless what follows it is only a part of an existing path. Raises `SourceError`.
    """
    base, adapter = divided(text)
    if adapter is None:
        return _resolve_one(text)
    if not base or not adapter:
        raise SourceError(
            "names no model before the `+`, or no adapter after it",
            subject=text,
            remedy="write it as BASE+ADAPTER",
        )
    return replace(_resolve_one(adapter), text=text, base=resolve(base))


def _resolve_one(text: str) -> ResolvedSource:
    try:
        path = Path(text).expanduser()
        is_local = path.exists()
    except (OSError, RuntimeError) as error:  # no such user's home, or a name that no disk allows
        raise SourceError(
            f"cannot be a path ({one_line(error)})", subject=text, remedy="check it"
        ) from None
    if is_local:
        if not (is_unicode(text) and is_unicode(os.path.realpath(path))):
            raise SourceError(
                "is not valid Unicode, and reports must name it",
                subject=text,
                remedy="rename the folder",
            )
        return ResolvedSource(text, path=snapshot(path))
    if not is_hub_id(text):
        raise SourceError(
            "no such file or folder, and not a Hub id (org/name or org/name@revision)",
            subject=without_user(text),
            remedy="check the path",
        )
    from shardmix.sources.hub import pin

    return ResolvedSource(text, repository=pin(text))


def resolve_all(texts: Iterable[str]) -> dict[str, ResolvedSource]:
    """Return text → model, each text resolved once. Raises `SourceError`."""
    return {text: resolve(text) for text in dict.fromkeys(texts)}


def model_folder(located: LocalSource) -> ModelFolder:
    """Return the folder of a model that only gives its config. Raises `SourceError`."""
    return next(found for kind in KINDS if (found := kind.folder(located)) is not None)


def open_sources(
    resolved: Iterable[ResolvedSource], *, max_memory: int | None = None
) -> Iterator[Source]:
    """Open several models, one after the other; decode common headers once.

    Raises `SourceError` if files are missing, damaged, pickled or outside the folder, `BudgetError`
    if to decode headers might take the process beyond `max_memory` (bytes).
    """
    headers = Headers()
    return (_open(each, headers, max_memory) for each in resolved)


def open_source(text: str, *, max_memory: int | None = None) -> Source:
    """Resolve one text and open its model, as `open_sources` does."""
    return _open(resolve(text), Headers(), max_memory)


def _open(resolved: ResolvedSource, headers: Headers, max_memory: int | None) -> Source:
    def open_other(text: str) -> Source:
        return _open(resolve(text), headers, max_memory)

    if resolved.base is not None:
        # Imported here: without an adapter, none of it is needed.
        from shardmix.sources.adapted import AdaptedSource
        from shardmix.sources.adapters import open_adapter

        base = _open(resolved.base, headers, max_memory)
        text = resolved.text.removeprefix(f"{resolved.base.text}+")
        opening = Opening(text, resolved.fetch(), headers, max_memory, open_other)
        return AdaptedSource(base, open_adapter(opening), resolved.text)
    opening = Opening(resolved.text, resolved.fetch(), headers, max_memory, open_other)
    found = next(source for kind in KINDS if (source := kind.open(opening)) is not None)
    for decoder in DECODERS:
        found = decoder(found) or found
    return found
