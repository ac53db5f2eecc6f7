"""The first model's values: for integers and booleans, which an average means nothing of."""

NAME = "keep_first"
"""The method of segments of integers and booleans. Others' values are compared with the first's,
and the report says where they differ. No recipe asks for it."""
