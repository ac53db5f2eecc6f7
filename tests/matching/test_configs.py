"""Pairs of configs that differ in one thing each, and what is to be said of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shardmix.matching.configs import NamedConfig, config_differences
from tests.support.sampling import sample

ROOT = Path(__file__).parents[2]

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_act": "gelu",
    "id2label": {"0": "negative", "1": "positive"},
    "label2id": {"negative": 0, "positive": 1},
}
MOE = {**LLAMA, "model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 8}
T5 = {"model_type": "t5", "d_model": 16, "num_heads": 2, "feed_forward_proj": "relu"}
OWN = {"model_type": "of-its-own", "width": 16, "n_head": 2}
VISION = {
    "model_type": "clip",
    "text_config": {"model_type": "clip_text_model", "hidden_act": "quick_gelu"},
    "vision_config": {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"},
}
DEBERTA = {"model_type": "deberta-v2", "relative_attention": True}
GEMMA = {"model_type": "gemma3_text", "num_hidden_layers": 6}
MODERN = {"model_type": "modernbert", "num_hidden_layers": 4}
ALBERT = {"model_type": "albert", "num_hidden_layers": 2}
SPEECH = {"model_type": "wav2vec2", "conv_stride": [5, 2], "do_stable_layer_norm": False}
LINEAR_ROPE = {"rope_type": "linear", "factor": 2.0}


def verdicts(*configs, output=0):
    """Return key → error, warning or listed, of configs called a, b, ..."""
    named = [NamedConfig(name, config) for name, config in zip("abcdef", configs, strict=False)]
    found = {}
    for difference in config_differences(named, output=output):
        if difference.finding.startswith("configs also differ in"):
            found |= dict.fromkeys((difference.key, *difference.other_keys), "listed")
        else:
            found[difference.key] = "error" if difference.is_refused else "warning"
    return found


def changed(config, *removed, **changes):
    return {key: value for key, value in {**config, **changes}.items() if key not in removed}


def differs(config, key, one, other, verdict):
    """Return a pair of configs that differ in one key, the key, and what is found."""
    return {**config, key: one}, {**config, key: other}, key, verdict


def alters(config, key, other, verdict):
    """Return a pair of configs of which the second has another value of a key, as `differs`."""
    return config, {**config, key: other}, key, verdict


def nested(config, part, **changes):
    return {**config, part: {**config[part], **changes}}


def labels(*names, **more):
    return changed(BERT, "label2id", id2label=dict(map(str_key, enumerate(names))), **more)


def str_key(pair):
    return str(pair[0]), pair[1]


PAIRS = {
    # Another head count.
    "heads": alters(LLAMA, "num_attention_heads", 2, "error"),
    "kv heads": alters(LLAMA, "num_key_value_heads", 1, "error"),
    "kv heads silent": (
        changed(LLAMA, "num_key_value_heads"),
        LLAMA,
        "num_key_value_heads",
        "error",
    ),
    "head dim": alters(LLAMA, "head_dim", 8, "error"),
    "t5 heads": alters(T5, "num_heads", 4, "error"),
    "heads of own code": alters(OWN, "n_head", 4, "error"),
    "heads by alias": (
        {"model_type": "gpt2", "n_head": 2},
        {"model_type": "gpt2", "num_attention_heads": 4},
        "n_head",
        "error",
    ),
    "heads by default": (
        {"model_type": "bert", "hidden_size": 768},
        {"model_type": "bert", "hidden_size": 768, "num_attention_heads": 24},
        "num_attention_heads",
        "error",
    ),
    "heads of own code, one silent": (OWN, changed(OWN, "n_head"), "n_head", "warning"),
    # Another activation.
    "activation": alters(BERT, "hidden_act", "relu", "error"),
    "activation by default": (
        changed(BERT, "hidden_act"),
        changed(BERT, hidden_act="silu"),
        "hidden_act",
        "error",
    ),
    "gelu and its tanh": alters(BERT, "hidden_act", "gelu_new", "warning"),
    "gelu and quick gelu": (
        VISION,
        nested(VISION, "vision_config", hidden_act="gelu"),
        "vision_config.hidden_act",
        "error",
    ),
    "silu and swish": alters(LLAMA, "hidden_act", "swish", None),
    "two tanh gelus": differs(BERT, "hidden_act", "gelu_pytorch_tanh", "gelu_new", None),
    "gated": alters(T5, "feed_forward_proj", "gated-gelu", "error"),
    "activation of own code": (
        {**OWN, "ffn_config": {"ffn_act_fn": {"name": "gelu"}}},
        {**OWN, "ffn_config": {"ffn_act_fn": {"name": "silu"}}},
        "ffn_config.ffn_act_fn",
        "error",
    ),
    # Another kind of model.
    "model type": alters(LLAMA, "model_type", "mistral", "error"),
    "copied classes": differs(BERT, "model_type", "roberta", "xlm-roberta", "warning"),
    "model type silent": (OWN, changed(OWN, "model_type"), "model_type", None),
    "task": alters(BERT, "architectures", ["BertForMultipleChoice"], "error"),
    "heads of one task": differs(BERT, "architectures", ["BertForMaskedLM"], ["BertModel"], None),
    "is decoder": alters(BERT, "is_decoder", True, "error"),
    "bidirectional": differs(OWN, "use_bidirectional_attention", False, True, "error"),
    "position embedding": alters(BERT, "position_embedding_type", "relative_key", "error"),
    "partial rotary": alters(LLAMA, "partial_rotary_factor", 0.5, "error"),
    "norm order": differs(OWN, "normalize_before", True, False, "error"),
    "scaled embedding": (
        {"model_type": "bart", "scale_embedding": True},
        {"model_type": "bart"},
        "scale_embedding",
        "error",
    ),
    "multiplier": differs({"model_type": "granite"}, "residual_multiplier", 0.22, 0.5, "error"),
    "experts at work": alters(MOE, "num_experts_per_tok", 1, "error"),
    "weights of experts": differs(OWN, "norm_topk_prob", True, False, "error"),
    "kinds of layers": differs(
        OWN,
        "layer_types",
        ["full_attention", "linear_attention"],
        ["linear_attention", "full_attention"],
        "error",
    ),
    "layers with a window": differs(
        OWN,
        "layer_types",
        ["full_attention", "full_attention"],
        ["full_attention", "sliding_attention"],
        "warning",
    ),
    "attention bias": alters(LLAMA, "attention_bias", True, "error"),
    "classifier pooling": (
        {"model_type": "modernbert", "classifier_pooling": "mean"},
        {"model_type": "modernbert"},
        "classifier_pooling",
        "error",
    ),
    "problem type": differs(
        BERT, "problem_type", "single_label_classification", "multi_label_classification", "error"
    ),
    "problem type silent": differs(
        BERT, "problem_type", "single_label_classification", None, "warning"
    ),
    # Classes that stand for other things.
    "labels in another order": (BERT, labels("positive", "negative"), "id2label", "error"),
    "other labels": (BERT, labels("no", "yes"), "id2label", "error"),
    "labels by default": (BERT, labels("LABEL_0", "LABEL_1"), "id2label", "warning"),
    "labels by number": (BERT, labels("0", "1"), "id2label", "warning"),
    "labels by other numbers": (labels("0", "1"), labels("1", "0"), "id2label", "warning"),
    "no labels": (BERT, changed(BERT, "id2label", "label2id"), "id2label", "warning"),
    "capitals": (BERT, labels("NEGATIVE", "Positive"), "id2label", "warning"),
    "integers as keys": alters(BERT, "id2label", {0: "negative", 1: "positive"}, None),
    "label2id only": (
        changed(BERT, "id2label"),
        changed(BERT, "id2label", label2id={"negative": 1, "positive": 0}),
        "label2id",
        "error",
    ),
    "labels without a head": (
        changed(BERT, architectures=["BertModel"]),
        labels("positive", "negative", architectures=["BertModel"]),
        "id2label",
        "warning",
    ),
    "pooling without a classifier": (
        {**MODERN, "architectures": ["ModernBertModel"], "classifier_pooling": "cls"},
        {**MODERN, "architectures": ["ModernBertModel"], "classifier_pooling": "mean"},
        "classifier_pooling",
        "listed",
    ),
    # What a model goes on working with.
    "rope theta": alters(LLAMA, "rope_theta", 5e5, "warning"),
    "rope theta of transformers 5": (
        changed(LLAMA, rope_theta=5e5),
        changed(LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        "rope_theta",
        "warning",
    ),
    "rope scaling": (
        LLAMA,
        changed(LLAMA, rope_scaling=LINEAR_ROPE),
        "rope_parameters.rope_type",
        "warning",
    ),
    "rope factor": (
        changed(LLAMA, rope_scaling=LINEAR_ROPE),
        changed(LLAMA, rope_scaling={**LINEAR_ROPE, "factor": 4.0}),
        "rope_parameters.factor",
        "warning",
    ),
    "local rope theta": (
        {"model_type": "gemma3_text", "rope_local_base_freq": 1e4},
        {"model_type": "gemma3_text", "rope_local_base_freq": 2e4},
        "rope_parameters.sliding_attention.rope_theta",
        "warning",
    ),
    "positions": alters(LLAMA, "max_position_embeddings", 128, "warning"),
    "eps": alters(LLAMA, "rms_norm_eps", 1e-5, "warning"),
    "layer norm eps": alters(BERT, "layer_norm_eps", 1e-5, "warning"),
    "eps by default": (
        changed(LLAMA, "rms_norm_eps"),
        changed(LLAMA, rms_norm_eps=2e-6),
        "rms_norm_eps",
        "warning",
    ),
    "window": differs({"model_type": "mistral"}, "sliding_window", 4096, None, "warning"),
    "window by default": alters({"model_type": "mistral"}, "sliding_window", None, "warning"),
    "dropout": alters(LLAMA, "attention_dropout", 0.1, "warning"),
    "pdrop": differs({"model_type": "gpt2"}, "embd_pdrop", 0.1, 0.0, "warning"),
    "initialisation": alters(LLAMA, "initializer_range", 0.1, "warning"),
    "soft caps": alters({"model_type": "gemma2"}, "attn_logit_softcapping", None, "warning"),
    "end of sequence": alters(LLAMA, "eos_token_id", 7, "warning"),
    "ends of sequence": alters(LLAMA, "eos_token_id", [2, 7], "warning"),
    "image token": differs({"model_type": "llava"}, "image_token_index", 32000, 32001, "warning"),
    # What versions of transformers write in two ways.
    "kinds of attention, as a text": differs(
        DEBERTA, "pos_att_type", ["p2c", "c2p"], "c2p|p2c", None
    ),
    "other kinds of attention": differs(DEBERTA, "pos_att_type", ["p2c", "c2p"], "p2c", "error"),
    "pattern of windows": (
        {**GEMMA, "layer_types": [*["sliding_attention"] * 5, "full_attention"]},
        {**GEMMA, "sliding_window_pattern": 6},
        "layer_types",
        None,
    ),
    "other pattern of windows": (
        {**GEMMA, "layer_types": [*["sliding_attention"] * 5, "full_attention"]},
        {**GEMMA, "sliding_window_pattern": 3},
        "layer_types",
        "warning",
    ),
    "two patterns of windows": (
        {**GEMMA, "sliding_window_pattern": 6},
        {**GEMMA, "sliding_window_pattern": 3},
        "layer_types",
        "warning",
    ),
    "pattern that begins with a whole view": (
        {**MODERN, "layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"]},
        {**MODERN, "global_attn_every_n_layers": 3},
        "layer_types",
        None,
    ),
    "scores of a cross-encoder": (
        {**BERT, "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
        {**BERT, "sentence_transformers": {"activation_fn": "torch.nn.Identity", "version": "5"}},
        "sentence_transformers.activation_fn",
        None,
    ),
    "other scores of a cross-encoder": (
        {**BERT, "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
        {**BERT, "sentence_transformers": {"activation_fn": "torch.nn.Sigmoid"}},
        "sentence_transformers.activation_fn",
        "warning",
    ),
    "another kind of positions by default": alters(
        BERT, "position_embedding_type", "relative_key", "error"
    ),
    "positions that a class of rotary ones doesn't name": alters(
        {"model_type": "cohere2"}, "position_embedding_type", "rope_gptj", "listed"
    ),
    "positions by default beside rotary ones": alters(
        MODERN, "position_embedding_type", "absolute", None
    ),
    "positions of a class that is not known": alters(
        OWN, "position_embedding_type", "alibi", "warning"
    ),
    "a key that no class reads": alters(
        {"model_type": "gptj"}, "scale_attn_weights", True, "listed"
    ),
    # Layers that share their parameters, and what a convolution steps over.
    "eps rounded to float32": differs(LLAMA, "rms_norm_eps", 1e-05, 9.999999747378752e-06, None),
    "layers": alters(ALBERT, "num_hidden_layers", 4, "error"),
    "layers not said": (
        ALBERT,
        changed(ALBERT, "num_hidden_layers"),
        "num_hidden_layers",
        "warning",
    ),
    "heads of two tasks": alters(BERT, "architectures", ["BertForTokenClassification"], "error"),
    "a classifier's config for a language model": alters(
        LLAMA, "architectures", ["LlamaForSequenceClassification"], "warning"
    ),
    "a bare model": alters(LLAMA, "architectures", ["LlamaModel"], None),
    "strides": alters(SPEECH, "conv_stride", [4, 2], "error"),
    "normalised before": alters(SPEECH, "do_stable_layer_norm", True, "error"),
    # The rest.
    "padding": alters(LLAMA, "pad_token_id", 0, "listed"),
    "unknown key": alters(LLAMA, "something", 1, "listed"),
    "unknown values": alters(OWN, "width", 17, "listed"),
    "unknown part": alters(OWN, "part_config", {"a": 1}, "listed"),
    "dtype": alters(LLAMA, "torch_dtype", "float16", None),
    "cache": alters(LLAMA, "use_cache", False, None),
    "version": alters(LLAMA, "transformers_version", "4.37.2", None),
    "generation": (LLAMA, changed(LLAMA, do_sample=True, top_k=50), "top_k", None),
    "tie": alters(LLAMA, "tie_word_embeddings", True, None),
    "loss": alters(MOE, "router_aux_loss_coef", 0.5, None),
    "quantisation": alters(LLAMA, "quantization_config", {"quant_method": "gptq"}, None),
    "stated default": alters(LLAMA, "attention_bias", False, None),
    "null for a default of none": alters(LLAMA, "rope_scaling", None, None),
    "one number, two types": alters(LLAMA, "rope_theta", 10000, None),
}


@pytest.mark.parametrize("name", PAIRS)
def test_one_key_is_judged(name):
    """In either order; and nothing else is found."""
    one, other, key, verdict = PAIRS[name]
    expected = {} if verdict is None else {key: verdict}
    assert verdicts(one, other) == expected
    assert verdicts(other, one) == expected


def test_difference_names_models_and_values():
    """A difference names models, values and output."""
    named = [
        NamedConfig("org/a", LLAMA),
        NamedConfig("b", changed(LLAMA, rope_theta=5e5)),
        NamedConfig("c", LLAMA),
    ]
    (difference,) = config_differences(named, output=1)
    assert difference.finding == "rope_theta: 10000.0 in org/a and c, 500000.0 in b"
    assert difference.consequence == "the output takes 500000.0"


def test_an_output_that_says_nothing_is_told():
    named = [NamedConfig("a", BERT), NamedConfig("b", {**BERT, "problem_type": "regression"})]
    (difference,) = config_differences(named)
    assert difference.consequence == "the output does not say"


def test_the_odd_one_of_many_is_named():
    configs = [NamedConfig(name, LLAMA) for name in "abcde"]
    configs[3] = NamedConfig("odd", changed(LLAMA, hidden_act="relu"))
    (difference,) = config_differences(configs)
    assert difference.finding == 'hidden_act: "silu" in a, b, c and 1 more, "relu" in odd'


def test_the_list_is_one_line_and_short():
    more = {f"key{number}": number for number in range(20)}
    (difference,) = config_differences(
        [NamedConfig("a", OWN), NamedConfig("b", {**OWN, **more, "key0": "x" * 500})]
    )
    assert "and 14 more keys" in difference.finding
    assert len(difference.finding) < 600
    assert set(more) == {difference.key, *difference.other_keys}


def test_flat_keys_go_to_one_part_of_a_model():
    """As old versions wrote them: RoPE's own key is among them, and both parts may have others."""
    text = {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default"}}
    flat = {"model_type": "llava", **text, "attention_dropout": 0.5}
    parts = {
        "text_config": {"model_type": "llama", **text, "attention_dropout": 0.5},
        "vision_config": {"model_type": "clip_vision_model"},
    }
    nested = {"model_type": "llava", **parts}
    for both in ((flat, nested), (nested, flat)):
        found = config_differences([NamedConfig("a", both[0]), NamedConfig("b", both[1])])
        assert not any(difference.is_refused for difference in found)


def test_only_what_a_config_says_is_told():
    """Of a class that nobody knows; not what RoPE is where a config names no scaling."""
    configs = [NamedConfig("a", {"foo": 1}), NamedConfig("b", {"foo": 1, "rope_theta": 5.0})]
    (found,) = config_differences(configs)
    assert found.key == "rope_theta"
    assert not found.other_keys


def test_many_keys_take_linear_time():
    """Many keys take no longer than their number.

    20,000 of either kind; and a key that patterns could go back in for hours.
    """
    numbers = range(20_000)
    one = {f"a{number}_eps": 1 for number in numbers} | {f"b{number}": 1 for number in numbers}
    other = {f"a{number}_eps": 2 for number in numbers} | {"heads_per_" * 200_000 + "!": 1}
    found = config_differences([NamedConfig("a", one), NamedConfig("b", other)])
    assert len(found) == len(numbers) + 1


def test_models_without_configs_are_silent():
    assert verdicts({}, LLAMA) == verdicts(LLAMA, {}) == verdicts({}, {}) == {}
    assert verdicts({}, LLAMA, changed(LLAMA, hidden_act="relu")) == {"hidden_act": "error"}


STRANGE = [None, [], {}, 10**5000, "x" * 10**5, float("nan"), {"a": {"b": {}}}, [[1]], True]


@pytest.mark.parametrize("number", range(len(STRANGE)))
@pytest.mark.parametrize(
    "key",
    [
        *("model_type", "hidden_act", "rope_scaling", "rope_parameters", "layer_types", "id2label"),
        *("label2id", "architectures", "num_attention_heads", "text_config", "hidden_size"),
        *("num_key_value_heads", "use_sliding_window", "rope_theta"),
    ],
)
def test_strange_values_are_no_error_of_ours(key, number):
    value = STRANGE[number]
    for config in (LLAMA, BERT, VISION):
        verdicts(config, {**config, key: value})
        verdicts({**config, key: value}, {**config, key: value, "a": 1})


def test_table_is_what_transformers_declares():
    """The table is what transformers declares.

    Run `python -m tests.generators.class_defaults` after an update of transformers.
    """
    path = ROOT / "shardmix" / "conventions" / "class_defaults.json"
    names = sample("defaults of config classes", json.loads(path.read_text()), 50)
    code = (
        "import json, sys\n"
        "import tests.generators.class_defaults as t\n"
        "text = t.TARGET.read_text()\n"
        "table = json.loads(text)\n"
        "assert text == t.written(table)\n"
        "assert sorted(table) == sorted(t.CONFIG_MAPPING.keys())\n"
        "names = sys.argv[1:]\n"
        "found = t.class_defaults(names)\n"
        "assert t.written(found) == t.written({name: table[name] for name in names})"
    )
    subprocess.run([sys.executable, "-c", code, *names], check=True, cwd=ROOT)


def test_equal_configs_load_no_table():
    code = (
        "from shardmix.conventions import class_defaults\n"
        "from shardmix.matching import configs as c\n"
        f"config = {json.dumps(json.dumps(LLAMA))}\n"
        "import json\n"
        "named = [c.NamedConfig(name, json.loads(config)) for name in 'ab']\n"
        "assert c.config_differences(named) == []\n"
        "assert class_defaults._table.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
