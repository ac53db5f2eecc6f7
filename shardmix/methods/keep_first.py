"""The first model's values: for integers and booleans, whose average means nothing."""

NAME = "keep_first"
"""The method of segments of integers and booleans. Others' values are compared with the first's,
and the report names those that differ. No recipe asks for it."""
