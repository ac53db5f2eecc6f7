import json

import pytest

import shardmix
from tests.support.models import random_model, save_model

CLIP = {
    "do_normalize": True,
    "image_mean": [0.48, 0.46, 0.41],
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 224},
}


def changed(**changes):
    return {**CLIP, **changes}


def plan(tmp_path, *contents, **options):
    pairs = []
    for number, content in enumerate(contents):
        folder = save_model(tmp_path / "abc"[number], random_model(number))
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / "preprocessor_config.json").write_text(text)
        pairs.append((folder, 1 / len(contents)))
    return shardmix.plan_merge(pairs, **options)


@pytest.mark.parametrize(
    "other",
    [
        *(CLIP, None, {}, changed(image_processor_type="CLIPFeatureExtractor"), changed(size=224)),
        {"do_normalize": True, "use_fast": True},
    ],
)
def test_what_prepares_alike_is_silent(tmp_path, other):
    assert plan(tmp_path, CLIP, other).warnings == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_mean", [0.5] * 3), ("size", {"shortest_edge": 336}), ("do_normalize", False)],
)
def test_what_prepares_otherwise_is_told(tmp_path, key, value):
    (warning,) = plan(tmp_path, CLIP, changed(**{key: value})).warnings
    assert f"preprocessor_config.json: {key} ({json.dumps(CLIP[key])} in " in warning
    assert f"the output takes that of {tmp_path / 'a'}" in warning


def test_what_cannot_be_read_is_told(tmp_path):
    (warning,) = plan(tmp_path, CLIP, "{").warnings
    assert "was not compared" in warning
