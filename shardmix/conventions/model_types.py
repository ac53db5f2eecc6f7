"""The model types of the LM-Cocktail functions and the scorer: one row each, with all that differs.

The scorer's objective of each is in `scoring.objectives`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardmix.errors import RecipeError, shown

DECODER = "decoder"
ENCODER = "encoder"
RERANKER = "reranker"
ENCODER_DECODER = "encoder-decoder"


@dataclass(frozen=True, slots=True)
class Reading:
    """A way to read an example, and what the scorer does differently for it."""

    name: str
    """Its name."""
    takes_queries: bool
    """True if its examples are a query and passages; else they are an input and an output."""
    loss_of_tokens: bool
    """True if a loss is a mean over tokens of the output, and so the tokenizer's matter."""
    has_own_limit: bool
    """True if the tokenizer's own longest text counts: that of RoBERTa knows how many of the
    config's positions are left."""


CONTINUATION = Reading(
    "continuation", takes_queries=False, loss_of_tokens=True, has_own_limit=False
)
"""Input and output, as one sequence."""
TWO_SIDES = Reading("two sides", takes_queries=False, loss_of_tokens=True, has_own_limit=False)
"""The input by an encoder, the output by a decoder."""
TEXTS = Reading("texts", takes_queries=True, loss_of_tokens=False, has_own_limit=True)
"""A query and its passages, each by itself."""
PAIRS = Reading("pairs", takes_queries=True, loss_of_tokens=False, has_own_limit=True)
"""A query with each of its passages, as one sequence."""


@dataclass(frozen=True, slots=True)
class ModelType:
    """A type of model, and what is different for it."""

    name: str
    """Its name in options and recipes."""
    auto_class: str
    """The class of transformers that loads it."""
    heads: tuple[str, ...]
    """Ends of class names, in a config's `architectures`, that fit it."""
    reads: Reading
    """Its way to read an example: CONTINUATION, TWO_SIDES, TEXTS or PAIRS."""
    embeds: bool = False
    """True if it gives a vector a text, without a head: a head or pooler beside it does not
    count."""
    scores: bool = False
    """True if a model without a head cannot be of this type."""


_TYPES = (
    ModelType(
        DECODER,
        "AutoModelForCausalLM",
        heads=("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"),
        reads=CONTINUATION,
    ),
    # Encoders are trained with the head of a masked language model.
    ModelType(
        ENCODER,
        "AutoModel",
        heads=("ForMaskedLM", "ForPreTraining"),
        reads=TEXTS,
        embeds=True,
    ),
    ModelType(
        RERANKER,
        "AutoModelForSequenceClassification",
        heads=("ForSequenceClassification",),
        reads=PAIRS,
        scores=True,
    ),
    ModelType(
        ENCODER_DECODER,
        "AutoModelForSeq2SeqLM",
        heads=("ForConditionalGeneration", "ForSpeechSeq2Seq"),
        reads=TWO_SIDES,
    ),
)
MODEL_TYPES = {each.name: each for each in _TYPES}
"""All types, by name."""


def check_model_type(model_type: str) -> None:
    """Raise `RecipeError` if this is no model type."""
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise RecipeError(
            f"must be one of {', '.join(MODEL_TYPES)}", subject=f"model type {model_type!r}"
        )


_HEADS = (
    *("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForSequenceClassification"),
    *("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice", "ForMaskedLM"),
    *("ForPreTraining", "ForImageClassification", "ForCTC", "ForSpeechSeq2Seq"),
)
# Families that read in both directions; as a decoder they would get a head of random weights.
_ENCODER_FAMILIES = frozenset(
    (
        *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra"),
        *("ernie", "esm", "modernbert", "mpnet", "new", "nomic_bert", "roberta", "xlm-roberta"),
        *("xlm-roberta-xl", "eurobert", "layoutlm", "longformer", "funnel", "gte"),
    )
)


def fitting_types(config: Mapping[str, Any]) -> list[str]:
    """Return the types that fit a config's architectures; empty if it names none."""
    architectures = config.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    return [
        each.name
        for each in MODEL_TYPES.values()
        if any(str(name).endswith(each.heads) for name in named)
        if contradiction(config, each.name) is None
    ]


def contradiction(
    config: Mapping[str, Any], model_type: str, *, has_modules: bool = False
) -> str | None:
    """Return why a model of this config cannot be of a type; None if it can, or nothing tells.

    `has_modules`: sentence-transformers' modules lie beside it. Then it embeds texts, whatever head
    it was trained with.
    """
    architectures = config.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    heads = [head for name in named for head in _HEADS if str(name).endswith(head)]
    kind = MODEL_TYPES[model_type]
    if kind.embeds and has_modules:
        return None
    fits = any(head in kind.heads for head in heads)
    if heads and not fits:
        return f"architectures {shown(named)}"
    family, is_decoder = str(config.get("model_type")), config.get("is_decoder") is True
    is_bare = bool(named) and all(str(name).endswith("Model") for name in named)
    if kind.scores and family in _ENCODER_FAMILIES and is_bare:
        return f"architectures {shown(named)}, without a head that scores"
    writes = kind.reads in (CONTINUATION, TWO_SIDES)
    if writes and family in _ENCODER_FAMILIES and not is_decoder:
        return f"model_type {shown(family)}, which reads in both directions"
    two_sided = config.get("is_encoder_decoder")
    if kind.reads == CONTINUATION and two_sided is True:
        return "is_encoder_decoder true"
    if kind.reads == TWO_SIDES and two_sided is False:
        return "is_encoder_decoder false"
    return None
