"""All of an output folder but its weights: config, tokenizer, index, model card.

Copies files and writes small JSON and Markdown; reads no tensors.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from shardmix._version import __version__
from shardmix.checkpoint import CONFIG_NAME, read_json
from shardmix.companions import MODULES_NAME
from shardmix.errors import OutputError
from shardmix.hub import INDEX_NAME
from shardmix.plan import MergePlan

CARD_NAME = "README.md"


def write_companions(plan: MergePlan, folder: Path) -> None:
    """Copy the donor's companion files, with a config that is true of the output."""
    for name in plan.companions:
        target = folder / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(plan.base_folder) / name, target)
        except OSError as error:
            raise OutputError(f"{target}: cannot be written ({error.strerror})") from None
    if CONFIG_NAME in plan.companions:
        config = read_json(folder / CONFIG_NAME)
        adapted = adapted_config(config, dtype=plan.config_dtype, untie=plan.untie_word_embeddings)
        # Untouched where nothing changes: then it stays the donor's, byte for byte.
        if adapted != config:
            _write_json(folder / CONFIG_NAME, adapted)


def write_index(plan: MergePlan, folder: Path) -> None:
    """Write the index of a sharded output, as huggingface_hub lays it out; nothing for one file."""
    if len(plan.shards) == 1:
        return
    weight_map = {name: shard.filename for shard in plan.shards for name in shard.tensor_names}
    data_nbytes = sum(shard.file_nbytes - len(shard.header.encode()) - 8 for shard in plan.shards)
    index = {"metadata": {"total_size": data_nbytes}, "weight_map": weight_map}
    _write_json(folder / INDEX_NAME, index, sort_keys=True)


def write_model_card(plan: MergePlan, folder: Path) -> None:
    """Write the model card: what was merged, by which weights, and how to do it again."""
    data = ModelCardData(
        base_model=list(dict.fromkeys(_model_ids(plan))),
        base_model_relation="merge",
        library_name=_library_name(plan),
        tags=["merge", "shardmix"],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_card_text(plan)}").save(folder / CARD_NAME)


def adapted_config(config: dict[str, Any], *, dtype: str, untie: bool) -> dict[str, Any]:
    """Return a config that names the output's dtype, and says that a stored head is not tied.

    `dtype` is a torch name, "" for a model without floats. The key is `dtype` (transformers 5) or
    `torch_dtype` (before), whichever the config has; nested configs that name one are adapted too.
    """
    adapted: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            adapted[key] = adapted_config(value, dtype=dtype, untie=False)
            if "tie_word_embeddings" in value and untie:
                adapted[key]["tie_word_embeddings"] = False
        elif key in ("dtype", "torch_dtype") and isinstance(value, str) and dtype:
            adapted[key] = dtype
        else:
            adapted[key] = value
    if untie:
        adapted["tie_word_embeddings"] = False
    return adapted


def _model_ids(plan: MergePlan) -> list[str]:
    """Return what the Hub links a merge to: an id without its revision, or else a name."""
    return [hub_id or name for hub_id, name in zip(plan.hub_ids, plan.public_names, strict=True)]


def _library_name(plan: MergePlan) -> str | None:
    if MODULES_NAME in plan.companions:
        return "sentence-transformers"
    return "transformers" if CONFIG_NAME in plan.companions else None


def _card_text(plan: MergePlan) -> str:
    title = Path(plan.output).name
    # By public name: a card travels, and the paths of a machine are nobody else's business.
    recipe = yaml.safe_dump(
        {
            "models": [
                {"source": name, "weight": weight}
                for name, weight in zip(plan.public_names, plan.weights, strict=True)
            ],
            "dtype": plan.dtype,
        },
        sort_keys=False,
        allow_unicode=True,
    )
    rows = "\n".join(
        f"| {number} | `{name}` | {weight!r} |"
        for number, (name, weight) in enumerate(
            zip(plan.public_names, plan.weights, strict=True), start=1
        )
    )
    return f"""# {title}

A merge of {plan.num_models} models by [shardmix](https://pypi.org/project/shardmix/) {__version__}:
a weighted sum of their weights, `out = Σ weightᵢ · modelᵢ`, accumulated in float32 and rounded once
to the output's dtype.

| | model | weight |
|---|---|---|
{rows}

Config, tokenizer and the other files beside the weights are those of `{plan.base_name}`.

## Recipe

```yaml
{recipe.rstrip()}
```
"""


def _write_json(path: Path, content: dict[str, Any], *, sort_keys: bool = False) -> None:
    text = json.dumps(content, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None
