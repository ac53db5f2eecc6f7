"""From a recipe and its models to a `MergePlan`, by headers only.

opening                opens what a recipe names
planner                decides names, dtypes, files, every offset, and the memory
layout                 output files: headers, offsets, and the runs their data is divided into
chunk_size             how many elements of a segment a chunk holds
memory_budget          the chunk and the workers that keep the budgets
output_modules         whose sentence-transformers modules an output has
weight_warnings        what weights do to a model: left out by 0, variances made negative
merge_plan             the values: `MergePlan`, `OutputShard`, `Run`
identity               what makes a merge this one and no other, and how two differ
"""
