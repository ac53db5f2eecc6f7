import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shardmix.profiling import profile

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PACKAGES = sorted(path.parent for path in (ROOT / "shardmix").glob("*/__init__.py"))


def test_the_cli_reference_is_what_help_says():
    generated = subprocess.run(
        [sys.executable, "-m", "tests.generators.cli_reference"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written.strip() == generated.strip(), "run `make docs`"


def test_every_command_shows_an_example():
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    commands = re.findall(r"^## `shardmix (\w+)`", text, flags=re.MULTILINE)
    named = ["merge", "convert", "extract", "score", "plan", "verify", "status", "inspect"]
    assert commands == named
    assert re.findall(r"^Example:\n\n    shardmix (\w+) ", text, flags=re.MULTILINE) == commands


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_has_a_map_of_itself(package):
    """Its docstring has a line for every module, in the order in which a reader needs them."""
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    lines = ast.get_docstring(tree, clean=False).splitlines()
    rows = [line for line in lines if re.match(r" *[a-z_][a-z0-9_, ]*?  +\S", line)]
    named = {name for row in rows for name in re.findall(r"\w+", re.split("  +", row.strip())[0])}
    assert named == {path.stem for path in package.glob("*.py")} - {"__init__"}


def test_design_shows_the_layers():
    """The design shows the layers that are held."""
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^layers = \[\n(.*?)^\]", settings, flags=re.MULTILINE | re.DOTALL)
    held = [line.split(" | ") for line in re.findall(r'"(.+)",', listed[1])]
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| ((?:`\w+`,? ?)+) \|", text, flags=re.MULTILINE)
    assert [sorted(re.findall(r"\w+", row)) for row in shown] == [sorted(row) for row in held]


def test_the_readme_is_short():
    """It has at most 500 words, as `wc -w` counts them."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 500


def test_the_design_is_one_page():
    assert len((ROOT / "docs" / "design.md").read_text(encoding="utf-8").split()) <= 950


def test_the_readme_has_no_figure_of_its_own():
    """Each row of its table is one of docs/benchmarks: the same seconds, the same peak."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w.*?) \| ([\d.]+) \| (\d+) MiB \|$", text, flags=re.MULTILINE)
    assert len(rows) == 3
    report = (ROOT / "docs" / "benchmarks" / "README.md").read_text(encoding="utf-8")
    table = report.split("## Every tool\n")[1].split("\n## ")[0]
    for name, seconds, peak in rows:
        tool = re.findall(r"`(\w+)`", name) or [name.split()[0]]
        assert re.search(rf"^\| {tool[0]} \| 5 \| {seconds} \(.* {peak} \|$", table, re.MULTILINE)


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{path.name}" for path in DOCS)])
def test_links_of_the_docs_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (ROOT / name).parent.joinpath(target).exists(), target


def test_paths_in_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:shardmix|tests|benchmarks|docs)/[\w./]*)`", text)
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_modules_in_the_design_exist():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    names = re.findall(r"`([a-z_]+\.[a-z_]+)`", text)
    patterns = re.findall(r"`([a-z_]+/\*[a-z_]+\.py)`", text)
    paths = [f"{name.replace('.', '/')}.py" for name in names]
    assert len(paths) > 15
    assert len(patterns) == 2
    package = ROOT / "shardmix"
    assert [path for path in [*paths, *patterns] if not list(package.glob(path))] == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_of_the_docs_exist(name):
    """Make targets that the docs name exist."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"^ {4}make (\w+)", text, flags=re.MULTILINE))
    named |= set(re.findall(r"`make (\w+)`", text))
    assert {"test", "demo"} <= named
    assert named <= targets


def test_profile_fields_are_documented():
    """Every field of a profile is documented, and no other."""
    prefixes = {
        profile.Profile: "",
        profile.PlannedMerge: "plan.",
        profile.StageProfile: "stages.NAME.",
        profile.Machine: "machine.",
        profile.Samples: "samples.",
    }
    fields = {
        prefix + field.name
        for kind, prefix in prefixes.items()
        for field in dataclasses.fields(kind)
    }
    text = (ROOT / "docs" / "profile.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `([\w.]+)` \|", text, flags=re.MULTILINE)
    assert sorted(documented) == sorted(fields - {"plan", "machine", "samples"})
