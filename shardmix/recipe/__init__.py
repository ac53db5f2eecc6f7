"""What the user asks for: models, a method, its parameters. mergekit's language, in YAML or Python.

recipe                 the values: `Recipe`, `RecipeModel`, and the settings of parameters
parameters             settings checked by what a method declares, and resolved for every tensor
yaml_file              YAML and JSON in, YAML out
build                  a checked recipe from words, pairs, files and options

A recipe and its sources alone decide the bytes of the output: where it goes and how much memory it
may take are not part of it. Opens no checkpoint.
"""

from shardmix.recipe.recipe import Recipe, RecipeModel

__all__ = ["Recipe", "RecipeModel"]
