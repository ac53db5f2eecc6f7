"""Repositories on the Hub to local folders: only the files that a merge needs.

Downloads weights in safetensors, and the files that go along with them. Tokens, mirrors and offline
mode are huggingface_hub's own (`HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`). Knows nothing of
tensors.
"""

import glob
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from shardmix.conventions.adapters import CONFIG_NAME as ADAPTER_CONFIG
from shardmix.conventions.file_kinds import (
    OTHER_WEIGHTS,
    UNPRINTABLE,
    LeftOut,
    divide,
    is_auxiliary_file,
    is_module_folder,
)
from shardmix.conventions.folder_kinds import no_weights
from shardmix.conventions.module_tree import (
    ROUTER_CONFIGS,
    inner_path,
    module_subfolders,
    read_modules,
)
from shardmix.conventions.peft import PICKLE_NAME as ADAPTER_PICKLE
from shardmix.conventions.peft import WEIGHTS_NAME as ADAPTER_WEIGHTS
from shardmix.conventions.peft import no_adapter
from shardmix.conventions.peft import weights_name as adapter_weights
from shardmix.conventions.sentence_modules import MODULES_NAME
from shardmix.conventions.weight_names import (
    ALL_WEIGHTS,
    DCP_METADATA,
    MARKS,
    StoredWeights,
    distributed_files,
    stored_weights,
)
from shardmix.errors import SourceError, one_line, printable, shown
from shardmix.errors.logs import logs_redacted
from shardmix.errors.redaction import HIDDEN
from shardmix.formats.strict_json import file_name_finding, read_index
from shardmix.sources.located import SHOW_DOWNLOADS, LocalSource, Repository

_LOGGER = logging.getLogger(__name__)
# Without any of these, a repository's files besides weights mean nothing to a merge.
_MODEL_MARKS = ("config.json", MODULES_NAME, *MARKS.values())
_MODULE_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
_WEIGHTS = (
    *(name for each in ALL_WEIGHTS for name in (each.whole, each.index)),
    DCP_METADATA,
)


def pin(hub_id: str) -> Repository:
    """Return the repository of a Hub id, at the commit that its revision stands for at this moment.

    Downloads nothing. If the Hub cannot be asked, a copy in the local cache decides. Raises
    `SourceError`.
    """
    repo_id, _, revision = hub_id.partition("@")
    check_endpoint()
    with logs_redacted():
        return _pin(repo_id, revision or None)


def fetch(repository: Repository, *, with_weights: bool = True) -> LocalSource:
    """Return the local copy of a repository, downloading what is not there yet.

    Without weights only the files that go along with them are fetched. Raises `SourceError`.
    """
    with logs_redacted():
        folder, left_out = _download(repository, with_weights=with_weights)
    # The cache stores each commit's files in a folder of that name.
    return LocalSource(folder, repository.repo_id, folder.name, left_out)


def fetch_adapter(repository: Repository) -> LocalSource:
    """Return the local copy of an adapter's repository: its config and its weights.

    Raises `SourceError`.
    """
    with logs_redacted():
        folder, left_out = _download(repository, with_weights=True, is_adapter=True)
    return LocalSource(folder, repository.repo_id, folder.name, left_out)


