"""Secrets are left out of what is told, wherever they come from."""

import json
import logging
import pickle

import pytest
from click.testing import CliRunner

import shardmix
from shardmix.cli.commands import app
from shardmix.errors import one_line, printable, shown
from shardmix.errors.logs import logs_redacted
from shardmix.errors.redaction import (
    without_environment,
    without_secrets,
    without_user,
)
from shardmix.sources import hub
from shardmix.sources.resolve import resolve
from tests.support.models import random_model, save_model

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567"


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("https://me:pass@host/x", "https://***@host/x"),
        ("see 'https://me:pa%40ss%2f@host:80/x'; then", "see 'https://***@host:80/x'; then"),
        ("https://me@host", "https://***@host"),
        ("https:///me:pass@host", "https:///***@host"),
        ("https://me:@host", "https://***@host"),
        ("HTTPS://me:p@ss@host/a@b", "HTTPS://***@host/a@b"),
        ("http://me:pa/ss@host/x", "http://***@host/x"),
        ("http://me:pa?ss#@host/x", "http://***@host/x"),
        ("http://me:pass@[::1]:8080/x", "http://***@[::1]:8080/x"),
        ("socks5h://me:pass@proxy:1080", "socks5h://***@proxy:1080"),
        ("/home/u/https:/me:pass@host/x: is missing", "/home/u/https:/***@host/x: is missing"),
        ("s3:/key:secret@bucket", "s3:/***@bucket"),
        (
            "(https://a.b/c?X-Amz-Signature=1&X-Amz-Credential=2); retry",
            "(https://a.b/c?***); retry",
        ),
        ("https://a.b/c#access_token=1", "https://a.b/c#***"),
        ("a.b/c?token=1&x=2", "a.b/c?token=***&x=2"),
        ("https://u:p@a.b/x=https://c:d@e.f?q", "https://***@a.b/x=https://***@e.f?***"),
        ("https://u:p@a.b and https://c:d@e.f", "https://***@a.b and https://***@e.f"),
        (f"token {TOKEN}.", "token hf_***."),
        ("{'authorization': 'Bearer abc'}", "{'authorization': 'Bearer ***'}"),
        ("Proxy-Authorization: Basic bWU6cGFzcw==", "Proxy-Authorization: Basic ***"),
    ],
)
def test_a_secret_is_left_out(text, bare):
    assert without_secrets(text) == bare
    assert without_secrets(bare) == bare
    assert printable(text) == bare
    assert one_line(ValueError(text)) == bare
    assert str(shardmix.SourceError(text)) == bare


@pytest.mark.parametrize(
    "text",
    [
        *("org/name@main: no such revision", "/data/a:b@c/model", "name@rev", "gpt2@main"),
        *("https://host:8080/org/name@rev", "http://[::1]:8080/org/name@rev", "C:/Users/me@work"),
        *("model=0.5", "a=1&b=2", "layers.0:weight@x", "hf_model", "weights?b=1", "x: y@z"),
        '{"a": "https://host", "b": "name@rev"}',
        '{"a":"https://host","b":"name@rev"}',
        "--source m0:/data/model@v2=x",
    ],
)
def test_what_is_no_secret_is_told(text):
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    "text",
    [
        *("a." * 100_000 + "://", "http://" * 40_000, "http://a?" + ")" * 100_000 + "x"),
        *("?" + "token" * 40_000 + "://", "http://" + ":" * 100_000 + "/", "hf_" * 60_000 + ":/"),
        *("authorization" * 20_000 + ":/", "http://a?b" * 20_000),
    ],
    ids=lambda text: text[:12],
)
def test_a_long_name_takes_no_time(text):
    """Names are strangers': with a search that begins anew at each character this takes hours."""
    without_secrets(text)
    without_user(text)
    printable(text)


def test_a_place_is_told_without_its_user():
    """Of what was meant for a model and is none, `user:password@host` needs no scheme."""
    assert without_user("me:pass@host:/models") == "***@host:/models"
    assert without_user("me:p@ss@host") == "***@host"
    assert without_user("org/name@main") == "org/name@main"
    assert without_user("https://me:pass@host") == "https://***@host"


def test_cutting_leaves_no_half_of_a_secret():
    url = "https://me:" + "secret" * 50 + "@host"
    assert one_line(ValueError(f"{'x' * 150} {url}")).endswith("https://***@host")
    assert "secret" not in shown(url)


def test_an_error_holds_no_secret_inside():
    error = shardmix.SourceError("https://me:pass@host")
    for copy in (error, pickle.loads(pickle.dumps(error))):
        assert "pass" not in repr(copy)
        assert "pass" not in str(copy.args)
        assert str(copy) == "https://***@host"


