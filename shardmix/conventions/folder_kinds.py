"""Kinds of folders and files that are no model, and the remedy for each.

Two tables, of names and of sentences. Opens nothing: the names may come from a disk or the Hub.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardmix.conventions.adapters import ADAPTER_REMEDY, ADAPTER_RULE
from shardmix.conventions.weight_names import (
    DCP_METADATA,
    DCP_SUFFIX,
    MODEL,
    STEMS,
    index_name,
    shard_name,
    weights_name,
)
from shardmix.errors import SourceError, listed

_RESAVE = (
    "convert it by loading it in transformers and calling save_pretrained(..., "
    "safe_serialization=True)"
)
_OLD_FRAMEWORK = (
    "transformers 4 converts it, 5 no longer does: in an environment with 'transformers<5' and "
    "{0}, AutoModel.from_pretrained(FOLDER, from_{1}=True).save_pretrained(OUT)"
)


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of folder, known by a file of such a name."""

    mark: str
    """A pattern of paths within the folder; the path of a folder ends in `/`.

    It is compiled only once a folder is found to be no model.
    """
    finding: str | Callable[[Sequence[str], str], SourceError]
    """The finding, or a function that makes the error from the names and the source.

    In it and in the remedy `{found}` stands for the matching names, `{one}` for one of them, and
    `{source}` for the user's word.
    """
    remedy: str = ""
    """The remedy."""


def _pipeline(names: Sequence[str], source: str) -> SourceError:
    parts = _sorted({name.split("/")[0] for name in names if re.fullmatch(_IN_A_FOLDER, name)})
    such = f", such as {source}/{parts[0]}" if parts else ""
    return SourceError(
        "is a pipeline of diffusers, whose parts are models of their own: "
        f"{listed(parts) or 'none of them is here in safetensors'}",
        remedy=f"merge each part with its like, folder by folder{such} (of a repository on the Hub "
        "download the folder first)",
    )


def _shards(names: Sequence[str], source: str) -> SourceError:
    shards = [(shard, name) for name in names if (shard := shard_name(name)) and "/" not in name]
    first, name = shards[0]
    here = {shard.number for shard, _ in shards if shard.stem == first.stem}
    suffix = name[name.rindex(".") :]
    index = f"{first.stem.removesuffix(suffix)}{suffix}.index.json"
    finding = f"has shards such as {name} but no {index}, which says what is in which"
    missing = [str(number) for number in range(1, first.count + 1) if number not in here]
    if missing and 0 not in here:
        finding += f", and of {first.count} shards lacks number {listed(missing)}"
    return SourceError(
        finding, remedy=f"fetch {'them' if missing else 'it'} from where the shards are from"
    )


def _distributed(names: Sequence[str], source: str) -> SourceError:
    described = [name for name in names if name.rpartition("/")[2] == DCP_METADATA]
    parts = [name for name in names if name.endswith(DCP_SUFFIX)]
    by_rank = [name for name in names if re.fullmatch(r"([^/]+/)?__\d+\.metadata", name)]
    if by_rank:
        return SourceError(
            f"holds a distributed checkpoint that each rank described for itself ({by_rank[0]})",
            remedy="save it with use_collectives=True",
        )
    if not described:
        return SourceError(
            f"has {listed(_sorted(set(parts)))} but no {DCP_METADATA}, which is written last and "
            "says what is in them: the checkpoint was not saved or copied to its end",
            remedy="fetch it again, or give an earlier checkpoint",
        )
    folders = _sorted({name.rpartition("/")[0] for name in described})
    return SourceError(
        f"has no weights itself, but distributed checkpoints below it: {listed(folders)}",
        remedy=f"give one of them, such as {source.rstrip('/')}/{folders[-1]}",
    )


_IN_A_FOLDER = r"[^/]+/[^/]+\.safetensors(\.index\.json)?"