def check_endpoint() -> None:
    """Raise `SourceError` if `HF_ENDPOINT` is no URL; huggingface_hub then cannot be imported.

    Its error prints the supposed port: a part of a password that is not encoded.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "")
    try:
        parts = urlsplit(endpoint)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if endpoint and (not is_url or "@" in parts.path or re.search(r"\s", endpoint)):
        user, at, host = endpoint.rpartition("@")
        raise SourceError(
            f"{HIDDEN * bool(user)}{at}{host} is no URL of a Hub",
            subject="HF_ENDPOINT",
            remedy="write https://host[:port], and in user information before the host / ? # @ "
            "and : as %2F %3F %23 %40 and %3A",
        )


def _pin(repo_id: str, revision: str | None) -> Repository:
    # Imported here: a merge of local folders needs no HTTP client.
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT, HF_HUB_OFFLINE

    # Every `except Exception`: HTTP clients, and their errors, change with huggingface_hub.
    try:
        info = HfApi().model_info(
            repo_id, revision=revision, timeout=HF_HUB_ETAG_TIMEOUT, files_metadata=True
        )
    except Exception as error:
        repository = Repository(repo_id, revision, None, unreachable=one_line(error))
        refusal = _refusal(error)
        if refusal is not None:
            raise refusal.of(repository.name) from None
        cached = _cached(repo_id, revision, with_weights=True)
        cached = cached or _cached(repo_id, revision, with_weights=False)
        cached = cached or _cached_adapter(repo_id, revision)
        if cached is None:
            raise _not_cached(repository) from None
        if not HF_HUB_OFFLINE:
            _LOGGER.warning(
                "%s: the Hub cannot be asked (%s); the copy in the local cache is used",
                repository.name,
                one_line(error),
            )
        return replace(repository, commit=cached.name)
    # A mirror may not report sizes.
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    return Repository(repo_id, revision, info.sha, sizes)


def _not_cached(repository: Repository) -> SourceError:
    return SourceError(
        "no such local path, not in the local cache, and the Hub cannot be asked "
        f"({repository.unreachable})",
        subject=repository.name,
        remedy="go online (unset HF_HUB_OFFLINE, check the network) or give a local folder",
    )


def _download(
    repository: Repository, *, with_weights: bool, is_adapter: bool = False
) -> tuple[Path, tuple[LeftOut, ...]]:
    if repository.unreachable:
        repo_id, commit = repository.repo_id, repository.commit
        if is_adapter:
            cached = _cached_adapter(repo_id, commit)
        else:
            cached = _cached(repo_id, commit, with_weights=with_weights)
        if cached is None:
            raise _not_cached(repository)
        return cached, ()
    try:
        with _progress_bars(shown=SHOW_DOWNLOADS.get()):
            if is_adapter:
                return _fetch_adapter(repository), ()
            return _fetch(repository, with_weights=with_weights)
    except SourceError as error:
        raise error.of(repository.name) from None
    except Exception as error:  # see `_pin`
        # huggingface_hub wraps some refusals in a LocalEntryNotFoundError.
        refusal = _refusal(error) or _refusal(error.__cause__)
        failure = SourceError(
            f"the download failed ({one_line(error)}); what has arrived is kept", remedy="try again"
        )
        raise (refusal or failure).of(repository.name) from None


@contextmanager
def _progress_bars(*, shown: bool) -> Iterator[None]:
    """Hide huggingface_hub's own progress bars, unless `shown`."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    hide = not shown and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def _fetch(repository: Repository, *, with_weights: bool) -> tuple[Path, tuple[LeftOut, ...]]:
    """Fetch the files that a merge needs into the cache; return the folder, and the other files."""
    from huggingface_hub import hf_hub_download, snapshot_download

    repo_id, sizes = repository.repo_id, repository.sizes
    commit = repository.commit or repository.revision
    files = list(sizes)
    subfolders = _module_subfolders(repo_id, files, commit)
    stored = {
        subfolder: found
        for subfolder in ("", *subfolders)
        if (found := _stored_weights(files, subfolder)) is not None
    }
    distributed = [] if stored else distributed_files(files)
    if with_weights and not stored and not distributed:
        raise no_weights(files, repo_id)
    weights: list[str] = distributed if with_weights else []
    for subfolder, found in stored.items() if with_weights else ():
        # Both present: as in transformers, the single file counts.
        if inner_path(subfolder, found.whole) in files:
            weights.append(inner_path(subfolder, found.whole))
            continue
        fetched = hf_hub_download(repo_id, inner_path(subfolder, found.index), revision=commit)
        shards = sorted(set(read_index(Path(fetched)).values()))
        weights += [inner_path(subfolder, name) for name in (found.index, *shards)]
    of_modules = [
        name
        for name in files
        if "/" in name and name.rpartition("/")[0] in stored and name.endswith(_MODULE_WEIGHTS)
    ]
    auxiliary_files, left_out = _auxiliary_files(sizes, {*weights, *of_modules}, subfolders)
    for name in (*auxiliary_files, *weights):
        finding = file_name_finding(name)
        if finding is not None:
            raise SourceError(
                f"has a file {shown(name)}, which {finding}; it cannot be fetched",
                remedy="download the model without it, and give the folder",
            )
    # Weights last: if they are in the cache, the rest is, so that a copy can be trusted offline.
    if auxiliary_files:
        patterns = [glob.escape(name) for name in auxiliary_files]
        snapshot_download(repo_id, revision=commit, allow_patterns=patterns)
    patterns = [glob.escape(name) for name in (*auxiliary_files, *weights)]
    folder = Path(snapshot_download(repo_id, revision=commit, allow_patterns=patterns))
    _remember(repository, folder)
    if not with_weights:
        left_out = [finding for finding in left_out if finding.reason != OTHER_WEIGHTS]
    return folder, tuple(left_out)


def _fetch_adapter(repository: Repository) -> Path:
    """Fetch an adapter's config and weights into the cache; return the folder."""
    from huggingface_hub import snapshot_download

    weights = adapter_weights(repository.sizes)
    if weights is None:
        raise no_adapter(repository.sizes)
    wanted = (ADAPTER_CONFIG, weights)
    folder = Path(
        snapshot_download(
            repository.repo_id,
            revision=repository.commit or repository.revision,
            allow_patterns=[glob.escape(name) for name in wanted],
        )
    )
    _remember(repository, folder)
    return folder


