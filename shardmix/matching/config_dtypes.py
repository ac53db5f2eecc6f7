"""The dtypes that a config states, of a model and of its parts, compared with stored tensors.

Each part of a multimodal model may have its own dtype, with a key of its own in the config. Pure
functions on configs, names and sizes.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shardmix.conventions.naming import DTYPE_KEYS

_PARTS = ("encoder", "decoder", "text_encoder", "audio_encoder")
_NO_PARTS = ("quantization_config", "compression_config", "generation_config")
# Keys of a model's config; each config has at least one of them.
_MODEL_KEYS = (
    *("model_type", "architectures", "hidden_size", "d_model", "embed_dim", "num_hidden_layers"),
    *("num_layers", "depth", *DTYPE_KEYS),
)
_MOST_PARTS = 50  # of one model; a stranger's config may have more than can be compared
_TEXT = ("text", "language", "llm", "lm", "decoder")
# Name of a part's config → names of the part in tensor names.
_NAMES = {
    "text": ("language_model", "text_model", "text_encoder", "text_decoder", "llm", "language"),
    "vision": (
        *("vision_tower", "vision_model", "vision_encoder", "vision_backbone", "visual", "vit"),
        *("image_encoder", "image_tower", "video_tower", "vision_embed_tokens", "vision"),
    ),
    "audio": ("audio_tower", "audio_model", "audio_encoder", "speech_encoder", "audio"),
    "projector": ("multi_modal_projector", "mm_projector", "connector", "projector"),
}
# Possible endings of such a module's name, if it begins with the name of the config.
_KINDS = ("model", "encoder", "tower", "transformer", "tokenizer", "backbone")
_SAME = {"language": "text", "llm": "text", "lm": "text", "vit": "vision", "image": "vision"}


@dataclass(slots=True)
class _Part:
    """A model that a config describes, or a part of one."""

    path: str
    """Dotted keys that lead to its config; "" for the whole."""
    name: str
    """Its key without `_config`."""
    config: Mapping[str, Any]
    parts: list["_Part"] = field(default_factory=list)
    nbytes: dict[str, int] = field(default_factory=dict)
    """Dtype → bytes of its tensors, without those of its own parts."""

    def each(self) -> Iterator["_Part"]:
        """Yield it and all its parts."""
        yield self
        for part in self.parts:
            yield from part.each()

    def has_tensors(self) -> bool:
        """Return True if some tensor is known to belong to it."""
        return any(part.nbytes for part in self.each())


def config_dtypes(
    config: Mapping[str, Any], tensors: Iterable[tuple[str, str, int]]
) -> dict[str, str]:
    """Return path → dtype that a config should state, for the model and its parts.

    `tensors` are name, torch name of the dtype, and bytes of all float tensors. A part has the
    dtype of most bytes of its own tensors; the whole has that of its text part and of tensors
    outside all parts. A dtype that is unknown, or may be intended, is left out: the config stays as
    it is there. Paths are dotted keys.
    """
    whole = _parts_of(config, "", "")
    by_modules: dict[tuple[str, ...], dict[str, int]] = {}
    total: dict[str, int] = {}
    for name, dtype, size in tensors:
        counted = by_modules.setdefault(_modules_of(name) if whole.parts else (), {})
        counted[dtype] = counted.get(dtype, 0) + size + 1
        total[dtype] = total.get(dtype, 0) + size + 1
    if not total:
        return {}
    if len(total) == 1:
        return dict.fromkeys((path for path, _ in _nested(config, "")), *total)
    for modules, sizes in by_modules.items():
        _add(_owner(whole, modules), sizes)
    return dict(_dtypes_of(whole, total))


def with_dtypes(config: Mapping[str, Any], dtypes: Mapping[str, str]) -> dict[str, Any]:
    """Return a config with all its dtypes replaced by the given ones, by path.

    The key is `dtype` or `torch_dtype`, whichever the config has; none is added.
    """
    changed = copy.deepcopy(dict(config))
    for path, part in _nested(changed, ""):
        for key in DTYPE_KEYS:
            stated = part.get(key)
            if isinstance(stated, str) and stated.removeprefix("torch.") != dtypes.get(path):
                part[key] = dtypes.get(path, stated)
    return changed


def _nested(config: Mapping[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a config and all mappings within it, with their paths."""
    yield path, config  # type: ignore[misc]
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _nested(value, f"{path}.{key}" if path else key)


