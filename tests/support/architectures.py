"""Small random models of the kinds that people merge, and inputs that use every part of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from tests.support import tied_models
from tests.support.small_configs import HEADS, VOCABULARY, small_config

Inputs = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Architecture:
    """A class of transformers, and how a small model of it is made and called."""

    name: str
    """The class."""
    kind: str
    """A kind of architecture that users speak of."""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keys of its config; "a.b" is key b of the nested config a."""
    inputs: Callable[[PreTrainedConfig], Inputs] | None = None
    """Makes arguments of its forward pass; None if the usual ones do."""

    @property
    def cls(self) -> type[PreTrainedModel]:
        """The class itself."""
        found: type[PreTrainedModel] = getattr(transformers, self.name)
        return found

    def bare(self) -> PreTrainedModel:
        """Return a model of it in float32."""
        return tied_models.build(self.cls, small_config(self.cls, **self.changes))

    def arguments(self, model: PreTrainedModel) -> Inputs:
        """Return arguments of its forward pass."""
        if self.inputs is None:
            return tied_models.find_inputs(model)
        return self.inputs(model.config)


def _ids(*tokens: int) -> torch.Tensor:
    return torch.tensor([[*tokens, 7, 11, 13, 5, 17]])


def _pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _image_and_text(num_tokens: int, *shape: int, key: str = "image_token_id") -> Any:
    """Return a maker of inputs: an image, and a text with so many places for it."""

    def make(config: PreTrainedConfig) -> Inputs:
        ids = _ids(*[getattr(config, key)] * num_tokens)
        return {"input_ids": ids, "pixel_values": _pixels(*(shape or (1, 3, 32, 32)))}

    return make


def _paligemma(config: PreTrainedConfig) -> Inputs:
    found = _image_and_text(16)(config)
    return {**found, "token_type_ids": torch.zeros_like(found["input_ids"])}


def _qwen_vl(config: PreTrainedConfig) -> Inputs:
    """One image of 4 x 4 patches, of which each token has 2 x 2."""
    vision = config.vision_config
    channels = getattr(vision, "in_channels", 3)
    row = channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": _ids(*[config.image_token_id] * 4),
        "mm_token_type_ids": torch.tensor([[1] * 4 + [0] * 5]),
        "pixel_values": _pixels(16, row),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_QWEN_VL = {
    "text_config.rope_parameters": _MROPE,
    "vision_config.spatial_merge_size": 2,
    "vision_config.patch_size": 4,
}
_DEEPSEEK = {
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": HEADS,
    "num_experts_per_tok": 2,
    "topk_method": "greedy",
    "first_k_dense_replace": 1,
}
_SPEECH = {
    "conv_dim": [16, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def _of(kind: str, *names: str) -> list[Architecture]:
    return [Architecture(name, kind) for name in names]


ARCHITECTURES: tuple[Architecture, ...] = (
    *_of("dense", "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM"),
    *_of("dense", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM"),
    *_of("dense", "MistralForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM"),
    *_of("dense", "GPTJForCausalLM", "OPTForCausalLM", "BloomForCausalLM", "FalconForCausalLM"),
    *_of("dense", "Olmo2ForCausalLM", "StableLmForCausalLM", "CohereForCausalLM"),
    *_of("dense", "Starcoder2ForCausalLM", "GraniteForCausalLM", "Glm4ForCausalLM"),
    *_of("dense", "SmolLM3ForCausalLM"),
    *_of("experts", "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"),
    Architecture("DeepseekV2ForCausalLM", "experts", _DEEPSEEK),
    Architecture("DeepseekV3ForCausalLM", "experts", _DEEPSEEK),
    *_of("experts", "GptOssForCausalLM", "OlmoeForCausalLM", "PhimoeForCausalLM"),
    *_of("experts", "GraniteMoeForCausalLM", "JambaForCausalLM", "Qwen3NextForCausalLM"),
    *_of("experts", "Llama4ForCausalLM", "Ernie4_5_MoeForCausalLM"),
    *_of("encoder", "BertForMaskedLM", "BertModel", "RobertaForMaskedLM"),
    *_of("encoder", "XLMRobertaForSequenceClassification", "DebertaV2ForMaskedLM"),
    *_of("encoder", "ElectraForPreTraining", "AlbertForMaskedLM", "DistilBertForMaskedLM"),
    *_of("encoder", "ModernBertForMaskedLM", "MPNetModel", "NomicBertModel"),
    *_of("encoder-decoder", "T5ForConditionalGeneration", "MT5ForConditionalGeneration"),
    *_of("encoder-decoder", "UMT5ForConditionalGeneration", "BartForConditionalGeneration"),
    *_of("encoder-decoder", "MBartForConditionalGeneration", "PegasusForConditionalGeneration"),
    *_of("encoder-decoder", "MarianMTModel", "M2M100ForConditionalGeneration"),
    Architecture(
        "LlavaForConditionalGeneration",
        "vision-language",
        {"vision_config.image_size": 32, "vision_config.patch_size": 8},
        _image_and_text(16),
    ),
    Architecture("Qwen2VLForConditionalGeneration", "vision-language", _QWEN_VL, _qwen_vl),
    Architecture("Qwen2_5_VLForConditionalGeneration", "vision-language", _QWEN_VL, _qwen_vl),
    Architecture(
        "PaliGemmaForConditionalGeneration",
        "vision-language",
        {"vision_config.image_size": 32, "vision_config.patch_size": 8},
        _paligemma,
    ),
    Architecture(
        "Gemma3ForConditionalGeneration",
        "vision-language",
        {"mm_tokens_per_image": 4, "vision_config.image_size": 32, "vision_config.patch_size": 8},
        lambda config: {
            **_image_and_text(4)(config),
            "token_type_ids": torch.tensor([[1] * 4 + [0] * 5]),
        },
    ),
    Architecture(
        "Idefics3ForConditionalGeneration",
        "vision-language",
        {"vision_config.image_size": 32, "vision_config.patch_size": 8, "scale_factor": 2},
        _image_and_text(4, 1, 1, 3, 32, 32),
    ),
    Architecture(
        "Blip2ForConditionalGeneration",
        "vision-language",
        {"num_query_tokens": 4, "image_token_index": 90},
        _image_and_text(4, key="image_token_index"),
    ),
    *_of("vision-language", "CLIPModel", "SiglipModel"),
    *_of("vision", "ViTForImageClassification", "Dinov2ForImageClassification"),
    Architecture(
        "ConvNextForImageClassification",
        "vision",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_stages": 4},
    ),
    *_of("speech", "WhisperForConditionalGeneration"),
    Architecture("Wav2Vec2ForCTC", "speech", _SPEECH),
    Architecture("HubertForCTC", "speech", _SPEECH),
    *_of("speech", "SeamlessM4TForTextToText"),
    *_of("state-space", "MambaForCausalLM", "Mamba2ForCausalLM", "RwkvForCausalLM"),
    *_of("state-space", "Zamba2ForCausalLM", "FalconMambaForCausalLM"),
    *_of("state-space", "RecurrentGemmaForCausalLM", "BambaForCausalLM"),
)
"""The architectures, of which each kind has several."""

assert VOCABULARY > 17
