"""Outputs that are quantised: bits, budgets, resuming, other methods, and what loads them."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmix
from shardmix.compute.backend import load_backend
from shardmix.errors import RecipeError
from shardmix.execute import quantising, tasks
from shardmix.execute.chunk_merger import ChunkMerger
from shardmix.execute.compare_pass import compare
from shardmix.plan import memory_budget
from shardmix.plan.memory_budget import TENSOR_SCALES_NBYTES
from shardmix.plan.merge_plan import CodedMatrices
from shardmix.sources.resolve import open_source
from shardmix.system.hashing import LEAF_NBYTES
from shardmix.system.units import KIB
from tests.support.cut_off import cut_off, cut_off_after, folder_bytes
from tests.support.fp8_reference import check_quantised, decoded
from tests.support.fresh_process import merge_report
from tests.support.models import load_model, random_tensor, save_model
from tests.support.sampling import every_nth, sample

CONFIG = {"model_type": "test", "torch_dtype": "bfloat16"}
LAYER = "model.layers.0"
SHAPES = {
    "model.embed_tokens.weight": (500, 130),
    "lm_head.weight": (500, 130),
    "model.norm.weight": (130,),
    f"{LAYER}.self_attn.q_proj.weight": (300, 272),
    f"{LAYER}.self_attn.q_proj.bias": (300,),
    f"{LAYER}.self_attn.k_proj.weight": (1, 5000),
    f"{LAYER}.self_attn.v_proj.weight": (130, 1),
    f"{LAYER}.mlp.gate.weight": (8, 130),
    f"{LAYER}.mlp.experts.gate_up_proj": (3, 260, 130),
    f"{LAYER}.mlp.experts.down_proj": (3, 130, 130),
    f"{LAYER}.mlp.experts.0.up_proj.weight": (128, 256),
    f"{LAYER}.mlp.up_proj.weight": (2100, 3000),
    f"{LAYER}.mlp.down_proj.weight": (1500, 1700),
    f"{LAYER}.empty.up_proj.weight": (0, 3),
    "model.layers.1.mlp.down_proj.weight": (900, 2500),
}
EXPECTED = {
    f"{LAYER}.self_attn.q_proj.weight",
    f"{LAYER}.self_attn.k_proj.weight",
    f"{LAYER}.self_attn.v_proj.weight",
    f"{LAYER}.mlp.experts.0.up_proj.weight",
    f"{LAYER}.mlp.up_proj.weight",
    f"{LAYER}.mlp.down_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
}
BUT_EXPERTS = {name: shape for name, shape in SHAPES.items() if "experts.g" not in name}
QUANTIZE = {"quantize": "fp8-blocks"}


def weights_of(folder):
    return {name: data for name, data in folder_bytes(folder).items() if "safetensors" in name}


def save(folder, *, seed, shapes=SHAPES, dtype=torch.bfloat16, shards=2):
    tensors = {
        name: random_tensor(shape, dtype, seed=100 * seed + row)
        for row, (name, shape) in enumerate(shapes.items())
    }
    names = sorted(shapes)
    split = None if shards == 1 else [names[: len(names) // 2], names[len(names) // 2 :]]
    return save_model(folder, tensors, shards=split, config=CONFIG)


@pytest.fixture
def models(tmp_path):
    return [(save(tmp_path / f"m{number}", seed=number), (0.6, 0.4)[number]) for number in (0, 1)]


def float32_of(models, folder, **options):
    shardmix.merge(models, folder, dtype="float32", **options)
    return load_model(folder)


def test_bits_are_those_of_a_reference(tmp_path, models):
    """Codes and scales are torch's of the float32 merge; other tensors those of a merge."""
    shardmix.merge(models, tmp_path / "out", **QUANTIZE)
    shardmix.merge(models, tmp_path / "plain")
    stored, plain = load_model(tmp_path / "out"), load_model(tmp_path / "plain")
    experts = {f"{LAYER}.mlp.experts.{name}_proj" for name in ("gate_up", "down")}
    found = check_quantised(stored, float32_of(models, tmp_path / "float32"))
    assert set(found) == EXPECTED | experts
    assert stored[f"{LAYER}.mlp.experts.down_proj_scale_inv"].shape == (3, 2, 2)
    for name in set(plain) - set(found):
        assert torch.equal(stored[name], plain[name])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": [
            *("lm_head", "model.embed_tokens", f"{LAYER}.empty.up_proj", f"{LAYER}.mlp.gate"),
        ],
    }


