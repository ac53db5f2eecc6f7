"""Credentials of the Hub's address, proxies and tokens: used, and never told.

Every scenario is a process of its own, as in test_hub.py.
"""

import json
from urllib.parse import quote

import pytest

from tests.sources.test_hub import Machine, hub, machine, model, weights  # noqa: F401 - fixtures
from tests.support.hub_server import EXPIRED_TOKEN, HubServer
from tests.support.models import random_model, save_model
from tests.support.sampling import sample

USER, PASSWORD = "us3r", "s3cr3t/w:@rd"
SECRETS = ("us3r", "s3cr3t", "w:@rd", "w%3A%40rd", quote(PASSWORD, safe=""))
SHOW = """
import sys, time
time.sleep = lambda seconds: None
from shardmix.cli import main
sys.argv = ["shardmix", *sys.argv[1:]]
main()
"""


def with_credentials(url: str, password: str = quote(PASSWORD, safe="")) -> str:
    return url.replace("://", f"://{USER}:{password}@")


def told(machine: Machine, *words: str, **settings: str) -> tuple[int, str]:  # noqa: F811
    """Run the command line; return its status and all that it printed."""
    done = machine.run("-c", SHOW, *words, **settings)
    text = done.stdout + done.stderr
    assert "Traceback" not in text
    assert [secret for secret in SECRETS if secret in text] == [], text
    return done.returncode, text


@pytest.mark.parametrize("debug", ["", "1"])
def test_a_merge_leaves_no_secret_anywhere(hub, machine, tmp_path, debug):  # noqa: F811
    for name in ("one", "two"):
        hub.push(f"org/{name}", model(1.0))
    words = ["merge", "org/one=0.5", "org/two=0.5", "-o", str(tmp_path / "out"), "--record-paths"]
    profile = ["--profile", str(tmp_path / "profile.json"), "--json"]
    endpoint = with_credentials(hub.url)
    status, text = told(machine, *words, *profile, HF_ENDPOINT=endpoint, HF_DEBUG=debug)
    assert status == 0, text
    assert "/org/one/resolve" in " ".join(request.path for request in hub.requests)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    written = [path for path in written if "hf-home" not in path.parts]
    assert len(written) >= 5
    for path in written:
        content = path.read_bytes()
        assert not [secret for secret in SECRETS if secret.encode() in content], path


def broken(hub: HubServer) -> None:  # noqa: F811
    hub.break_off("model.safetensors", after=10)


def down(hub: HubServer) -> None:  # noqa: F811
    hub.is_down = True


TROUBLES = [
    (broken, {}),
    (broken, {"HF_DEBUG": "1"}),
    (down, {}),
    (down, {"HF_DEBUG": "1"}),
    (HubServer.stop, {}),
    (None, {"HF_HUB_OFFLINE": "1"}),
    (None, {"HTTPS_PROXY": "http://us3r:s3cr3t@127.0.0.1:9", "HTTP_PROXY": "us3r:s3cr3t@[::1"}),
    (None, {"ALL_PROXY": "socks9://us3r:s3cr3t@127.0.0.1:9"}),
    (None, {"HTTP_PROXY": "http://us3r:s3cr3t@127.0.0.1:9"}),
]


@pytest.mark.parametrize(
    ("trouble", "settings"), sample("troubles of the Hub", TROUBLES, 5, kinds=lambda case: case[:1])
)
def test_troubles_tell_no_secret(hub, machine, trouble, settings):  # noqa: F811
    hub.push("org/name", model(1.0))
    if trouble is not None:
        trouble(hub)
    endpoint = with_credentials(hub.url)
    status, text = told(machine, "inspect", "org/name", "--json", HF_ENDPOINT=endpoint, **settings)
    assert status == 1, text
    assert "org/name: " in text


@pytest.mark.parametrize("password", [PASSWORD, "s3cr3t/w:@rd#x", "s3cr3t w:@rd", "12/s3cr3t"])
def test_malformed_address_tells_no_secret(hub, machine, password):  # noqa: F811
    """An address that is none tells no secret. A password that nobody has encoded makes it one."""
    endpoint = with_credentials(hub.url, password)
    for address in (endpoint, endpoint.removeprefix("http://")):
        status, text = told(machine, "inspect", "org/name", HF_ENDPOINT=address)
        assert status == 1, text
        assert "error: HF_ENDPOINT: " in text
        assert "***@" in text
        assert f"127.0.0.1:{hub.url.rpartition(':')[2]} is no URL of a Hub" in text


def test_what_needs_no_hub_asks_for_none(machine, tmp_path):  # noqa: F811
    """An address that is none is no trouble then, but to those who import the Hub's library."""
    place = save_model(tmp_path / "model", random_model(1))
    words = ["merge", f"{place}=0.5", f"{place}=0.5", "-o", str(tmp_path / "out")]
    endpoint = with_credentials("http://host", PASSWORD)
    status, text = told(machine, *words, "--max-shard-size", "1KB", HF_ENDPOINT=endpoint)
    assert status == 0, text
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"input": "a", "output": "b"}')
    words = ["score", str(place), "--data", str(examples), "--model-type", "decoder"]
    status, text = told(machine, *words, HF_ENDPOINT=endpoint)
    assert status == 1, text
    assert "error: HF_ENDPOINT: ***@host is no URL of a Hub" in text


def test_a_token_is_told_by_nobody(hub, machine):  # noqa: F811
    hub.push("org/name", model(1.0))
    for debug in ("", "1"):
        settings = {"HF_TOKEN": EXPIRED_TOKEN, "HF_DEBUG": debug}
        status, text = told(machine, "inspect", "org/name", "--json", **settings)
        assert status == 1, text
        assert "denies access" in text
        assert EXPIRED_TOKEN not in text


def test_a_warning_tells_no_secret(hub, machine):  # noqa: F811
    """The copy in the cache is used, and the log says why."""
    hub.push("org/name", model(1.0))
    assert machine.find("org/name")
    hub.is_down = True
    endpoint = with_credentials(hub.url)
    status, text = told(machine, "inspect", "org/name", HF_ENDPOINT=endpoint, HF_DEBUG="1")
    assert status == 0, text
    assert "the copy in the local cache is used" in text


def test_the_library_tells_no_secret(hub, machine):  # noqa: F811
    """Also of an error that somebody else prints with all that caused it."""
    hub.push("org/name", {**model(1.0), "more": weights(1.0)}, token="x", private=True)
    program = """
import json, shardmix, sys, traceback
try:
    shardmix.inspect("org/name")
except shardmix.SourceError as error:
    print(json.dumps([str(error), repr(error), "".join(traceback.format_exception(error))]))
"""
    done = machine.run("-c", program, HF_ENDPOINT=with_credentials(hub.url))
    assert done.returncode == 0, done.stderr
    assert "org/name" in json.loads(done.stdout)[0]
    for secret in SECRETS:
        assert secret not in done.stdout + done.stderr
