"""Pairs of tokenizers that differ in one thing each, and what is to be said of them."""

import base64
import json
import os

import pytest

import shardmix
from shardmix.errors import MismatchError
from shardmix.matching.tokenizers import TokenizerFolder, tokenizer_differences
from tests.support.models import random_model, save_model

WORDS = ["<unk>", "<s>", "</s>", *"abcdefghij"]
NUM_ROWS = 20


def added(*pairs):
    return [{"id": number, "content": token, "special": True} for number, token in pairs]


def fast(words=WORDS, model="BPE", *, tokens=(), **changes):
    """Return a tokenizer.json."""
    vocab = {word: number for number, word in enumerate(words)}
    body = {"type": model, "vocab": vocab, "merges": [["a", "b"], ["c", "d"]]}
    body |= changes.pop("body", {})
    whole = {"version": "1.0", "added_tokens": added(*tokens), "normalizer": None, "model": body}
    return {"tokenizer.json": json.dumps({**whole, **changes})}


def unigram(scores=(0.0, -1.0), words=WORDS):
    vocab = [[word, scores[number % len(scores)]] for number, word in enumerate(words)]
    return fast(body={"type": "Unigram", "vocab": vocab, "merges": None})


def settings(**content):
    return {"tokenizer_config.json": json.dumps(content)}


def pieces(words=WORDS):
    """Return a SentencePiece model: field 1 of each message is a piece, 2 of it a score."""
    encoded = b""
    for word in words:
        text = word.encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + bytes(4)
        encoded += b"\x0a" + bytes([len(piece)]) + piece
    return {"tokenizer.model": encoded + b"\x12\x02\x18\x01"}


def ranks(words=WORDS):
    lines = [b"%b %d" % (base64.b64encode(word.encode()), i) for i, word in enumerate(words)]
    return {"own.tiktoken": b"\n".join(lines) + b"\n"}


def tekken(words=WORDS, special=()):
    """Return a tekken.json, in which special tokens come before all others."""
    encoded = [base64.b64encode(word.encode()).decode() for word in words]
    vocab = [{"rank": i, "token_bytes": word, "token_str": "x"} for i, word in enumerate(encoded)]
    specials = [{"rank": i, "token_str": token} for i, token in enumerate(special)]
    config = {"default_num_special_tokens": len(special)} if special else {}
    return {
        "tekken.json": json.dumps({"config": config, "vocab": vocab, "special_tokens": specials})
    }


def lines(words=WORDS):
    return {"vocab.txt": "".join(f"{word}\n" for word in words)}


def numbers(words=WORDS, merges="a b\n"):
    vocab = {word: number for number, word in enumerate(words)}
    return {"vocab.json": json.dumps(vocab), "merges.txt": f"#version: 0.2\n{merges}"}


def plain_json(files):
    """Return a tokenizer.json as programs write it that don't escape characters."""
    return json.dumps(json.loads(files["tokenizer.json"]), ensure_ascii=False)


SWAPPED = [*WORDS[:3], "b", "a", *WORDS[5:]]
LOWER = {"normalizer": {"type": "Lowercase"}}
SPACES = {"type": "Metaspace", "replacement": "▁"}

