"""Quantised models are decoded while they are read, to the values that torch gives them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import shardmix
from shardmix.conventions.naming import declared_quantisation
from shardmix.errors import SourceError
from shardmix.scoring import score
from shardmix.sources import quantised_reader
from shardmix.sources.resolve import open_source
from tests.support.cut_off import cut_off, folder_bytes
from tests.support.fresh_process import merge_report
from tests.support.language_models import TEXTS, save_language_model
from tests.support.models import random_tensor, save_model
from tests.support.quantised_models import COMPRESSED, FORMS, FP8, mxfp4_experts
from tests.support.sampling import examples

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["norm"]}
BY_NAME = {form.__name__: form for form in FORMS}


def config_of(quantisation, **more):
    return {"model_type": "test", "quantization_config": quantisation, **more}


def read(source, name, start=0, stop=None):
    """Return the bits of a tensor's elements."""
    row = source.tensors.names.index(name)
    stop = source.tensors[row].num_elements if stop is None else stop
    buffer = bytearray(4 * (stop - start))
    reader = source.open_reader()
    reader.prefetch(row, start, stop - start)
    reader.read(row, start, memoryview(buffer))
    reader.close()
    return np.frombuffer(buffer, np.uint32)


def check_values(folder, name, values, parts=((0, 1), (0.3, 0.31), (0.1, 0.9))):
    source = open_source(str(folder))
    row = source.tensors.names.index(name)
    assert source.tensors.shapes[row] == tuple(values.shape)
    bits = values.contiguous().numpy().reshape(-1).view(np.uint32)
    for first, last in parts:
        start, stop = int(first * len(bits)), int(last * len(bits))
        assert (read(source, name, start, stop) == bits[start:stop]).all()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("shape", [(300, 272), (1, 70_000), (600, 32)], ids=str)
def test_values_are_those_of_torch(tmp_path, form, shape):
    """Every bit of float32, of whole tensors and parts, with ragged blocks in either axis."""
    stored, values = form(shape, torch.Generator().manual_seed(1))
    tensors = {f"layer.{name}": tensor for name, tensor in stored.items()}
    folder = save_model(tmp_path, {**tensors, "norm": torch.ones(3)}, config=config_of(FORMS[form]))
    check_values(folder, "layer.weight", values)
    assert set(open_source(str(folder)).tensors.names) == {"layer.weight", "norm"}


@settings(max_examples=examples(15), deadline=None)
@given(
    form=st.sampled_from(list(FORMS)),
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    parts=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted), max_size=3),
    seed=st.integers(0, 99),
)
def test_any_shape_is_decoded(tmp_path_factory, form, shape, parts, seed):
    stored, values = form(shape, torch.Generator().manual_seed(seed))
    tensors = {f"layer.{name}": tensor for name, tensor in stored.items()}
    quantisation = dict(FORMS[form])
    if form.__name__.startswith("int"):
        bits = {"int4": 4, "int3": 3, "int8": 8}[form.__name__[:4]]
        quantisation["config_groups"] = {"g": {"weights": {"num_bits": bits, "type": "int"}}}
    folder = save_model(tmp_path_factory.mktemp("m"), tensors, config=config_of(quantisation))
    check_values(folder, "layer.weight", values, [(0, 1), *parts])


@pytest.mark.parametrize("shape", [(2, 40, 96), (1, 3000, 64), (3, 7, 32)], ids=str)
@pytest.mark.parametrize("held", [True, False], ids=["held", "in parts"])
def test_experts_are_transposed(tmp_path, monkeypatch, shape, held):
    """gpt-oss' experts have the names and shapes of the unquantised model."""
    if not held:
        monkeypatch.setattr(quantised_reader, "EXPERTS_NBYTES", 8)
    stored, values = mxfp4_experts(shape, torch.Generator().manual_seed(2))
    tensors = {f"experts.down_proj_{name}": tensor for name, tensor in stored.items()}
    tensors["experts.down_proj_bias"] = torch.ones(3)
    folder = save_model(tmp_path, tensors, config=config_of(MXFP4))
    check_values(folder, "experts.down_proj", values, [(0, 1), (0.3, 0.31), (0.013, 0.87)])
    assert len(open_source(str(folder)).tensors) == 2


