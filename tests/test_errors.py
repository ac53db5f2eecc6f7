"""Errors have parts: a subject, a finding, a remedy, and hints that callers add."""

import pickle

import pytest

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
