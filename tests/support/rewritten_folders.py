"""Ways in which one model is stored: what programs and versions call its tensors.

Each way takes a model and an empty folder. A way that says nothing new of a model returns False.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.support import tied_models
from tests.support.tie_states import stored_tensors

Tensors = dict[str, torch.Tensor]
Way = Callable[[PreTrainedModel, Path], bool]


def as_saved(model: PreTrainedModel, folder: Path) -> bool:
    """Store it by save_pretrained, in the layout of the first checkpoints of its kind."""
    model.save_pretrained(folder)
    return True


def _names_of_class(model: PreTrainedModel, folder: Path) -> bool:
    """Programs that save a state dict store the names and shapes of the class."""
    model.save_pretrained(folder)
    names = stored_tensors(folder).keys()
    model.save_pretrained(folder, save_original_format=False)
    return stored_tensors(folder).keys() != names


def _shards(model: PreTrainedModel, folder: Path) -> bool:
    model.save_pretrained(folder, max_shard_size="40kB")
    return (folder / "model.safetensors.index.json").exists()


def _torch_save(model: PreTrainedModel, folder: Path) -> bool:
    """Before safetensors: a pickle, with a name for each tied parameter."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    computed = model._keys_to_ignore_on_save or ()
    state = {name: value for name, value in model.state_dict().items() if name not in computed}
    torch.save(state, folder / "pytorch_model.bin")
    return True


def _torch_save_beside(model: PreTrainedModel, folder: Path) -> bool:
    """A repository that has been converted holds both; safetensors come first."""
    model.save_pretrained(folder)
    garbage = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    torch.save(garbage, folder / "pytorch_model.bin")
    return True


def _without_base_prefix(model: PreTrainedModel, folder: Path) -> bool:
    """A checkpoint of the base model, with the head's tensors under their own names."""
    prefix = f"{model.base_model_prefix}."
    return _renamed(model, folder, lambda name: name.removeprefix(prefix))


def _with_base_prefix(model: PreTrainedModel, folder: Path) -> bool:
    """A base model cut out of a model with a head."""
    prefix = f"{model.base_model_prefix}."
    is_base = model.base_model is model
    return is_base and _renamed(model, folder, lambda name: prefix + name)


def _gamma_and_beta(model: PreTrainedModel, folder: Path) -> bool:
    """Names of checkpoints that were converted from TensorFlow."""

    def rename(name: str) -> str:
        name = re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name)
        return re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", name)

    return _renamed(model, folder, rename)


def _weight_norm(model: PreTrainedModel, folder: Path) -> bool:
    """The older of torch's two ways to normalise weights."""

    def rename(name: str) -> str:
        name = name.replace(".parametrizations.weight.original0", ".weight_g")
        return name.replace(".parametrizations.weight.original1", ".weight_v")

    return _renamed(model, folder, rename)


def _computed_buffers(model: PreTrainedModel, folder: Path) -> bool:
    """Older versions store what transformers computes by itself."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    has_rotary = any(name.endswith("rotary_emb") for name, _ in model.named_modules())
    buffers: Tensors = {}
    for name in tensors:
        head, found, _ = name.rpartition("embeddings.position_embeddings.weight")
        if found:
            buffers[f"{head}embeddings.position_ids"] = torch.arange(8)[None]
        head, found, _ = name.rpartition("self_attn.q_proj.weight")
        if found and has_rotary:
            buffers[f"{head}self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        head, found, _ = name.rpartition("attn.c_attn.weight")
        if found:
            buffers[f"{head}attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
            buffers[f"{head}attn.masked_bias"] = torch.tensor(-1e4)
    _save(tensors | buffers, folder)
    return bool(buffers)


def _every_tied_name(model: PreTrainedModel, folder: Path) -> bool:
    """Programs that know no ties store a copy for each name."""
    ties = dict(model.all_tied_weights_keys)
    if not ties:
        return False
    tied_models.separate(model, seed=None).save_pretrained(folder)
    return True


def _other_tied_name(model: PreTrainedModel, folder: Path) -> bool:
    """Which of a tied tensor's names is stored differs between programs: here it is the last."""
    ties = dict(model.all_tied_weights_keys)
    if not _every_tied_name(model, folder):
        return False
    path = folder / "model.safetensors"
    tensors = load_file(path)
    kept = {source: target for target, source in ties.items()}
    gone = {*ties, *kept} - {*kept.values()}
    if not gone <= tensors.keys():  # stored under other names
        return False
    _save({name: tensor for name, tensor in tensors.items() if name not in gone}, folder)
    return True


def _wrapped(prefix: str) -> Way:
    def way(model: PreTrainedModel, folder: Path) -> bool:
        return _renamed(model, folder, lambda name: prefix + name)

    return way


def _wrapped_layers(model: PreTrainedModel, folder: Path) -> bool:
    """Layers that are wrapped one by one, for FSDP with activation checkpointing."""

    def rename(name: str) -> str:
        wrappers = r"\g<0>_fsdp_wrapped_module._checkpoint_wrapped_module."
        return re.sub(r"\b(layers?|h|blocks?)\.\d+\.", wrappers, name, count=1)

    return _renamed(model, folder, rename)


def _renamed(model: PreTrainedModel, folder: Path, rename: Callable[[str], str]) -> bool:
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    _save(renamed, folder)
    return renamed.keys() != tensors.keys() and len(renamed) == len(tensors)


def _save(tensors: Tensors, folder: Path) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


WAYS: dict[str, Way] = {
    "as saved": as_saved,
    "names of the class": _names_of_class,
    "shards": _shards,
    "torch.save": _torch_save,
    "torch.save beside": _torch_save_beside,
    "without base prefix": _without_base_prefix,
    "with base prefix": _with_base_prefix,
    "gamma and beta": _gamma_and_beta,
    "weight norm": _weight_norm,
    "every tied name": _every_tied_name,
    "other tied name": _other_tied_name,
}
"""Ways that transformers reads, for the classes that it reads them for."""

UNREAD: dict[str, Way] = {
    "distributed and compiled": _wrapped("module._orig_mod."),
    "compiled": _wrapped("_orig_mod."),
    "in PEFT": _wrapped("base_model.model."),
    "wrapped layers": _wrapped_layers,
    "computed buffers": _computed_buffers,
}
"""Ways with the names of wrappers or of buffers, which transformers does not read."""
