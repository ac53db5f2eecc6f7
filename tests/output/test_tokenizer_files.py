"""Tokenizers of outputs: what they make of texts, by the tokenizers library and transformers."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

import shardmix
from shardmix.errors import SourceChangedError
from tests.support.models import random_tensor, save_model
from tests.support.sampling import examples
from tests.support.vocabularies import EMBEDDING, LLAMA, NORM, WIDTH

transformers = pytest.importorskip("transformers")

ONE = ["hello world, the quick brown fox jumps over the lazy dog", "she sells sea shells"] * 3
TWO = ["lorem ipsum dolor sit amet consectetur", "the brown dog dolor"] * 3
TEXTS = [*ONE[:2], *TWO[:2], "singing héllo 猫 \n\t x", "", "a  b   c"]


def byte_level(texts, size=290):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def word_piece(texts, size=60):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def unigram(texts, size=60):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=["<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


KINDS = {"bpe": byte_level, "wordpiece": word_piece, "unigram": unigram}


def save(folder, tokenizer, added=()):
    """Save a model with this tokenizer, in the files that transformers writes."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_tokens(list(added))
    rows = tokenizer.get_vocab_size()
    tensors = {
        EMBEDDING: random_tensor((rows, WIDTH), seed=rows),
        NORM: random_tensor((WIDTH,), seed=1),
    }
    save_model(
        folder,
        tensors,
        config={**LLAMA, "vocab_size": rows, "tie_word_embeddings": True, "num_attention_heads": 1},
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(folder)
    return tokenizer


def merged(tmp_path, *names, **options):
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    models = [(str(tmp_path / name), 1 / len(names)) for name in names]
    shardmix.merge(models, out, **options)
    own = Tokenizer.from_file(str(out / "tokenizer.json"))
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    assert loaded.get_vocab() == own.get_vocab()
    return own, loaded


def encoded(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_are_united(tmp_path, kind):
    """Of one vocabulary: each is found in texts as its model finds it; other texts stay."""
    trained = KINDS[kind](ONE)
    first = save(tmp_path / "a", trained, ["<|x|>", AddedToken("<|y|>", special=True)])
    strips = AddedToken("<|z|>", lstrip=True, special=True)
    second = save(tmp_path / "b", trained, [AddedToken("<|y|>", special=True), strips, "word"])
    own, loaded = merged(tmp_path, "a", "b", tokenizer_source="union")
    size = first.get_vocab_size()
    assert own.get_vocab() == {**first.get_vocab(), "<|z|>": size, "word": size + 1}
    for text in TEXTS:
        assert own.encode(text).ids == encoded(loaded, text) == first.encode(text).ids
    names = {number: token for token, number in second.get_vocab().items()}
    for text in ("hello  <|z|> world", "hello <|y|><|z|>", "keyword <|z|>"):
        wanted = [own.token_to_id(names[number]) for number in second.encode(text).ids]
        assert own.encode(text).ids == wanted == encoded(loaded, text)
    assert loaded.added_tokens_decoder[size].lstrip
    assert loaded.added_tokens_decoder[size].special
    assert loaded.chat_template == "{{ messages }}"


def test_apart_trained_bpe_splits_as_base(tmp_path):
    """Entries of another byte-level BPE get ids and rows, and no text is split into them."""
    first = save(tmp_path / "a", byte_level(ONE), ["<|x|>"])
    second = save(tmp_path / "b", byte_level(TWO), ["<|y|>", "<|x|>"])
    own, loaded = merged(tmp_path, "a", "b", tokenizer_source="union")
    assert own.get_vocab().items() >= first.get_vocab().items()
    assert own.get_vocab().keys() == first.get_vocab().keys() | second.get_vocab().keys()
    assert sorted(own.get_vocab().values()) == list(range(own.get_vocab_size()))
    for text in [*TEXTS, "hello <|x|>dolor"]:
        assert own.encode(text).ids == encoded(loaded, text) == first.encode(text).ids
        assert loaded.decode(encoded(loaded, text)) == text
    assert own.encode("<|y|>").ids == [own.token_to_id("<|y|>")]
    only = sorted(second.get_vocab().keys() - first.get_vocab().keys() - {"<|y|>"})
    assert only
    assert [own.id_to_token(own.token_to_id(token)) for token in only] == only


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_other_apart_trained_is_refused(tmp_path, kind):
    """With what to use; base and a model map what they share, and split as those."""
    first = save(tmp_path / "a", KINDS[kind](ONE))
    second = save(tmp_path / "b", KINDS[kind](TWO))
    with pytest.raises(shardmix.MismatchError, match=r"learned apart: .*use base, or the model"):
        merged(tmp_path, "a", "b", tokenizer_source="union")
    for source, tokenizer in (("base", first), (str(tmp_path / "b"), second)):
        own, loaded = merged(tmp_path, "a", "b", tokenizer_source=source)
        assert own.get_vocab() == tokenizer.get_vocab()
        for text in TEXTS:
            assert own.encode(text).ids == encoded(loaded, text) == tokenizer.encode(text).ids


@settings(
    max_examples=examples(6),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_bpe_splits_as_base(tmp_path, data):
    """For any texts that two byte-level vocabularies were learned from, and any text to split."""
    words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
    learned = [data.draw(st.lists(words, min_size=1, max_size=6)) for _ in range(2)]
    for name, texts in zip("ab", learned, strict=True):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        save(tmp_path / name, byte_level(texts * 3, 275), [f"<|{name}|>"])
    first, second = (Tokenizer.from_file(str(tmp_path / name / "tokenizer.json")) for name in "ab")
    own, loaded = merged(tmp_path, "a", "b", tokenizer_source="union")
    assert own.get_vocab().items() >= first.get_vocab().items()
    assert own.get_vocab().keys() == first.get_vocab().keys() | second.get_vocab().keys()
    assert sorted(own.get_vocab().values()) == list(range(own.get_vocab_size()))
    for text in (*learned[0], *learned[1], data.draw(words)):
        assert own.encode(text).ids == encoded(loaded, text) == first.encode(text).ids


@pytest.mark.parametrize("change", [{"ignore_merges": True}, {"end_of_word_suffix": "</w>"}])
def test_words_looked_up_whole_are_refused(tmp_path, change):
    """As with `ignore_merges`: a new entry would be found in texts."""
    save(tmp_path / "b", byte_level(TWO))
    trained = json.loads(byte_level(ONE).to_str())
    trained["model"] |= change
    save(tmp_path / "a", Tokenizer.from_str(json.dumps(trained)))
    with pytest.raises(shardmix.MismatchError, match="learned apart"):
        merged(tmp_path, "a", "b", tokenizer_source="union")


def test_single_characters_are_refused(tmp_path):
    """They need no merges: texts with bytes that the base lacks would be split otherwise."""
    save(tmp_path / "b", byte_level(TWO))
    trained = json.loads(byte_level(ONE).to_str())
    vocab = {token: number for token, number in trained["model"]["vocab"].items() if token != "Z"}
    trained["model"]["vocab"] = {token: number for number, token in enumerate(vocab)}
    save(tmp_path / "a", Tokenizer.from_str(json.dumps(trained)))
    with pytest.raises(shardmix.MismatchError, match="learned apart"):
        merged(tmp_path, "a", "b", tokenizer_source="union")


def test_a_changed_tokenizer_is_an_error(tmp_path, monkeypatch):
    """Rows were mapped by the tokenizer as it was opened."""
    save(tmp_path / "a", byte_level(ONE), ["<|x|>"])
    save(tmp_path / "b", byte_level(ONE), ["<|y|>"])
    from shardmix.output import model_folder

    write = model_folder.write_auxiliary_files

    def late(plan, folder):
        path = tmp_path / "a" / "tokenizer.json"
        path.write_text(path.read_text() + " ")
        write(plan, folder)

    monkeypatch.setattr(model_folder, "write_auxiliary_files", late)
    with pytest.raises(SourceChangedError, match=r"tokenizer.json: has changed"):
        merged(tmp_path, "a", "b", tokenizer_source="union")


def test_logits_are_the_permuted_models(tmp_path):
    """A model with permuted tokens computes what it did, token by token."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    words = [f"w{number}" for number in range(64)]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3)).tolist()
    models = []
    for number, its in enumerate((words, [words[at] for at in order])):
        torch.manual_seed(number)
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / "ab"[number])
        vocab = {word: at for at, word in enumerate(its)}
        level = Tokenizer.from_str(
            json.dumps({"model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}})
        )
        level.save(str(tmp_path / "ab"[number] / "tokenizer.json"))
        models.append(model)
    out = tmp_path / "out"
    shardmix.merge(
        {str(tmp_path / "a"): 0.0, str(tmp_path / "b"): 1.0}, out, tokenizer_source="base"
    )
    loaded = transformers.LlamaForCausalLM.from_pretrained(out)
    place = {word: at for at, word in enumerate(words[at] for at in order)}
    its_ids = torch.tensor([place[word] for word in words])
    ids = torch.tensor([[5, 9, 63, 0, 17, 5]])
    with torch.no_grad():
        wanted = models[1](its_ids[ids]).logits[..., its_ids]
        assert torch.equal(loaded(ids).logits, wanted)
    assert loaded.config.eos_token_id == 2
