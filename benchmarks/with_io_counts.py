"""Runs a python program in this process and writes down what the kernel counts of its reads.

    python benchmarks/with_io_counts.py IO.json -m shardmix score ...
    python benchmarks/with_io_counts.py IO.json SCRIPT.py ...

`rchar` is what read calls returned, from page cache or disk; `read_bytes` is what came from disk,
by read calls or by page faults. Both from the start of the process.
"""

import json
import runpy
import sys
from pathlib import Path


def io_counts() -> dict[str, int]:
    """/proc/self/io, all threads together."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(count) for name, _, count in (line.partition(":") for line in lines)}


def main() -> None:
    """Become the program, as `python` would; write the counts however it ends."""
    counts = Path(sys.argv[1])
    is_module = sys.argv[2] == "-m"
    program = sys.argv[3 if is_module else 2]
    sys.argv = sys.argv[3 if is_module else 2 :]
    try:
        if is_module:
            # As `python -m`: this folder's modules must not hide another's of the same name.
            sys.path[0] = str(Path.cwd())
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program, run_name="__main__")
    finally:
        counts.write_text(json.dumps(io_counts()))


if __name__ == "__main__":
    main()
