"""`shardmix merge --profile`: the figures, and a picture of them where matplotlib is."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from shardmix.cli import pictures
from shardmix.errors import OutputError, RecipeError
from shardmix.profiling.profile import Profile
from tests.support.cut_off import folder_bytes
from tests.support.models import random_model, save_model
from tests.support.sampling import sample

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
needs_matplotlib = pytest.mark.skipif(
    not HAS_MATPLOTLIB, reason="needs matplotlib (extra `profile`)"
)
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [save_model(folder / name, random_model(1, torch.bfloat16)) for name in "ab"]


def merge(models, out, *words, **options):
    return subprocess.run(
        [
            *(sys.executable, "-m", "shardmix", "merge", *(f"{model}=0.5" for model in models)),
            *("-o", str(out), *map(str, words)),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **options},
    )


def test_a_json_file_takes_no_matplotlib(models, tmp_path):
    done = merge(models, tmp_path / "out", "--profile", tmp_path / "run.json")
    assert done.returncode == 0, done.stderr
    assert f"profile: {tmp_path / 'run.json'}" in done.stdout
    assert json.loads((tmp_path / "run.json").read_text())["outcome"] == "complete"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run.json"]


def test_dry_run_writes_no_picture(models, tmp_path):
    """A dry run checks the place and writes nothing."""
    done = merge(models, tmp_path / "out", "--dry-run", "--profile", tmp_path / "run.json")
    assert done.returncode == 0, done.stderr
    done = merge(models, tmp_path / "out", "--dry-run", "--profile", tmp_path / "no" / "run.json")
    assert (done.returncode, "there is no folder" in done.stderr) == (1, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "status", "finding"),
    [
        ("run.txt", 2, "must end in .json (figures), or in .svg, .png, .pdf"),
        ("run", 2, "must end in .json (figures)"),
        ("none/run.json", 1, "there is no folder"),
        ("out/run.json", 1, "a profile cannot be in"),
    ],
)
def test_mistake_is_told_before_the_merge(models, tmp_path, file, status, finding):
    """A mistake is one message before anything is done."""
    done = merge(models, tmp_path / "out", "--profile", tmp_path / file)
    assert done.returncode == status
    assert finding in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_names_the_remedy(tmp_path, monkeypatch):
    """A picture without matplotlib is refused with the remedy."""
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        RecipeError, match=r"takes matplotlib, .* pip install 'shardmix\[profile\]'"
    ):
        pictures.profile_files(tmp_path / "run.svg")
    assert pictures.profile_files(tmp_path / "run.json") == (tmp_path / "run.json", None)
    assert pictures.profile_files(None) == (None, None)


def test_foreign_picture_is_not_replaced(tmp_path, monkeypatch):
    """A picture of somebody else's is not replaced."""
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: name)
    figures, picture = tmp_path / "logo.json", tmp_path / "logo.svg"
    picture.write_text("<svg/>")
    with pytest.raises(OutputError, match=r"logo\.svg: exists and is not the picture of a profile"):
        pictures.profile_files(picture)
    figures.write_text('{"profile_version":1}')
    assert pictures.profile_files(picture) == (figures, picture)


def test_picture_that_cannot_be_drawn_warns(tmp_path):
    """A picture that cannot be drawn is a warning."""
    (tmp_path / "run.json").write_text('{"profile_version":1}')
    finding = pictures.draw(tmp_path / "run.json", tmp_path / "run.svg")
    assert finding is not None
    assert finding.startswith(f"{tmp_path / 'run.svg'}: could not be drawn (")
    assert finding.endswith(f"); its figures are in {tmp_path / 'run.json'}")
    assert "\n" not in finding


@needs_matplotlib
def test_svg_is_drawn_with_figures_beside_it(models, tmp_path):
    """An SVG is a picture with the figures beside it."""
    for _ in range(2):  # the second run's replace the first one's
        done = merge(models, tmp_path / "out", "--overwrite", "--profile", tmp_path / "run.svg")
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run.json", "run.svg"]
    assert ElementTree.parse(tmp_path / "run.svg").getroot().tag == f"{SVG}svg"
    merge(models, tmp_path / "plain" / "out", "--quiet")
    assert folder_bytes(tmp_path / "plain" / "out") == folder_bytes(tmp_path / "out")


@needs_matplotlib
def test_merging_process_loads_no_matplotlib(models, tmp_path):
    """The process that merges loads no matplotlib."""
    words = [f"{model}=0.5" for model in models]
    arguments = ["shardmix", "merge", *words, "-o", str(tmp_path / "out"), "-q"]
    arguments += ["--profile", str(tmp_path / "run.png")]
    code = (
        f"import sys\nsys.argv = {arguments!r}\nfrom shardmix.cli.commands import app\n"
        "try: app()\nexcept SystemExit as end: assert not end.code\n"
        "print('matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def profile(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    assert merge(models, folder / "out", "--profile", folder / "run.json").returncode == 0
    return Profile.from_json((folder / "run.json").read_bytes())


def texts(path: Path) -> str:
    """Return the words of an SVG: matplotlib draws letters, and has the text as a comment."""
    return " ".join(
        element.text or ""
        for element in ElementTree.parse(
            path, ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
        ).iter()
    )


@needs_matplotlib
@pytest.mark.parametrize(
    "case",
    sample("pictures", ["plain", "budget", "gpu", "no /proc", "few samples", "cut off"], 2),
)
def test_every_profile_draws_reproducibly(profile, tmp_path, case):
    """Every profile can be drawn, and the same one the same."""
    from shardmix.profiling.plot import draw

    samples, plan = profile.samples, profile.plan
    unknown = [None] * len(samples.seconds)
    expected = {"resident", "projected", "Cached", "read", "GB/s"}
    if case == "budget":
        profile = dataclasses.replace(
            profile, plan=dataclasses.replace(plan, max_memory_bytes=2 * plan.projected_peak_bytes)
        )
        expected.add("budget")
    elif case == "gpu":
        vram = [None, *[2**30] * (len(samples.seconds) - 1)]
        samples = dataclasses.replace(
            samples, vram_reserved_bytes=vram, vram_device_used_bytes=vram
        )
        expected |= {"GPU, GiB", "reserved by torch"}
    elif case == "no /proc":
        samples = dataclasses.replace(
            samples,
            rss_anon_bytes=unknown,
            rss_file_bytes=unknown,
            system_dirty_bytes=unknown,
            system_writeback_bytes=unknown,
        )
    elif case == "few samples":
        samples = dataclasses.replace(
            samples,
            **{
                name: value[-1:]
                for name in samples.__dataclass_fields__
                if isinstance(value := getattr(samples, name), list)
            },
        )
    elif case == "cut off":
        profile = dataclasses.replace(profile, outcome="cancelled")
        expected.add("(cancelled)")
    profile = dataclasses.replace(profile, samples=samples)
    for name in ("a.svg", "b.svg"):
        draw(profile, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    drawn = texts(tmp_path / "a.svg")
    for word in expected:
        assert word in drawn
    assert ("GPU, GiB" in drawn) == (case == "gpu")