def test_fused_experts_have_blocks_each(tmp_path):
    g = torch.Generator().manual_seed(3)
    stored, values = next(iter(FORMS))((3, 200, 150), g)
    tensors = {"e.gate": stored["weight"], "e.gate_scale_inv": stored["weight_scale_inv"]}
    check_values(save_model(tmp_path, tensors, config=config_of(FP8)), "e.gate", values)


def test_committed_values(tmp_path):
    """Values worked out by hand: the largest, the least, a negative zero, NaN; each times 0.5."""
    codes = torch.tensor([[0x7E, 0x01, 0x80, 0x7F, 0x38, 0xC0]], dtype=torch.uint8)
    tensors = {"w.weight": codes.view(torch.float8_e4m3fn), "w.weight_scale": torch.tensor(0.5)}
    source = open_source(str(save_model(tmp_path, tensors, config=config_of(COMPRESSED))))
    values = read(source, "w.weight").view(np.float32)
    assert values[[0, 1, 4, 5]].tolist() == [224.0, 2.0**-10, 0.5, -1.0]
    assert np.isnan(values[3])
    assert np.signbit(values[2])


def test_experts_are_those_of_transformers(tmp_path):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4", reason="needs transformers")
    stored, _ = mxfp4_experts((2, 40, 96), torch.Generator().manual_seed(2))
    values = mxfp4.convert_moe_packed_tensors(*stored.values(), dtype=torch.float32)
    tensors = {f"up_{name}": tensor for name, tensor in stored.items()}
    check_values(save_model(tmp_path, tensors, config=config_of(MXFP4)), "up", values)


def test_blocks_are_those_of_transformers(tmp_path):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="needs it")
    stored, _ = BY_NAME["fp8_blocks"]((384, 256), torch.Generator().manual_seed(2))
    decoder = fp8.Fp8Dequantize(SimpleNamespace())
    values = decoder._dequantize_one(*stored.values(), output_dtype=torch.float32)
    tensors = {f"m.{name}": tensor for name, tensor in stored.items()}
    check_values(save_model(tmp_path, tensors, config=config_of(FP8)), "m.weight", values)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_are_compressed_tensors(tmp_path, bits, symmetric):
    """What compressed-tensors itself packs, as it decodes it itself."""
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = {"num_bits": bits, "type": "int", "group_size": 32, "symmetric": symmetric}
    args = QuantizationArgs(strategy="group", **weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    g = torch.Generator().manual_seed(bits)
    half = 1 << (bits - 1)
    scale = (torch.rand((40, 3), generator=g) + 0.1).bfloat16()
    weight = torch.randn((40, 96), generator=g)
    given = {"weight": weight.bfloat16(), "weight_scale": scale}
    if not symmetric:
        points = torch.randint(-half, half, (40, 3), generator=g)
        given["weight_zero_point"] = points.to(torch.int8)
    stored = compressor.compress(given, scheme)
    wide = {**stored, "weight_scale": scale.float()}
    tensors = {f"m.{name}": tensor for name, tensor in stored.items()}
    config = config_of({**COMPRESSED, "config_groups": {"g": {"weights": weights}}})
    folder = save_model(tmp_path, tensors, config=config)
    check_values(folder, "m.weight", compressor.decompress(wide, scheme)["weight"])


def test_nvfp4_is_compressed_tensors(tmp_path):
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    stored, _ = BY_NAME["nvfp4"]((64, 160), torch.Generator().manual_seed(2))
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    values = dequantize(
        unpack_fp4_from_uint8(stored["weight_packed"], 64, 160),
        stored["weight_scale"].bfloat16(),
        args=args,
        global_scale=stored["weight_global_scale"],
        dtype=torch.float32,
    )
    tensors = {f"m.{name}": tensor for name, tensor in stored.items()}
    check_values(save_model(tmp_path, tensors, config=config_of(COMPRESSED)), "m.weight", values)


@pytest.fixture
def models(tmp_path):
    """Return pairs of which one is quantised, and the same with that one decoded to float32."""
    g = torch.Generator().manual_seed(5)
    names = [f"layer{number}.weight" for number in range(len(FORMS) + 1)]
    stored, decoded = {}, {}
    for name, form in zip(names, FORMS, strict=False):
        parts, decoded[name] = form((304, 1024), g)
        stored |= {f"{name.removesuffix('weight')}{part}": x for part, x in parts.items()}
    # A layer that is not quantised, experts, and a norm.
    stored[names[-1]] = decoded[names[-1]] = random_tensor((300, 500), torch.bfloat16)
    parts, decoded["experts.up"] = mxfp4_experts((2, 200, 640), g)
    stored |= {f"experts.up_{part}": x for part, x in parts.items()}
    stored["norm"] = decoded["norm"] = random_tensor((77,), torch.bfloat16)
    decoded = {name: values.contiguous() for name, values in decoded.items()}
    quantisation = {**COMPRESSED, "weight_block_size": [128, 128]}
    sibling = {
        name: random_tensor(values.shape, torch.bfloat16, seed=row)
        for row, (name, values) in enumerate(decoded.items())
    }
    config = {"model_type": "test", "torch_dtype": "bfloat16"}
    coded = save_model(
        tmp_path / "coded",
        stored,
        config={**config, "quantization_config": quantisation},
    )
    plain = save_model(tmp_path / "plain", decoded, config=config)
    other = save_model(tmp_path / "other", sibling, config=config)
    return [(coded, 0.6), (other, 0.4)], [(plain, 0.6), (other, 0.4)]


def weights_of(folder):
    return {name: data for name, data in folder_bytes(folder).items() if "safetensors" in name}


@pytest.mark.parametrize(
    "way",
    [{"io": "pread"}, {"io": "mmap"}, {"backend": "torch"}, {"workers": 3}],
    ids=str,
)
@pytest.mark.parametrize("is_first", [False, True], ids=["second", "first"])
def test_a_merge_is_that_of_decoded_models(tmp_path, models, way, is_first):
    pairs, plain = (each if is_first else each[::-1] for each in models)
    shardmix.merge(pairs, tmp_path / "out", **way)
    shardmix.merge(plain, tmp_path / "expected", dtype="bfloat16")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "expected")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert declared_quantisation(config) is None


