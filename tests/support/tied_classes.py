"""The classes of transformers that tie weights, and the configs that decide what they tie.

`tie_word_embeddings` of each (nested) config gates all ties of its model, also those that have
nothing to do with words. Where that key means more, or another one decides:

- T5, UMT5, LongT5, Pop2Piano: the key is always true once loaded. False in a file only means that
  the decoder's outputs are not scaled by d_model**-0.5; `scale_decoder_outputs` counts before it.
- Switch Transformers: false unties, and ends that scaling too.
- MT5, Udop, ViLT: the key is always true, whatever a file says.
- CSM: `tie_codebooks_embeddings` decides. Lfm2: an older `tie_embedding` counts before it.
- Marian: `share_encoder_decoder_embeddings` decides what is shared.
- Idefics: `additional_vocab_size` adds ties of additional rows.
- Deformable DETR, Grounding DINO: `with_box_refine`, `two_stage`, `decoder_bbox_embed_share` and
  `decoder_cls_embed_share` decide which heads are shared.
- Zamba: `layers_block_type` and `num_mem_blocks` decide which blocks are.
- LLaVA and Qwen-VL kin: true in `text_config` counts although the top says false.
"""

import dataclasses
import functools
import importlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from tests.support.small_configs import VOCABULARY

_MODELS = Path(transformers.__file__).parent / "models"
_KEYS = "_tied_weights_keys"


_OF_PARTS = """
bart:BartForQuestionAnswering bart:BartForSequenceClassification
bigbird_pegasus:BigBirdPegasusForQuestionAnswering
bigbird_pegasus:BigBirdPegasusForSequenceClassification
blip_2:Blip2ForConditionalGeneration blip_2:Blip2Model
encoder_decoder:EncoderDecoderModel florence2:Florence2Model fsmt:FSMTForConditionalGeneration
instructblip:InstructBlipForConditionalGeneration
instructblipvideo:InstructBlipVideoForConditionalGeneration
kosmos2_5:Kosmos2_5ForConditionalGeneration led:LEDForQuestionAnswering
llama4:Llama4ForConditionalGeneration mbart:MBartForQuestionAnswering
mbart:MBartForSequenceClassification mt5:MT5ForSequenceClassification
mt5:MT5ForTokenClassification mvp:MvpForQuestionAnswering mvp:MvpForSequenceClassification
pix2struct:Pix2StructForConditionalGeneration plbart:PLBartForSequenceClassification
pp_doclayout_v3:PPDocLayoutV3ForObjectDetection
rag:RagModel rag:RagSequenceForGeneration rag:RagTokenForGeneration
"""
# Classes that declare no ties but have parts that do.


@functools.cache
def tied_class_names() -> tuple[str, ...]:
    """Return `folder:module:Class` for every class that declares ties, without importing any.

    Classes that tie what no class before them ties come first.
    """
    kinds: Counter[str] = Counter()
    names: list[tuple[int, str]] = []
    for name, kind in _declared_classes():
        kinds[kind] += 1
        names.append((kinds[kind], name))
    of_parts = (part.split(":") for part in _OF_PARTS.split())
    others = [f"{folder}:modeling_{folder}:{name}" for folder, name in of_parts]
    return (*(name for _, name in sorted(names)), *others)


def _declared_classes() -> Iterator[tuple[str, str]]:
    for path in sorted(_MODELS.glob("*/modeling_*.py")):
        text = path.read_text()
        if _KEYS not in text:
            continue
        declared: set[str] = set()
        for part in re.split(r"^(?=class )", text, flags=re.MULTILINE)[1:]:
            head = re.match(r"class (\w+)\(([^)]*)\)", part)
            if head is None:
                continue
            bases = {base.strip() for base in head[2].split(",")}
            if _KEYS in part or bases & declared:
                declared.add(head[1])
                table = re.search(rf"{_KEYS}\W[^{{\n]*(\{{.*?\}})", part, re.DOTALL)
                kind = " ".join(table[1].split()) if table else head[1]
                yield f"{path.parent.name}:{path.stem}:{head[1]}", kind


def model_class(name: str) -> type[PreTrainedModel]:
    """Import the class of a `folder:module:Class`."""
    folder, module, class_name = name.split(":")
    found = importlib.import_module(f"transformers.models.{folder}.{module}")
    return getattr(found, class_name)


TIE_MEANS_MORE = frozenset({"SwitchTransformersForConditionalGeneration"})
"""Classes that compute something else with `tie_word_embeddings: false`, besides untying."""


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """A kind of config in which a class ties other weights, or says so otherwise."""

    label: str = ""
    """Empty for the class's defaults."""
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Keys of the config."""
    edit: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """What is done to each saved config.json."""


def _as_before_scale_key(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != "scale_decoder_outputs"} | {
        "tie_word_embeddings": False
    }


def _says_untied(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "tie_word_embeddings": False}


def _by_older_key(config: dict[str, Any]) -> dict[str, Any]:
    rest = {k: v for k, v in config.items() if k != "tie_word_embeddings"}
    return {**rest, "tie_embedding": config.get("tie_word_embeddings", True)}


# In the T5 family `false` only says that the decoder's outputs are not scaled. Files of version 4
# say so, later ones have a key for it.
_UNSCALED = (
    Variant("unscaled", {"tie_word_embeddings": False}),
    Variant("unscaled in version 4", {"tie_word_embeddings": False}, _as_before_scale_key),
)
_FORCED = (Variant("false that is ignored", {}, _says_untied),)
_OLDER_KEY = (Variant("older key", {}, _by_older_key),)

VARIANTS: dict[str, tuple[Variant, ...]] = {
    "T5Config": _UNSCALED,
    "UMT5Config": _UNSCALED,
    "LongT5Config": _UNSCALED,
    "Pop2PianoConfig": _UNSCALED,
    "MT5Config": _FORCED,
    "UdopConfig": _FORCED,
    "ViltConfig": _FORCED,
    "MarianConfig": (
        Variant(
            "two vocabularies",
            {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": VOCABULARY},
        ),
    ),
    "DeformableDetrConfig": (
        Variant("boxes refined", {"with_box_refine": True}),
        Variant("two stages", {"with_box_refine": True, "two_stage": True}),
    ),
    "GroundingDinoConfig": (Variant("boxes of their own", {"decoder_bbox_embed_share": False}),),
    "MMGroundingDinoConfig": (
        Variant("boxes of their own", {"decoder_bbox_embed_share": False}),
        Variant("classes of their own", {"decoder_cls_embed_share": False}),
    ),
    "IdeficsConfig": (Variant("more tokens", {"additional_vocab_size": 4}),),
    "Lfm2Config": _OLDER_KEY,
    "Lfm2MoeConfig": _OLDER_KEY,
    "Lfm2VlConfig": _OLDER_KEY,
}
UNTIE: dict[str, dict[str, Any]] = {"CsmConfig": {"tie_codebooks_embeddings": False}}
"""What unties a model instead of `tie_word_embeddings: false`, by config class."""


def variants(cls: type[PreTrainedModel]) -> tuple[Variant, ...]:
    """Return the kinds of config in which a class is tried."""
    return (Variant(), *VARIANTS.get(cls.config_class.__name__, ()))
