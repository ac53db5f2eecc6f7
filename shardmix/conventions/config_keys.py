"""Meanings of a config's keys, for two models of the same tensors that differ in them.

Pure rules on a key's name, as transformers' configs and those of models with code of their own use
it. Values are not judged here.
"""

import enum
import re


class Meaning(enum.Enum):
    """Effect of a key."""

    NOTHING = "nothing of what the model computes"
    ACTIVATION = "the function between two layers; some names are of one function"
    LAYER_KINDS = "the kind of each layer"
    CLASSIFIER = "what a classifier sees: as decisive as the next, if there is one"
    COMPUTATION = "what the weights stand for: nobody means an average over two of these"
    TUNING = "how they are used; a model goes on working if it changes a little"
    UNKNOWN = "who knows"


def meaning(key: str) -> Meaning:
    """Return the effect of a config's key, by its name in its own part of the config.

    A key of `rope_parameters` has a dot in it: all of them turn positions into angles.
    """
    group, _, key = key.rpartition(".")
    if len(key) > _LONGEST_KEY:
        return Meaning.UNKNOWN
    if group == "sentence_transformers":
        return Meaning.TUNING  # of scores that are computed already
    if key in _NOTHING or re.search(_NOTHING_PATTERN, key):
        return Meaning.NOTHING
    if key in ("layer_types", "layers_block_type", "mlp_layer_types"):
        return Meaning.LAYER_KINDS
    if key in _CLASSIFIER:
        return Meaning.CLASSIFIER
    if re.search(_ACTIVATION_PATTERN, key):
        return Meaning.ACTIVATION
    if key in _COMPUTATION or re.search(_COMPUTATION_PATTERN, key):
        return Meaning.COMPUTATION
    if group or re.search(_TUNING_PATTERN, key):
        return Meaning.TUNING
    return Meaning.UNKNOWN


# Patterns are compiled when a key is first judged: most models' configs are equal.
_LONGEST_KEY = 200  # the patterns backtrack within a key; transformers' longest has 40 letters
_NOTHING = frozenset(
    (
        # Names, versions, paths.
        *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "auto_map"),
        *("_diffusers_version", "unsloth_version", "unsloth_fixed", "model_name", "language"),
        *("license", "tokenizer_class", "custom_pipelines", "finetuning_task", "prefix"),
        *("task_specific_params", "generation_config", "sentence_transformers"),
        *("transformers.js_config", "adapters"),
        # The way it is stored and run, not the result.
        *("dtype", "torch_dtype", "use_cache", "torchscript", "return_dict", "use_return_dict"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "output_scores"),
        *("return_dict_in_generate", "gradient_checkpointing", "use_gradient_checkpointing"),
        *("pretraining_tp", "chunk_size_feed_forward", "chunk_size_lm_head", "xla_device"),
        *("use_bfloat16", "tf_legacy_loss", "attn_implementation", "attn_impl", "use_flash_attn"),
        *("use_mamba_kernels", "use_mem_eff_path", "deterministic_flash_attn", "verbose"),
        *("disable_custom_kernels", "bf16", "fp16", "fp32", "init_device", "reference_compile"),
        *("use_dynamic_ntk_kernel", "use_cache_quantization", "use_cache_kernel", "cache_size"),
        # The way texts are generated, which generation_config.json decides.
        *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping"),
        *("num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p"),
        *("typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
        *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
        *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
        *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"),
        *("forced_decoder_ids", "cache_implementation", "renormalize_logits"),
        # Ties and quantisation have checks of their own; sizes are in the tensors' shapes.
        *("tie_word_embeddings", "tie_encoder_decoder", "tie_embeddings", "tie_lm_head"),
        "scale_decoder_outputs",  # a tie may decide it, see `belonging`
        *("quantization_config", "compression_config", "quantization"),
        *("is_gated_act", "num_labels", "_num_labels"),  # both follow from other keys
    )
)
_NOTHING_PATTERN = (
    r"^_(?:attn|experts|unsloth)|(?:^|_)loss(?:_|$)|jitter_noise|^mask_(?:time|feature)_"
    r"|^apply_spec_augment$|^label_smoothing|^ctc_|^use_flash_|^_flash"
)
_ACTIVATION_PATTERN = (
    r"(?:^|_)(?:act|act_fn|act_func|activation|activation_fn|activation_func"
    r"|activation_function|activation_type|non_?linearity|afn|feed_forward_proj)$"
)
COUNTS_OF_LAYERS = ("num_hidden_layers", "num_hidden_groups", "inner_group_num")
"""Numbers of passes through layers: passes may share their parameters."""

