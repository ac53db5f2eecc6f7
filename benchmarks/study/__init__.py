"""LM-Cocktail's experiments on small models; docs/study.md tells what came of them."""
