"""Which parameters an output stores, and from which tensors, when models share them differently."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import shardmix
from shardmix.conventions import declarations, naming
from shardmix.conventions.declarations import declaration_of
from shardmix.conventions.tensor_names import aligned, class_names, without_wrappers
from shardmix.errors import MismatchError
from shardmix.matching.tensors import match_tensors
from shardmix.sources.resolve import open_source

E, H = "model.embed_tokens.weight", "lm_head.weight"
SHARED, ENCODER, DECODER = (
    f"model.{name}.weight" for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
)
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
BART = {"architectures": ["BartForConditionalGeneration"], "model_type": "bart"}
T5 = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
BERT = {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


def save(folder, values, config):
    """Save tensors of one value each: of shape [4, 2], but biases of [4]."""
    folder.mkdir(parents=True)
    tensors = {
        name: np.full((4,) if name.endswith("bias") else (4, 2), value, np.float32)
        for name, value in values.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def merged(tmp_path, *models, weights=(0.5, 0.5), **options):
    """Merge models given as (values, config); return the output's values, config and warnings."""
    folders = [
        save(tmp_path / f"m{number}", values, config)
        for number, (values, config) in enumerate(models)
    ]
    pairs = list(zip(folders, weights, strict=True))
    report = shardmix.merge(pairs, tmp_path / "out", fsync=False, **options)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    values = {name: float(tensor.flat[0]) for name, tensor in tensors.items()}
    return values, json.loads((tmp_path / "out" / "config.json").read_text()), report.warnings


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("one", "other", "expected", "tie"),
    [
        # Tied, and untied: each parameter is a mean, and the config says untied.
        (({E: 1}, LLAMA | TIED), ({E: 3, H: 5}, LLAMA | UNTIED), {E: 2, H: 3}, False),
        # A stored copy counts as stored: it may differ from the embedding.
        (({E: 1}, LLAMA | TIED), ({E: 3, H: 5}, LLAMA | TIED), {E: 2, H: 3}, True),
        (({SHARED: 1}, BART), ({SHARED: 3, H: 3}, BART), {SHARED: 2, H: 2}, None),
        # Untied, nothing is shared: what is read by its own name is stored.
        (
            ({SHARED: 1}, BART),
            ({SHARED: 3, ENCODER: 5, DECODER: 7, H: 9}, BART | UNTIED),
            {SHARED: 2, ENCODER: 3, DECODER: 4, H: 5},
            False,
        ),
        # Written by older versions: untied, but encoder and decoder share all the same.
        (
            ({SHARED: 1}, BART | TIED),
            ({SHARED: 3, H: 9}, BART | UNTIED),
            {SHARED: 2, ENCODER: 2, DECODER: 2, H: 5},
            False,
        ),
        # T5's key means a scale as well, and its class always shares: the key is left alone.
        (
            ({"shared.weight": 1}, T5),
            ({"shared.weight": 3, H: 9}, T5 | TIED),
            {"shared.weight": 2, H: 5},
            ...,
        ),
        # A bias of a masked-LM head is a parameter of its own once the model is untied.
        (
            ({"cls.predictions.bias": 1}, BERT),
            (
                {"cls.predictions.bias": 3, "cls.predictions.decoder.bias": 5},
                BERT | UNTIED,
            ),
            {"cls.predictions.bias": 2, "cls.predictions.decoder.bias": 3},
            False,
        ),
    ],
)
def test_mean_of_each_parameter(tmp_path, one, other, expected, tie, order):
    """Tied, untied, stored and silent models, in both orders: the same tensors, and right ones."""
    values, config, _ = merged(tmp_path, *(one, other)[::order])
    assert values == expected
    if tie is not ...:
        own = (one, other)[::order][0][1].get("tie_word_embeddings")
        assert config.get("tie_word_embeddings") == (own if tie is None else tie)