# Kinds: error; ids, text, settings (warnings of these); tokenizer (another warning).
PAIRS = {
    "same": (fast(), fast(), []),
    "another order": (fast(), fast(SWAPPED), ["error"]),
    "another word": (fast(), fast([*WORDS[:-1], "z"]), ["error"]),
    "another order of lines": (lines(), lines(SWAPPED), ["error"]),
    "another order of numbers": (numbers(), numbers(SWAPPED), ["error"]),
    "another order of pieces": (pieces(), pieces(SWAPPED), ["error"]),
    "another order of ranks": (ranks(), ranks(SWAPPED), ["error"]),
    "another order in tekken": (tekken(), tekken(SWAPPED), ["error"]),
    "another order of scored words": (unigram(), unigram(words=SWAPPED), ["error", "text"]),
    "formatting": (fast(), {"tokenizer.json": fast()["tokenizer.json"].replace(" ", "\n ")}, []),
    "escapes": (
        fast(["<s>", "▁é"]),
        {"tokenizer.json": json.dumps(json.loads(fast(["<s>", "▁é"])["tokenizer.json"]), indent=1)},
        [],
    ),
    "escapes or not": (
        fast(["<s>", '▁é"\\']),
        {
            "tokenizer.json": json.dumps(
                json.loads(fast(["<s>", '▁é"\\'])["tokenizer.json"]), ensure_ascii=False
            )
        },
        [],
    ),
    "order in the file": (
        fast(),
        fast(body={"vocab": {word: i for i, word in reversed(list(enumerate(WORDS)))}}),
        [],
    ),
    "line breaks of Windows": (
        lines(),
        {"vocab.txt": lines()["vocab.txt"].replace("\n", "\r\n")},
        [],
    ),
    "no last line break": (lines(), {"vocab.txt": lines()["vocab.txt"].removesuffix("\n")}, []),
    "other added tokens": (
        fast(tokens=[(13, "<x>")]),
        fast(tokens=[(13, "<y>")]),
        ["error"],
    ),
    "added tokens in another order": (
        fast(tokens=[(13, "<x>"), (14, "<y>")]),
        fast(tokens=[(13, "<y>"), (14, "<x>")]),
        ["error"],
    ),
    "added tokens of one": (fast(), fast(tokens=[(13, "<x>")]), ["ids"]),
    "a token for a reserved one": (
        fast(tokens=[(13, "<|reserved_special_token_2|>")]),
        fast(tokens=[(13, "<|eom_id|>")]),
        ["ids"],
    ),
    "a token for an unused one": (
        lines([*WORDS, "[unused1]"]),
        lines([*WORDS, "[ENT]"]),
        ["ids"],
    ),
    "added in another file": (
        fast(tokens=[(13, "<x>")]),
        {**fast(), "added_tokens.json": '{"<x>": 13}'},
        [],
    ),
    "added by the config": (
        {**pieces(), **settings(added_tokens_decoder={"13": {"content": "<x>"}})},
        {**pieces(), **settings(added_tokens_decoder={"13": {"content": "<y>"}})},
        ["error"],
    ),
    "added in a file of its own": (
        {**numbers(), "added_tokens.json": '{"<x>": 13}'},
        {**numbers(), "added_tokens.json": '{"<x>": 14}'},
        ["ids", "ids"],
    ),
    "more words": (fast(), fast([*WORDS, "z"]), ["ids"]),
    "merges": (fast(), fast(body={"merges": [["a", "b"], ["e", "f"]]}), ["text"]),
    "fewer merges": (fast(), fast(body={"merges": [["a", "b"]]}), ["text"]),
    "merges written as words": (fast(), fast(body={"merges": ["a b", "c d"]}), []),
    "other merges written as words": (fast(), fast(body={"merges": ["a b"]}), ["text"]),
    "merges.txt": (numbers(), numbers(merges="c d\n"), ["text"]),
    "scores": (unigram(), unigram((0.0, -2.0)), ["text"]),
    "kind of model": (fast(), fast(model="WordLevel"), ["text"]),
    "byte fallback": (fast(), fast(body={"byte_fallback": True}), ["text"]),
    "escaped merges": (
        fast(body={"merges": [["▁", "é"]]}),
        {"tokenizer.json": plain_json(fast(body={"merges": [["▁", "é"]]}))},
        [],
    ),
    "other escaped merges": (
        fast(body={"merges": [["▁", "é"]]}),
        {"tokenizer.json": plain_json(fast(body={"merges": [["▁", "è"]]}))},
        ["text"],
    ),
    "escaped words with scores": (
        unigram(words=[*WORDS, "▁é"]),
        {"tokenizer.json": plain_json(unigram(words=[*WORDS, "▁é"])).replace("-1.0", "-1.00")},
        [],
    ),
    "other scores": (unigram(), unigram((0.0, -1.5)), ["text"]),
    "merges.txt without a version": (
        {**numbers(), "merges.txt": "#version: 0.2\na b\n"},
        {**numbers(), "merges.txt": "a b"},
        [],
    ),
    "merges.txt of Windows": (
        {**numbers(), "merges.txt": "#version: 0.2\na b\nc d\n"},
        {**numbers(), "merges.txt": "#version: 0.2\r\na b\r\nc d\r\n"},
        [],
    ),
    "special tokens of tekken": (
        tekken(special=["<s>", "</s>"]),
        tekken(special=["</s>", "<s>"]),
        ["error"],
    ),
    "more special tokens of tekken": (
        tekken(special=["<s>", "</s>"]),
        tekken(special=["<s>"]),
        ["error"],
    ),
    "stated default": (fast(), fast(body={"byte_fallback": False, "ignore_merges": False}), []),
    "normalizer": (fast(), fast(**LOWER), ["text"]),
    "pre-tokenizer": (fast(), fast(pre_tokenizer={"type": "Whitespace"}), ["text"]),
    "post-processor": (fast(), fast(post_processor={"type": "ByteLevel"}), ["text"]),
    "older metaspace": (
        fast(pre_tokenizer={**SPACES, "add_prefix_space": True, "str_rep": "▁"}),
        fast(pre_tokenizer={**SPACES, "prepend_scheme": "always", "split": True}),
        [],
    ),
    "older byte level": (
        fast(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False}),
        fast(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}),
        [],
    ),
    "truncation": (fast(), fast(truncation={"max_length": 8}, padding=None), []),
    "decoder": (fast(), fast(decoder={"type": "ByteLevel"}), []),
    "end of sequence": (
        {**fast(), **settings(eos_token="</s>")},
        {**fast(), **settings(eos_token={"content": "<s>"})},
        ["settings"],
    ),
    "end of sequence, written twice": (
        {**fast(), **settings(eos_token="</s>")},
        {**fast(), **settings(), "special_tokens_map.json": '{"eos_token": {"content": "</s>"}}'},
        [],
    ),
    "chat template": ({**fast(), **settings(chat_template="x")}, fast(), ["settings"]),
    "chat template in a file": (
        {**fast(), **settings(chat_template="x")},
        {**fast(), "chat_template.jinja": "x"},
        [],
    ),
    "lower case": (
        {**lines(), **settings(do_lower_case=True)},
        {**lines(), **settings(do_lower_case=False)},
        ["text"],
    ),
    "length": (
        {**fast(), **settings(model_max_length=8, tokenizer_class="LlamaTokenizer")},
        {**fast(), **settings(model_max_length=9, tokenizer_class="LlamaTokenizerFast")},
        [],
    ),
    "lines and json": (lines(), fast(model="WordPiece"), []),
    "lines and another json": (lines(), fast(SWAPPED), ["error"]),
    "pieces and json": (pieces(), fast(), []),
    "pieces and json with an offset": (pieces(WORDS[1:]), fast(), ["tokenizer"]),
    "pieces by another name": (pieces(), {"spiece.model": pieces()["tokenizer.model"]}, []),
    "ranks and json": (ranks(), fast(), ["tokenizer"]),
    "none in the second": (fast(), {}, []),
    "none in the first": ({}, fast(), ["tokenizer"]),
    "none": ({}, {}, []),
    "no json": (fast(), {"tokenizer.json": "{"}, ["tokenizer"]),
    "a pointer of Git LFS": (fast(), {"tokenizer.json": "version https://git-lfs"}, ["tokenizer"]),
    "no json beside": (fast(), {**fast(), "tokenizer_config.json": "{"}, ["tokenizer"]),
    "no pieces": (pieces(), {"tokenizer.model": b"\xff" * 40}, ["tokenizer"]),
    "a huge id": (fast(), fast(body={"vocab": {"a": 10**30}}), None),
    "a negative id": (fast(), fast(tokens=[(-1, "<x>")]), []),
}


