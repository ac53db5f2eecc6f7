"""The model types of the LM-Cocktail functions and the scorer, and the loader of each."""

from collections.abc import Mapping
from typing import Any

from shardmix.errors import RecipeError, shown

DECODER = "decoder"
ENCODER = "encoder"
RERANKER = "reranker"
ENCODER_DECODER = "encoder-decoder"

AUTO_CLASSES = {
    DECODER: "AutoModelForCausalLM",
    ENCODER: "AutoModel",
    RERANKER: "AutoModelForSequenceClassification",
    ENCODER_DECODER: "AutoModelForSeq2SeqLM",
}
"""Model type → the class of transformers that loads it."""


def check_model_type(model_type: str) -> None:
    """Raise `RecipeError` if this is no model type."""
    if not isinstance(model_type, str) or model_type not in AUTO_CLASSES:
        raise RecipeError(
            f"must be one of {', '.join(AUTO_CLASSES)}", subject=f"model type {model_type!r}"
        )


_HEADS = (
    *("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForSequenceClassification"),
    *("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice", "ForMaskedLM"),
    *("ForPreTraining", "ForImageClassification", "ForCTC", "ForSpeechSeq2Seq"),
)
# The heads that a model of each type may have. An encoder is loaded without a head; encoders are
# trained with that of a masked language model.
_FITTING_HEADS = {
    DECODER: ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"),
    ENCODER: ("ForMaskedLM", "ForPreTraining"),
    RERANKER: ("ForSequenceClassification",),
    ENCODER_DECODER: ("ForConditionalGeneration", "ForSpeechSeq2Seq"),
}
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
        model_type
        for model_type, heads in _FITTING_HEADS.items()
        if any(str(name).endswith(heads) for name in named)
        if contradiction(config, model_type) is None
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
    if model_type == ENCODER and has_modules:
        return None
    fits = any(head in _FITTING_HEADS[model_type] for head in heads)
    if heads and not fits:
        return f"architectures {shown(named)}"
    family, is_decoder = str(config.get("model_type")), config.get("is_decoder") is True
    is_bare = bool(named) and all(str(name).endswith("Model") for name in named)
    if model_type == RERANKER and family in _ENCODER_FAMILIES and is_bare:
        return f"architectures {shown(named)}, without a head that scores"
    if model_type in (DECODER, ENCODER_DECODER) and family in _ENCODER_FAMILIES and not is_decoder:
        return f"model_type {shown(family)}, which reads in both directions"
    two_sided = config.get("is_encoder_decoder")
    if model_type == DECODER and two_sided is True:
        return "is_encoder_decoder true"
    if model_type == ENCODER_DECODER and two_sided is False:
        return "is_encoder_decoder false"
    return None
