"""LM-Cocktail's experiments on small models; docs/study.md tells what came of them.

- `decoder`, `rewriting`, `sentences`: small Llamas that rewrite sentences made by rules
- `encoder`: all-MiniLM-L6-v2, fine-tuned as in the demo
- `mixing`: mixes a family's models, and measures them
- `tables`: the tables of docs/study.md
"""
