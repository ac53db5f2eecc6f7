"""New tokens in a tokenizer's files: what is spliced is what JSON would have."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmix.conventions.tokenizer_splices import EDITED_NAMES, splices
from shardmix.conventions.vocabularies import AddedToken
from shardmix.errors import SourceError

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)


def spliced(name, content, added, entries):
    found, end = b"", 0
    for splice in splices(name, content, added, entries):
        assert splice.name == name
        found += content[end : splice.offset] + splice.text.encode()
        end = splice.offset
    return found + content[end:]


@given(
    own=st.lists(texts, unique=True, max_size=5),
    new=st.lists(texts, unique=True, max_size=4),
    more=st.lists(texts, unique=True, max_size=4),
    indent=st.sampled_from([None, 0, 2]),
    is_ascii=st.booleans(),
)
def test_splices_are_what_json_would_have(own, new, more, indent, is_ascii):
    """For any tokens and any way to write the file."""
    vocab = {text: number for number, text in enumerate(own)}
    old = [msgspec.to_builtins(AddedToken(number, text)) for number, text in enumerate(own)]
    added = [AddedToken(number, text, special=True) for number, text in enumerate(new, start=50)]
    ids = {token.content: token.id for token in added}
    entries = {text: number for number, text in enumerate(more, start=90)} | ids if more else {}
    flags = {str(token.id): msgspec.to_builtins(token) for token in added}
    for entry in flags.values():
        del entry["id"]
    kept = {"1": {"content": "x"}} if own else {}
    before = {
        "tokenizer.json": {"added_tokens": old, "model": {"vocab": vocab, "merges": []}, "z": 1},
        "tokenizer_config.json": {"a": [1], "added_tokens_decoder": kept, "b": {}},
        "added_tokens.json": vocab,
        "vocab.json": vocab,
    }
    assert set(before) == set(EDITED_NAMES)
    after = {
        "tokenizer.json": {
            "added_tokens": [*old, *map(msgspec.to_builtins, added)],
            "model": {"vocab": {**vocab, **entries}, "merges": []},
            "z": 1,
        },
        "tokenizer_config.json": {"a": [1], "added_tokens_decoder": kept | flags, "b": {}},
        "added_tokens.json": {**vocab, **ids},
        "vocab.json": {**vocab, **{k: v for k, v in entries.items() if k not in ids}},
    }
    for name, content in before.items():
        encoded = json.dumps(content, indent=indent, ensure_ascii=is_ascii).encode()
        assert json.loads(spliced(name, encoded, added, entries)) == after[name]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"added_tokens": null}', b'{"added_tokens": 7, "model": {}}']
)
def test_what_is_no_tokenizer_is_refused(content):
    with pytest.raises(SourceError, match=r"tokenizer\.json: is not a tokenizer's"):
        splices("tokenizer.json", content, [AddedToken(1, "x")], {})