@pytest.mark.parametrize("order", [1, -1])
def test_one_stored_under_two_names(tmp_path, order):
    """Models that share one tensor and store it by different names: one tensor, the first's."""
    names = (SHARED, DECODER)[::order]
    values, _, _ = merged(tmp_path, ({names[0]: 1}, BART), ({names[1]: 3}, BART))
    assert values == {names[0]: 2}


def test_an_untied_config_from_elsewhere(tmp_path):
    """A donor of the config that ties nothing makes the head be stored, also of tied models."""
    donor = save(tmp_path / "donor", {E: 0, H: 0}, LLAMA | UNTIED)
    models = ({E: 1}, LLAMA | TIED), ({E: 3}, LLAMA | TIED)
    values, config, _ = merged(tmp_path, *models, config_from=str(donor))
    assert values == {E: 2, H: 2}
    assert config["tie_word_embeddings"] is False


def test_scaled_and_unscaled_heads(tmp_path):
    """T5 of the first version scales what its head reads, later ones do not: no mean of both."""
    models = ({"shared.weight": 1}, T5), ({"shared.weight": 3}, T5 | UNTIED)
    with pytest.raises(MismatchError, match=r"scaled by.*--allow-differences tie_word_embeddings"):
        merged(tmp_path / "refused", *models)
    allowed = {"allow_differences": ["tie_word_embeddings"]}
    values, config, warnings = merged(tmp_path / "allowed", *models, **allowed)
    assert (values, config) == ({"shared.weight": 2}, T5)
    assert any("it is scaled" in warning for warning in warnings)
    # As transformers 5 writes what older versions wrote: the same.
    resaved = T5 | TIED | {"scale_decoder_outputs": False}
    values, _, _ = merged(tmp_path / "same", models[1], ({"shared.weight": 1}, resaved))
    assert values == {"shared.weight": 2}


def test_a_head_that_is_missing(tmp_path):
    """An untied model without its head has none to average; silence means the class's default."""
    for number, config in enumerate((LLAMA, LLAMA | UNTIED)):
        with pytest.raises(MismatchError, match=H):
            merged(tmp_path / str(number), ({E: 1}, config), ({E: 1, H: 1}, LLAMA | UNTIED))


def test_nested_config_says_untied(tmp_path):
    """Where a nested config's tie counts for the whole, it is taken back there as well."""
    config = {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl"}
    embedding = "model.language_model.embed_tokens.weight"
    tied = {**config, "text_config": {"tie_word_embeddings": True}}
    untied = {**config, "tie_word_embeddings": False, "text_config": UNTIED}
    values, written, _ = merged(
        tmp_path,
        ({embedding: 1}, tied),
        ({embedding: 3, H: 5}, untied),
        allow_differences=["text_config"],
    )
    assert values == {embedding: 2, H: 3}
    assert written["tie_word_embeddings"] is False
    assert written["text_config"]["tie_word_embeddings"] is False


def test_a_class_outside_of_the_table(tmp_path, monkeypatch):
    """It is asked of transformers; without that, what the answer decides is refused."""
    known = declaration_of(BART)
    content = declarations._table()
    classes = {
        name: entry for name, entry in content.classes.items() if name != BART["architectures"][0]
    }
    fewer = declarations._Table(content.transformers, content.legacy, content.parts, classes)
    monkeypatch.setattr(declarations, "_table", lambda: fewer)
    models = ({SHARED: 1}, BART), ({SHARED: 3, H: 5}, BART)
    values, _, _ = merged(tmp_path / "asked", *models)
    assert values == {SHARED: 2, H: 3}
    asked = declaration_of(BART, tmp_path / "asked" / "m0")
    pairs = {pair for tie in asked.ties for pair in tie.pairs}
    assert pairs == {
        (f"{tie.at}.{one}".strip("."), f"{tie.at}.{other}".strip("."))
        for tie in known.ties
        for one, other in tie.pairs
    }
    monkeypatch.setattr(declarations, "_asked", lambda *_: None)
    with pytest.raises(MismatchError, match="its class is not known here"):
        merged(tmp_path / "refused", *models)
    values, _, _ = merged(tmp_path / "equal", models[1], models[1])
    assert values == {SHARED: 3, H: 5}


def test_a_class_with_code_of_its_own(tmp_path):
    """What brings its own code follows the usual names."""
    own = {"architectures": ["MyLM"], "auto_map": {"AutoModelForCausalLM": "modeling_my.MyLM"}}
    for number, order in enumerate((1, -1)):
        models = ({E: 1}, own | TIED), ({E: 3, H: 5}, own | UNTIED)
        values, config, _ = merged(tmp_path / str(number), *models[::order])
        assert values == {E: 2, H: 3}
        assert config["tie_word_embeddings"] is False


def test_the_outermost_embedding(tmp_path):
    """Of several embeddings that names might mean, the one with the shortest name is the input."""
    inner = "vision.encoder.patches.word_embeddings.weight"
    assert naming.input_embedding(["h.0.weight", inner, "model.word_embeddings.weight"]) == (
        "model.word_embeddings.weight"
    )
    one = {inner: 7, "word_embeddings.weight": 1}
    values, _, _ = merged(tmp_path, (one, {}), ({**one, H: 5}, {}))
    assert values == {inner: 7, "word_embeddings.weight": 1, H: 3}


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "base_model.model."]
)
def test_wrappers_leave_their_names(tmp_path, prefix):
    """torch.compile, DDP and PEFT add to names of tensors; the output has what loaders read."""
    wrapped = {prefix + E: 1, prefix + H: 1}
    values, _, warnings = merged(tmp_path, (wrapped, LLAMA), ({E: 3, H: 5}, LLAMA))
    assert values == {E: 2, H: 3}
    assert any("wrapper" in warning for warning in warnings)