def write(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def kinds(one, other):
    folders = [TokenizerFolder(path.name, path) for path in (one, other)]
    found = tokenizer_differences(folders, num_rows=NUM_ROWS)
    return [
        "error" if difference.is_refused else difference.key.removeprefix("tokenizer.")
        for difference in found
    ]


@pytest.mark.parametrize("name", PAIRS)
def test_one_thing_is_judged(tmp_path, name):
    """In either order, but for a tokenizer that only one has."""
    one, other, expected = PAIRS[name]
    a, b = write(tmp_path / "a", one), write(tmp_path / "b", other)
    found = kinds(a, b)
    if expected is not None:
        assert found == expected
    if one and other:
        assert sorted(kinds(b, a)) == sorted(found)


def test_tokens_beyond_the_rows_are_told(tmp_path):
    """Of the output's tokenizer: another's are of no use to anybody."""
    a, b = write(tmp_path / "a", fast()), write(tmp_path / "b", fast(tokens=[(NUM_ROWS, "<x>")]))
    assert kinds(a, b) == []
    folders = [TokenizerFolder(path.name, path) for path in (b, a)]
    (found,) = tokenizer_differences(folders, num_rows=NUM_ROWS)
    assert found.finding == "tokenizer: b has ids up to 20, and the embedding has 20 rows"


@pytest.mark.parametrize("way", ["tokenizer.json", "vocab.txt", "added_tokens.json", "large"])
def test_equal_tokenizers_may_be_beyond_rows(tmp_path, monkeypatch, way):
    """A large file is not read for that: its added tokens are in smaller ones."""
    more = [*WORDS, *(f"more{number}" for number in range(NUM_ROWS))]
    files = {
        "tokenizer.json": fast(more),
        "vocab.txt": lines(more),
        "added_tokens.json": {**lines(), "added_tokens.json": json.dumps({"<x>": 32})},
        "large": {**fast(), **settings(added_tokens_decoder={"32": {"content": "<x>"}})},
    }[way]
    if way == "large":
        monkeypatch.setattr("shardmix.matching.tokenizers._QUICK_NBYTES", 0)
    folders = [TokenizerFolder(name, write(tmp_path / name, files)) for name in "ab"]
    (found,) = tokenizer_differences(folders, num_rows=NUM_ROWS)
    assert found.finding == "tokenizer: a has ids up to 32, and the embedding has 20 rows"


def test_a_pointer_of_git_lfs_is_told(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    a, b = write(tmp_path / "a", fast()), write(tmp_path / "b", {"tokenizer.json": pointer})
    (found,) = tokenizer_differences([TokenizerFolder(path.name, path) for path in (a, b)])
    assert "is a Git LFS pointer" in found.finding
    assert "git lfs pull" in found.finding


def test_one_id_is_told_in_the_singular(tmp_path):
    a, b = write(tmp_path / "a", fast()), write(tmp_path / "b", fast(tokens=[(13, "<x>")]))
    (found,) = tokenizer_differences([TokenizerFolder(path.name, path) for path in (a, b)])
    assert "id 13 stands for a token in b only" in found.finding


def test_an_error_names_the_tokens(tmp_path):
    a, b = write(tmp_path / "a", fast()), write(tmp_path / "b", fast(SWAPPED))
    (found,) = tokenizer_differences([TokenizerFolder(path.name, path) for path in (a, b)])
    assert found.finding == (
        'tokenizer: 2 ids stand for other tokens: 3 is "a" in a, "b" in b; 4 is "b" in a, "a" in b'
    )


@pytest.mark.parametrize("word", ['"', "\\", '\\"', '"\\\\"', 'a\\"b', "\u0120"])
def test_tokens_of_quotes_are_read(tmp_path, word):
    """As JSON escapes them, and as a SentencePiece model has them."""
    words = [*WORDS, word, "end"]
    a, b = write(tmp_path / "a", fast(words)), write(tmp_path / "b", fast([*WORDS, "end", word]))
    (found,) = tokenizer_differences([TokenizerFolder(path.name, path) for path in (a, b)])
    assert "2 ids stand for other tokens" in found.finding
    plain = {"vocab.txt": "\n".join(words)}
    listed = {"vocab.json": json.dumps({own: number for number, own in enumerate(words)})}
    assert kinds(write(tmp_path / "c", plain), write(tmp_path / "d", listed)) == []


def test_a_token_of_many_quotes_is_read(tmp_path):
    """It takes neither hours nor gigabytes, though its id is none."""
    hostile = json.dumps({'"' * 900_000: 12345678901, **dict.fromkeys(WORDS, 1)})
    a, b = write(tmp_path / "a", {"vocab.json": hostile}), write(tmp_path / "b", fast())
    assert "error" in kinds(a, b)


def test_too_many_tokens_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("shardmix.conventions.vocabularies._MOST_TOKENS", len(WORDS))
    a, b = (
        write(tmp_path / "a", {"vocab.txt": "\n" * (len(WORDS) + 1)}),
        write(tmp_path / "b", fast()),
    )
    (found,) = tokenizer_differences([TokenizerFolder(path.name, path) for path in (a, b)])
    assert "more than 13 tokens" in found.finding


def test_lone_ids_are_named_as_ranges(tmp_path):
    more = [(13, "<x>"), (14, "<y>"), (17, "<z>")]
    a, b = write(tmp_path / "a", fast()), write(tmp_path / "b", fast(tokens=more))
    (found,) = tokenizer_differences([TokenizerFolder(path.name, path) for path in (a, b)])
    assert "ids 13-14, 17 stand for tokens in b only" in found.finding


def test_the_odd_one_of_many_is_named(tmp_path):
    folders = [write(tmp_path / name, fast()) for name in "abc"]
    folders.append(write(tmp_path / "odd", fast(SWAPPED)))
    (found,) = tokenizer_differences([TokenizerFolder(path.name, path) for path in folders])
    assert '3 is "a" in a, "b" in odd' in found.finding


def test_link_out_of_a_folder_is_ignored(tmp_path):
    """A link out of a folder is not followed."""
    write(tmp_path / "elsewhere", fast(SWAPPED))
    a, b = write(tmp_path / "a", fast()), write(tmp_path / "b", {})
    (b / "tokenizer.json").symlink_to(tmp_path / "elsewhere" / "tokenizer.json")
    (found,) = tokenizer_differences([TokenizerFolder(path.name, path) for path in (a, b)])
    assert not found.is_refused
    assert "outside the model's folder" in found.finding


def test_a_pipe_is_not_waited_for(tmp_path):
    a, b = write(tmp_path / "a", fast()), write(tmp_path / "b", {})
    os.mkfifo(b / "tokenizer.json")
    (found,) = tokenizer_differences([TokenizerFolder(path.name, path) for path in (a, b)])
    assert "not a regular file" in found.finding


def test_large_tokenizer_is_not_compared(tmp_path):
    """A large one is not compared on a budget."""
    words = [f"word{number}" for number in range(200_000)]
    a, b = write(tmp_path / "a", fast(words)), write(tmp_path / "b", fast(words[::-1]))
    folders = [TokenizerFolder(path.name, path) for path in (a, b)]
    (found,) = tokenizer_differences(folders, max_memory=1)
    assert not found.is_refused
    assert "were not compared" in found.finding
    (found,) = tokenizer_differences(folders)
    assert found.is_refused


def models(tmp_path, one, other):
    pairs = []
    for number, files in enumerate((one, other)):
        folder = save_model(tmp_path / "ab"[number], random_model(number))
        for name, content in files.items():
            (folder / name).write_text(content)
        pairs.append((folder, 0.5))
    return pairs


def test_a_merge_of_other_ids_is_refused(tmp_path):
    pairs = models(tmp_path, fast(), fast(SWAPPED))
    with pytest.raises(MismatchError, match=r"3 is .*--allow-differences tokenizer "):
        shardmix.plan_merge(pairs)
    (warning,) = shardmix.plan_merge(pairs, allow_differences=["tokenizer"]).warnings
    assert "3 is" in warning


def test_a_base_with_other_ids_is_refused(tmp_path):
    """The output's tokenizer must be that of the rows."""
    pairs = models(tmp_path, fast(), fast())
    base = save_model(tmp_path / "base", random_model(3))
    (base / "tokenizer.json").write_text(fast(SWAPPED)["tokenizer.json"])
    with pytest.raises(MismatchError, match="2 ids stand for other tokens"):
        shardmix.plan_merge(pairs, config_from=base)


def test_missing_tokenizer_names_its_remedy(tmp_path):
    """A missing tokenizer is told with its remedy."""
    pairs = models(tmp_path, {}, fast())
    (warning,) = shardmix.plan_merge(pairs).warnings
    assert f"use --config-from {pairs[1][0]}" in warning
    assert shardmix.plan_merge(pairs, config_from=pairs[1][0]).warnings == ()
