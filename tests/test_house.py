"""The tests keep the house's rules: where they lie, what they are called, which of them run."""

import ast
import re
from itertools import product
from pathlib import Path

import pytest

from tests.support import sampling
from tests.support.changed import ALWAYS, select_tests
from tests.support.sampling import Sampling, every_nth, sample

TESTS = Path(__file__).parent
PACKAGES = {path.parent.name for path in (TESTS.parent / "shardmix").glob("*/__init__.py")}
OTHER_FOLDERS = {"faults", "generators", "golden", "gpu", "hostile", "memory", "support"}
OF_THE_WHOLE = {
    *("architectures", "as_adapter", "convert", "extract"),
    *("docs", "ecosystem", "house", "imports", "lm_cocktail_programs", "merge", "reference"),
    *("rehearsal", "weights"),
}
"""What no package does on its own, and benchmarks."""
LONGEST_NAME = 40


def test_folders_mirror_the_packages():
    """A folder of tests is a package's, or one of a few that a user could name."""
    folders = {path.parent.name for path in TESTS.glob("*/__init__.py")}
    assert folders - PACKAGES == OTHER_FOLDERS


def test_top_has_what_no_package_does():
    """Tests of a package lie in its folder; at the top are those of modules there, and of all."""
    modules = {path.stem for path in (TESTS.parent / "shardmix").glob("*.py")}
    tested = {path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py")}
    assert tested - modules == OF_THE_WHOLE


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


@pytest.fixture
def draw(monkeypatch):
    """Set how samples are drawn, and draw one of a campaign of 325 cases."""

    def draw(most=30, **fields):
        monkeypatch.setattr(sampling, "SAMPLING", Sampling(**fields))
        return sample("a test", product(range(13), "abcde", "vwxyz"), most)

    return draw


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("most", [1, 40])
def test_sample_holds_every_kind(draw, most, seed):
    cases = draw(most, seed=seed)
    assert [sorted(set(values)) for values in zip(*cases, strict=True)] == [
        [*range(13)],
        [*"abcde"],
        [*"vwxyz"],
    ]
    assert len(set(cases)) == len(cases) == max(len(cases), most)
    assert sampling.SAMPLING.drawn == {"a test": (len(cases), 325)}


def test_sample_follows_the_seed(draw):
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)


def test_campaign_runs_whole(draw):
    assert len(draw(is_whole=True)) == 325
    assert sampling.SAMPLING.drawn == {}
    assert every_nth(range(9), 4) == range(9)
    assert sampling.examples(7) == 70


def test_steps_begin_at_any(draw):
    """Every fourth step, from one of the first four on."""
    firsts = set()
    for seed in range(50):
        draw(seed=seed)
        steps = every_nth(range(9), 4)
        firsts.add(steps[0])
        assert steps == range(steps[0], 9, 4)
    assert firsts == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["shardmix/cli/commands.py", "tests/cli/test_progress.py"], ["tests/cli"]),
        (["shardmix/plan/layout.py"], ["tests/golden", "tests/plan"]),
        (["shardmix/dtypes.py"], ["tests/test_dtypes.py"]),
        (
            ["shardmix/api.py", "shardmix/reports/merge_report.py"],
            ["tests/cli", "tests/test_merge.py"],
        ),
        (["tests/golden/outputs.json"], ["tests/golden"]),
        (["tests/plan/test_gone.py"], []),
        (["README.md", "docs/design.md"], []),
    ],
)
def test_changes_select_their_tests(changed, expected):
    assert select_tests(changed) == sorted([*expected, *ALWAYS])


def test_no_change_selects_nothing():
    assert select_tests([]) == select_tests(["benchmarks/README.md"]) == []


PACKAGE = TESTS.parent / "shardmix"
QUESTION_WORDS = {"how", "what", "when", "where", "whether", "which", "who", "whose", "why"}
NO_VERBS = {
    "a",
    "all",
    "an",
    "any",
    "each",
    "every",
    "if",
    "in",
    "it",
    "its",
    "no",
    "not",
    "number",
}
NO_VERBS |= {"of", "one", "only", "that", "the", "their", "these", "this", "those", "to", "true"}


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_docstrings_open_plainly(path):
    """A function's begins with a verb; a class's, a field's or a module's with the noun."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = {id(node.body[0]) for node in ast.walk(tree) if _is_function(node)}
    wrong = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        if not isinstance(node.value.value, str):
            continue
        text = node.value.value.strip()
        opens_a_function = id(node) in functions
        if _first_word(text) in QUESTION_WORDS or (opens_a_function and not _is_verb(text)):
            wrong.append(f"{node.lineno}: {text[:60]}")
    assert wrong == []


def _is_function(node):
    """Tell functions from classes and properties, which are fields to whoever reads them."""
    if not isinstance(node, ast.FunctionDef):
        return False
    names = [ast.unparse(decorator) for decorator in node.decorator_list]
    return not any(name.endswith("property") for name in names)


def _first_word(text):
    return re.split(r"[\s,:;]", text, maxsplit=1)[0].lower()


def _is_verb(text):
    """Accept an imperative: capital first, neither a plural, a participle nor one of a list."""
    word = _first_word(text)
    is_inflected = re.search(r"(?<!s)s$|(?<!br)ing$|(?<!e)ed$", word)
    return text[0].isupper() and not is_inflected and word not in NO_VERBS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("Return x.", True), ("Pass y on.", True), ("Bring, then go.", True), ("Feed it.", True)),
        *(("Returns x.", False), ("The x.", False), ("`x` is y.", False), ("Closed files.", False)),
        ("Reading of x.", False),
    ],
)
def test_verbs_are_told(text, expected):
    assert _is_verb(text) is expected