@pytest.mark.parametrize("method", ["task_arithmetic", "slerp"])
def test_other_methods_read_values(tmp_path, models, method):
    for pairs, out, dtype in zip(models, ("out", "expected"), ("keep", "bfloat16"), strict=True):
        if method == "slerp":
            merged = [path for path, _ in pairs]
            options = {"parameters": {"t": 0.3}, "base_model": merged[0]}
        else:
            merged, options = pairs[:1], {"base_model": pairs[1][0]}
        shardmix.merge(merged, tmp_path / out, method=method, dtype=dtype, **options)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "expected")


def test_cut_off_merges_go_on_and_verify(tmp_path, models):
    pairs, plain = models
    cut_off(pairs, tmp_path / "out", num_leaves=1, record_paths=True)
    assert shardmix.merge(pairs, tmp_path / "out", record_paths=True).bytes_kept > 0
    shardmix.merge(plain, tmp_path / "expected", dtype="bfloat16")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "expected")
    assert shardmix.verify(tmp_path / "out", recompute=True).is_verified


def test_block_size_is_part_of_the_digest(tmp_path):
    """The same files by another block size are another merge."""
    stored, _ = next(iter(FORMS))((256, 256), torch.Generator())
    tensors = {f"a.{name}": tensor for name, tensor in stored.items()}
    digests = set()
    for size in ([128, 128], [129, 129]):
        folder = save_model(tmp_path, tensors, config=config_of({**FP8, "weight_block_size": size}))
        digests.add(shardmix.plan_merge([(folder, 0.5), (folder, 0.5)]).digest())
    assert len(digests) == 2


def test_inspect_shows_the_decoded_model(models):
    report = shardmix.inspect(models[0][0][0])
    assert set(report.dtypes) == {"F32", "BF16"}
    assert report.num_tensors == len(FORMS) + 3


def test_quantised_config_source_is_cleaned(tmp_path, models):
    """The model that gives the config may be one of those that are decoded."""
    pairs, _ = models
    shardmix.merge(pairs[::-1], tmp_path / "out", config_from=pairs[0][0])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert declared_quantisation(config) is None


def test_files_on_a_quantisation_stay_behind(tmp_path, models):
    coded = models[0][0][0]
    (coded / "hf_quant_config.json").write_text("{}")
    shardmix.merge(models[0], tmp_path / "out")
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


