"""Configs of small models, made from the defaults of any config class of transformers.

Every key that counts something (layers, heads, widths, tokens) is made small, by its name.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

HIDDEN, HEADS, HEAD_DIM, INNER, VOCABULARY, POSITIONS, IMAGE, PATCH = 32, 4, 8, 48, 96, 64, 32, 8

_Rule = Callable[[int], int]


def _at_most(most: int) -> _Rule:
    return lambda value: min(value, most)


# What a key counts, by its name: the first pattern that fits decides.
_SIZES: tuple[tuple[str, _Rule], ...] = (
    (r"(type|token_type|task_type|modality_type)_vocab_size", lambda value: value),
    (r".*vocab_size.*|.*codebook_size|num_embeddings", _at_most(VOCABULARY)),
    (r".*hash_byte_group_vocab", _at_most(VOCABULARY)),
    (r"max_window_layers|first_k_dense_replace|num_dense_layers", _at_most(1)),
    (r"num_hidden_layers|.*num_layers|n_layers?|.*_layers|layers", _at_most(2)),
    (r"depth|.*_depth|num_blocks|num_hidden_groups", _at_most(2)),
    (r".*num_key_value_heads|num_kv_heads|.*num_query_groups|kv_n_heads", _at_most(2)),
    (r".*_attention_heads|.*num_heads|n_heads?|.*_n_heads|(attention_)?heads", _at_most(HEADS)),
    (r"linear_num_(key|value)_heads", _at_most(HEADS)),
    (r"(.*_)?head_dim|kv_channels|d_kv|dim_head|d_head|.*_d_head", _at_most(HEAD_DIM)),
    (r"qk_(nope|rope)_head_dim|mamba_headdim|rotary_dim", _at_most(HEAD_DIM)),
    (r"qk_head_dim", lambda value: 2 * HEAD_DIM),
    (r".*_rank|.*d_state|state_size", _at_most(HEAD_DIM)),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts|zero_expert_num", _at_most(4)),
    (r".*experts_per_tok|moe_topk|moe_top_k|moe_k|top_k|topk", _at_most(2)),
    (r"n_group|topk_group", lambda value: 1),
    (r".*max_.*position.*|n_positions|n_ctx|max_pos_emb", _at_most(POSITIONS)),
    (r"max_seq_len|max_sequence_length|context_length", _at_most(POSITIONS)),
    (r"position_embedding_size", _at_most(POSITIONS)),
    (r".*image_size|resolution|crop_size|img_size", lambda value: IMAGE),
    (r"patch_size", _at_most(PATCH)),
    (r".*intermediate_size.*|.*ffn.*(dim|size)|.*_ffn|d_ff|dff|mlp_dim|d_inner", _at_most(INNER)),
    (r".*feedforward_dim", _at_most(INNER)),
    (r".*sliding_window|.*attention_window.*|attention_chunk_size", _at_most(16)),
    (r"local_attention|.*window_len|(.*_)?chunk_size|(index_)?block_size", _at_most(16)),
    (r"index_topk.*|num_queries|num_denoising|num_position_embeddings", _at_most(16)),
    (r"two_stage_num_proposals|num_(image_)?patches", _at_most(16)),
    (r".*hidden_size.*|.*hidden_dim|.*_dim|dim|.*_dim_.*|d_model|n_embd", _at_most(HIDDEN)),
    (r".*embed_size|.*embedding_size|.*emb_size|.*output_size|.*bottleneck_size", _at_most(HIDDEN)),
    (r".*_channels?|.*_units|.*_width|.*_planes", _at_most(HIDDEN)),
    (r"num_pos_feats", lambda value: HIDDEN // 2),
    (r"num_mel_bins|.*num_filters|.*feat_per_channel|.*_feat_size|input_size", _at_most(16)),
)

_TOKEN = re.compile(
    r".*_(token|code)_?(id|index)s?|.*_token_id_.*|lang_id|(mask|unk|pad)_index|.*_token_offset|.*_id"
)


def small_value(key: str, value: Any) -> Any:
    """Return what a key of a config is in a small model."""
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    rule = next((rule for pattern, rule in _SIZES if re.fullmatch(pattern, key)), None)
    return value if rule is None else rule(value)


class _Tokens:
    """Hands out small ids for special tokens that would lie beyond the small vocabulary."""

    def __init__(self) -> None:
        self.used: dict[int, int] = {}

    def small(self, value: int) -> int:
        if value < VOCABULARY // 2:
            return value
        return self.used.setdefault(value, VOCABULARY - 2 - len(self.used))


def small_config(cls: type[PreTrainedModel], **changes: Any) -> PreTrainedConfig:
    """Return the config of a small model of this class."""
    overrides = {
        **OVERRIDES.get(cls.config_class.__name__, {}),
        **changes,
    }
    return _shrunk(cls.config_class, None, overrides, _Tokens())


def _shrunk(
    config_class: type[PreTrainedConfig],
    example: PreTrainedConfig | None,
    overrides: dict[str, Any],
    tokens: _Tokens,
) -> PreTrainedConfig:
    tie = overrides.get("__tie__")
    if example is None:
        example = config_class()
    own = {k: v for k, v in overrides.items() if "." not in k and not k.startswith("__")}
    arguments: dict[str, Any] = {}
    for key, value in _defaults(config_class).items():
        actual = vars(example).get(key)  # an attribute may be one of each layer, and raise
        if isinstance(actual, PreTrainedConfig):
            nested = {k[len(key) + 1 :]: v for k, v in overrides.items() if k.startswith(key + ".")}
            general = OVERRIDES.get(type(actual).__name__, {})
            if tie is not None and "tie_word_embeddings" in _defaults(type(actual)):
                nested |= {"tie_word_embeddings": tie, "__tie__": tie}
            arguments[key] = _shrunk(type(actual), actual, {**general, **nested}, tokens)
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            is_token = _TOKEN.fullmatch(key) is not None
            arguments[key] = tokens.small(value) if is_token else small_value(key, value)
        elif (
            isinstance(value, list | tuple)
            and value
            and _TOKEN.fullmatch(key)
            and all(isinstance(v, int) for v in value)
        ):
            arguments[key] = [tokens.small(v) for v in value]
        elif value is not None:
            arguments[key] = value
    return config_class(**{**arguments, **own})


def _defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(config_class):
        if not field.init or field.name.startswith("_"):
            continue
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    general = {f.name for f in dataclasses.fields(PreTrainedConfig)} - {
        "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id",
        "is_encoder_decoder", "is_decoder", "add_cross_attention",
    }  # fmt: skip
    return {key: value for key, value in found.items() if key not in general}


_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
_RT_RESNET = {**_RESNET, "model_type": "rt_detr_resnet", "layer_type": "basic"}
_HGNET = {
    "model_type": "hgnet_v2",
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 8, 16, 16],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [8, 16, 16, 32],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [2, 2, 2, 2],
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
    "return_idx": [1, 2, 3],
}
_HGNET_WITH_STEM = {
    **_HGNET,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
    "return_idx": [0, 1, 2, 3],
}
_SWIN = {
    "model_type": "swin",
    "image_size": 32,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 2, 2],
    "window_size": 4,
    "out_features": ["stage2", "stage3", "stage4"],
}
_HIERA = {
    "hidden_size": 8,
    "blocks_per_stage": [1, 1, 1, 1],
    "embed_dim_per_stage": [8, 16, 16, 32],
    "num_attention_heads_per_stage": [1, 1, 1, 1],
    "window_size_per_stage": [4, 4, 4, 4],
    "global_attention_blocks": [2],
    "image_size": [64, 64],
}
_DETR_ENCODER = {
    "encoder_in_channels": [16, 16, 32],
    "decoder_in_channels": [32, 32, 32],
    "encode_proj_layers": [2],
    "feat_strides": [8, 16, 32],
    "encoder_hidden_dim": 32,
}

# What names are not enough for, by config class. "a.b" is key b of the nested config a.
OVERRIDES: dict[str, dict[str, Any]] = {
    "CohereCompassTextConfig": {"layer_types": ["sliding_attention", "sliding_attention"]},
    "BridgeTowerVisionConfig": {"hidden_size": 64},
    "BridgeTowerConfig": {
        "hidden_size": 64,
        "vision_config.hidden_size": 64,
        "text_config.hidden_size": 64,
    },
    "ChameleonConfig": {"vocabulary_map": {"<image>": 5, "IMGIMGA": 10, "IMGIMGB": 11}},
    "Emu3Config": {
        "vocabulary_map": {
            "<image>": 5,
            "<|extra_200|>": 6,
            "<|visual token 000000|>": 10,
            "<|visual token 000001|>": 11,
        }
    },
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "Granite4VisionConfig": {"deepstack_layer_map": [[0, 0]]},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": INNER},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0},
    "Glm5NextTextConfig": {"num_key_value_heads": HEADS},
    "FunAsrNanoConfig": {"adaptor_config.intermediate_size": 8},
    "GraniteSpeechPlusConfig": {
        "encoder_config.context_size": 16,
        "encoder_config.max_pos_emb": 32,
    },
    "GraniteSpeechPlusEncoderConfig": {"context_size": 16, "max_pos_emb": 32},
    "GraniteSpeech5Config": {"context_size": 16},
    "GraniteSpeech5EncoderConfig": {"context_size": 16},
    "LwDetrViTConfig": {"image_size": 64, "num_windows": 4, "patch_size": 8},
    "KyutaiSpeechToTextConfig": {"codebook_vocab_size": 65, "codec_config.codebook_size": 64},
    "MimiConfig": {"codebook_size": 64, "upsample_groups": 32},
    "Dots3NoteTextConfig": {"num_key_value_heads": HEADS},
    "CsmConfig": {"codebook_size": 64, "vocab_size": 64},
    "CsmDepthDecoderConfig": {"vocab_size": 64},
    "DFineConfig": {"backbone_config": _HGNET, **_DETR_ENCODER},
    "Deimv2Config": {"backbone_config": _HGNET, **_DETR_ENCODER},
    "DabDetrConfig": {"backbone_config": _RESNET},
    "DeformableDetrConfig": {"backbone_config": _RESNET},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1},
    "EsmConfig": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "Florence2VisionConfig": {
        "embed_dim": [8, 8, 16, 32],
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2],
        "num_groups": [1, 1, 2, 2],
        "window_size": 4,
    },
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "GraniteSpeechConfig": {"encoder_config.context_size": 16, "encoder_config.max_pos_emb": 32},
    "GraniteSpeechEncoderConfig": {"context_size": 16, "max_pos_emb": 32},
    "GroundingDinoConfig": {"backbone_config": _SWIN},
    "MMGroundingDinoConfig": {"backbone_config": _SWIN},
    "HunYuanDenseV1Config": {"head_dim": HEAD_DIM},
    "HunYuanMoEV1Config": {"head_dim": HEAD_DIM},
    "HunYuanVLTextConfig": {"head_dim": HEAD_DIM},
    "JanusVQVAEConfig": {"channel_multiplier": [1, 1], "base_channels": 32, "num_res_blocks": 1},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "Mamba2Config": {"num_heads": 8},
    "MinistralConfig": {"head_dim": HEAD_DIM},
    "MoonshineStreamingConfig": {"num_key_value_heads": 4},
    "NemotronConfig": {"num_key_value_heads": 2},
    "PPDocLayoutV3Config": {"backbone_config": _HGNET_WITH_STEM, **_DETR_ENCODER},
    "PPDocLayoutV4Config": {"backbone_config": _HGNET_WITH_STEM, **_DETR_ENCODER},
    "RTDetrV2Config": {"backbone_config": _RT_RESNET, "encoder_in_channels": [8, 16, 16]},
    "RTDetrConfig": {"backbone_config": _RT_RESNET, "encoder_in_channels": [8, 16, 16]},
    "Sam2HieraDetConfig": _HIERA,
    "Sam2VisionConfig": {
        "backbone_channel_list": [32, 16, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "Pix2StructTextConfig": {"initializer_range": 0.02},
    "SpeechT5Config": {
        "max_speech_positions": 64,
        "max_text_positions": 64,
        "encoder_max_relative_position": 16,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "conv_dim": [16] * 7,
    },
    "ZambaConfig": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid"],
    },
    "Zamba2Config": {
        "num_hidden_layers": 6,
        "layers_block_type": [
            "linear_attention",
            "hybrid",
            "hybrid",
            "linear_attention",
            "hybrid",
            "hybrid",
        ],
        "num_mem_blocks": 2,
    },
    "DbrxAttentionConfig": {"rope_theta": 10000.0},
}