def test_layout_is_that_of_safetensors(tmp_path, models):
    """Each file has the bytes that safetensors' own writer gives it."""
    shardmix.merge(models, tmp_path / "out", **QUANTIZE)
    for path in (tmp_path / "out").glob("*.safetensors"):
        save_file(load_file(path), tmp_path / "again", metadata={"format": "pt"})
        assert path.read_bytes() == (tmp_path / "again").read_bytes()


WAYS = [
    {"backend": "torch"},
    {"io": "mmap"},
    {"workers": 3},
    {"workers": 1, "digest": "sha256"},
    {"max_shard_size": "5MB"},
]


CHUNKED_WAYS = list(itertools.product([None, 64 * KIB, 256 * KIB], WAYS))


@pytest.mark.parametrize(
    ("chunk", "way"),
    sample("ways to quantise", CHUNKED_WAYS, 5, kinds=lambda case: [case[0], str(case[1])]),
)
def test_bytes_depend_on_nothing_else(tmp_path, models, monkeypatch, way, chunk):
    """Small chunks hold no whole band of blocks, so that bands are merged twice."""
    expected = shardmix.merge(models, tmp_path / "expected", **QUANTIZE)
    if chunk is not None:
        monkeypatch.setattr(memory_budget, "_LARGEST_WHOLE_NBYTES", chunk)
        monkeypatch.setattr(
            memory_budget, "BEST_CHUNK_NBYTES", dict.fromkeys(("llvm", "torch", "cuda"), chunk)
        )
    report = shardmix.merge(models, tmp_path / "out", **QUANTIZE, **way)
    if chunk is not None:
        assert report.strip_bytes == chunk < expected.strip_bytes
    if "max_shard_size" in way:
        found, wanted = load_model(tmp_path / "out"), load_model(tmp_path / "expected")
        assert all(torch.equal(found[name].float(), wanted[name].float()) for name in wanted)
        files = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        names = files["weight_map"]
        assert all(
            names[name] == file
            for scales, file in names.items()
            if (name := scales.removesuffix("_scale_inv")) in names
        )
        return
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "expected")


METHODS = list(itertools.product(["slerp", "task_arithmetic", "passthrough"], [None, 64 * KIB]))


@pytest.mark.parametrize(("method", "chunk"), sample("methods that quantise", METHODS, 3))
def test_every_method_quantises(tmp_path, models, monkeypatch, method, chunk):
    if chunk is not None:
        monkeypatch.setattr(memory_budget, "_LARGEST_WHOLE_NBYTES", chunk)
        monkeypatch.setattr(
            memory_budget, "BEST_CHUNK_NBYTES", dict.fromkeys(("llvm", "torch", "cuda"), chunk)
        )
    (first, _), (second, _) = models
    options = {"method": method}
    if method == "slerp":
        sources = [first, second]
        options |= {"parameters": {"t": 0.3}, "base_model": first}
    elif method == "task_arithmetic":
        sources, options = [(second, 0.7)], options | {"base_model": first}
    else:
        sources = [first]
    values = float32_of(sources, tmp_path / "float32", **options)
    shardmix.merge(sources, tmp_path / "out", **options, **QUANTIZE)
    assert check_quantised(load_model(tmp_path / "out"), values)


@pytest.mark.parametrize("dtype", ["keep", "float16", "float32"])
def test_dtype_is_that_of_other_tensors(tmp_path, models, dtype):
    shardmix.merge(models, tmp_path / "out", dtype=dtype, **QUANTIZE)
    stored = load_model(tmp_path / "out")
    check_quantised(stored, float32_of(models, tmp_path / "float32"))
    other = {"keep": torch.bfloat16}.get(dtype, getattr(torch, dtype, None))
    assert stored["model.norm.weight"].dtype == other
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == str(other).removeprefix("torch.")


