"""Whether an output is what its merge wrote.

verify                 digests, files that were added, and the merge computed anew
recomputation          the merge that an output tells of, done again against its files
status                 what is at an output path, and what is unfinished
"""
