"""Makes files of this repository that are written by a program. Tests hold each one true.

- `cli_reference`: docs/cli.md, from the commands themselves (`make docs`)
- `class_defaults`: `class_defaults.json`, what a config means that leaves a key out
- `transformers_declarations`: `transformers_declarations.json`, what transformers declares

The last two ask the transformers that is installed; run them again after an update of it.
"""
