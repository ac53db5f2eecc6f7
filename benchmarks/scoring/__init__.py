"""Weights from examples: time, peak memory and reads beside other tools.

- `compare`: shardmix and LM-Cocktail, whose weights must agree
- `memory`: what `shardmix score` promises, and accelerate's disk offload
- `task`: the examples and the settings; `decoders`: tokenizers, and small decoders that have one
- `others`: programs that score, in environments of their own
"""
