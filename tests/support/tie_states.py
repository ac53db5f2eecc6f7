"""The ways in which a model's folder can say what its tied weights are, each made from one model.

A *state* is one such folder: tied weights left out, stored as copies, stored with values of their
own, under another name, with or without the config's key, or with that key in a nested config. What
a state holds is what transformers makes of it on loading; what it cannot load whole is no state.
"""

import contextlib
import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel

from tests.support import tied_models
from tests.support.small_configs import small_config
from tests.support.tied_classes import TIE_MEANS_MORE, UNTIE, Variant

TIE_KEY = "tie_word_embeddings"
USUAL = ("tied", "untied", "copy", "tied-silent")
"""States that everybody meets."""

# Keys that only tie, and keys that say nothing of what a model computes.
_TIE_KEYS = (TIE_KEY, "tie_codebooks_embeddings", "tie_embedding")
_META_KEYS = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")

Values = Mapping[str, torch.Tensor]
"""Name → tensor, for all names of a model: a tied tensor has several."""
_Edit = Callable[[dict[str, Any]], dict[str, Any]]


class NotWholeError(Exception):
    """A folder that transformers does not load whole."""


@dataclass(frozen=True, slots=True)
class State:
    """One folder of a model, and what transformers loads from it."""

    label: str
    """The way in which it is stored."""
    folder: Path
    """The place where it lies."""
    values: Values
    """The loaded model's."""
    config: PreTrainedConfig
    """The loaded model's."""
    computation: str
    """A digest of what the config says of how the values are used."""


class StoredModels:
    """Models of one class and kind of config, each in all its states."""

    def __init__(
        self, cls: type[PreTrainedModel], variant: Variant, root: Path, *, num_models: int = 2
    ) -> None:
        self.cls = cls
        self.variant = variant
        self.root = root
        self.tied_config, self.untied_config = _configs(cls, variant)
        self.not_valid: dict[str, str] = {}
        """State → why it is none."""
        self._bare: dict[str, PreTrainedModel] = {}
        self._built: dict[str, Values] = {}
        self._loads_as_built: set[str] = set()
        self.models: list[dict[str, State]] = []
        """For each model: label → state."""
        for number in range(1, num_models + 1):
            self.models.append(self._states(number))

    def bare(self, config: PreTrainedConfig) -> PreTrainedModel:
        """Return a model with this config, built once."""
        key = config.to_json_string()
        if key not in self._bare:
            self._bare[key] = tied_models.build(self.cls, config)
        return self._bare[key]

    def ties(self) -> dict[str, str]:
        """Return tied name → the name it is tied to."""
        return dict(self.bare(self.tied_config).all_tied_weights_keys)

    def _states(self, number: int) -> dict[str, State]:
        found: dict[str, State] = {}
        seen: set[str] = set()
        for label, folder, how in self._folders(number):
            if folder is None or (digest := folder_digest(folder)) in seen:
                continue
            seen.add(digest)
            try:
                found[label] = self._load(label, folder, how, number)
            except NotWholeError as error:
                self.not_valid[label] = str(error)
        return found

    def _folders(self, number: int) -> Iterator[tuple[str, Path | None, str]]:
        """Yield label, folder and how the model in it was built."""
        root = self.root / str(number)
        saved = {how: self._save(root / how, number, how) for how in ("tied", "copy", "separate")}
        if self.untied_config is not None:
            saved["untied"] = self._save(root / "untied", number, "untied")
        for how, folder in saved.items():
            yield how, folder, how
        for how, folder in saved.items():
            if folder is not None:
                yield f"{how}-silent", _edited(folder, f"{how}-silent", _without_tie_key), how
        for how in ("tied", "untied"):
            folder = saved.get(how)
            if folder is None or (part := _nested_part(folder)) is None:
                continue
            for label, top, nested in (
                (f"{how}-nested", None, how == "tied"),
                (f"{how}-top-only", True, False),
                (f"{how}-nested-only", False, True),
            ):
                yield label, _edited(folder, label, _said(part, top, nested)), how
        for label, last in (("other", False), ("other-last", True)):
            yield label, self._renamed(saved, root / label, number, last=last), "tied"

    def _model(self, number: int, how: str) -> PreTrainedModel:
        config = self.untied_config if how == "untied" else self.tied_config
        assert config is not None
        model = tied_models.randomise(copy.deepcopy(self.bare(config)), 100 * number)
        if how in ("copy", "separate"):
            tied_models.separate(model, seed=7000 + number if how == "separate" else None)
        self._built[f"{how} {number}"] = dict(model.state_dict())
        return model

    def _save(self, folder: Path, number: int, how: str) -> Path | None:
        try:
            self._model(number, how).save_pretrained(folder)
        except Exception as error:
            self.not_valid[how] = f"cannot be saved: {one_line(error)}"
            return None
        if self.variant.edit is not None:
            _edit_config(folder, self.variant.edit)
        return folder

    def _renamed(
        self, saved: Mapping[str, Path | None], folder: Path, number: int, *, last: bool
    ) -> Path | None:
        """Store one name only of each tied tensor: the first or last of those tied to another."""
        copies, own = saved["copy"], saved["separate"]
        if copies is None or own is None:
            return None
        groups: dict[str, list[str]] = {}
        for target, source in self.ties().items():
            groups.setdefault(source, []).append(target)
        if last and all(len(targets) == 1 for targets in groups.values()):
            return None
        # A file's names may differ from the model's: where each has a value of its own, that tells.
        file_name = {_bits(tensor): name for name, tensor in stored_tensors(own).items()}
        values = self._built[f"separate {number}"]
        tensors = stored_tensors(copies)
        for source, targets in groups.items():
            kept = targets[-1 if last else 0]
            for name in (source, *targets):
                stored = file_name.get(_bits(values[name]))
                if stored is None:
                    self.not_valid[folder.name] = f"{name} is stored as a part of another tensor"
                    return None
                if name != kept:
                    tensors.pop(stored, None)
        shutil.copytree(copies, folder)
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def _load(self, label: str, folder: Path, how: str, number: int) -> State:
        built = self._built[f"{how} {number}"]
        if number > 1 and label in self._loads_as_built:
            # Stored as the first model is, which has loaded as it was built.
            like = self.models[0][label]
            return State(label, folder, built, like.config, like.computation)
        model = load_whole(self.cls, folder)
        values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if not difference(values, built):
            self._loads_as_built.add(label)
        return State(label, folder, values, model.config, _computation(model))


