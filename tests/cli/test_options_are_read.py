"""Options: each keyword of the library is read by something, and help names what tables have."""

import pytest

from shardmix import api
from shardmix.cli import options as cli_options
from shardmix.conventions.model_types import MODEL_TYPES
from shardmix.options import MergeOptions
from shardmix.scoring.options import ScoreOptions, ScoreSettings
from shardmix.system.hashing import ALGORITHMS, digest_nbytes, file_digest
from tests.support.models import random_model, save_model


class Recorded(dict):
    """Options that note which of them are read."""

    def __init__(self, options):
        super().__init__(options)
        self.read = set()

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)


def test_every_merge_option_is_read(tmp_path):
    """By the recipe, by the settings of the run, or by who plans and merges."""
    options = Recorded({})
    models = {save_model(tmp_path / name, random_model(1)): 0.5 for name in "ab"}
    api.merge_resolved(models, tmp_path / "out", None, options, resolved={})
    assert options.read == set(MergeOptions.__annotations__)


def test_every_score_option_is_a_setting():
    settings = {name.removesuffix("_nbytes") for name in ScoreSettings.__annotations__}
    assert settings - {"model_type"} == set(ScoreOptions.__annotations__)


def _metavars(name):
    """Return the choices that the help of an option's declarations shows."""

    def command():
        pass

    for attribute in vars(cli_options).values():
        if callable(attribute) and getattr(attribute, "__module__", "").startswith("click"):
            attribute(command)
    return {
        tuple(option.metavar.split("|"))
        for option in command.__click_params__
        if name in option.opts
    }


@pytest.mark.parametrize(
    ("name", "table"), [("--digest", ALGORITHMS), ("--model-type", tuple(MODEL_TYPES))]
)
def test_help_names_what_the_table_has(name, table):
    assert _metavars(name) == {table}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_digest_is_as_long_as_planned(tmp_path, algorithm):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    with path.open("rb") as file:
        assert len(file_digest(file.fileno(), algorithm)) == 2 * digest_nbytes(algorithm)