# The first kind that matches counts; those that a merge can use with the least work come first.
_FOLDERS = (
    _Kind(r"model_index\.json", _pipeline),
    _Kind(
        r"adapter_config\.json|adapter_model.*|pytorch_lora_weights\.\w+",
        f"holds an adapter ({{found}}), not a model; {ADAPTER_RULE}",
        ADAPTER_REMEDY,
    ),
    _Kind(
        rf"({'|'.join(STEMS)})\.(?!\d)\w+\.safetensors",
        "has the weights in a variant only ({found})",
        "give that file itself as the source, or load it with from_pretrained(..., variant=...) "
        "and save it without",
    ),
    _Kind(
        rf"({'|'.join(STEMS)})\.(?!safetensors)\w+-\d+-of-\d+\.safetensors",
        "has the weights in a variant only ({found})",
        "load it with from_pretrained(..., variant=...) and save it without",
    ),
    _Kind(r"[^/]+[-_.]\d+[-_.]?of[-_.]?\d+\.(safetensors|bin)", _shards),
    _Kind(
        r"model-rank-\d+-part-\d+\.safetensors",
        "holds {found}, the state of vLLM's workers, cut to pieces",
        "merge the checkpoint that it was made from",
    ),
    _Kind(
        r"[^/]+\.safetensors",
        f"has {{found}} but neither {weights_name(MODEL)} nor {index_name(MODEL)}",
        "if one of them is the whole model, give the file itself as the source",
    ),
    _Kind(
        r"snapshots/([^/]+/?)?|models--[^/]+/",
        "is a folder of the Hub's cache, which holds {found}",
        "give a repository's id (org/name), or a snapshot with files in it "
        "(models--org--name/snapshots/COMMIT)",
    ),
    _Kind(r"([^/]+/)?([^/]+\.distcp|\.metadata)", _distributed),
    _Kind(
        r"global_step\d+/|([^/]+/)?(bf16_)?zero_pp_rank_.*|zero_to_fp32\.py|([^/]+/)?mp_rank_.*",
        "holds a checkpoint of DeepSpeed ({found})",
        "join it first: python zero_to_fp32.py FOLDER OUT --safe_serialization",
    ),
    _Kind(
        r"iter_\d+/|latest_checkpointed_iteration\.txt",
        "holds a checkpoint of Megatron-LM ({found})",
        "export it to Hugging Face's format first",
    ),
    _Kind(
        r"(checkpoint|epoch|step)[-_]\d+/",
        "is a trainer's output without a model of its own; it holds {found}",
        "give one of them, such as {source}/{one}",
    ),
    _Kind(
        r"openvino_.*\.(xml|bin)|openvino/",
        "has weights only for OpenVINO ({found})",
        "use the checkpoint that they were exported from",
    ),
    _Kind(
        r"consolidated\.\d+\.pth",
        "holds weights as Meta releases them ({found})",
        "use the repository in Hugging Face's format, or transformers' convert_llama_weights_to_hf",
    ),
    _Kind(
        r"(?!training_args|optimizer|scheduler|scaler|rng_state|random_states)"
        r"[^/]+\.(bin|pt|pth|ckpt)",
        f"has {{found}} but neither {weights_name(MODEL)} nor pytorch_model.bin",
        "if one of them is the whole model, give the file itself as the source",
    ),
    _Kind(
        r"[^/]+\.(pkl|pickle)",
        "has weights only as pickle ({found}), which may run code",
        _RESAVE,
    ),
    _Kind(
        _IN_A_FOLDER,
        "has no weights itself, but {found} below it has",
        "give that folder: {source}/{one}",
    ),
    _Kind(
        r"[^/]+\.gguf",
        "has weights only as GGUF ({found}), which shardmix does not read",
        "use the original checkpoint that it was made from",
    ),
    _Kind(
        r"tf_model.*\.h5|([^/]+/)?saved_model\.pb|saved_model/|.*\.ckpt\.index",
        "has weights only for TensorFlow ({found})",
        _OLD_FRAMEWORK.format("tensorflow", "tf"),
    ),
    _Kind(
        r"flax_model.*\.msgpack",
        "has weights only for Flax ({found})",
        _OLD_FRAMEWORK.format("flax", "flax"),
    ),
    _Kind(
        r"[^/]+\.onnx(_data)?|onnx/",
        "has weights only as ONNX ({found})",
        "use the checkpoint that they were exported from",
    ),
    _Kind(
        r"weights(\.\d+)?\.npz",
        "has weights only for MLX ({found})",
        "use the original checkpoint, or convert it with mlx_lm's tools to safetensors without "
        "quantisation",
    ),
    _Kind(
        r"[^/]+\.(mlpackage|mlmodelc)/|[^/]+\.(mlmodel|tflite|litertlm|ot|engine|nemo|keras|h5|"
        r"pdparams|npz|msgpack)|coreml/",
        "has weights only as {found}, which shardmix does not read",
        "use the checkpoint in safetensors that they were made from",
    ),
    _Kind(
        r"[^/]+\.(zip|tar|tar\.\w+|tgz|7z|rar)",
        "has no weights, but an archive ({found})",
        "unpack it, and give the folder that it holds",
    ),
    _Kind(
        r".*\.(incomplete|part|crdownload|aria2)",
        "holds a download that is not finished ({found})",
        "fetch it again",
    ),
    _Kind(
        r"config\.json|tokenizer\.json|tokenizer_config\.json",
        f"has {{found}} but no weights: neither {weights_name(MODEL)} nor {index_name(MODEL)}; "
        "the download may be incomplete",
        "fetch it again",
    ),
)

