import json

import pytest

from shardmix.errors import RecipeError
from shardmix.scoring.examples import QueryExample, TextExample, load_examples
from shardmix.scoring.options import check_options

TEXT = {"input": "why", "output": "because"}
QUERY = {"query": "why", "pos": ["because", "so"], "neg": ["no", "yes", "maybe"]}


def load(examples, model_type="decoder", **options):
    return load_examples(examples, check_options(model_type, options))


def file_with(tmp_path, text, name="examples.jsonl"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (json.dumps([TEXT, TEXT]), ["example 1", "example 2"]),
        (json.dumps([TEXT, TEXT], indent=2), ["example 1", "example 2"]),
        (f"{json.dumps(TEXT)}\n\n{json.dumps(TEXT)}\n", ["line 1", "line 3"]),
        (f"{json.dumps(TEXT)}\r\n{json.dumps(TEXT)}", ["line 1", "line 2"]),
        (json.dumps(TEXT), ["example 1"]),
        (json.dumps({"one": [TEXT], "two": [TEXT, TEXT]}), ["one[1]", "two[1]", "two[2]"]),
        ("﻿" + json.dumps([TEXT]), ["example 1"]),
    ],
)
def test_a_file_is_a_list_or_lines_or_tasks(tmp_path, text, names):
    path = file_with(tmp_path, text)
    loaded = load(path)
    assert [example.name for example in loaded] == [f"{path}: {name}" for name in names]
    assert {(example.input, example.output) for example in loaded} == {("why", "because")}


def test_a_list_of_mappings_will_do_too():
    assert load([TEXT]) == (TextExample("example 1", "why", "because"),)


def test_first_of_several_positives_counts():
    """Of several positives, the first counts."""
    (example,) = load([QUERY], "encoder")
    assert example == QueryExample("example 1", "why", "because", ("no", "yes", "maybe"))


def test_negatives_are_drawn_by_a_seed():
    many = {**QUERY, "neg": [str(n) for n in range(50)]}
    draws = {load([many] * 3, "encoder", neg_number=5, seed=seed) for seed in (0, 0, 1)}
    assert len(draws) == 2
    for example in draws.pop():
        assert len(set(example.negatives)) == 5
        assert set(example.negatives) <= set(many["neg"])


def test_fewer_negatives_are_all_used():
    """Fewer negatives than asked for are all used."""
    (example,) = load([QUERY], "reranker", neg_number=9)
    assert example.negatives == ("no", "yes", "maybe")


def test_batch_gives_a_query_its_negatives():
    """An encoder's query may have only its batch for negatives."""
    bare = {"query": "why", "pos": ["because"]}
    assert load([bare, QUERY], "encoder")[0].negatives == ()


@pytest.mark.parametrize(
    ("examples", "model_type", "finding"),
    [
        ([], "decoder", "no examples given"),
        (7, "decoder", "int given; give a list of examples or a file"),
        ([TEXT, "x"], "decoder", "example 2: must be an object with `input` and `output`, not 'x'"),
        ([{"input": "why"}], "decoder", "example 1: `output` is missing; it has 'input'"),
        ([{"input": 3, "output": "x"}], "decoder", "example 1: `input` must be a text, not 3"),
        ([{"input": "x", "output": " "}], "decoder", "example 1: `output` is empty"),
        ([TEXT], "encoder", "example 1: `query` is missing; it has 'input', 'output'"),
        ([{"input": "x", "output": "\ud800"}], "decoder", "`output` is not valid Unicode"),
        ([{**QUERY, "pos": "x"}], "encoder", "example 1: `pos` must be a list of texts, not 'x'"),
        ([{**QUERY, "pos": []}], "reranker", "example 1: `pos` is empty"),
        ([{"query": "x"}], "encoder", "`pos` must be a list of texts, but is missing"),
        ([{**QUERY, "neg": [1]}], "encoder", "`neg` must hold only texts, not 1"),
        ([QUERY, {**QUERY, "neg": []}], "reranker", "example 2: `neg` gives no negatives"),
        ([{**QUERY, "neg": []}], "encoder", "example 1: `neg` gives no negatives"),
        ([QUERY, QUERY, {**QUERY, "neg": []}], "encoder", "example 3: `neg` gives no negatives"),
    ],
)
def test_malformed_example_names_its_field(examples, model_type, finding):
    """A malformed example is named with its field."""
    with pytest.raises(RecipeError) as error:
        load(examples, model_type)
    assert finding in str(error.value)


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ('{"input": "x", "output": "y"}\n{"input": \n', "line 2: not valid JSON"),
        ('{"input": "x", "output": "y"}\n["x"]\n', "line 2: must be an object"),
        ("[" * 100_000, "line 1: not valid JSON"),
        ("", "no examples given"),
        ("7", "example 1: must be an object"),
    ],
)
def test_malformed_file_names_its_line(tmp_path, text, finding):
    """A malformed file is named with its line."""
    with pytest.raises(RecipeError) as error:
        load(file_with(tmp_path, text))
    assert finding in str(error.value)


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "examples.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        load(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        ({"temperature": "5"}, "temperature '5': must be a positive number"),
        ({"seed": [1]}, "seed [1]: must be a whole number"),
        ({"max_input_length": 10**30}, "max input length 1000"),
        ({"temperature": 0}, "temperature 0: must be a positive number"),
        ({"batch_size": 0}, "batch size 0: must be a whole number, 1 or more"),
        ({"max_input_length": 1}, "max input length 1"),
        ({"neg_number": -1}, "neg number -1"),
        ({"pooling": "best"}, "pooling 'best': must be one of cls, mean, max"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"max_memory": "plenty"}, "size 'plenty'"),
    ],
)
def test_senseless_options_are_named(options, finding):
    """Options that make no sense are named."""
    with pytest.raises(RecipeError) as error:
        load([QUERY], "encoder", **options)
    assert finding in str(error.value)


def test_a_model_type_must_be_known():
    with pytest.raises(RecipeError, match="model type 'llm': must be one of decoder, encoder, "):
        load([TEXT], "llm")


def test_a_chat_template_is_for_decoders():
    with pytest.raises(RecipeError, match="a chat template is for decoders"):
        load([QUERY], "encoder", chat_template=True)