def test_layers_that_an_adapter_changes_stay(tmp_path):
    """A name within PEFT's module around a layer is not the layer's."""
    wrapped = {f"base_model.model.{E}": 1, "base_model.model.lm_head.base_layer.weight": 1}
    with pytest.raises(MismatchError, match="merge_and_unload"):
        merged(tmp_path, (wrapped, LLAMA), ({E: 3, H: 5}, LLAMA))


def test_a_name_with_and_without_wrapper(tmp_path):
    both = {E: 1, f"_orig_mod.{E}": 1}
    with pytest.raises(shardmix.SourceError, match="wrapper"):
        merged(tmp_path, (both, LLAMA), (both, LLAMA))


def test_names_of_older_versions():
    declaration = declaration_of({"architectures": ["Gemma3ForConditionalGeneration"]})
    old = ["language_model.model.norm.weight", "language_model.lm_head.weight", "vision_tower.x"]
    new = ["model.language_model.norm.weight", "lm_head.weight", "model.vision_tower.x"]
    assert list(class_names(old, declaration)) == new
    assert list(class_names(new, declaration)) == new
    assert list(class_names(["a.LayerNorm.gamma", "a.weight_g"], declaration)) == [
        "a.LayerNorm.weight",
        "a.parametrizations.weight.original0",
    ]
    # Two names that would become one stay two.
    clash = ["LayerNorm.gamma", "LayerNorm.weight"]
    assert list(class_names(clash, declaration)) == clash


def test_names_of_the_class_stay():
    """A renaming for older files is not applied to a name that is the class's own."""
    declaration = declaration_of({"architectures": ["AXK1ForCausalLM"], "model_type": "axk1"})
    own = "model.layers.1.mlp.post_mlp_layernorm.weight"
    for name in (own, "model.layers.1.post_mlp_layernorm.weight"):
        assert list(class_names([name], declaration)) == [own]


def test_prefix_of_a_base_model():
    assert aligned(["wte", "lm_head"], {"transformer.wte", "lm_head"}, "transformer") == [
        "transformer.wte",
        "lm_head",
    ]
    assert aligned(["transformer.wte"], {"wte"}, "transformer") == ["wte"]
    assert aligned(["a", "x.a"], {"a"}, "x") == ["a", "x.a"]
    names = ("plain.weight",)
    assert without_wrappers(names) is names


