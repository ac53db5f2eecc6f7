"""shardmix beside every other tool, beside the disk, and beside itself without some of its work.

`python -m benchmarks.compare` is `make bench`; of it

- `parts` says what is measured, `measurement` measures it, `samples` holds the raw figures
- `report` and `plots` make docs/benchmarks of them; they measure nothing
- `floor` and `others` are programs that merge

`safety` and `profiling` merge with and without what shardmix does beyond merging.
"""
