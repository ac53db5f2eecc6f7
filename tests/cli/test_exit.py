"""How commands end: one line on standard error, and with --json an object with its parts."""

import json

import click
import pytest

from shardmix import errors
from shardmix.cli.exit import errors_reported
from shardmix.errors import ShardmixError

FAMILY = [kind for kind in vars(errors).values() if isinstance(kind, type)]
FAMILY = [kind for kind in FAMILY if issubclass(kind, ShardmixError)]


@pytest.fixture(autouse=True)
def signals_left_alone(monkeypatch):
    """Keep pytest's own handlers of signals."""
    monkeypatch.setattr("shardmix.cli.exit.signal.signal", lambda *_: None)


def ended(error, capsys, **options):
    """Return the exit status of a command that ends with an error, and what it prints."""
    with pytest.raises(click.exceptions.Exit) as caught, errors_reported(**options):
        raise error
    printed = capsys.readouterr()
    return caught.value.exit_code, printed.out, " ".join(printed.err.split())


@pytest.mark.parametrize("kind", FAMILY, ids=lambda kind: kind.__name__)
def test_json_has_the_parts(kind, capsys):
    """One error of each kind."""
    error = kind("is cut short", subject="a.safetensors", remedy="fetch it again")
    error.add_hint("2 MiB are done and kept")
    text = "a.safetensors: is cut short; fetch it again; 2 MiB are done and kept"
    status, out, err = ended(error, capsys, json=True)
    assert json.loads(out) == {
        "error": {
            "kind": kind.__name__,
            "message": text,
            "subject": "a.safetensors",
            "finding": "is cut short",
            "remedy": "fetch it again",
            "hints": ["2 MiB are done and kept"],
        }
    }
    assert err == f"error: {text}"
    assert status == kind.exit_status


def test_absent_parts_are_empty(capsys):
    _, out, err = ended(ShardmixError("all is lost"), capsys, json=True)
    told = json.loads(out)["error"]
    assert (told["subject"], told["remedy"], told["hints"]) == ("", "", [])
    assert err == "error: all is lost"


def test_people_get_no_object(capsys):
    _, out, err = ended(ShardmixError("all is lost"), capsys, json=False)
    assert (out, err) == ("", "error: all is lost")


def test_long_parts_are_cut_short(capsys):
    """A list of 90,000 names fills no terminal, and no log."""
    _, out, err = ended(ShardmixError("x" * 100_000, remedy="end it"), capsys, json=True)
    told = json.loads(out)["error"]
    assert len(told["finding"]) < 2_000
    assert told["message"].endswith("; end it")
    assert len(err) < 2_000


@pytest.mark.parametrize(
    ("said", "kept"), [("2 MiB are kept", "2 MiB are kept"), ("", "nothing was written")]
)
def test_an_interrupt_has_the_parts(capsys, said, kept):
    status, out, err = ended(KeyboardInterrupt(*[said] * bool(said)), capsys, json=True)
    told = json.loads(out)["error"]
    assert (told["kind"], told["finding"], told["hints"]) == ("Interrupted", "interrupted", [kept])
    assert told["message"] == err == f"interrupted: {kept}"
    assert status == 130
