"""A model without its weights: built from its config on the meta device, by transformers.

Reads config and code, never weights.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate import init_empty_weights

from shardmix.conventions.naming import declared_quantisation
from shardmix.dtypes import BY_NAME, FLOAT, FLOAT_DTYPES, INTEGER
from shardmix.errors import SourceError, one_line
from shardmix.sources.base import Source
from shardmix.sources.checkpoint import CONFIG_NAME

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, dtype.torch_name)
    for name, dtype in BY_NAME.items()
    if dtype.torch_name is not None and dtype.kind in (FLOAT, INTEGER)
}


def build_empty_model(
    source: Source, auto_class: str, dtype: torch.dtype, *, trust_remote_code: bool
) -> Any:
    """Return the model in evaluation mode, parameters on the meta device, computed buffers real.

    Raises `SourceError` if transformers cannot build it from the folder's config.
    """
    import transformers

    folder = source.folder
    if not (folder / CONFIG_NAME).exists():
        raise SourceError(
            f"has no {CONFIG_NAME}, so that it cannot be run",
            subject=source.text,
            remedy="give a whole model folder, which scoring needs",
        )
    declared = declared_quantisation(source.config)
    if declared is not None:
        raise SourceError(
            f"is quantised ({declared[1]}, in config.json); scoring needs the original weights",
            subject=source.text,
            remedy=f"if these are floats, remove {declared[0]} from config.json",
        )
    try:
        with _quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(
                str(folder), trust_remote_code=trust_remote_code
            )
            # The weights of a quantised model arrive decoded.
            vars(config).pop("quantization_config", None)
            # Buffers are computed, not stored: on the meta device they would be lost.
            with init_empty_weights(include_buffers=False):
                model = getattr(transformers, auto_class).from_config(
                    config, dtype=dtype, trust_remote_code=trust_remote_code
                )
    except Exception as error:  # configs of strangers fail in every possible way
        raise _build_failed(error, auto_class).of(source.text) from None
    _keep_float32(model, dtype)
    _compute_sinusoids(model)
    model.requires_grad_(False)
    model.eval()
    model.tie_weights()
    return model


def import_model_code(source: Source, auto_class: str) -> None:
    """Load transformers' code for such a model, if it has any.

    That takes seconds, once, and should not count as the first model's time.
    """
    import transformers

    with suppress(Exception):  # an error of the model is raised when it is built
        config = transformers.AutoConfig.from_pretrained(str(source.folder))
        _ = getattr(transformers, auto_class)._model_mapping[type(config)]


def _keep_float32(model: Any, dtype: torch.dtype) -> None:
    """Make those parameters float32 that transformers leaves so in a model of 16 bits."""
    patterns = list(model._get_dtype_plan(dtype))
    if not patterns:
        return
    stays_float32 = re.compile(
        "|".join(rf"(^|\.){re.escape(pattern)}($|\.)" for pattern in patterns)
    )
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if stays_float32.search(f"{path}.{name}"):
                setattr(module, name, torch.nn.Parameter(parameter.float(), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if stays_float32.search(f"{path}.{name}") and buffer.is_floating_point():
                setattr(module, name, buffer.float())


def _compute_sinusoids(model: Any) -> None:
    """Fill position tables that are never stored, since a formula defines them."""
    for module in model.modules():
        if "Sinusoidal" in type(module).__name__ and isinstance(module, torch.nn.Embedding):
            empty = torch.empty(module.weight.shape, dtype=module.weight.dtype)
            module.weight = torch.nn.Parameter(empty, requires_grad=False)
            with torch.no_grad():
                model._init_weights(module)


def compute_dtype(source: Source, asked: str) -> torch.dtype:
    """Return the dtype that a model computes in: as asked, or the dtype of most of its weights."""
    if asked != "auto":
        return getattr(torch, asked)  # type: ignore[no-any-return]
    nbytes: Counter[str] = Counter()
    for info in source.tensors:
        if info.dtype in FLOAT_DTYPES:
            nbytes[info.dtype] += info.nbytes
    if not nbytes:
        raise SourceError(
            "has no floating-point weights to compute with",
            subject=source.text,
            remedy="score the original model",
        )
    return TORCH_DTYPES[nbytes.most_common(1)[0][0]]


def _build_failed(error: Exception, auto_class: str) -> SourceError:
    finding = one_line(error, limit=300)
    if "trust_remote_code" in str(error):
        return SourceError(
            "needs code from its own folder to run",
            remedy="if you trust it, read it and use --trust-remote-code (trust_remote_code=True)",
        )
    return SourceError(
        f"cannot be built as {auto_class} from its config ({finding})", remedy="check --model-type"
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide advice about training and generation from the user's terminal."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
