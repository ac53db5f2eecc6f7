"""The values of a recipe: models, a method, and settings of its parameters. Plain frozen data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shardmix.methods import linear
from shardmix.methods.base import Value
from shardmix.recipe.tokenizer import RecipeTokenizer

KEEP = "keep"
"""The output dtype that keeps each tensor's dtype in the first model."""
WEIGHT = "weight"
"""The parameter that `SOURCE=WEIGHT` words set: each model's share."""
NORMALIZE = "normalize"
"""The parameter that `--normalize` sets."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A parameter's value for some of the tensors."""

    points: tuple[Value, ...]
    """One value, or a gradient: several, spread evenly over the layers, linear between them."""
    filter: str | None = None
    """A part of the names of these tensors; None: all."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A parameter and its value for every tensor. The first choice that fits a name counts."""

    name: str
    """The parameter."""
    choices: tuple[Choice, ...]
    """At least one. If none fits a tensor, the tensor is without this setting."""

    @property
    def depends_on_tensor(self) -> bool:
        """True if two tensors may have different values."""
        first = self.choices[0]
        return first.filter is not None or len(first.points) > 1


Settings = tuple[Setting, ...]
"""Parameters of a model or of a recipe as a whole, each named once."""


@dataclass(frozen=True, slots=True)
class RecipeModel:
    """A model to merge, and its own parameters."""

    source: str
    """Local folder, `.safetensors` file, or Hub id `org/name[@revision]`."""
    parameters: Settings = ()
    """The model's own parameters. They count before the recipe's, which are for all models."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A merge as the user describes it. `build.checked` refuses one that makes no sense."""

    models: tuple[RecipeModel, ...]
    """The models, in order; once checked, without the base model."""
    merge_method: str = linear.NAME
    """The method's name in `methods.registry`."""
    base_model: str | None = None
    """The model that others are compared with. Once checked, None if the method needs none."""
    parameters: Settings = ()
    """Parameters of the merge as a whole, and values that are the same for all models."""
    dtype: str | None = None
    """Output dtype, if `out_dtype` is None. mergekit casts models to it before the arithmetic.
    Here the arithmetic is always in float32 (float64 if any source is)."""
    out_dtype: str | None = None
    """Output dtype: KEEP, float32, float16 or bfloat16."""
    quantize: str | None = None
    """Quantisation that the output's linear layers are written in, by its name in
    `output_quantisations`; `output_dtype` is then that of the other tensors."""
    config_from: str | None = None
    """Source of config, tokenizer and the other auxiliary files; None: the first of `sources`."""
    max_shard_size: int | None = None
    """Largest output shard in bytes; None: the shard layout of the first of `sources`."""
    model_type: str | None = None
    """decoder, encoder, reranker or encoder-decoder. The output of encoders also loads in
    sentence-transformers: with its own modules, or else with CLS pooling and normalisation."""
    allow_differences: tuple[str, ...] = ()
    """Keys in which the models may differ. shardmix otherwise refuses such models, since an average
    of them makes no sense. A key of a config (`num_attention_heads`, `text_config.hidden_act`),
    `tokenizer`, `model_type`, `quantization_config`, or a file (`modules.json`). Sorted, each
    once."""
    pooling: str | None = None
    """Pooling of an encoder's token states into one vector, one of `sentence_modules.POOLINGS`.
    None: as its modules say; without modules, cls."""
    as_adapter: bool = False
    """Write the changes to the base model as a LoRA adapter, not the model."""
    rank: int | None = None
    """Largest rank of the adapter's matrices; None: the ranks of the models' adapters, added up."""
    energy: float | None = None
    """Share of each matrix's squared norm that the least rank must keep; None: `rank` decides."""
    tokenizer: RecipeTokenizer | None = None
    """The output's vocabulary, to whose tokens rows are mapped; None: all models have one."""
    skip_others: bool = False
    """Leave all but weights of linear layers as it is in the base, in an adapter of a rank."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources to open, in order: the base model, if there is one, then the models.

        The first gives names, dtypes and shard layout.
        """
        base = () if self.base_model is None else (self.base_model,)
        return (*base, *(model.source for model in self.models))

    def with_sources(self, sources: Sequence[str], *, config_from: str | None = None) -> "Recipe":
        """Return the same recipe with other names for its `sources`, in their order."""
        base = None if self.base_model is None else sources[0]
        others = sources if base is None else sources[1:]
        models = zip(self.models, others, strict=True)
        names = dict(zip(self.sources, sources, strict=True))
        return replace(
            self,
            tokenizer=None if self.tokenizer is None else self.tokenizer.renamed(names),
            base_model=base,
            config_from=config_from,
            models=tuple(replace(model, source=source) for model, source in models),
        )

    @property
    def output_dtype(self) -> str:
        """The output's dtype: KEEP, float32, float16 or bfloat16."""
        return self.out_dtype or self.dtype or KEEP

    @property
    def depends_on_tensor(self) -> bool:
        """True if any parameter may have different values for two tensors."""
        levels = (self.parameters, *(model.parameters for model in self.models))
        return any(setting.depends_on_tensor for level in levels for setting in level)


def plain(values: Mapping[str, Value]) -> Settings:
    """Return settings of parameters that are the same for every tensor.

    Example:
        >>> plain({"weight": 0.5})[0].choices[0].points
        (0.5,)
    """
    return tuple(Setting(name, (Choice((value,)),)) for name, value in values.items())


def overlaid(below: Settings, above: Settings) -> Settings:
    """Return settings of one level. Those `above` replace those `below` of the same name."""
    by_name = {setting.name: setting for setting in (*below, *above)}
    return tuple(by_name.values())


def plain_value(setting: Setting) -> object:
    """Return a setting as it is written: a value, a list, or a list of filters."""
    if len(setting.choices) == 1 and setting.choices[0].filter is None:
        return _plain_points(setting.choices[0])
    return [
        {"filter": choice.filter, "value": _plain_points(choice)}
        if choice.filter is not None
        else {"value": _plain_points(choice)}
        for choice in setting.choices
    ]


def _plain_points(choice: Choice) -> object:
    return choice.points[0] if len(choice.points) == 1 else list(choice.points)
