"""Small random models with tied weights, and what their forward passes return."""

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from tests.support.small_configs import IMAGE

MOST_PARAMETERS = 5_000_000
_LENGTH = 8


def build(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model, in float32, for evaluation. Raises `ValueError` if it isn't small."""
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size} parameters: not small")
    torch.manual_seed(0)
    return cls(copy.deepcopy(config)).float().eval()


def randomise(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Give every parameter, and every stored buffer of floats, values of its own, ties kept."""
    generator = torch.Generator().manual_seed(seed)
    stored = set(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(values.to(parameter.dtype))
        for name, buffer in model.named_buffers():
            if name in stored and buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape, generator=generator) * 0.1)
    return model


def separate(model: PreTrainedModel, *, seed: int | None) -> PreTrainedModel:
    """Give each tied name a tensor of its own: a copy, or other values if `seed` is given."""
    generator = torch.Generator().manual_seed(seed or 0)
    for name in model.all_tied_weights_keys:
        tensor = model.get_parameter_or_buffer(name)
        values = tensor.detach().clone()
        if seed is not None:
            values = torch.randn(values.shape, generator=generator) * 0.2
        place_tensor(model, name, values, is_parameter=isinstance(tensor, torch.nn.Parameter))
    return model


def place_tensor(
    model: PreTrainedModel, name: str, values: torch.Tensor, *, is_parameter: bool
) -> None:
    """Put a new tensor where a model has this name, and nowhere else."""
    folder, _, last = name.rpartition(".")
    owner = model.get_submodule(folder)
    setattr(owner, last, torch.nn.Parameter(values) if is_parameter else values)


def outputs_of(model: PreTrainedModel, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Return all tensors of floats that the forward pass returns."""
    torch.manual_seed(0)
    with torch.no_grad():
        return list(_float_tensors(model(**inputs)))


def _float_tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _float_tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _float_tensors(part)


def find_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Return arguments that the forward pass takes, by trial. Raises what the first one raised."""
    failure: Exception | None = None
    for inputs in _candidate_inputs(model):
        try:
            tensors = outputs_of(model, inputs)
        except Exception as error:
            failure = failure or error
            continue
        if any(t.numel() and bool(t.isfinite().any()) for t in tensors):
            return inputs
    raise failure or TypeError("it takes none of the usual arguments")


def _candidate_inputs(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    names = inspect.signature(model.forward).parameters
    config = model.config
    text = config.get_text_config()
    embedding = _input_embedding(model)
    rows = embedding.weight.shape[0] if embedding is not None else getattr(text, "vocab_size", 20)
    generator = torch.Generator().manual_seed(0)

    def ids(length: int = _LENGTH) -> torch.Tensor:
        return torch.randint(3, max(4, min(rows, 40)), (1, length), generator=generator)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or IMAGE
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(vision, "num_channels", None) or 3
    mels = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", 16)
    tokens = {"input_ids": ids()} if "input_ids" in names else {}
    decoder = {"decoder_input_ids": ids()} if "decoder_input_ids" in names else {}
    pixels = {"pixel_values": randn(1, channels, height, width)}
    boxes = {"bbox": torch.zeros(1, _LENGTH, 4, dtype=torch.long)} if "bbox" in names else {}
    no_cache = {"use_cache": False} if "use_cache" in names else {}
    base = {**tokens, **decoder, **boxes}
    main = model.main_input_name
    if main in ("input_features", "input_values"):
        frames = 2 * getattr(config, "max_source_positions", 32)
        yield {main: randn(1, mels, frames), **decoder}
        yield {main: randn(1, frames, mels), **decoder}
        yield {main: randn(1, 3200), **decoder}
    if main == "pixel_values" or "pixel_values" in _required(names):
        larger = {"pixel_values": randn(1, channels, 4 * height, 4 * width)}
        yield {**pixels, **decoder}
        yield {**pixels, **base}
        yield {**pixels, **base, "pixel_mask": torch.ones(1, height, width, dtype=torch.long)}
        yield larger
        yield {**larger, **base}
    if tokens:
        yield base
        yield {**base, **no_cache}
        yield {"input_ids": tokens["input_ids"]}
        yield {**base, **pixels}
        for length in (32, 64):
            yield {**base, "input_ids": ids(length), **no_cache}


def _required(names: Any) -> list[str]:
    empty = inspect.Parameter.empty
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [n for n, p in names.items() if p.default is empty and p.kind not in kinds]


def _input_embedding(model: PreTrainedModel) -> Any:
    try:
        found = model.get_input_embeddings()
    except Exception:
        return None
    return found if getattr(found, "weight", None) is not None else None
