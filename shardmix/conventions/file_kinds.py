"""Kinds of files in a model's folder, by their names: those that go along with merged weights.

All files of the config source are copied except known kinds of other things: weights in another
format or precision, a trainer's files and checkpoints, caches, version control, hidden files, and
files that every merge writes itself. Other files may have 1 GB each and 4 GB together, a folder
1,000 files: a data set is no part of a model. Files left out are reported with the reason,
shortened in a warning and whole in `--json`. The same rules decide what is fetched from the Hub.

Beside a model given as a single file lies anybody's work, so only names that surely belong to a
model go along. `verify` uses that stricter list, too. `--overwrite` deletes of a model from
elsewhere only files with names that programs give. Opens no file.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from shardmix.conventions.weight_names import shard_name
from shardmix.system.units import format_size

MAX_FILE_NBYTES = 1_000_000_000
"""A larger file does not go along, unless any model may have one of its name."""
MAX_TOTAL_NBYTES = 4_000_000_000
"""Limit for all such files together; the smallest ones go along."""
MAX_FOLDER_FILES = 1_000
"""A folder with more files is left out as a whole: it is a data set, or a project."""
TOO_MANY_FILES = f"more than {MAX_FOLDER_FILES:,} files"
"""The reason for such a folder."""
UNPRINTABLE = "a name with characters that cannot be printed"
"""The reason for a file whose name cannot be printed as it is."""
MAX_FOLDER_DEPTH = 8
"""Depth of nested folders that are searched."""

TEMPLATE_FOLDER = "additional_chat_templates"
_SENTENCE_TRANSFORMERS_FOLDER = re.compile(r"\d+_\w+")

# Files that any model's folder may have: config, tokenizer, chat templates, code, terms.
_AUXILIARY_SUFFIXES = (
    ".json",
    ".txt",
    ".model",
    ".tiktoken",
    ".jinja",
    ".py",
    ".vocab",
    ".spm",
    ".bpe",
)
_AUXILIARY_PREFIXES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_VERSIONED_TOKENIZER = re.compile(r"tokenizer\.model\.v\w+")  # Mistral's
_NOT_AUXILIARY = re.compile(
    r".*\.index\.json|.*_results\.json|trainer_state\.json|requirements.*\.txt|shardmix\.json|"
    r"adapter_config\.json"
)


# Names that programs give to texts, data and code of a model; people choose other names.
_GIVEN_NAME = re.compile(
    r"(.*_)?config\.json|config_.*\.json|(tokenizer|vocab|merges|added_tokens|special_tokens|"
    r"chat_template|normalizer|processor|preprocessor|quant|modules|params|tekken|sentence_).*\."
    r"(json|txt|model)|(LICEN[SC]E|NOTICE|USE_POLICY).*|(modeling|configuration|tokenization|"
    r"processing|image_processing|video_processing|feature_extraction|generation)_\w+\.py|"
    r"(.*\.)?(spiece|sentencepiece.*|bpe)\.model|.*\.(tiktoken|jinja|spm|bpe)"
)


def has_given_name(path: str) -> bool:
    """Return True if a model's file has a name that programs give, so that it may be deleted.

    `is_auxiliary_file` also accepts any text and any JSON, which may be a person's work.
    """
    name = path.rpartition("/")[2]
    return is_auxiliary_file(path) and ("/" in path or _GIVEN_NAME.fullmatch(name) is not None)


def is_auxiliary_file(path: str) -> bool:
    """Return True if a file (path within the model's folder, with `/`) surely belongs to a model.

    Weights do not count, since these files go along with them. Module folders of
    sentence-transformers (`1_Pooling/`) count as a whole.
    """
    folder, _, name = path.rpartition("/")
    if folder:
        if is_module_folder(folder.split("/")[0]):
            return True
        return folder == TEMPLATE_FOLDER and name.endswith(".jinja")
    if _NOT_AUXILIARY.fullmatch(name):
        return False
    if _VERSIONED_TOKENIZER.fullmatch(name):
        return True
    return name.endswith(_AUXILIARY_SUFFIXES) or name.startswith(_AUXILIARY_PREFIXES)


def is_module_folder(name: str) -> bool:
    """Return True if a folder has a name of sentence-transformers' module folders."""
    return _SENTENCE_TRANSFORMERS_FOLDER.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file or folder that does not go along with the merged weights."""

    name: str
    """Path within the model's folder; a folder's ends in `/`."""
    reason: str
    """The kind it is taken for."""
    is_told: bool = True
    """True if somebody may miss it, so that a message names it."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of files and folders that do not go along, by their names."""

    reason: str
    files: re.Pattern[str]
    folders: re.Pattern[str]
    is_told: bool
    is_only_in_root: bool = False
    """True if the patterns hold only in the model's folder itself, not in folders below it."""
    spares_only_weights: bool = False
    """True if, below the model's folder, the pattern holds only beside safetensors. Without these,
    the files may be all the weights of another model."""


def _kind(reason: str, files: str, folders: str, *, is_told: bool = True, **more: bool) -> _Kind:
    return _Kind(reason, re.compile(files), re.compile(folders), is_told, **more)


_NOTHING = r"(?!)"
_WEIGHTS_STEM = (
    r"((pytorch|tf|flax|rust|open_clip|open_clip_pytorch|diffusion|diffusion_pytorch)_)?"
    r"(model|weights)|consolidated"
)
_ADAPTER_FILE = r"adapter_(config\.json|model.*)"
OTHER_FORMAT = "weights in another format"
"""The reason for files that may be the same weights for another program."""
ADAPTER = "an adapter"
"""The reason for PEFT's files."""
OTHER_WEIGHTS = "other weights of the model"
"""The reason for files that may be the same model in another precision or layout."""

# The first kind that matches counts.
_KINDS = (
    _kind(
        "version control",
        r"\.git\w+|\.hgignore",
        r"\.git|\.svn|\.hg",
        is_told=False,
    ),
    _kind(
        "a cache",
        r"\.DS_Store|Thumbs\.db|desktop\.ini|\.mdl|\.msc|\.mv|.*\.(pyc|lock|tmp|temp|swp|bak|"
        r"incomplete|part|crdownload|aria2|download)|.*~",
        r"\.cache|__pycache__|\.ipynb_checkpoints|\.huggingface|\.\w+_cache|\.locks|\.?venv|"
        r"node_modules|\._____temp|\.idea|\.vscode",
        is_told=False,
    ),
    _kind(
        "written anew",
        r"README(\.md)?|shardmix\.json|.*\.(safetensors|bin)\.index(\.\w+)?\.json",
        _NOTHING,
        is_told=False,
        is_only_in_root=True,
    ),
    _kind(
        "describes a quantisation, which the output does not have",
        r"hf_quant_config\.json|quantize_config\.json|quant_config\.json",
        _NOTHING,
        is_told=False,
        is_only_in_root=True,
    ),
    _kind("hidden", r"\..*", r"\..*"),
    _kind(ADAPTER, _ADAPTER_FILE, _NOTHING, is_only_in_root=True),
    _kind(
        OTHER_FORMAT,
        r".*\.(gguf|ggml|onnx|onnx_data.*|onnx\.data|tflite|litertlm|mlmodel|engine|trt|mnn|rknn|"
        r"nemo|distcp|llamafile|keras|pdparams|pdiparams|pb)|"
        r"openvino_.*\.(xml|bin)|ggml-.*\.bin",
        r"onnx|openvino|coreml|tflite|tensorrt|gguf|ggml|original|metal|saved_model|flax|mlx|"
        r".*\.(mlpackage|mlmodelc|mlmodel)",
    ),
    _kind(
        OTHER_FORMAT,
        # Except SetFit's head, which is no copy of the weights.
        rf"(?!model_head\.pkl)({_WEIGHTS_STEM})([.\-_].*)?\.(bin|pt|pth|pkl|h5|msgpack|ot|npz)"
        r"(\.index.*\.json)?|"
        r".*\.(ckpt|ckpt\..*|h5|msgpack|ot)",
        _NOTHING,
        spares_only_weights=True,
    ),
    _kind(
        OTHER_WEIGHTS,
        rf"({_WEIGHTS_STEM})([.\-_].*)?\.safetensors",
        r"(fp|bf|float|bfloat|int|nf)\d+(-\w+)?|\d+bit",
        is_only_in_root=True,
    ),
    _kind(
        "a trainer's checkpoint",
        _NOTHING,
        r"checkpoint[-_]\d+.*|global_step\d+|pytorch_model_fsdp_\d+|optimizer_\d+|iter_\d+|"
        r"(epoch|step)[-_]\d+",
    ),
    _kind(
        "a trainer's",
        r"optimizer.*\.(pt|pth|bin|safetensors)|scheduler.*\.(pt|bin)|scaler\.pt|"
        r"rng_state.*\.pth|random_states_\d+\.pkl|custom_checkpoint_\d+\.pkl|(dl_)?sampler.*\.(pt|bin)|"
        r"trainer_(state|log)\.jsonl?|training_args\.\w+|.*_results(_\w+)?\.(json|txt|csv)|"
        r"(events\.out\.|.*\.)tfevents.*|zero_to_fp32\.py|latest|zero_pp_rank_.*|mp_rank_.*|"
        r"training_.*loss\.(png|jpg|svg)|.*\.log",
        r"runs|wandb|mlruns|lightning_logs|tensorboard|logs",
        is_told=False,
    ),
)
_BY_A_TRAINER = re.compile(r"optimizer.*\.(pt|pth|bin)|rng_state.*\.pth|random_states_\d+\.pkl")


def is_adapter_file(name: str) -> bool:
    """Return True if PEFT writes a file of this name into a model's folder."""
    return re.fullmatch(_ADAPTER_FILE, name) is not None


def folder_left_out(path: str) -> LeftOut | None:
    """Return why a folder (path within the model's) never goes along, or None if it may."""
    name = path.rpartition("/")[2]
    for kind in _KINDS:
        if kind.folders.fullmatch(name):
            return LeftOut(f"{path}/", kind.reason, kind.is_told)
    return None


def divide(
    sizes: Mapping[str, int],
    *,
    weights: Collection[str] = (),
    modules: Collection[str] = (),
) -> tuple[list[str], list[LeftOut]]:
    """Divide the files of a model's folder into those that go along, and those that do not.

    Args:
        sizes: path within the folder → bytes.
        weights: the files that are merged.
        modules: folders of sentence-transformers' modules, which go along as a whole,
            except weights in other formats.
    """
    folders = _folders_left_out(sizes, modules)
    with_safetensors = {path.rpartition("/")[0] for path in sizes if path.endswith(".safetensors")}
    kept: list[str] = []
    left_out = dict.fromkeys(folders.values())
    for path in sorted(sizes):
        if path in weights or _within(path, folders):
            continue
        finding = _file_left_out(path, with_safetensors)
        if path.split("/")[0] in modules and finding and finding.reason != OTHER_FORMAT:
            finding = None
        if finding is None:
            kept.append(path)
        else:
            left_out[finding] = None
    too_large = {finding.name: finding for finding in _too_large(kept, sizes, modules)}
    kept = [path for path in kept if path not in too_large]
    return kept, [*left_out, *too_large.values()]


def _file_left_out(path: str, with_safetensors: Collection[str]) -> LeftOut | None:
    folder, _, name = path.rpartition("/")
    for kind in _KINDS:
        if folder and kind.is_only_in_root:
            continue
        if folder and kind.spares_only_weights and folder not in with_safetensors:
            continue
        if kind.files.fullmatch(name):
            return LeftOut(path, kind.reason, kind.is_told)
    if not folder and name.endswith(".safetensors") and shard_name(name) is not None:
        return LeftOut(path, OTHER_WEIGHTS)
    return None


def _folders_left_out(sizes: Mapping[str, int], modules: Collection[str]) -> dict[str, LeftOut]:
    """Return folder → reason, for folders that never go along."""
    found: dict[str, LeftOut] = {}
    num_files: dict[str, int] = {}
    for path in sizes:
        folder, _, name = path.rpartition("/")
        top = folder.split("/")[0]
        if not folder or top in modules:
            continue
        num_files[top] = num_files.get(top, 0) + 1
        for parent in _parents(path):
            finding = found.get(parent) or folder_left_out(parent)
            if finding is not None:
                found[parent] = finding
                break
        else:
            if _BY_A_TRAINER.fullmatch(name):
                found[folder] = LeftOut(f"{folder}/", "a trainer's checkpoint")
    for top, count in num_files.items():
        if count > MAX_FOLDER_FILES and top not in found:
            found[top] = LeftOut(f"{top}/", TOO_MANY_FILES)
    # Only the outermost.
    return {path: finding for path, finding in found.items() if not _within(path, found)}


def _too_large(
    paths: Collection[str], sizes: Mapping[str, int], modules: Collection[str]
) -> Iterator[LeftOut]:
    total = 0
    for path in sorted(paths, key=lambda path: (sizes[path], path)):
        if is_auxiliary_file(path) or path.split("/")[0] in modules:
            continue
        if sizes[path] > MAX_FILE_NBYTES:
            yield LeftOut(path, f"larger than {format_size(MAX_FILE_NBYTES)}")
        elif total + sizes[path] > MAX_TOTAL_NBYTES:
            yield LeftOut(path, f"beyond {format_size(MAX_TOTAL_NBYTES)} in all")
        else:
            total += sizes[path]


def _parents(path: str) -> list[str]:
    """Return the folders that a file lies in, the outermost first."""
    return [path[:at] for at, letter in enumerate(path) if letter == "/"]


def _within(path: str, folders: Collection[str]) -> bool:
    return bool(folders) and any(parent in folders for parent in _parents(path))