def _parts_of(config: Mapping[str, Any], path: str, name: str) -> _Part:
    parts: list[_Part] = []
    for key, value in config.items():
        is_part = (key.endswith("_config") and key not in _NO_PARTS) or key in _PARTS
        if len(parts) == _MOST_PARTS:
            break
        if is_part and isinstance(value, dict) and any(known in value for known in _MODEL_KEYS):
            inner = f"{path}.{key}" if path else key
            parts.append(_parts_of(value, inner, key.removesuffix("_config")))
    return _Part(path, name, config, parts)


def _modules_of(name: str) -> tuple[str, ...]:
    """Return the modules that contain a tensor, down to the first numbered one."""
    modules = name.split(".")[:-1]
    numbered = next((i for i, module in enumerate(modules) if module.isdecimal()), len(modules))
    return tuple(modules[:numbered])


def _owner(part: _Part, modules: tuple[str, ...]) -> _Part:
    """Return the innermost part that a tensor belongs to, by the modules that contain it."""
    for number, module in enumerate(modules):
        for inner in part.parts:
            if _is_called(module, inner.name):
                return _owner(inner, modules[number + 1 :])
    return part


def _is_called(module: str, name: str) -> bool:
    """Return True if a module is that of a part's config, by both names."""
    own = name.removesuffix("_model")
    is_like = module.startswith(f"{own}_") and module.rpartition("_")[2] in _KINDS
    return (
        module in (name, f"{own}model")
        or module in _NAMES.get(_SAME.get(name, name), ())
        or (is_like and "decoder" not in module)  # of speech, which has an encoder's config
    )


def _add(part: _Part, sizes: Mapping[str, int]) -> None:
    for dtype, size in sizes.items():
        part.nbytes[dtype] = part.nbytes.get(dtype, 0) + size


def _dtypes_of(part: _Part, total: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yield path and dtype of a part and of those within it, if they are known."""
    sizes = _main_sizes(part)
    found = [inner for inner in part.parts if inner.has_tensors()]
    lost = [inner for inner in part.parts if inner not in found and inner.name not in _TEXT]
    stated = _stated(part.config)
    # The whole may state the dtype of any of its parts: that is the dtype it is loaded in. And
    # these may include tensors of parts whose names we don't know.
    possible = {_most(_main_sizes(inner)) for inner in found} | {_most(total) if found else None}
    is_possible = stated in possible or (bool(lost) and stated in total)
    own = None if is_possible else _most(sizes)
    if own is not None:
        yield part.path, own
    for inner in part.parts:
        if inner in found:
            yield from _dtypes_of(inner, total)
        elif inner.name in _TEXT and not lost and sizes:
            yield inner.path, str(_most(sizes))  # tensors outside all other parts are its own


def _most(sizes: Mapping[str, int]) -> str | None:
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None


def _main_sizes(part: _Part) -> dict[str, int]:
    """Return dtype → bytes of tensors outside all parts, and of the part that reads text."""
    sizes = dict(part.nbytes)
    for inner in part.parts:
        if inner.name in _TEXT:
            for dtype, size in _main_sizes(inner).items():
                sizes[dtype] = sizes.get(dtype, 0) + size
    return sizes


def _stated(config: Mapping[str, Any]) -> str | None:
    for key in DTYPE_KEYS:
        if isinstance(config.get(key), str):
            return str(config[key]).removeprefix("torch.")
    return None
