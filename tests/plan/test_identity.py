"""The identity of a merge: what another request differs in is said in its user's words."""

import dataclasses

from shardmix.plan.identity import MergeDescription, asked_otherwise
from shardmix.recipe.build import build_recipe
from shardmix.recipe.recipe import Recipe


def test_every_field_of_a_recipe_is_compared():
    """A field that decides bytes and is not compared would refuse a resume without a reason."""
    read = set()

    class Noted(Recipe):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    recipe = build_recipe({"a": 0.5, "b": 0.5})
    noted = Noted(**{each.name: getattr(recipe, each.name) for each in dataclasses.fields(recipe)})
    read.clear()
    merge = MergeDescription(noted, "a", None, "xxh3", record_paths=False, files=())
    asked_otherwise(merge, merge)
    # `config_from` is the description's own, by its resolved name.
    assert {each.name for each in dataclasses.fields(Recipe)} - read == {"config_from"}