@pytest.mark.parametrize("variable", ["HF_ENDPOINT", "HTTPS_PROXY", "all_proxy"])
@pytest.mark.parametrize(
    "said",
    [
        *("Invalid port: 'se/cret'", "no 'se%2Fcret'", "Invalid port: 'cret'"),
        *("Basic bWU6c2UvY3JldA==", "http://me:se%2Fcret@host"),
    ],
)
def test_parts_of_the_environments_urls(monkeypatch, variable, said):
    """HTTP clients name a password without its URL."""
    monkeypatch.setenv(variable, "http://me:se%2Fcret@host")
    assert "cret" not in without_environment(said)
    assert "bWU6" not in without_environment(said)
    monkeypatch.setenv(variable, "me:se/cret@host:3128")
    assert "cret" not in without_environment(said)


def test_a_token_of_the_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "api-0123456789")
    assert printable("sent api-0123456789 to it") == "sent *** to it"
    monkeypatch.setenv("HF_TOKEN", "model")
    assert printable("/a/model: is missing") == "/a/model: is missing"


def test_logs_hold_no_secret(caplog):
    """Also of loggers that come to be meanwhile; afterwards all is as before."""
    factory = logging.getLogRecordFactory()
    url = "http://me:pass@host"
    with logs_redacted(), logs_redacted():
        logging.getLogger("huggingface_hub.test_redaction").warning("asking %s for %d", url, 3)
        try:
            raise ValueError(url)
        except ValueError:
            logging.getLogger("httpx.test_redaction").exception("failed")
        logging.getLogger("httpx").warning("%d", 7)
    assert "asking http://***@host for 3" in caplog.text
    assert "ValueError: http://***@host" in caplog.text
    assert "pass" not in caplog.text
    assert caplog.records[-1].args == (7,)
    assert logging.getLogRecordFactory() is factory


URL = "https://me:s3cr3t@host/org/name"


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", URL],
        ["inspect", URL, "--json"],
        ["inspect", "me:s3cr3t@host:/models/x"],
        ["inspect", "MODEL", URL],
        [URL],
        ["merge", f"{URL}=0.5", "MODEL=0.5", "-o", "OUT", "--json"],
        ["merge", f"{URL}?token=abc=0.5", "MODEL=0.5", "-o", "OUT"],
        ["merge", f"{URL}={URL}", "MODEL=0.5", "-o", "OUT"],
        ["merge", URL, "-o", "OUT"],
        ["merge", "MODEL=0.5", "MODEL=0.5", "-o", URL, "--json"],
        ["merge", "MODEL=0.5", "MODEL=0.5", "-o", "OUT", "--config-from", URL],
        ["merge", "MODEL=0.5", "MODEL=0.5", "-o", "OUT", "--profile", URL],
        ["merge", "MODEL=0.5", "MODEL=0.5", "-o", "OUT", "--max-memory", URL],
        ["merge", "MODEL=0.5", "MODEL=0.5", "-o", "OUT", "--device", URL],
        ["merge", "MODEL", URL, "-o", "OUT", "--weights-from", URL, "--model-type", "decoder"],
        ["merge", f"{URL}.yaml", "-o", "OUT"],
        ["plan", f"{URL}=0.5", "MODEL=0.5"],
        ["score", URL, "MODEL", "--data", URL, "--model-type", "decoder"],
        ["status", URL, "--json"],
        ["verify", URL, "--json"],
        ["verify", "MODEL", "--recompute", "--source", URL],
        ["verify", "MODEL", "--recompute", "--source", f"a={URL}"],
    ],
)
def test_no_command_tells_a_secret(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    model = str(save_model(tmp_path / "model", random_model(1)))
    filled = [word.replace("MODEL", model).replace("OUT", str(tmp_path / "out")) for word in words]
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, filled)
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit)
    assert "s3cr3t" not in result.output + result.stderr
    is_told = "***@host" in result.output + result.stderr
    assert is_told or {"decoder", f"{URL}={URL}", f"a={URL}"} & set(words)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_recipe_tells_no_secret(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    model = save_model(tmp_path / "model", random_model(1))
    models = [{"model": each, "parameters": {"weight": 0.5}} for each in (URL, str(model))]
    recipe.write_text(json.dumps({"models": models}))
    with pytest.raises(shardmix.SourceError, match=r"^https://\*\*\*@host/org/name: no such"):
        shardmix.plan_merge(recipe)
    recipe.write_text(json.dumps({"models": models, URL: 1}))
    with pytest.raises(shardmix.RecipeError) as caught:
        shardmix.plan_merge(recipe)
    assert "s3cr3t" not in str(caught.value)


def test_hubs_warning_tells_no_secret(monkeypatch, caplog):
    """A warning of the Hub tells no secret."""

    def fail(*_, **__):
        raise OSError(f"cannot reach {URL}")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_cached", lambda *_, **__: None)
    with pytest.raises(shardmix.SourceError, match=r"cannot reach https://\*\*\*@host"):
        resolve("org/name")
