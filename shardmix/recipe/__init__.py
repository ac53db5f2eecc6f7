"""The user's request: models, a method, its parameters. mergekit's language, in YAML or Python.

recipe                 the values: `Recipe`, `RecipeModel`, and the settings of parameters
tokenizer              the vocabulary that a recipe asks for
parameters             settings, checked by the method's declarations, resolved for every tensor
yaml_file              recipes in YAML and JSON, read and written
adapter                recipes whose output is an adapter, checked
build                  a checked recipe from words, pairs, files and options

The recipe and its sources decide every byte of the output. The output's path and the memory budget
change none, so they are no part of a recipe. No module here opens a checkpoint.
"""

from shardmix.recipe.recipe import Recipe, RecipeModel

__all__ = ["Recipe", "RecipeModel"]
