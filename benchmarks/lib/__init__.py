"""What all benchmarks stand on. Knows no benchmark.

- `workspace`: the command line that they share, and the folder for their data
- `processes`: runs processes one at a time, and measures each
- `programs`: the command lines of all programs that are measured, and where they are installed
- `machine`: what machine this is; its page cache and its cores brought to a known state
- `control_group`: a memory control group for one process
- `shapes`, `checkpoints`: synthetic checkpoints
- `tables`: figures on the screen and as CSV
"""