@pytest.mark.parametrize(
    "dtype",
    sample("floats to quantise", [torch.float16, torch.float32, torch.float64], 1),
    ids=str,
)
def test_sources_of_any_float(tmp_path, dtype):
    models = [
        (save(tmp_path / f"m{n}", seed=n, dtype=dtype, shards=1), weight)
        for n, weight in enumerate((0.3, 0.7))
    ]
    shardmix.merge(models, tmp_path / "out", **QUANTIZE)
    check_quantised(load_model(tmp_path / "out"), float32_of(models, tmp_path / "float32"))


CUTS = list(itertools.product([1, 2, 3], [1, 3]))


@pytest.mark.parametrize(("num_leaves", "workers"), sample("cuts of quantised merges", CUTS, 3))
def test_cut_off_merges_go_on(tmp_path, models, num_leaves, workers):
    """The scales of codes that an earlier merge wrote are found again."""
    shardmix.merge(models, tmp_path / "expected", **QUANTIZE)
    with cut_off_after(num_leaves), pytest.raises(KeyboardInterrupt):
        shardmix.merge(models, tmp_path / "out", workers=workers, **QUANTIZE)
    report = shardmix.merge(models, tmp_path / "out", record_paths=False, **QUANTIZE)
    assert report.bytes_kept > 0
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "expected")


@pytest.mark.parametrize("workers", [1, 3])
def test_bands_are_merged_once(tmp_path, models, monkeypatch, workers):
    """But for those in the leaf of the scales, and at the ends of tasks."""
    monkeypatch.setattr(tasks, "_LEAST_CODED_LEAVES", 1)
    apart = []
    merged = ChunkMerger._merged

    def counted(self, segment, start, num_elements):
        apart.append((segment, start))
        return merged(self, segment, start, num_elements)

    monkeypatch.setattr(ChunkMerger, "_merged", counted)
    shardmix.merge(models, tmp_path / "out", workers=workers, **QUANTIZE)
    assert apart
    assert all(segment.out_offset + start < LEAF_NBYTES for segment, start in apart)


@pytest.mark.parametrize("workers", [1, 3])
def test_unknown_scales_are_found_again(tmp_path, models, monkeypatch, workers):
    """If none are kept, each is found when it is written."""
    shardmix.merge(models, tmp_path / "expected", **QUANTIZE)
    monkeypatch.setattr(quantising.KnownScales.__init__, "__kwdefaults__", {"most_nbytes": 0})
    shardmix.merge(models, tmp_path / "out", workers=workers, **QUANTIZE)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "expected")


def test_known_scales_are_bounded():
    """Those of the oldest tensors give way; those that are written are forgotten."""
    coded = CodedMatrices("fp8-blocks", 1, 256, 128)  # two bands, a scale each
    first, second, third = (SimpleNamespace(out_offset=n, coded=coded) for n in range(3))
    known = quantising.KnownScales(most_nbytes=2 * (TENSOR_SCALES_NBYTES + 10))
    one, two = (np.full(1, value, np.float32) for value in (1, 2))
    for segment in (first, second):
        known.put(0, segment, 0, one)
        known.put(0, segment, 1, two)
    assert [known.get(0, first, band) for band in range(2)] == [one, two]
    assert known.get(1, first, 0) is None
    known.put(0, third, 1, two)
    assert [known.get(0, each, 1) for each in (first, second, third)] == [None, two, two]
    known.forget(0, second, 0)
    assert [known.get(0, second, band) for band in range(2)] == [None, two]
    known.forget(0, second, 1)
    known.put(0, first, 0, one)
    assert [known.get(0, each, 1) for each in (first, second, third)] == [None, None, two]
    large = SimpleNamespace(out_offset=3, coded=coded._replace(rows=1 << 20))
    known.put(0, large, 0, one)
    assert known.get(0, large, 0) is None


