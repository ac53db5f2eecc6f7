"""The arithmetic of merging, and what it needs. Imports no torch: arrays' operations are passed in.

base                   the seam: `MergeMethod`, its `Parameter`s and `Needs`; `Params`, their values
ops                    the operations that methods are written with, and a counter of them
statistics             the seam `Statistic`, and those of whole tensors, in float64
linear                 the weighted sum
keep_first             the first model's values, for integers
task_arithmetic        the base model plus a weighted sum of models' changes to it
slerp                  spherical interpolation between the base model and another
passthrough            one model as it is
registry               every method by name
"""