def test_prefix_of_another_tied_name():
    """A shared parameter goes as its model's other names do, though the others have none of it."""
    other = "decoder.embed_tokens.weight"
    assert aligned([f"model.{other}", "model.x"], {"shared.weight", "x"}, "model") == [other, "x"]
    names, shared = [other, "x", "lm_head.weight"], {f"model.{other}", "lm_head.weight"}
    expected = [f"model.{other}", "model.x", "lm_head.weight"]
    assert aligned(names, {"model.x"}, "model", shared) == expected


def test_experts_fused_and_apart(tmp_path):
    """Fused experts lie one after the other: the output has them apart, in either order."""
    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    head = "model.layers.0.block_sparse_moe.experts"
    rng = np.random.default_rng(0)
    shapes = {"w1": (3, 2), "w3": (3, 2), "w2": (2, 3)}
    apart = {
        f"{head}.{number}.{part}.weight": rng.standard_normal(shape).astype(np.float32)
        for number in range(2)
        for part, shape in shapes.items()
    }
    up = rng.standard_normal((2, 6, 2)).astype(np.float32)
    down = rng.standard_normal((2, 2, 3)).astype(np.float32)
    fused = {
        "model.layers.0.mlp.experts.gate_up_proj": up,
        "model.layers.0.mlp.experts.down_proj": down,
    }
    for name, tensors in (("apart", apart), ("fused", fused)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    for first, second in (("apart", "fused"), ("fused", "apart")):
        out = tmp_path / f"{first}-first"
        models = {tmp_path / first: 0.5, tmp_path / second: 0.5}
        report = shardmix.merge(models, out, fsync=False)
        found = load_file(out / "model.safetensors")
        assert found.keys() == apart.keys()
        for number in range(2):
            for part, other in (
                ("w1", up[number, :3]),
                ("w3", up[number, 3:]),
                ("w2", down[number]),
            ):
                name = f"{head}.{number}.{part}.weight"
                np.testing.assert_array_equal(
                    found[name], np.float32(0.5) * apart[name] + np.float32(0.5) * other
                )
        assert any("in one piece" in warning for warning in report.warnings)
        assert shardmix.verify(
            out, recompute=True, sources={"1": tmp_path / first, "2": tmp_path / second}
        ).is_verified


def test_experts_of_other_sizes(tmp_path):
    """Pieces that are not the fused tensor are not taken for it."""
    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    head = "model.layers.0.mlp.experts"
    for name, tensors in (
        ("a", {f"{head}.0.w2.weight": (2, 3), f"{head}.1.w2.weight": (2, 4)}),
        ("b", {f"{head}.down_proj": (2, 2, 3)}),
    ):
        (tmp_path / name).mkdir()
        arrays = {each: np.zeros(shape, np.float32) for each, shape in tensors.items()}
        save_file(arrays, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match="save_pretrained"):
        shardmix.merge({tmp_path / "a": 0.5, tmp_path / "b": 0.5}, tmp_path / "out")


def test_equal_models_read_no_table(tmp_path, monkeypatch):
    """Models that agree in names and in what they say of ties need no table."""
    monkeypatch.setattr(declarations, "_table", lambda: pytest.fail("the table was read"))
    folders = [save(tmp_path / name, {E: 1, H: 2}, LLAMA | UNTIED) for name in "ab"]
    matched = match_tensors([open_source(str(folder)) for folder in folders], LLAMA | UNTIED)
    assert matched.names == (H, E) or matched.names == (E, H)


@pytest.mark.parametrize("order", [1, -1])
def test_untied_under_older_names(tmp_path, order):
    """A config is untied, too, if files have other names for the head than the class."""
    config = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}
    names = ("gpt_neox.embed_in.weight", "embed_out.weight")
    models = (dict.fromkeys(names, 1), config | TIED), (dict.fromkeys(names, 3), config | UNTIED)
    values, written, _ = merged(tmp_path, *models[::order])
    assert values == dict.fromkeys(names, 2)
    assert written["tie_word_embeddings"] is False
