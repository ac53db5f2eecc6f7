import pytest
import torch

from shardmix.errors import MismatchError, SourceError
from shardmix.matching.tensors import check_mergeable, match_tensors
from shardmix.sources.resolve import open_source
from tests.support.models import save_model

TIED = {"model_type": "llama", "tie_word_embeddings": True}
UNTIED = {"model_type": "llama", "tie_word_embeddings": False}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def opened(tmp_path, *models):
    checkpoints = []
    for number, (names, config) in enumerate(models):
        tensors = {
            name: spec if isinstance(spec, torch.Tensor) else torch.zeros(spec)
            for name, spec in names.items()
        }
        folder = save_model(tmp_path / f"m{number}", tensors, config=config)
        checkpoints.append(open_source(str(folder)))
    return checkpoints


def matched_sources(checkpoints, out_config=None):
    """Return output name → the stored name in each model."""
    matched = match_tensors(checkpoints, {} if out_config is None else out_config)
    return matched, {
        name: tuple(
            checkpoint.tensors.names[rows[index]]
            for checkpoint, rows in zip(checkpoints, matched.rows, strict=True)
        )
        for index, name in enumerate(matched.names)
    }


def test_names_match_in_any_order(tmp_path):
    """The same names match, whatever their order."""
    checkpoints = opened(
        tmp_path, ({"a": (2,), "b": (3,)}, UNTIED), ({"b": (3,), "a": (2,)}, UNTIED)
    )
    _, sources = matched_sources(checkpoints)
    assert sources == {"a": ("a", "a"), "b": ("b", "b")}


def test_differing_names_list_a_few_of_each(tmp_path):
    """Tensor sets that differ list the first few of each side."""
    many = {f"extra.{number}": (1,) for number in range(5)}
    checkpoints = opened(tmp_path, ({"a": (2,), **many}, {}), ({"a": (2,), "other": (1,)}, {}))
    with pytest.raises(MismatchError) as caught:
        match_tensors(checkpoints, out_config={})
    message = str(caught.value)
    assert f"only in {tmp_path / 'm0'}: extra.0, extra.1, extra.2 and 2 more" in message
    assert f"only in {tmp_path / 'm1'}: other;" in message


@pytest.mark.parametrize(
    "names",
    [
        {"a.weight": (2,), "a.lora_A.default.weight": (2,)},
        {"a.base_layer.weight": (2,)},
        {"base_model.model.a.base_layer.weight": (2,)},
        {"a.modules_to_save.default.weight": (2,)},
    ],
)
def test_an_unmerged_adapter_has_its_own_way(tmp_path, names):
    """To load and save it in transformers would lead nowhere."""
    for models in (names, {"a.weight": (2,)}), ({"a.weight": (2,)}, names):
        checkpoints = opened(tmp_path, *((model, UNTIED) for model in models))
        with pytest.raises(MismatchError, match="merge_and_unload") as caught:
            match_tensors(checkpoints, out_config={})
        assert "one class of transformers" not in str(caught.value)


def test_a_third_model_that_differs_is_found(tmp_path):
    checkpoints = opened(tmp_path, ({"a": (2,)}, {}), ({"a": (2,)}, {}), ({"b": (2,)}, {}))
    with pytest.raises(MismatchError, match=r"only in .*m2: b"):
        match_tensors(checkpoints, out_config={})


def test_differing_shapes_show_both_models(tmp_path):
    """Shapes that differ are shown with both models."""
    checkpoints = opened(tmp_path, ({"a": (2, 3)}, {}), ({"a": (3, 2)}, {}))
    with pytest.raises(MismatchError) as caught:
        match_tensors(checkpoints, out_config={})
    message = str(caught.value)
    assert f"a: [2, 3] in {tmp_path / 'm0'}, [3, 2] in {tmp_path / 'm1'}" in message
    assert "vocabulary" not in message


def test_a_resized_vocabulary_is_recognised(tmp_path):
    checkpoints = opened(tmp_path, ({EMBEDDING: (32, 4)}, TIED), ({EMBEDDING: (33, 4)}, TIED))
    with pytest.raises(MismatchError, match="--tokenizer-source base or union"):
        match_tensors(checkpoints, out_config=TIED)


def test_float_beside_integer_is_refused(tmp_path):
    """Floats and integers of one name are refused."""
    integers = torch.zeros(2, dtype=torch.int64)
    checkpoints = opened(tmp_path, ({"a": (2,)}, {}), ({"a": integers}, {}))
    with pytest.raises(MismatchError, match=r"a: F32 in .*I64"):
        match_tensors(checkpoints, out_config={})


def test_stored_copy_counts_as_the_head(tmp_path):
    """A stored copy of a tied head counts as the head of a model without it."""
    both, one = {EMBEDDING: (32, 4), HEAD: (32, 4)}, {EMBEDDING: (32, 4)}
    matched, sources = matched_sources(opened(tmp_path, (both, TIED), (one, TIED)), out_config=TIED)
    assert sources[HEAD] == (HEAD, EMBEDDING)
    assert not matched.untied


