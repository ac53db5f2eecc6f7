"""A Hub that means harm: names that lead elsewhere, and texts that a terminal would obey."""

import json

import pytest

from tests.sources.test_hub import INDEX, Machine, hub, machine, model, sharded_model
from tests.support.hub_server import EXPIRED_TOKEN, HubServer, _Answer

__all__ = ["hub", "machine"]  # fixtures


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("1_Pooling/../../../../escaped.json", "lies outside the model's folder"),
        ("1_Pooling/..\\..\\escaped.json", "lies outside the model's folder"),
        ("1_Pooling/a\x1b[2J.json", "'1_Pooling/a\\x1b[2J.json', which has control characters"),
        ("a\nerror: b.json", "'a\\nerror: b.json', which has control characters"),
        ("\u202enosj.txt", "which has control characters"),
    ],
)
def test_harmful_names_fetch_nothing(
    hub: HubServer, machine: Machine, tmp_path, name: str, finding: str
) -> None:
    """Files of harmful names are refused, and nothing is fetched."""
    hub.push("org/harmful", model() | {name: b"{}"})
    (message,) = machine.refusals("org/harmful")
    assert message.startswith("org/harmful: has a file ")
    assert finding in message
    assert hub.fetched() == []
    assert not list(tmp_path.rglob("escaped.json"))


@pytest.mark.parametrize("name", ["../../../escaped.safetensors", "/tmp/escaped.safetensors"])
def test_index_leading_out_fetches_nothing(
    hub: HubServer, machine: Machine, tmp_path, name: str
) -> None:
    """An index that leads elsewhere is refused before any weights are fetched."""
    hub.push("org/harmful", sharded_model(name))
    (message,) = machine.refusals("org/harmful")
    assert message.startswith("org/harmful: ")
    assert "which lies outside the model's folder" in message
    assert hub.fetched() == [INDEX]
    assert not list(tmp_path.rglob("escaped.safetensors"))


def test_hubs_words_are_one_harmless_line(
    hub: HubServer, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the Hub says is told in one line that no terminal obeys."""
    body = json.dumps({"error": "asked \x1b[2J\nerror: \u202egnp"}).encode()
    monkeypatch.setattr(
        "tests.support.hub_server._refusal", lambda status, *_: _Answer(status, body)
    )
    hub.push("org/gated", model())
    done = machine.run("-m", "shardmix", "inspect", "org/gated", HF_TOKEN=EXPIRED_TOKEN)
    assert done.returncode == 1
    assert done.stderr.startswith("error: org/gated: ")
    assert "asked \\x1b[2J error: \\u202egnp" in done.stderr
    assert done.stderr[:-1].isprintable()