@pytest.mark.parametrize("stated", ["float16", "float32", "float8_e4m3fn", None])
def test_outputs_keep_the_config_s_dtype(tmp_path, stated):
    """Without a float of 16 or 32 bits in the config it is bfloat16."""
    stored, _ = next(iter(FORMS))((130, 20), torch.Generator())
    tensors = {f"a.{name}": tensor for name, tensor in stored.items()}
    folder = save_model(tmp_path / "m", tensors, config=config_of(FP8, torch_dtype=stated))
    plan = shardmix.plan_merge([(folder, 0.5), (folder, 0.5)])
    wanted = {"float16": "F16", "float32": "F32"}.get(stated, "BF16")
    assert plan.tensor_dtype("a.weight") == wanted


def test_peak_is_within_the_projection(tmp_path):
    """In a fresh process, of a tensor much larger than a chunk."""
    g = torch.Generator().manual_seed(6)
    stored, _ = next(iter(FORMS))((9_000, 8_192), g)
    parts, _ = mxfp4_experts((4, 4_000, 2_048), g)
    tensors = {f"a.{name}": x for name, x in stored.items()}
    tensors |= {f"e.up_{name}": x for name, x in parts.items()}
    folder = save_model(tmp_path / "m", tensors, config=config_of({**FP8}))
    report = merge_report(f"{folder}=0.5", f"{folder}=0.5", "-o", tmp_path / "out", "--no-fsync")
    assert report["peak_rss_bytes"] <= report["projected_peak_bytes"]


