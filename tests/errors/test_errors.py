"""Errors have parts: a subject, a finding, a remedy, and hints that callers add."""

import ast
import pickle
from pathlib import Path

import pytest

import shardmix
from shardmix import errors
from shardmix.errors import RecipeError, ShardmixError, SourceError

URL = "https://me:s3cr3t@host/x"


def whole():
    return SourceError("is cut short", subject="a.safetensors", remedy="fetch it again")


def test_parts_make_one_line():
    error = whole()
    error.add_hint("2 MiB are done")
    assert str(error) == "a.safetensors: is cut short; fetch it again; 2 MiB are done"
    assert repr(error) == f"SourceError({str(error)!r})"
    assert str(ShardmixError("is empty")) == "is empty"
    assert str(ShardmixError("is empty", remedy="fill it")) == "is empty; fill it"


def test_a_caller_names_the_subject():
    """Who does not know it leaves it out; one further out puts its own before it."""
    error = SourceError("is cut short")
    assert error.of("a.safetensors") is error
    assert str(error) == "a.safetensors: is cut short"
    assert str(error.of("model")) == "model: a.safetensors: is cut short"


def test_a_pickled_error_is_the_same():
    error = whole()
    error.add_hint("2 MiB are done")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is SourceError
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


@pytest.mark.parametrize("part", ["subject", "finding", "remedy", "hint", "of"])
def test_no_part_tells_a_secret(part):
    """Nor obeys a terminal what strangers named."""
    parts = {"finding": "is cut short"} | (
        {part: f"{URL}\x1b"} if part not in ("hint", "of") else {}
    )
    error = SourceError(parts.pop("finding"), **parts)
    if part == "hint":
        error.add_hint(f"{URL}\x1b")
    if part == "of":
        error.of(f"{URL}\x1b")
    for copy in (error, pickle.loads(pickle.dumps(error))):
        told = f"{copy} {copy!r} {vars(copy)} {copy.args}"
        assert "s3cr3t" not in told
        assert "\x1b" not in told
        assert "https://***@host/x" in told


def test_the_tree_names_every_kind():
    """The module's docstring draws the family as it is."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    family = [kind for kind in kinds if issubclass(kind, ShardmixError)]
    drawn = [line for line in errors.__doc__.splitlines() if "─" in line]
    assert len(drawn) == len(family) - 1
    for kind in family:
        assert f"{kind.__name__}" in errors.__doc__
        assert kind.exit_status == (2 if kind is RecipeError else 1)


KINDS = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
KINDS = {name for name in KINDS if issubclass(getattr(errors, name), ShardmixError)}
FILES = sorted(Path(shardmix.__file__).parent.rglob("*.py"))
NOTHING_TO_DO = {"MergeCancelled"}
"""Kinds without a remedy: what the caller asked for has happened."""


def shown(node):
    """Return the text of a string's source, with expressions in braces; None if it is no text."""
    if node is None:
        return ""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(shown, node.values))
    if isinstance(node, ast.IfExp):
        return " ".join(map(shown, (node.body, node.orelse)))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return None
    return f"{{{ast.unparse(node.value if isinstance(node, ast.FormattedValue) else node)}}}"


def names_in(node):
    """Return the names that an expression uses."""
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} if node else set()


def calls_of_kinds(node):
    """Yield the calls that make an error of the family, `type(error)(...)` among them."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func) in {*KINDS, "type(error)"}:
            yield call


def flaws(call):
    """Yield what is wrong with an error's parts."""
    parts = {keyword.arg: shown(keyword.value) for keyword in call.keywords}
    finding = shown(call.args[0]) if len(call.args) == 1 else ""
    subject, remedy = parts.get("subject", ""), parts.get("remedy", "")
    if None in (finding, subject, remedy):
        yield "adds texts up; write one f-string"
        return
    if not finding.strip():
        yield "has no finding"
    if subject and finding.startswith(subject):
        yield "says the subject twice"
    if "; " in remedy or "; " in subject:
        yield "joins parts"
    if finding.endswith((".", ";", ":")) or remedy.endswith((".", ";", ":")):
        yield "ends as no part does"
    # A rule such as "must be one of a, b" says itself what to write.
    if not remedy and "must " not in finding and ast.unparse(call.func) not in NOTHING_TO_DO:
        yield "has no remedy"


def test_every_error_has_its_parts():
    """Each call of a kind, raised or returned, gives a finding, and a remedy if there is one."""
    calls = [(file, call) for file in FILES for call in calls_of_kinds(ast.parse(file.read_text()))]
    assert len(calls) > 200
    assert not [
        f"{file}:{call.lineno}: {flaw}: {ast.unparse(call)}"
        for file, call in calls
        for flaw in flaws(call)
    ]


def test_no_error_is_wrapped_in_another():
    """What a caller knows is added with `of` and `add_hint`; an error's text is not made anew."""
    wrapped = []
    for file in FILES:
        for handler in ast.walk(ast.parse(file.read_text())):
            if isinstance(handler, ast.ExceptHandler) and names_in(handler.type) & KINDS:
                wrapped += [
                    f"{file}:{call.lineno}: {ast.unparse(call)}"
                    for call in calls_of_kinds(handler)
                    if handler.name in names_in(call)
                ]
    assert not wrapped


@pytest.mark.parametrize(
    ("call", "flaw"),
    [
        ("SourceError()", "has no finding"),
        (
            "SourceError(f'{path}: is empty', subject=path, remedy='fill it')",
            "says the subject twice",
        ),
        ("SourceError('is empty', remedy='fill it; try again')", "joins parts"),
        ("SourceError('is empty' + more, remedy='fill it')", "adds texts up; write one f-string"),
        ("SourceError('is empty', subject=path)", "has no remedy"),
        ("SourceError('is empty', remedy='fill it.')", "ends as no part does"),
    ],
)
def test_a_flaw_is_found(call, flaw):
    """The test above would fail for each of these."""
    assert next(flaws(ast.parse(call, mode="eval").body)) == flaw