_FILES = (
    (r"\.index\.json", "is the index of a model in shards", "give its folder"),
    (r"\.gguf", "is GGUF", "use the original checkpoint that it was made from"),
    (r"\.(pkl|pickle)", "is a pickle, which may run code", _RESAVE),
    (
        r"\.(onnx|tflite|mlmodel|h5|keras|msgpack|ot|npz|engine|nemo)",
        "holds weights in another format",
        "use the checkpoint in safetensors that it was made from",
    ),
    (
        r"\.(zip|tar|tgz|7z|rar|gz|bz2|xz|zst)",
        "is an archive",
        "unpack it, and give the folder that it holds",
    ),
    (r"\.ya?ml", "is a recipe", "give it without a weight, as the only word"),
    (r"\.json", "is JSON", "give the model's folder"),
    (r"\.(distcp|metadata)", "is a part of a distributed checkpoint", "give its folder"),
)


def no_weights(names: Sequence[str], source: str = "FOLDER") -> SourceError:
    """Return the error for a folder without weights that can be merged, made from its names.

    It says what the folder is and what to do; the caller names the folder.
    `names` are paths of files and, ending in `/`, of folders; two levels are enough.
    """
    names = list(
        dict.fromkeys((*names, *(f"{name.split('/')[0]}/" for name in names if "/" in name)))
    )
    for kind in _FOLDERS:
        mark = re.compile(kind.mark)
        marks = [name for name in names if mark.fullmatch(name)]
        if not marks:
            continue
        if not isinstance(kind.finding, str):
            return kind.finding(names, source)
        if kind.mark == _IN_A_FOLDER:
            marks = [mark.split("/")[0] + "/" for mark in marks]
        found = _sorted(set(marks))
        given = {"found": listed(found), "one": found[-1].rstrip("/"), "source": source.rstrip("/")}
        return SourceError(kind.finding.format(**given), remedy=kind.remedy.format(**given))
    if not names:
        return SourceError(
            f"is empty; a model's folder has {weights_name(MODEL)} or {index_name(MODEL)}",
            remedy="name such a folder",
        )
    return SourceError(
        f"has neither {weights_name(MODEL)} nor {index_name(MODEL)}",
        remedy="name the model's folder",
    )


def no_weights_file(name: str) -> SourceError:
    """Return the error for a file that is given as a model and is not .safetensors.

    It says what the file is and what to do; the caller names the file.
    """
    for ending, finding, remedy in _FILES:
        if re.search(rf"{ending}$", name.lower()):
            return SourceError(f"is not a .safetensors file: it {finding}", remedy=remedy)
    return SourceError(
        "is a file but not a .safetensors file",
        remedy="give a model folder, a .safetensors file or a Hub id",
    )


def _sorted(names: set[str]) -> list[str]:
    """Return names sorted, `checkpoint-500` before `checkpoint-1000`."""

    def parts(name: str) -> list[tuple[int, str]]:
        pieces = re.split("([0-9]+)", name)
        return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces]

    return sorted(names, key=parts)