def test_decoded_models_are_scored(tmp_path):
    """The losses are those of the model that is decoded on the disk."""
    plain = save_language_model("llama", tmp_path / "plain")
    coded = save_language_model("llama", tmp_path / "coded")
    index = json.loads((plain / "model.safetensors.index.json").read_text())
    weight_map = dict(index["weight_map"])
    for path in sorted(coded.glob("*.safetensors")):
        tensors, stored = load_file(path), {}
        for name, x in tensors.items():
            if "proj" not in name:
                stored[name] = x
                continue
            scale = x.abs().max() / 448
            stored[name] = (x / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale"] = scale
            tensors[name] = stored[name].float() * scale
            weight_map[f"{name}_scale"] = path.name
        save_file(stored, path, metadata={"format": "pt"})
        save_file(tensors, plain / path.name, metadata={"format": "pt"})
    (coded / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    config = json.loads((coded / "config.json").read_text())
    config["quantization_config"] = COMPRESSED
    (coded / "config.json").write_text(json.dumps(config))
    report = score([plain, coded], "decoder", TEXTS, max_memory="4GiB")
    assert report.losses[0] == report.losses[1]


def spoilt(tmp_path, form, change, quantisation=None):
    """Return the message that refuses a quantised model, once its tensors are changed."""
    stored, _ = BY_NAME[form]((256, 256), torch.Generator().manual_seed(4))
    tensors = {f"m.{name}": tensor for name, tensor in stored.items()}
    if form == "fp8_blocks":
        tensors["norm"] = torch.ones(4)
    change(tensors)
    config = config_of(FORMS[BY_NAME[form]] if quantisation is None else quantisation)
    folder = save_model(
        tmp_path, {name: x.contiguous() for name, x in tensors.items()}, config=config
    )
    with pytest.raises(SourceError) as refused:
        shardmix.plan_merge([(folder, 0.5), (folder, 0.5)])
    return str(refused.value)


def without(name):
    return lambda tensors: tensors.pop(f"m.{name}")


def instead(name, tensor):
    return lambda tensors: tensors.__setitem__(f"m.{name}", tensor)


def nothing(tensors):
    pass


def declared(**weights):
    return {**COMPRESSED, "config_groups": {"g": {"weights": {"type": "int", **weights}}}}


def blocks(size):
    return {"quant_method": "fp8", "weight_block_size": size}


SPOILT = {
    "scales of two rows too many": ("fp8_blocks", instead("weight_scale_inv", torch.ones(4, 2))),
    "scales transposed": ("fp8_channels", instead("weight_scale", torch.ones(1, 9))),
    "scales of three axes": ("fp8_blocks", instead("weight_scale_inv", torch.ones(2, 2, 2))),
    "scales that are none": ("fp8_blocks", instead("weight_scale_inv", torch.ones(0))),
    "scales in I64": ("fp8_blocks", instead("weight_scale_inv", torch.ones(2, 2).long())),
    "scales twice": ("fp8_blocks", instead("weight_scale", torch.ones(2, 2))),
    "codes without scales": ("fp8_blocks", without("weight_scale_inv")),
    "scales without codes": ("fp8_blocks", without("weight")),
    "scales beside floats": ("fp8_blocks", instead("weight", torch.ones(256, 256))),
    "other codes without scales": (
        "fp8_blocks",
        instead("b", torch.ones(4, 4).to(torch.float8_e4m3fn)),
    ),
    "scales of another's codes": ("fp8_blocks", instead("other.weight_scale", torch.ones(2))),
    "codes of one axis": ("fp8_blocks", instead("weight", torch.ones(8).to(torch.float8_e4m3fn))),
    "a packed weight without scales": ("int4_groups", without("weight_scale")),
    "a packed weight without shape": ("int4_groups", without("weight_shape")),
    "a shape of other rows": ("int4_groups", instead("weight_shape", torch.tensor([255, 256]))),
    "a shape of more columns": ("int4_groups", instead("weight_shape", torch.tensor([256, 9999]))),
    "a negative shape": ("int4_groups", instead("weight_shape", torch.tensor([256, -1]))),
    "a vast shape": ("int4_groups", instead("weight_shape", torch.tensor([256, 1 << 62]))),
    "a shape of floats": ("int4_groups", instead("weight_shape", torch.ones(2))),
    "a shape of one number": ("int4_groups", instead("weight_shape", torch.tensor([256]))),
    "a shape of a million axes": (
        "int4_groups",
        instead("weight_shape", torch.ones(1_000_000).long()),
    ),
    "zero points of other rows": (
        "int4_groups",
        instead("weight_zero_point", torch.zeros(31, 8).int()),
    ),
    "zero points of a wide dtype": (
        "int4_groups",
        instead("weight_zero_point", torch.zeros(256, 8).long()),
    ),
    "groups that do not divide": ("int4_groups", instead("weight_scale", torch.ones(256, 7))),
    "an order of too few": ("int4_ordered", instead("weight_g_idx", torch.zeros(9).int())),
    "an order of floats": ("int4_ordered", instead("weight_g_idx", torch.zeros(256))),
    "NVFP4 without scales": ("nvfp4", without("weight_scale")),
    "NVFP4 without a tensor's scale": ("nvfp4", without("weight_global_scale")),
    "NVFP4 with two of them": ("nvfp4", instead("weight_global_scale", torch.ones(2))),
    "NVFP4 with scales by 32": (
        "nvfp4",
        instead("weight_scale", torch.ones(256, 8).to(torch.float8_e4m3fn)),
    ),
    "NVFP4 with scales in F32": ("nvfp4", instead("weight_scale", torch.ones(256, 16))),
    "MXFP4 with scales by 16": (
        "mxfp4_packed",
        instead("weight_scale", torch.ones(256, 16).to(torch.uint8)),
    ),
    "FP4 that 32 does not divide": (
        "mxfp4_packed",
        instead("weight_packed", torch.zeros(256, 124).to(torch.uint8)),
    ),
    "a tensor in two forms": ("int4_groups", instead("weight", torch.ones(256, 256))),
    "blocks of bytes without scales": (
        "fp8_blocks",
        instead("up_blocks", torch.zeros(1, 2, 3, 16).to(torch.uint8)),
    ),
    "experts of 15 bytes": (
        "fp8_blocks",
        lambda tensors: tensors.update(
            up_blocks=torch.zeros(1, 2, 3, 15).to(torch.uint8),
            up_scales=torch.zeros(1, 2, 3).to(torch.uint8),
        ),
    ),
    "experts with scales of another": (
        "fp8_blocks",
        lambda tensors: tensors.update(
            up_blocks=torch.zeros(1, 2, 3, 16).to(torch.uint8),
            up_scales=torch.zeros(1, 3, 2).to(torch.uint8),
        ),
    ),
}
DECLARED = {
    "no block size": ("fp8_blocks", {"quant_method": "fp8"}),
    "a block of 0": ("fp8_blocks", blocks([0, 128])),
    "a negative block": ("fp8_blocks", blocks([128, -128])),
    "a block of words": ("fp8_blocks", blocks(["128", "128"])),
    "a block of one": ("fp8_blocks", blocks([128])),
    "a block of a number": ("fp8_blocks", blocks(128)),
    "a vast block": ("fp8_blocks", blocks([1 << 70, 128])),
    "a block that is true": ("fp8_blocks", blocks([True, True])),
    "a block of another size": ("fp8_blocks", blocks([64, 64])),
    "other bits": ("int4_groups", declared(num_bits=5)),
    "bits that are none": ("int4_groups", declared(num_bits=0)),
    "groups of another size": ("int4_groups", declared(num_bits=4, group_size=64)),
    "groups of -7": ("int4_groups", declared(num_bits=4, group_size=-7)),
    "zero points that are missing": ("int8_packed", declared(num_bits=8, symmetric=False)),
    "transforms": ("int4_groups", {**COMPRESSED, "transform_config": {"config_groups": {}}}),
}
METHODS = ("gptq", "awq", "bitsandbytes", "hqq", "quanto", "aqlm", "exl2", "gguf", "torchao", "new")


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_not_whole_is_refused(tmp_path, name):
    """One line says what does not fit, before a weight is read."""
    message = spoilt(tmp_path, *SPOILT[name])
    assert message.startswith(f"{tmp_path}: ")
    assert message.isprintable()
    assert len(message) < 1_000


@pytest.mark.parametrize("name", DECLARED)
def test_wrong_declarations_are_refused(tmp_path, name):
    form, quantisation = DECLARED[name]
    message = spoilt(tmp_path, form, nothing, quantisation)
    assert message.startswith(f"{tmp_path}: ")
    assert (
        "config.json" in message
        or "blocks of" in message
        or "bits" in message
        or ("groups" in message)
    )


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_are_refused_by_name(tmp_path, method):
    message = spoilt(tmp_path, "fp8_blocks", nothing, {"quant_method": method})
    assert f"is quantised ({method}, in config.json)" in message
    assert "merge the unquantised checkpoint" in message


def test_an_order_beyond_groups_is_refused(tmp_path):
    """It is data, so it is found when it is read, with the tensors named."""
    stored, _ = BY_NAME["int4_ordered"]((64, 64), torch.Generator())
    stored["weight_g_idx"][5] = 2
    tensors = {f"m.{name}": tensor for name, tensor in stored.items()}
    folder = save_model(tmp_path / "m", tensors, config=config_of(COMPRESSED))
    with pytest.raises(SourceError, match=r"m.weight_g_idx names groups of m.weight .* it has 2"):
        shardmix.merge([(folder, 0.5), (folder, 0.5)], tmp_path / "out")


def test_scales_of_nan_are_told(tmp_path):
    """They decode to NaN, and the merge is refused as one of NaN is."""
    stored, _ = BY_NAME["fp8_tensor"]((64, 64), torch.Generator())
    stored["weight_scale"] = torch.tensor(float("nan"))
    tensors = {f"m.{name}": tensor for name, tensor in stored.items()}
    folder = save_model(tmp_path / "m", tensors, config=config_of(COMPRESSED))
    report = shardmix.merge([(folder, 0.5), (folder, 0.5)], tmp_path / "out", on_nonfinite="warn")
    assert "m.weight" in str(report)


def test_adapters_apply_to_decoded_weights(tmp_path):
    """BASE+ADAPTER of a quantised base is that of the base decoded to float32."""
    stored, values = BY_NAME["fp8_blocks"]((130, 140), torch.Generator().manual_seed(8))
    name = "model.layers.0.mlp.up_proj"
    tensors = {f"{name}.{part}": tensor for part, tensor in stored.items()}
    save_model(tmp_path / "coded", tensors, config=config_of(FP8))
    save_model(tmp_path / "plain", {f"{name}.weight": values}, config={"model_type": "test"})
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]})
    )
    prefix = f"base_model.model.{name}"
    matrices = {
        f"{prefix}.lora_A.weight": random_tensor((2, 140), seed=1),
        f"{prefix}.lora_B.weight": random_tensor((130, 2), seed=2),
    }
    save_file(matrices, tmp_path / "lora" / "adapter_model.safetensors")
    for base in ("coded", "plain"):
        text = f"{tmp_path / base}+{tmp_path / 'lora'}"
        shardmix.merge([(text, 1.0)], tmp_path / f"{base} out", dtype="float32")
    assert weights_of(tmp_path / "coded out") == weights_of(tmp_path / "plain out")
