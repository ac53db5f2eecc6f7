"""The check that an output is what its merge wrote.

verify                 digests, files that were added, and the merge computed again
recomputation          the merge of an output's shardmix.json, done again against its files
status                 the state of an output path, and of an unfinished merge to it
"""
