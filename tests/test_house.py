"""The tests keep the house's rules: where they lie, and what they are called."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGES = {path.parent.name for path in (TESTS.parent / "shardmix").glob("*/__init__.py")}
OTHER_FOLDERS = {"faults", "generators", "golden", "gpu", "hostile", "memory", "support"}
LONGEST_NAME = 40


def test_folders_mirror_the_packages():
    """A folder of tests is a package's, or one of a few that a user could name."""
    folders = {path.parent.name for path in TESTS.glob("*/__init__.py")}
    assert folders - PACKAGES == OTHER_FOLDERS


def test_files_of_tests_lie_in_packages():
    """Else two files of one name could not stand in two folders."""
    assert all((path.parent / "__init__.py").exists() for path in TESTS.rglob("*.py"))


@pytest.mark.parametrize(
    "path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: path.relative_to(TESTS).as_posix()
)
def test_names_have_40_characters(path):
    """Noun and verb; the clause goes into the docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    names = [node.name for node in functions if node.name.startswith("test_")]
    assert names
    assert [name for name in names if len(name) > LONGEST_NAME] == []
    assert len(set(names)) == len(names)