def load_whole(cls: type[PreTrainedModel], folder: Path, **options: Any) -> PreTrainedModel:
    """Load a model. Raises `NotWholeError` if a name is missing, unexpected or of another shape."""
    try:
        model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:
        raise NotWholeError(
            f"does not load: {type(error).__name__}: {one_line(error)[:200]}"
        ) from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if names := info.get(what):
            listed = sorted(map(str, names))
            raise NotWholeError(f"{what} ({len(listed)}): {', '.join(listed[:3])}")
    return model.eval()


def difference(actual: Values, expected: Values) -> str:
    """Return in what two models differ, "" if in nothing but rounding."""
    if actual.keys() != expected.keys():
        return f"other names: {', '.join(sorted(actual.keys() ^ expected.keys())[:4])}"
    wrong = [
        name
        for name, tensor in expected.items()
        if actual[name].shape != tensor.shape
        or not torch.allclose(actual[name].double(), tensor.double(), rtol=1e-6, atol=1e-6)
    ]
    if not wrong:
        return ""
    return f"not the mean ({len(wrong)} of {len(expected)}): {', '.join(wrong[:4])}"


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder's files."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def folder_digest(folder: Path) -> str:
    """Return a digest of a folder's tensors and config: of one digest, folders are one state."""
    config = _without(json.loads((folder / "config.json").read_text()), _META_KEYS)
    text = json.dumps(config, sort_keys=True)
    return values_digest(stored_tensors(folder)) + hashlib.sha1(text.encode()).hexdigest()


def values_digest(values: Values) -> str:
    """Return a digest of names and bytes."""
    digest = hashlib.sha1()
    for name, tensor in sorted(values.items()):
        digest.update(name.encode() + _bits(tensor))
    return digest.hexdigest()


def config_digest(config: PreTrainedConfig, *, without: Sequence[str] = ()) -> str:
    """Return a digest of what a config says of a model, but for some keys."""
    said = _without(config.to_dict(), (*_META_KEYS, *without))
    return hashlib.sha1(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:12]


def one_line(error: BaseException) -> str:
    """Return an error's text in one line, shortened."""
    return " ".join(str(error).split())[:600]


def _computation(model: PreTrainedModel) -> str:
    means_more = type(model).__name__ in TIE_MEANS_MORE
    return config_digest(model.config, without=() if means_more else _TIE_KEYS)


def _configs(
    cls: type[PreTrainedModel], variant: Variant
) -> tuple[PreTrainedConfig, PreTrainedConfig | None]:
    """Return the config of a tied model, and that of an untied one if the class has such."""
    tied: PreTrainedConfig | None = None
    failure: Exception = ValueError("nothing is tied, whatever the config says")
    for choice in ({}, {TIE_KEY: True}, {TIE_KEY: True, "__tie__": True}):
        try:
            config = small_config(cls, **{**variant.changes, **choice})
            if tied_models.build(cls, config).all_tied_weights_keys:
                tied = config
                break
        except Exception as error:
            failure = error
    if tied is None:
        raise failure
    other = UNTIE.get(cls.config_class.__name__, {})
    for choice in ({TIE_KEY: False}, {TIE_KEY: False, "__tie__": False}, other):
        with contextlib.suppress(Exception):
            config = small_config(cls, **{**variant.changes, **choice})
            if not tied_models.build(cls, config).all_tied_weights_keys:
                return tied, config
    return tied, None


def _edited(saved: Path, name: str, edit: _Edit) -> Path:
    folder = saved.with_name(name)
    shutil.copytree(saved, folder)
    _edit_config(folder, edit)
    return folder


def _edit_config(folder: Path, edit: _Edit) -> None:
    path = folder / "config.json"
    config = edit(json.loads(path.read_text()))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _without_tie_key(config: dict[str, Any]) -> dict[str, Any]:
    return _without(config, (TIE_KEY,))


def _without(value: Any, keys: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(part, keys) for key, part in value.items() if key not in keys}
    return value


def _nested_part(folder: Path) -> str | None:
    config = json.loads((folder / "config.json").read_text())
    return "text_config" if isinstance(config.get("text_config"), dict) else None


def _said(part: str, top: bool | None, nested: bool) -> _Edit:
    def edit(config: dict[str, Any]) -> dict[str, Any]:
        said = _without_tie_key(config)
        said[part][TIE_KEY] = nested
        return said if top is None else {**said, TIE_KEY: top}

    return edit


def _bits(tensor: torch.Tensor) -> bytes:
    if not tensor.numel():
        return b""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