def test_a_stored_copy_is_not_dropped(tmp_path):
    """A head that one model stores beside its embedding may differ from it: it counts."""
    both, one = {EMBEDDING: (32, 4), HEAD: (32, 4)}, {EMBEDDING: (32, 4)}
    matched, sources = matched_sources(opened(tmp_path, (one, TIED), (both, TIED)), out_config=TIED)
    assert sources == {EMBEDDING: (EMBEDDING, EMBEDDING), HEAD: (EMBEDDING, HEAD)}
    assert not matched.untied


@pytest.mark.parametrize("tied_first", [True, False])
def test_tied_and_untied_give_untied(tmp_path, tied_first):
    """A tied and an untied model give an untied one."""
    tied = ({EMBEDDING: (32, 4)}, TIED)
    untied = ({EMBEDDING: (32, 4), HEAD: (32, 4)}, UNTIED)
    order = (tied, untied) if tied_first else (untied, tied)
    matched, sources = matched_sources(
        opened(tmp_path, *order), out_config=TIED if tied_first else UNTIED
    )
    assert sources[HEAD] == ((EMBEDDING, HEAD) if tied_first else (HEAD, EMBEDDING))
    assert matched.untied == (("",) if tied_first else ())
    assert any(HEAD in note for note in matched.notes)


def test_missing_untied_head_is_an_error(tmp_path):
    """A missing head of a model that does not tie is an error."""
    both, one = {EMBEDDING: (32, 4), HEAD: (32, 4)}, {EMBEDDING: (32, 4)}
    with pytest.raises(MismatchError, match=HEAD):
        match_tensors(opened(tmp_path, (both, UNTIED), (one, UNTIED)), out_config=UNTIED)


def test_encoder_decoder_copies_are_shared(tmp_path):
    """Copies of an encoder-decoder embedding are the shared one."""
    copies = {"encoder.embed_tokens.weight": (9, 4), "decoder.embed_tokens.weight": (9, 4)}
    full, lean = {"shared.weight": (9, 4), **copies}, {"shared.weight": (9, 4)}
    config = {"model_type": "t5", "tie_word_embeddings": False}
    _, sources = matched_sources(opened(tmp_path, (full, config), (lean, config)))
    assert sources["encoder.embed_tokens.weight"] == (
        "encoder.embed_tokens.weight",
        "shared.weight",
    )
    _, sources = matched_sources(opened(tmp_path, (lean, config), (full, config)))
    assert sources["encoder.embed_tokens.weight"] == (
        "shared.weight",
        "encoder.embed_tokens.weight",
    )


def test_tied_bias_is_found_beside_its_head(tmp_path):
    full = {"cls.predictions.bias": (9,), "cls.predictions.decoder.bias": (9,)}
    lean = {"cls.predictions.bias": (9,)}
    config = {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
    _, sources = matched_sources(opened(tmp_path, (full, config), (lean, config)))
    assert sources["cls.predictions.decoder.bias"][1] == "cls.predictions.bias"


@pytest.mark.parametrize(
    "buffer",
    [
        "embeddings.position_ids",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
        "transformer.h.0.attn.masked_bias",
    ],
)
def test_computed_buffers_are_left_out(tmp_path, buffer):
    """Buffers that transformers computes are left out if not all have them."""
    for order in (0, 1):
        models = [({"a": (2,), buffer: (3,)}, {}), ({"a": (2,)}, {})]
        matched, sources = matched_sources(opened(tmp_path / str(order), *models[:: 1 - 2 * order]))
        assert set(sources) == {"a"}
        assert any(buffer in note for note in matched.notes)
    matched, sources = matched_sources(opened(tmp_path / "all", models[0], models[0]))
    assert buffer in sources
    assert not matched.notes


def test_inner_layers_are_no_heads(tmp_path):
    """Inner layers named like an output head are no heads."""
    inner = {"blocks.0.proj_out.weight": (4, 4), EMBEDDING: (32, 4)}
    checkpoints = opened(tmp_path, (inner, TIED), (inner, UNTIED))
    matched, sources = matched_sources(checkpoints, out_config=TIED)
    assert set(sources) == set(inner)
    assert not matched.untied


def test_silent_config_is_told_of_untied(tmp_path):
    """A config source that is silent about ties is told if models are untied."""
    both = {EMBEDDING: (32, 4), HEAD: (32, 4)}
    matched, _ = matched_sources(opened(tmp_path, (both, UNTIED), (both, UNTIED)), out_config={})
    assert matched.untied


def test_attention_bias_parameter_stays(tmp_path):
    """An attention bias that is a parameter is not left out."""
    name = "model.layers.0.attn.bias"
    with pytest.raises(MismatchError, match=name):
        match_tensors(
            opened(tmp_path, ({"a": (2,), name: (3,)}, {}), ({"a": (2,)}, {})), out_config={}
        )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_a_matrix_of_codes_is_refused(tmp_path, dtype):
    """Two axes are enough; a vector of such integers is none, nor a matrix of int64 or booleans."""
    codes = torch.ones(2, 3).to(dtype)
    (model,) = opened(tmp_path / "codes", ({"layer.codes": codes}, {}))
    with pytest.raises(SourceError, match=r"layer.codes, a mark of quantised weights"):
        check_mergeable(model)
    for number, other in enumerate([codes[0], codes.long(), codes.bool()]):
        (model,) = opened(tmp_path / str(number), ({"layer.codes": other}, {}))
        check_mergeable(model)
