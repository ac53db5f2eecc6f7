"""The types of models that the LM-Cocktail functions and the scorer know, and what loads each."""

from shardmix.errors import RecipeError

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
"""The class of transformers that loads each type."""


def check_model_type(model_type: str) -> None:
    """Raise `RecipeError` where this is no type of model."""
    if not isinstance(model_type, str) or model_type not in AUTO_CLASSES:
        raise RecipeError(f"model type {model_type!r}: must be one of {', '.join(AUTO_CLASSES)}")
