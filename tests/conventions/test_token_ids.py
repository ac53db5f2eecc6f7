"""Ids of tokens in configs: which keys name them, and which name something else."""

import pytest

from shardmix.conventions.token_ids import LostId, with_ids, with_sizes


def shifted(number):
    """Return the next id; 9 is of a token that is gone."""
    return None if number == 9 else number + 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"bos_token_id": 1, "eos_token_id": [2, 3]}, {"bos_token_id": 2, "eos_token_id": [3, 4]}),
        ({"pad_token_id": None, "image_token_index": 5}, {"pad_token_id": None,
                                                          "image_token_index": 6}),
        ({"pad_token_id": -1, "eos_token_id": False}, {"pad_token_id": -1, "eos_token_id": False}),
        ({"forced_decoder_ids": [[1, 5], [2, None]]}, {"forced_decoder_ids": [[1, 6], [2, None]]}),
        ({"bad_words_ids": [[5], [6, 7]]}, {"bad_words_ids": [[6], [7, 8]]}),
        ({"lang_to_id": {"<|en|>": 4}}, {"lang_to_id": {"<|en|>": 5}}),
        ({"text_config": {"eos_token_id": 2}}, {"text_config": {"eos_token_id": 3}}),
        ({"decoder": {"bos_token_id": 2}}, {"decoder": {"bos_token_id": 3}}),
        ({"vision_config": {"pad_token_id": 2}}, {"vision_config": {"pad_token_id": 2}}),
        ({"hidden_size": 5, "token_type_ids": 2, "num_tokens": 3},
         {"hidden_size": 5, "token_type_ids": 2, "num_tokens": 3}),
        ({"vision_start_token_id": 4}, {"vision_start_token_id": 5}),
        ({"eos_token_id": "2"}, {"eos_token_id": "2"}),
    ],
)  # fmt: skip
def test_ids_become_others(content, expected):
    found, lost = with_ids(content, shifted)
    assert found == expected
    assert lost == []


def test_lost_ids_are_left_out_and_told():
    content = {"pad_token_id": 9, "suppress_tokens": [1, 9, 2], "text_config": {"eos_token_id": 9}}
    found, lost = with_ids(content, shifted)
    assert found == {
        "pad_token_id": None,
        "suppress_tokens": [2, 3],
        "text_config": {"eos_token_id": None},
    }
    assert set(lost) == {
        LostId("pad_token_id", 9),
        LostId("suppress_tokens", 9),
        LostId("text_config.eos_token_id", 9),
    }
    assert content["suppress_tokens"] == [1, 9, 2]


def test_sizes_change_where_they_count():
    """At the keys named, and in other spellings of the same number; not of pictures' codes."""
    content = {
        "vocab_size": 8,
        "text_config": {"vocab_size": 8, "hidden_size": 8},
        "decoder": {"vocab_size": 7},
        "vision_config": {"vocab_size": 8},
        "padded_vocab_size": 8,
    }
    assert with_sizes(content, ["text_config.vocab_size"], 8, 10) == {
        "vocab_size": 10,
        "text_config": {"vocab_size": 10, "hidden_size": 8},
        "decoder": {"vocab_size": 7},
        "vision_config": {"vocab_size": 8},
        "padded_vocab_size": 10,
    }
    assert with_sizes({}, ["text_config.vocab_size"], None, 3) == {"text_config": {"vocab_size": 3}}
