"""Reports: flat, typed, ready for JSON. The field names are those of the `--json` output.

They read no files. Each is loaded only by the command that gives it.

plan_facts             what a plan and its merge have in common
plan_report            a plan
merge_report           a finished merge
model_report           a model
"""
