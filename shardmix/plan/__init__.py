"""From a recipe and its models to a `MergePlan`, by headers only.

opening                the opened models of a recipe
planner                names, dtypes, files, every offset, and the memory
adapter_plan           the same for an output that is an adapter
adapter_stacking       adapters on one base side by side, parameter by parameter
adapter_extraction     what models changed in a base: factors, and what is kept whole
adapter_layout         the file and config of an adapter
factoring              the factors that must be computed first, and their memory
factor_results         factors that were computed
low_rank               the report of factors: rank and error of each parameter
planned_sources        the files and streams that are read, and the memory of their readers
outcome                the keywords of a plan that concern its output
layout                 output files: headers, offsets, and the segments of their data
chunk_size             the number of elements of a chunk
backend_choice         the device, the backend and the way to read, if left to auto
memory_budget          the chunk and the workers that fit the budgets
output_quantisation    the part of an output that is written as codes
output_modules         the sentence-transformers modules of an output
output_vocabulary      the models, mapped to the vocabulary that a recipe asks for
weight_warnings        warnings of weights that leave a model out or make variances negative
merge_plan             the values: `MergePlan`, `OutputShard`, `Segment`
identity               the identity of a merge, and the differences between two

A plan is a value. It holds every decision before a weight is read, prints, hashes, and goes through
JSON unchanged. `execute` only carries it out.

A segment is a range of elements that is contiguous in the output and in every source. Tensors that
are neighbours everywhere, of one dtype and the same parameters, are one segment. So thousands of
small tensors are as fast as a few large ones, and a plan stays small. A chunk is a part of a
segment, and one byte range per source, whatever the tensor's shape: element-wise methods need no
more, since safetensors is row-major. So a 2 GB embedding merges in 2 MiB chunks.

A tensor that is quantised is a segment of its own, merged in float32 and written as codes; a chunk
of it holds whole bands of blocks, if these fit. Its scales are a second segment, without sources,
which names the first.

A model whose weight is 0 (also if only float32 rounds it to 0) is not read, since 0 · NaN is NaN.
If it is the first model, its names, dtypes, layout, config and integers count all the same.
"""