def _remember(repository: Repository, folder: Path) -> None:
    """Let the cache know, offline, which commit the revision stood for.

    huggingface_hub does so only for downloads by the revision's name, which may stand for another
    commit by now. Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    refs, revision = folder.parent.parent / "refs", repository.revision or "main"
    if repository.commit in (None, revision) or ".." in Path(revision).parts:
        return
    with suppress(OSError):  # a cache that is only read from
        reference = refs / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        written = reference.with_name(f"{reference.name}.{os.getpid()}")
        written.write_text(folder.name)
        written.replace(reference)


def _auxiliary_files(
    sizes: Mapping[str, int], weights: Collection[str], subfolders: Collection[str]
) -> tuple[list[str], list[LeftOut]]:
    """Divide a repository's files, except weights, into those to fetch and the others."""
    tops = {name.partition("/")[0] for name in sizes if "/" in name}
    modules = {top for top in tops if is_module_folder(top)}
    modules |= {subfolder.partition("/")[0] for subfolder in subfolders}
    auxiliary_files, left_out = divide(sizes, weights=weights, modules=modules)
    if not any(name in sizes for name in _MODEL_MARKS):
        auxiliary_files = [name for name in auxiliary_files if is_auxiliary_file(name)]
    # Pictures have such names; a file that surely belongs to the model is refused for one.
    odd = {
        name for name in auxiliary_files if not name.isprintable() and not is_auxiliary_file(name)
    }
    left_out += [LeftOut(printable(name), UNPRINTABLE) for name in sorted(odd)]
    return [name for name in auxiliary_files if name not in odd], left_out


def _module_subfolders(repo_id: str, files: list[str], commit: str | None) -> tuple[str, ...]:
    """Return the folders of a repository's modules, by the files that name them."""
    from huggingface_hub import snapshot_download

    if MODULES_NAME not in files:
        return ()
    naming = [name for name in files if name.rpartition("/")[2] in ROUTER_CONFIGS]
    patterns = [
        glob.escape(name) for name in (MODULES_NAME, *naming) if not file_name_finding(name)
    ]
    folder = Path(snapshot_download(repo_id, revision=commit, allow_patterns=patterns))
    return module_subfolders(read_modules(folder))


def _stored_weights(files: list[str], subfolder: str) -> StoredWeights | None:
    return stored_weights(lambda name: inner_path(subfolder, name) in files)


def _cached(repo_id: str, revision: str | None, *, with_weights: bool) -> Path | None:
    """Return the folder of an earlier download that has the needed files, or None."""
    from huggingface_hub import try_to_load_from_cache

    # Not snapshot_download(local_files_only=True): files that were never wanted count as missing
    # there.
    for name in _WEIGHTS if with_weights else _MODEL_MARKS:
        found = try_to_load_from_cache(repo_id, name, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    found = try_to_load_from_cache(repo_id, MODULES_NAME, revision=revision)
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    subfolders = [folder / subfolder for subfolder in module_subfolders(read_modules(folder))]
    weights = [subfolder / name for subfolder in subfolders for name in _WEIGHTS]
    return folder if any(path.exists() for path in weights) else None


def _cached_adapter(repo_id: str, revision: str | None) -> Path | None:
    """Return the folder of an earlier download of an adapter, or None."""
    from huggingface_hub import try_to_load_from_cache

    for name in (ADAPTER_WEIGHTS, ADAPTER_PICKLE):
        found = try_to_load_from_cache(repo_id, name, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _refusal(error: BaseException | None) -> SourceError | None:
    """Return the error if asking again would not help; None for troubles on the way."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return SourceError(
            f"no such file or folder, and not a Hub id ({one_line(error)})",
            remedy="check the path",
        )
    if isinstance(error, GatedRepoError):
        return SourceError(
            "the repository is gated",
            remedy="ask for access on its page, then log in with `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, RevisionNotFoundError):
        return SourceError(
            "the repository has no such revision", remedy="check the branch, tag or commit"
        )
    if isinstance(error, RepositoryNotFoundError):
        return SourceError(
            "no such local path and no such Hub repository (or it is private)",
            remedy="check the name, or log in with `hf auth login` or set HF_TOKEN",
        )
    # Before huggingface_hub 1.0 an error without a response is an HfHubHTTPError too.
    response = error.response if isinstance(error, HfHubHTTPError) else None
    if response is not None and response.status_code in (401, 403):
        return SourceError(
            f"the Hub denies access ({one_line(error, limit=300)})",
            remedy="check HF_TOKEN, or log in again with `hf auth login`",
        )
    return None
