"""Hub ids to local folders: what a merge needs of a repository, and no more.

Downloads only weights in safetensors, config and tokenizer files. Tokens, mirrors and offline mode
are huggingface_hub's own (`HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`). Knows nothing of tensors.
"""

import glob
import json
import re
from dataclasses import dataclass
from pathlib import Path

from shardmix.errors import SourceError
from shardmix.naming import is_companion_file

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[^@\s]+)?")


@dataclass(frozen=True, slots=True)
class LocalSource:
    """A source as it lies on this machine."""

    path: Path
    """A model folder, or one `.safetensors` file."""
    hub_id: str | None = None
    """`org/name`, where it came from the Hub."""


def locate(source: str) -> LocalSource:
    """Return where a source lies, downloading it first if it is a Hub id.

    What exists on disk is local; `org/name` or `org/name@revision` is a Hub id. Raises
    `SourceError`.
    """
    path = Path(source).expanduser()
    if path.exists():
        return LocalSource(path)
    if not _HUB_ID.fullmatch(source):
        raise SourceError(
            f"{source}: no such file or folder, and not a Hub id (org/name or org/name@revision); "
            "check the path"
        )
    repo_id, _, revision = source.partition("@")
    return LocalSource(_download(repo_id, revision or None), hub_id=repo_id)


def _download(repo_id: str, revision: str | None) -> Path:
    # Imported here: a merge of local folders needs no HTTP client.
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = repo_id if revision is None else f"{repo_id}@{revision}"
    try:
        try:
            info = HfApi().model_info(repo_id, revision=revision)
        except HfHubHTTPError:
            raise
        except Exception:
            # The Hub cannot be asked: what was downloaded before will do, as for transformers.
            return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
        files = [sibling.rfilename for sibling in info.siblings or ()]
        weights = [WEIGHTS_NAME]
        if INDEX_NAME in files:
            index = hf_hub_download(repo_id, INDEX_NAME, revision=info.sha)
            weights = [INDEX_NAME, *_shards_named_by(Path(index), named)]
        elif WEIGHTS_NAME not in files:
            raise SourceError(f"{named}: {no_weights_finding(files)}")
        wanted = [*weights, *filter(is_companion_file, files)]
        patterns = [glob.escape(name) for name in wanted]
        return Path(snapshot_download(repo_id, revision=info.sha, allow_patterns=patterns))
    except GatedRepoError:
        raise SourceError(
            f"{named}: the repository is gated; ask for access on its page, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise SourceError(
            f"{named}: the repository has no such revision; check the branch, tag or commit"
        ) from None
    except RepositoryNotFoundError:
        raise SourceError(
            f"{named}: no such local path and no such Hub repository (or it is private); check the "
            "name, or log in with `hf auth login`"
        ) from None
    except LocalEntryNotFoundError:
        raise SourceError(
            f"{named}: not in the local cache and the Hub cannot be asked; go online (unset "
            "HF_HUB_OFFLINE, check the network) or give a local folder"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise SourceError(
            f"{named}: the download failed ({_one_line(error)}); "
            "what has arrived is kept: try again"
        ) from None


def _shards_named_by(index: Path, named: str) -> list[str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return sorted({str(shard) for shard in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SourceError(f"{named}: its {INDEX_NAME} has no readable weight_map") from None


def no_weights_finding(files: list[str]) -> str:
    """Say what is wrong with a model that has no safetensors weights, from its file names."""
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in files):
        return (
            "has weights only as pickle (.bin); shardmix reads safetensors alone, which cannot run "
            "code: convert it by loading it in transformers and calling "
            "save_pretrained(..., safe_serialization=True)"
        )
    if any(name.endswith(".gguf") for name in files):
        return "has weights only as GGUF; shardmix merges safetensors: use the original checkpoint"
    return f"has neither {WEIGHTS_NAME} nor {INDEX_NAME}; is it the model's folder?"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