_COMPUTATION = frozenset(
    (
        # Heads.
        *("d_kv", "kv_channels", "head_size", "n_groups", "mamba_n_groups", "n_head_kv"),
        *("num_query_groups", "num_attention_groups", "multi_query_group_num", "multi_query"),
        # The use of positions.
        *("position_embedding_type", "position_embeddings_type", "pos_embed_type", "alibi"),
        *("use_alibi", "rotary", "relative_attention", "pos_att_type", "position_biased_input"),
        *("rope_interleave", "rope_interleaved", "rotary_interleaved", "interleaved_rope"),
        *("partial_rotary_factor", "rotary_dim", "rotary_emb_fraction", "mrope_section"),
        *("mrope_interleaved", "no_rope_layers", "no_rope_layer_interval"),
        *("nope_layer_interval", "use_rope", "use_rotary_embedding", "use_rel_pos"),
        *("use_absolute_position_embeddings", "use_relative_position_bias"),
        # The order of layers, and the tokens that each token sees.
        *("normalize_before", "do_layer_norm_before", "pre_norm", "post_norm", "norm_first"),
        *("apply_residual_connection_post_layernorm", "parallel_attn", "use_parallel_residual"),
        *("new_decoder_architecture", "norm_type", "layer_norm_type", "normalization_type"),
        *("is_decoder", "is_causal", "is_encoder_decoder", "use_bidirectional_attention"),
        *("use_causal_mask", "bidirectional", "qk_layernorm", "use_qk_norm", "qk_norm"),
        *("attention_type", "attn_type", "add_cross_attention", "norm_rel_ebd"),
        *("do_stable_layer_norm", *COUNTS_OF_LAYERS),
        # The inputs that a convolution sees.
        *("conv_stride", "patch_stride", "patch_strides", "stride", "strides", "dilation"),
        *("dilations", "conv_dilation", "tdnn_dilation", "upsample_rates"),
        # Factors that the weights were trained with.
        *("scale_embedding", "scale_embeddings", "scale_emb", "scale_depth", "scale_attn_weights"),
        *("scale_attn_by_inverse_layer_idx", "dim_model_base"),
        *("logits_scaling", "logit_scale", "query_pre_attn_scalar", "route_scale", "emb_scale"),
        # The choice of experts.
        *("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k"),
        *("moe_topk", "moe_k", "top_k_experts", "num_selected_experts", "router_top_k"),
        *("norm_topk_prob", "moe_renormalize", "scoring_func", "score_func", "topk_method"),
        *("n_group", "topk_group", "num_expert_group", "mlp_only_layers", "decoder_sparse_step"),
        # The use of the last layer.
        "pooling_type",
        *("vision_feature_layer", "vision_feature_select_strategy"),
        *("bias", "add_bias_linear", "add_qkv_bias", "enable_bias"),
    )
)
_CLASSIFIER = frozenset(
    ("classifier_pooling", "summary_type", "problem_type", "use_mean_pooling", "mean_pooling")
)
_COMPUTATION_PATTERN = (
    r"(?:^|_)heads?$|(?:^|_)heads_(?:kv|per_\w+)$|(?:^|_)head_(?:dim|size)$"
    r"|(?:^|_)multipliers?$|(?:^|_)scaling_factor$"
    r"|(?:^|_)(?:attention|attn|mlp|qkv|qv|query|key|value|use|lm_head|ffn|conv|proj|projector|norm"
    r"|classifier|decoder)_bias$"
)
_TUNING_PATTERN = (
    r"(?:^|_)eps(?:ilon)?$|dropout|(?:^|_)drop(?:_rate|_prob|_path|$)|pdrop$|layerdrop"
    r"|initiali[sz]er|init_(?:std|xavier|range)|(?:^|_)ro(?:pe|tary)(?:_|$)|theta$|base_freq$"
    r"|max_position|position_embeddings$|n_positions|n_ctx|max_seq|seq_len|context_length"
    r"|model_max_length|max_distance$|relative_positions$|sliding|window|local_attention|softcap"
    r"|token_(?:id|ids|index)$|clip_qkv|attn_temperature|attention_chunk_size|momentum$"
)

# Names of functions; those of one line are one function, or differ by less than rounding does.
_SAME_FUNCTIONS = (
    ("silu", "swish"),
    ("gelu", "gelu_python", "gelu_erf", "gelu_none"),
    (
        "gelu_new",
        "gelu_pytorch_tanh",
        "gelu_fast",
        "gelu_accurate",
        "gelu_python_tanh",
        "gelu_tanh",
    ),
    ("gated-gelu", "gated-gelu_new"),  # transformers reads the first as the second
    ("linear", "identity"),
)
_NEARLY_GELU = (1, 2)
"""The two groups that differ from one another by less than 0.0005."""


def same_function(one: str, other: str) -> bool | None:
    """Return True if two names mean one activation function, None if nearly the same."""
    groups = [_function_group(name.lower()) for name in (one, other)]
    if groups[0] == groups[1]:
        return True
    return None if set(groups) == set(_NEARLY_GELU) else False


def _function_group(name: str) -> int | str:
    for number, names in enumerate(_SAME_FUNCTIONS):
        if name in names:
            return number
    return name


_SAME_MODEL_TYPES = (frozenset({"roberta", "xlm-roberta", "camembert"}),)
"""Model types whose classes are copies of one another."""


def same_model_type(one: str, other: str, *, is_nested: bool) -> bool:
    """Return True if two model types have classes that compute the same.

    Parts of a model had their model's own type in older versions: `qwen2_vl`, now `qwen2_vl_text`.
    """
    if is_nested and (one.startswith(f"{other}_") or other.startswith(f"{one}_")):
        return True
    return one == other or any({one, other} <= types for types in _SAME_MODEL_TYPES)


POSITION_KINDS = ("position_embedding_type", "position_embeddings_type")
"""Keys that name the positions of a model without rotary embeddings."""
LEGACY_DEFAULTS: dict[str, object] = {
    **dict.fromkeys(POSITION_KINDS, "absolute"),
    "is_decoder": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
}
"""Meanings of these keys if a config of any class leaves them out; only some versions write
them."""