def test_claims_are_not_trusted(tmp_path, models):
    """Scales that were damaged after their leaf was claimed are written again."""
    shardmix.merge(models, tmp_path / "expected", **QUANTIZE)
    cut_off(models, tmp_path / "out", num_leaves=3, **QUANTIZE)
    (hidden,) = tmp_path.glob(".out.shardmix")
    for path in hidden.rglob("*.safetensors*"):
        with path.open("r+b") as file:
            for leaf in range(-(-path.stat().st_size // LEAF_NBYTES)):
                file.seek(leaf * LEAF_NBYTES + 70_000)
                file.write(b"\x55" * 100)
    shardmix.merge(models, tmp_path / "out", **QUANTIZE)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "expected")


def test_killed_merges_go_on(tmp_path, models):
    """By SIGKILL, at several moments."""
    words = [f"{path}={weight}" for path, weight in models]
    command = [sys.executable, "-m", "shardmix", "merge", *words, "--quantize", "fp8-blocks"]
    shardmix.merge(models, tmp_path / "expected", **QUANTIZE)
    out = tmp_path / "out"
    for number in every_nth(range(6), 3):
        process = subprocess.Popen([*command, "-o", str(out), "--quiet", "--workers", "1"])
        journal = tmp_path / ".out.shardmix" / "journal"
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if journal.exists() and journal.read_bytes().count(b"\n") > number:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.wait()
    if not out.exists():
        shardmix.merge(models, out, **QUANTIZE)
    assert weights_of(out) == weights_of(tmp_path / "expected")


def test_it_is_part_of_the_digest(tmp_path, models):
    plans = [shardmix.plan_merge(models, **options) for options in ({}, QUANTIZE)]
    assert plans[0].digest() != plans[1].digest()
    cut_off(models, tmp_path / "out", num_leaves=2, **QUANTIZE)
    with pytest.raises(shardmix.errors.OutputError, match="quantize fp8-blocks then, none now"):
        shardmix.merge(models, tmp_path / "out")
    assert plans[1].from_json(plans[1].to_json()) == plans[1]


def test_outputs_verify(tmp_path, models):
    shardmix.merge(models, tmp_path / "out", record_paths=True, **QUANTIZE)
    assert shardmix.verify(tmp_path / "out", recompute=True).is_verified
    recorded = json.loads((tmp_path / "out" / "shardmix.json").read_text())
    assert recorded["recipe"]["quantize"] == "fp8-blocks"
    path = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x12")
    report = shardmix.verify(tmp_path / "out", recompute=True)
    assert not report.is_verified


def test_scales_are_compared_as_well(tmp_path, models):
    """Recomputing finds a scale that is not what the sources give."""
    shardmix.merge(models, tmp_path / "out", record_paths=True, **QUANTIZE)
    path = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    stored = load_file(path)
    name = next(name for name in stored if name.endswith("_scale_inv"))
    stored[name][0, 0] *= 2
    save_file(stored, path, metadata={"format": "pt"})
    plan = shardmix.plan_merge(models, **QUANTIZE)
    differences = compare(plan, load_backend(plan), tmp_path / "out", None, None)
    assert differences.num_bytes.keys() == {(path.name, name)}


def test_our_own_reader_decodes_it(tmp_path, models):
    shardmix.merge(models, tmp_path / "out", **QUANTIZE)
    stored = load_model(tmp_path / "out")
    shardmix.convert(tmp_path / "out", tmp_path / "back", dtype="float32")
    back = load_model(tmp_path / "back")
    for name, values in back.items():
        scales = stored.get(f"{name}_scale_inv")
        expected = stored[name].float() if scales is None else decoded(stored[name], scales)
        assert torch.equal(values, expected), name
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_fp8_sources_are_quantised_anew(tmp_path, models):
    """FP8 to FP8: values are decoded, merged and quantised anew."""
    shardmix.merge(models, tmp_path / "fp8", **QUANTIZE)
    shardmix.convert(tmp_path / "fp8", tmp_path / "values", dtype="float32")
    shardmix.convert(tmp_path / "fp8", tmp_path / "out", **QUANTIZE)
    assert check_quantised(load_model(tmp_path / "out"), load_model(tmp_path / "values"))
    assert open_source(str(tmp_path / "out")).identity.decoding


def test_nonfinite_values_are_told(tmp_path):
    names = sorted(BUT_EXPERTS)
    tensors = {name: random_tensor(SHAPES[name], torch.float32) for name in names}
    name = f"{LAYER}.mlp.up_proj.weight"
    tensors[name][2000, 2900] = torch.nan
    tensors[name][0, 0] = torch.inf
    folder = save_model(tmp_path / "m", tensors, config=CONFIG)
    report = shardmix.convert(folder, tmp_path / "out", **QUANTIZE)
    (found,) = report.nonfinite
    assert (found.name, found.num_nan, found.num_inf, found.num_overflowed) == (name, 1, 1, 0)
    values = load_model(tmp_path / "out")
    check_quantised(values, tensors)


def test_wide_rows_are_counted(tmp_path):
    """The scales of a band are all that grows with a row, and they are in the projection."""
    peaks = []
    for columns in (9_000_000, 14_000_000):
        shapes = {f"{LAYER}.mlp.up_proj.weight": (2, columns)}
        model = save(tmp_path / f"m{columns}", seed=0, shapes=shapes, shards=1)
        plan = shardmix.plan_merge([(model, 0.5)] * 2, workers=1, max_memory="2GiB", **QUANTIZE)
        peaks.append(plan.memory.projected_peak_nbytes - plan.memory.reserved_nbytes)
        assert plan.coding.num_scales == -(-columns // 128)
    assert peaks[1] - peaks[0] == 4 * 4 * 39_062 == 4 * 4 * (109_375 - 70_313)


@pytest.mark.parametrize("chunk", [None, 64 * KIB], ids=str)
def test_each_nan_is_told_once(tmp_path, monkeypatch, chunk):
    """Bands at the ends of tasks are merged twice; so are parts of bands, and what goes on."""
    if chunk is not None:
        monkeypatch.setattr(memory_budget, "_LARGEST_WHOLE_NBYTES", chunk)
        monkeypatch.setattr(
            memory_budget, "BEST_CHUNK_NBYTES", dict.fromkeys(("llvm", "torch", "cuda"), chunk)
        )
    monkeypatch.setattr(tasks, "_LEAST_CODED_LEAVES", 1)
    name = "layers.0.up_proj.weight"
    tensors = {name: random_tensor((3000, 5000), torch.bfloat16)}
    tensors[name].view(-1)[::7919] = torch.nan
    tensors["norm"] = torch.ones(3)
    folder = save_model(tmp_path / "m", tensors, config=CONFIG)
    models = [(folder, 0.5), (folder, 0.5)]
    cut_off(models, tmp_path / "out", num_leaves=2, **QUANTIZE)
    (found,) = shardmix.merge(models, tmp_path / "out", workers=2, **QUANTIZE).nonfinite
    assert (found.name, found.num_nan, found.num_inf) == (name, -(-15_000_000 // 7919), 0)


def test_peak_is_as_projected(tmp_path):
    """A matrix of 64 MB of codes, with bands that fit into a chunk."""
    shapes = {f"{LAYER}.mlp.up_proj.weight": (4000, 16_000), "model.norm.weight": (10,)}
    models = [save(tmp_path / f"m{n}", seed=n, shapes=shapes, shards=1) for n in (0, 1)]
    words = [f"{model}=0.5" for model in models]
    for more in ((), ("--max-memory", "165MiB")):
        out = tmp_path / f"out{len(more)}"
        report = merge_report(*words, "-o", out, "--quantize", "fp8-blocks", *more)
        assert report["peak_rss_bytes"] <= report["projected_peak_bytes"]
    assert weights_of(tmp_path / "out0") == weights_of(tmp_path / "out2")


def refused(models, folder, **options):
    with pytest.raises(RecipeError) as found:
        shardmix.merge(models, folder, **options)
    return str(found.value)


def test_unknown_quantisations_are_refused(tmp_path, models):
    message = refused(models, tmp_path / "out", quantize="fp8_block")
    assert "must be fp8-blocks (did you mean 'fp8-blocks'?)" in message
    for given in ("int4", ["fp8-blocks"], 8, True):
        assert repr(given) in refused(models, tmp_path / "out", quantize=given)


def test_an_adapter_is_not_quantised(tmp_path, models):
    options = {"as_adapter": True, "base_model": models[0][0], **QUANTIZE}
    with pytest.raises(RecipeError, match="quantize: has no effect on an adapter"):
        shardmix.merge(models, tmp_path / "out", **options)


@pytest.mark.parametrize(
    "shapes",
    [
        {"model.embed_tokens.weight": (5, 5)},
        {"q_proj.weight": (5, 5)},  # in no numbered layer
        {"layers.0.q_proj.weight": (5,)},
        {"layers.0.q_proj.weight": (5, 5, 5)},
        {"layers.0.q_proj.weight": (0, 5), "norm": (1,)},
    ],
    ids=str,
)
def test_nothing_to_quantise_is_refused(tmp_path, shapes):
    models = [(save(tmp_path / f"m{n}", seed=n, shapes=shapes, shards=1), 0.5) for n in (0, 1)]
    message = refused(models, tmp_path / "out", **QUANTIZE)
    assert "nothing to quantise" in message
    assert "numbered layers" in message


def test_integers_are_not_quantised(tmp_path):
    tensors = {
        "layers.0.q_proj.weight": torch.ones(5, 5, dtype=torch.int64),
        "layers.0.k_proj.weight": torch.ones(5, 5),
    }
    folder = save_model(tmp_path / "m", tensors, config=CONFIG)
    shardmix.convert(folder, tmp_path / "out", **QUANTIZE)
    assert load_model(tmp_path / "out")["layers.0.q_proj.weight"].dtype == torch.int64


def test_a_name_of_scales_that_is_taken(tmp_path):
    experts = "layers.0.experts"
    tensors = {
        f"{experts}.gate_up_proj": torch.ones(2, 8, 3),
        f"{experts}.down_proj": torch.ones(2, 3, 4),
        f"{experts}.down_proj_scale_inv": torch.ones(1),
    }
    folder = save_model(tmp_path / "m", tensors, config=CONFIG)
    message = refused([folder], tmp_path / "out", method="passthrough", **QUANTIZE)
    assert f"{experts}.down_proj_scale_inv is the name of the scales" in message


def test_no_config_is_refused(tmp_path):
    """Nobody could tell that the weights are codes."""
    tensors = {"layers.0.q_proj.weight": torch.ones(5, 5)}
    folder = save_model(tmp_path / "m", tensors, config=None)
    with pytest.raises(RecipeError, match=r"config\.json"):
        shardmix.convert(folder, tmp_path / "out", **QUANTIZE)


def test_plan_tells_what_is_quantised(tmp_path, models):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "shardmix", "plan", "--quantize", "fp8-blocks"),
            *(f"{path}={weight}" for path, weight in models),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    text = " ".join(done.stdout.split())
    assert "fp8-blocks: 9 tensors" in text
    assert "numbered layers" in text


def test_ragged_blocks_are_a_warning(tmp_path, models):
    """Blocks in the middle of which a matrix ends, unless it is smaller than one."""
    (warning,) = shardmix.plan_merge(models, **QUANTIZE).warnings
    # Of the rest, one has whole blocks, and one a single row and column of blocks.
    assert warning.startswith("8 quantised tensors")
    assert "end in ragged blocks" in warning
    shapes = {f"{LAYER}.mlp.up_proj.weight": (256, 128), f"{LAYER}.mlp.down_proj.weight": (1, 100)}
    model = save(tmp_path / "whole", seed=0, shapes=shapes, shards=1)
    assert shardmix.plan_merge([(model, 0.5)] * 2, **QUANTIZE).warnings == ()


def test_recipes_have_the_key(tmp_path, models):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "quantize: fp8-blocks\nmodels:\n"
        + "".join(
            f"  - model: {path}\n    parameters: {{weight: {weight}}}\n" for path, weight in models
        )
    )
    shardmix.merge(recipe, tmp_path / "out")
    shardmix.merge(models, tmp_path / "expected", **QUANTIZE)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "expected")
